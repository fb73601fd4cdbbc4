//! The Prometheus page: our own metrics with an `adapter` label, and vLLM's, so that gateways which route to vLLM
//! (llm-d, the Gateway API inference extension) route here unchanged.

mod families;
mod sequence;

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{Counter, IntCounter, Registry, TextEncoder};

use crate::adapter::registry::AdapterInfo;
use crate::adapter::tiers::TierStats;
use crate::engine::EngineStats;
use crate::error::ErrorKind;
use crate::finetune::jobs::JobGauge;
use crate::{Error, Result};
use families::{AdapterMetrics, EngineMetrics, Registrar, RequestMetrics, TrainingMetrics, VllmMetrics};
pub(super) use sequence::SequenceMetrics;
use sequence::WaitingSequences;

/// Distinct adapter labels; later names are counted together under [`OTHER`], so that the page stays bounded.
const MAX_LABELS: usize = 1000;

/// Label of the adapters beyond [`MAX_LABELS`].
const OTHER: &str = "other";

/// All metrics of one server.
pub(super) struct Metrics {
    registry: Registry,
    /// One scrape at a time: gauges are set from live state and then read.
    scrape: Mutex<()>,
    /// Adapter names that have a label of their own.
    labels: Mutex<HashSet<String>>,
    waiting: WaitingSequences,
    requests: RequestMetrics,
    adapters: AdapterMetrics,
    engine: EngineMetrics,
    training: TrainingMetrics,
    vllm: VllmMetrics,
}

/// The state of the running server that a scrape reads.
pub(super) struct ScrapeInput<'a> {
    /// `model_name` label.
    pub(super) model: &'a str,
    /// The engine's counters.
    pub(super) stats: &'a EngineStats,
    /// All adapters.
    pub(super) adapters: &'a [AdapterInfo],
    /// The counters of the adapters' tiers.
    pub(super) tiers: &'a TierStats,
    /// Adapters of a usual size that fit into the slots.
    pub(super) nominal_slots: usize,
    /// Tokens of a KV block.
    pub(super) block_size: usize,
    /// Fine-tuning jobs.
    pub(super) jobs: &'a [JobGauge],
}

impl Metrics {
    /// Registers every name. Fails only if two collide.
    pub(super) fn new() -> Result<Self> {
        let registry = Registry::new();
        let registrar = Registrar(&registry);
        registrar.process()?;
        Ok(Self {
            scrape: Mutex::new(()),
            labels: Mutex::default(),
            waiting: WaitingSequences::default(),
            requests: RequestMetrics::register(&registrar)?,
            adapters: AdapterMetrics::register(&registrar)?,
            engine: EngineMetrics::register(&registrar)?,
            training: TrainingMetrics::register(&registrar)?,
            vllm: VllmMetrics::register(&registrar)?,
            registry,
        })
    }

    /// Counts a request that was answered with an error.
    pub(super) fn error(&self, kind: ErrorKind, adapter: &str) {
        self.requests.errors.with_label_values(&[kind.word(), &self.label(adapter)]).inc();
    }

    /// The page in Prometheus's text format. Without `input`, while the model loads, it has only the counters.
    pub(super) fn render(&self, input: Option<ScrapeInput>) -> Result<String> {
        let _one_at_a_time = lock(&self.scrape);
        if let Some(input) = input {
            self.refresh_engine(&input);
            self.refresh_adapters(&input);
            self.refresh_lora_info(&input);
            self.training.refresh(input.jobs);
        }
        let page = TextEncoder::new().encode_to_string(&self.registry.gather());
        page.map_err(|e| Error::internal(e.to_string()).caused_by(e))
    }

    fn refresh_engine(&self, input: &ScrapeInput) {
        let engine = [input.model, "0"];
        let (stats, vllm) = (input.stats, &self.vllm);
        let total = read(&stats.total_blocks);
        vllm.running.with_label_values(&engine).set(read(&stats.running) as f64);
        vllm.waiting.with_label_values(&engine).set(read(&stats.waiting) as f64);
        vllm.kv_usage.with_label_values(&engine).set(read(&stats.used_blocks) as f64 / total.max(1) as f64);
        vllm.cache_config
            .with_label_values(&[&input.block_size.to_string(), &total.to_string(), input.model, "0"])
            .set(1.0);
        catch_up(&vllm.prefix_queries.with_label_values(&engine), &stats.prefix_queries);
        catch_up(&vllm.prefix_hits.with_label_values(&engine), &stats.prefix_hits);
        catch_up(&vllm.preemptions.with_label_values(&engine), &stats.preemptions);
        catch_up(&self.engine.steps, &stats.steps);
        catch_up(&self.engine.time_slices, &stats.background_slices);
        for (work, micros) in [("serve", &stats.serving_micros), ("train", &stats.background_micros)] {
            catch_up_seconds(&self.engine.busy_seconds.with_label_values(&[work]), micros);
        }
    }

    fn refresh_adapters(&self, input: &ScrapeInput) {
        let (adapters, tiers) = (&self.adapters, input.tiers);
        for level in ["slot", "host", "disk"] {
            let count = input.adapters.iter().filter(|a| a.level == level).count();
            adapters.count.with_label_values(&[level]).set(count as f64);
        }
        adapters.bytes.with_label_values(&["slot"]).set(read(&tiers.slot_bytes) as f64);
        adapters.bytes.with_label_values(&["host"]).set(read(&tiers.host_bytes) as f64);
        catch_up(&adapters.loads.with_label_values(&["ok"]), &tiers.loads);
        catch_up(&adapters.loads.with_label_values(&["failed"]), &tiers.load_failures);
        catch_up_seconds(&adapters.load_seconds, &tiers.load_micros);
        catch_up(&adapters.slot_loads, &tiers.slot_loads);
        catch_up(&adapters.disk_reads, &tiers.disk_reads);
        catch_up(&adapters.evictions.with_label_values(&["slot"]), &tiers.slot_evictions);
        catch_up(&adapters.evictions.with_label_values(&["host"]), &tiers.host_evictions);
    }

    /// Gateways read the adapters from the labels of `vllm:lora_requests_info`; it has one series, of the present state.
    fn refresh_lora_info(&self, input: &ScrapeInput) {
        let resident: BTreeSet<&str> =
            input.adapters.iter().filter(|a| a.level == "slot").map(|a| a.name.as_str()).collect();
        let waiting = lock(&self.waiting);
        let waiting: BTreeSet<&str> =
            waiting.keys().flat_map(|k| k.split('+')).filter(|n| !n.is_empty() && !resident.contains(n)).collect();
        let csv = |names: &BTreeSet<&str>| names.iter().copied().collect::<Vec<_>>().join(",");
        let max_lora = input.nominal_slots.to_string();
        self.vllm.lora.reset();
        self.vllm
            .lora
            .with_label_values(&[&max_lora, &csv(&resident), &csv(&waiting)])
            .set(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64()));
    }

    fn label(&self, adapter: &str) -> String {
        let mut labels = lock(&self.labels);
        if adapter.is_empty() || labels.contains(adapter) {
            return adapter.to_owned();
        }
        if labels.len() >= MAX_LABELS {
            return OTHER.to_owned();
        }
        labels.insert(adapter.to_owned());
        adapter.to_owned()
    }
}

fn read(n: &AtomicU64) -> u64 {
    n.load(Ordering::Relaxed)
}

/// Brings a counter to the count that the engine or a tier keeps.
fn catch_up(counter: &IntCounter, n: &AtomicU64) {
    counter.inc_by(read(n).saturating_sub(counter.get()));
}

/// Brings a counter of seconds to a count of microseconds.
fn catch_up_seconds(counter: &Counter, micros: &AtomicU64) {
    counter.inc_by((read(micros) as f64 / 1e6 - counter.get()).max(0.0));
}

/// Locks a mutex. Its data is plain counters, which a panic elsewhere leaves valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn info(name: &str, level: &'static str) -> AdapterInfo {
        AdapterInfo {
            name: name.into(),
            generation: "0".into(),
            source: "/".into(),
            rank: 8,
            modules: 1,
            bytes: 100,
            pinned: false,
            level,
            leases: 0,
            loaded_at: UNIX_EPOCH,
            warnings: Vec::new(),
        }
    }

    #[test]
    fn only_the_present_residents_are_listed() {
        let metrics = Metrics::new().expect("no name twice");
        let tiers = TierStats::default();
        tiers.slot_bytes.store(400, Ordering::Relaxed);
        let stats = EngineStats::default();
        let page = |adapters: &[AdapterInfo]| {
            let input = ScrapeInput {
                model: "base",
                stats: &stats,
                adapters,
                tiers: &tiers,
                nominal_slots: 5,
                block_size: 16,
                jobs: &[],
            };
            let page = metrics.render(Some(input)).expect("it renders");
            let series: Vec<String> =
                page.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).map(str::to_owned).collect();
            assert_eq!(series.len(), 1, "{series:?}");
            series[0].rsplit_once(' ').expect("a value").0.to_owned()
        };
        let list = [info("a", "slot"), info("b", "host"), info("c/d", "slot")];
        assert_eq!(
            page(&list),
            "vllm:lora_requests_info{max_lora=\"5\",running_lora_adapters=\"a,c/d\",waiting_lora_adapters=\"\"}"
        );
        let _b = metrics.track("base", "b", 1, Instant::now());
        let _sum = metrics.track("base", "a+e", 1, Instant::now());
        // The number of slots does not follow the adapters, or each change would make a new series.
        assert!(page(&list[..1]).contains("max_lora=\"5\""));
        assert!(page(&list[..1]).ends_with("running_lora_adapters=\"a\",waiting_lora_adapters=\"b,e\"}"));
    }

    #[test]
    fn labels_are_bounded() {
        let metrics = Metrics::new().expect("no name twice");
        for i in 0..MAX_LABELS {
            assert_eq!(metrics.label(&i.to_string()), i.to_string());
        }
        assert_eq!(metrics.label("one more"), OTHER);
        assert_eq!(metrics.label("7"), "7");
        assert_eq!(metrics.label(""), "");
    }
}
