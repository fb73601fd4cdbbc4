//! Every Prometheus metric name, once: our own with an `adapter` label, and vLLM's, so that gateways which route to vLLM
//! (llm-d, the Gateway API inference extension) route here unchanged.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry, TextEncoder,
};

use crate::adapter::registry::AdapterInfo;
use crate::adapter::tiers;
use crate::engine::EngineStats;
use crate::engine::request::FinishReason;
use crate::error::ErrorKind;
use crate::finetune::jobs;
use crate::{Error, Result};

/// Distinct adapter labels; later names are counted together under [`OTHER`], so that the page stays bounded.
const MAX_LABELS: usize = 1000;

/// Label of the adapters beyond [`MAX_LABELS`].
const OTHER: &str = "other";

/// Bounds of the first-token, queue and whole-request histograms, seconds.
const REQUEST_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Bounds of the inter-token histograms, seconds.
const TOKEN_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5];

/// Requests by adapter label, base and sums included.
type Waiting = Arc<Mutex<HashMap<String, usize>>>;

/// All metrics of one server.
pub(super) struct Metrics {
    registry: Registry,
    /// One scrape at a time: gauges are set from live state and then read.
    scrape: Mutex<()>,
    /// Adapter names that have a label of their own.
    labels: Mutex<HashSet<String>>,
    /// Requests by adapter that have not had their first token.
    waiting: Waiting,
    requests: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generated_tokens: IntCounterVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    request: HistogramVec,
    queue: HistogramVec,
    errors: IntCounterVec,
    adapters: GaugeVec,
    adapter_bytes: GaugeVec,
    adapter_loads: IntCounterVec,
    adapter_load_seconds: Gauge,
    slot_loads: IntCounter,
    disk_reads: IntCounter,
    evictions: IntCounterVec,
    steps: IntCounter,
    training: Training,
    vllm: Vllm,
}

/// Of fine-tuning jobs.
struct Training {
    state: GaugeVec,
    step: GaugeVec,
    steps: GaugeVec,
    train_loss: GaugeVec,
    valid_loss: GaugeVec,
    tokens_per_second: GaugeVec,
    /// What jobs and requests took of the engine's thread.
    slices: IntCounter,
    seconds: GaugeVec,
}

/// vLLM's names, labelled as there.
struct Vllm {
    running: GaugeVec,
    waiting: GaugeVec,
    kv_usage: GaugeVec,
    cache_config: GaugeVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    preemptions: IntCounterVec,
    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    success: IntCounterVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    request: HistogramVec,
    queue: HistogramVec,
    lora: GaugeVec,
}

/// What a scrape reads from the running server.
pub(super) struct Live<'a> {
    /// `model_name` label.
    pub(super) model: &'a str,
    /// The engine's counters.
    pub(super) stats: &'a EngineStats,
    /// All adapters.
    pub(super) adapters: &'a [AdapterInfo],
    /// The counters of their memory.
    pub(super) tiers: &'a tiers::TierStats,
    /// Bytes that slots may take.
    pub(super) slot_budget: usize,
    /// Tokens of a KV block.
    pub(super) block_size: usize,
    /// Fine-tuning jobs.
    pub(super) jobs: &'a [jobs::JobGauge],
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> Result<C> {
    let metric = metric.map_err(|e| Error::internal(e.to_string()))?;
    registry.register(Box::new(metric.clone())).map_err(|e| Error::internal(e.to_string()))?;
    Ok(metric)
}

impl Metrics {
    /// Registers every name. Fails only if two collide.
    pub(super) fn new() -> Result<Self> {
        let r = Registry::new();
        let counter =
            |name: &str, help: &str, labels: &[&str]| register(&r, IntCounterVec::new(Opts::new(name, help), labels));
        let gauge =
            |name: &str, help: &str, labels: &[&str]| register(&r, GaugeVec::new(Opts::new(name, help), labels));
        let single = |name: &str, help: &str| register(&r, IntCounter::new(name, help));
        let seconds = |name: &str, help: &str, bounds: &[f64], labels: &[&str]| {
            register(&r, HistogramVec::new(HistogramOpts::new(name, help).buckets(bounds.to_vec()), labels))
        };
        #[cfg(target_os = "linux")]
        r.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .map_err(|e| Error::internal(e.to_string()))?;
        gauge("quiver_build_info", "Version of this server.", &["version"])?
            .with_label_values(&[env!("CARGO_PKG_VERSION")])
            .set(1.0);
        let adapter = &["adapter"];
        let engine = &["model_name", "engine"];
        Ok(Self {
            scrape: Mutex::new(()),
            labels: Mutex::default(),
            waiting: Arc::default(),
            requests: counter(
                "quiver_requests_total",
                "Sequences that ended, by how: stop, length, abort (client gone), error.",
                &["adapter", "finished_reason"],
            )?,
            prompt_tokens: counter("quiver_prompt_tokens_total", "Prompt tokens of admitted sequences.", adapter)?,
            generated_tokens: counter("quiver_generated_tokens_total", "Tokens generated.", adapter)?,
            first_token: seconds(
                "quiver_time_to_first_token_seconds",
                "From arrival to the first token.",
                REQUEST_SECONDS,
                adapter,
            )?,
            inter_token: seconds("quiver_inter_token_seconds", "Between tokens.", TOKEN_SECONDS, adapter)?,
            request: seconds("quiver_request_seconds", "From arrival to the last token.", REQUEST_SECONDS, adapter)?,
            queue: seconds("quiver_queue_seconds", "From arrival to the first step.", REQUEST_SECONDS, adapter)?,
            errors: counter("quiver_errors_total", "Requests answered with an error.", &["kind", "adapter"])?,
            adapters: gauge("quiver_adapters", "Adapters by where their weights are.", &["level"])?,
            adapter_bytes: gauge("quiver_adapter_resident_bytes", "Bytes of adapter weights.", &["level"])?,
            adapter_loads: counter("quiver_adapter_loads_total", "Loads by result: ok, failed.", &["result"])?,
            adapter_load_seconds: register(
                &r,
                Gauge::new("quiver_adapter_load_seconds_total", "Time that the loads which succeeded took in all."),
            )?,
            slot_loads: single("quiver_adapter_slot_loads_total", "Adapters brought into a slot.")?,
            disk_reads: single("quiver_adapter_disk_reads_total", "Of these, read from disk again.")?,
            evictions: counter("quiver_adapter_evictions_total", "Adapters that lost their place.", &["level"])?,
            steps: single("quiver_steps_total", "Forward passes.")?,
            training: Training {
                state: gauge("quiver_train_job_state", "1 for the state that a job is in.", &["job", "state"])?,
                step: gauge("quiver_train_step", "Optimiser steps done.", &["job"])?,
                steps: gauge("quiver_train_steps", "Optimiser steps in all.", &["job"])?,
                train_loss: gauge("quiver_train_loss", "Training loss of the last step, nats a token.", &["job"])?,
                valid_loss: gauge("quiver_valid_loss", "Loss of the last validation, nats a token.", &["job"])?,
                tokens_per_second: gauge("quiver_train_tokens_per_second", "Speed of the last step.", &["job"])?,
                slices: single("quiver_train_slices_total", "Pieces of training run on the engine's thread.")?,
                seconds: gauge(
                    "quiver_engine_busy_seconds_total",
                    "Time of the engine's thread by what it did: serve, train.",
                    &["work"],
                )?,
            },
            vllm: Vllm {
                running: gauge("vllm:num_requests_running", "Sequences in the running set.", engine)?,
                waiting: gauge("vllm:num_requests_waiting", "Sequences in the queue.", engine)?,
                kv_usage: gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", engine)?,
                cache_config: gauge(
                    "vllm:cache_config_info",
                    "Shape of the KV cache.",
                    &["block_size", "num_gpu_blocks", "model_name", "engine"],
                )?,
                prefix_queries: counter("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", engine)?,
                prefix_hits: counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", engine)?,
                preemptions: counter("vllm:num_preemptions_total", "Sequences put back for lack of blocks.", engine)?,
                prompt_tokens: counter("vllm:prompt_tokens_total", "Prompt tokens of admitted sequences.", engine)?,
                generation_tokens: counter("vllm:generation_tokens_total", "Tokens generated.", engine)?,
                success: counter(
                    "vllm:request_success_total",
                    "Sequences that ended, by how.",
                    &["model_name", "engine", "finished_reason"],
                )?,
                first_token: seconds(
                    "vllm:time_to_first_token_seconds",
                    "From arrival to the first token.",
                    REQUEST_SECONDS,
                    engine,
                )?,
                inter_token: seconds("vllm:inter_token_latency_seconds", "Between tokens.", TOKEN_SECONDS, engine)?,
                request: seconds(
                    "vllm:e2e_request_latency_seconds",
                    "From arrival to the last token.",
                    REQUEST_SECONDS,
                    engine,
                )?,
                queue: seconds(
                    "vllm:request_queue_time_seconds",
                    "From arrival to the first step.",
                    REQUEST_SECONDS,
                    engine,
                )?,
                lora: gauge(
                    "vllm:lora_requests_info",
                    "Unix time; labels list the adapters resident in slots and those that requests wait for.",
                    &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
                )?,
            },
            registry: r,
        })
    }

    /// Begins to watch a sequence that the engine admits. `adapter` is empty for the base.
    pub(super) fn track(&self, model: &str, adapter: &str, prompt_tokens: usize, arrived: Instant) -> Track {
        let label = self.label(adapter);
        let engine = [model, "0"];
        self.prompt_tokens.with_label_values(&[&label]).inc_by(prompt_tokens as u64);
        self.vllm.prompt_tokens.with_label_values(&engine).inc_by(prompt_tokens as u64);
        *lock(&self.waiting).entry(adapter.to_owned()).or_default() += 1;
        let pair = |own: &HistogramVec, vllm: &HistogramVec| {
            [own.with_label_values(&[&label]), vllm.with_label_values(&engine)]
        };
        Track {
            arrived,
            prompt_tokens,
            tokens: 0,
            first_token_after: None,
            last_token: None,
            waiting: Some((self.waiting.clone(), adapter.to_owned())),
            ended: false,
            generated: [
                self.generated_tokens.with_label_values(&[&label]),
                self.vllm.generation_tokens.with_label_values(&engine),
            ],
            first_token: pair(&self.first_token, &self.vllm.first_token),
            inter_token: pair(&self.inter_token, &self.vllm.inter_token),
            request: pair(&self.request, &self.vllm.request),
            queue: pair(&self.queue, &self.vllm.queue),
            requests: (self.requests.clone(), self.vllm.success.clone()),
            errors: self.errors.clone(),
            label,
            model: model.to_owned(),
        }
    }

    /// Counts a request that was answered with an error.
    pub(super) fn error(&self, kind: ErrorKind, adapter: &str) {
        self.errors.with_label_values(&[kind.word(), &self.label(adapter)]).inc();
    }

    /// The page in Prometheus's text format. Without `live` (still loading) it has only what has been counted.
    pub(super) fn render(&self, live: Option<Live>) -> Result<String> {
        let _one_at_a_time = lock(&self.scrape);
        if let Some(live) = live {
            self.refresh(&live);
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).map_err(|e| Error::internal(e.to_string()))
    }

    fn refresh(&self, live: &Live) {
        let read = |n: &AtomicU64| n.load(Ordering::Relaxed);
        // The engine counts; our counter catches up at each scrape.
        let catch_up = |counter: &IntCounter, n: &AtomicU64| counter.inc_by(read(n).saturating_sub(counter.get()));
        let engine = [live.model, "0"];
        let (stats, vllm) = (live.stats, &self.vllm);
        let total = read(&stats.total_blocks);
        vllm.running.with_label_values(&engine).set(read(&stats.running) as f64);
        vllm.waiting.with_label_values(&engine).set(read(&stats.waiting) as f64);
        vllm.kv_usage.with_label_values(&engine).set(read(&stats.used_blocks) as f64 / total.max(1) as f64);
        vllm.cache_config
            .with_label_values(&[&live.block_size.to_string(), &total.to_string(), live.model, "0"])
            .set(1.0);
        catch_up(&vllm.prefix_queries.with_label_values(&engine), &stats.prefix_queries);
        catch_up(&vllm.prefix_hits.with_label_values(&engine), &stats.prefix_hits);
        catch_up(&vllm.preemptions.with_label_values(&engine), &stats.preemptions);
        catch_up(&self.steps, &stats.steps);
        catch_up(&self.training.slices, &stats.background_slices);
        for (work, micros) in [("serve", &stats.serving_micros), ("train", &stats.background_micros)] {
            self.training.seconds.with_label_values(&[work]).set(read(micros) as f64 / 1e6);
        }
        self.training.refresh(live.jobs);

        let tiers = live.tiers;
        for level in ["slot", "host", "disk"] {
            let count = live.adapters.iter().filter(|a| a.level == level).count();
            self.adapters.with_label_values(&[level]).set(count as f64);
        }
        self.adapter_bytes.with_label_values(&["slot"]).set(read(&tiers.slot_bytes) as f64);
        self.adapter_bytes.with_label_values(&["host"]).set(read(&tiers.host_bytes) as f64);
        catch_up(&self.adapter_loads.with_label_values(&["ok"]), &tiers.loads);
        catch_up(&self.adapter_loads.with_label_values(&["failed"]), &tiers.load_failures);
        self.adapter_load_seconds.set(read(&tiers.load_micros) as f64 / 1e6);
        catch_up(&self.slot_loads, &tiers.slot_loads);
        catch_up(&self.disk_reads, &tiers.disk_reads);
        catch_up(&self.evictions.with_label_values(&["slot"]), &tiers.slot_evictions);
        catch_up(&self.evictions.with_label_values(&["host"]), &tiers.host_evictions);

        // Gateways read the adapters from the labels; only the present state may stand there.
        let resident: BTreeSet<&str> =
            live.adapters.iter().filter(|a| a.level == "slot").map(|a| a.name.as_str()).collect();
        let waiting = lock(&self.waiting);
        let waiting: BTreeSet<&str> =
            waiting.keys().flat_map(|k| k.split('+')).filter(|n| !n.is_empty() && !resident.contains(n)).collect();
        let csv = |names: &BTreeSet<&str>| names.iter().copied().collect::<Vec<_>>().join(",");
        // Slots have a byte budget, not a number: this many adapters of the present mean size would fit.
        let mean = match resident.len() {
            0 => live.adapters.iter().map(|a| a.bytes).sum::<usize>() / live.adapters.len().max(1),
            n => read(&tiers.slot_bytes) as usize / n,
        };
        let max_lora = (live.slot_budget / mean.max(1)).max(1).to_string();
        vllm.lora.reset();
        vllm.lora
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

impl Training {
    /// Only the present jobs in their present states may stand there.
    fn refresh(&self, jobs: &[jobs::JobGauge]) {
        let all = [&self.state, &self.step, &self.steps, &self.train_loss, &self.valid_loss, &self.tokens_per_second];
        all.iter().for_each(|gauge| gauge.reset());
        for job in jobs {
            let id = [job.id.as_str()];
            self.state.with_label_values(&[&job.id, job.status.word()]).set(1.0);
            self.step.with_label_values(&id).set(job.step as f64);
            self.steps.with_label_values(&id).set(job.steps as f64);
            for (gauge, value) in [
                (&self.train_loss, job.train_loss),
                (&self.valid_loss, job.valid_loss),
                (&self.tokens_per_second, job.tokens_per_second),
            ] {
                value.iter().for_each(|value| gauge.with_label_values(&id).set(*value));
            }
        }
    }
}

/// The data behind these locks is plain counters: a panic elsewhere leaves nothing half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The clocks of one sequence. Dropped before its end, it counts as aborted.
pub(super) struct Track {
    arrived: Instant,
    /// For the log.
    prompt_tokens: usize,
    tokens: usize,
    first_token_after: Option<Duration>,
    last_token: Option<Instant>,
    /// Where it is counted as waiting, until its first token.
    waiting: Option<(Waiting, String)>,
    ended: bool,
    generated: [IntCounter; 2],
    first_token: [Histogram; 2],
    inter_token: [Histogram; 2],
    request: [Histogram; 2],
    queue: [Histogram; 2],
    requests: (IntCounterVec, IntCounterVec),
    errors: IntCounterVec,
    label: String,
    model: String,
}

impl Track {
    /// It left the queue.
    pub(super) fn scheduled(&mut self) {
        observe(&self.queue, self.arrived.elapsed());
    }

    /// A token came.
    pub(super) fn token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                self.stop_waiting();
                self.first_token_after = Some(now - self.arrived);
                observe(&self.first_token, now - self.arrived);
            }
            Some(last) => observe(&self.inter_token, now - last),
        }
        self.tokens += 1;
        self.generated.iter().for_each(IntCounter::inc);
    }

    /// It ended well.
    pub(super) fn finish(&mut self, reason: FinishReason) {
        observe(&self.request, self.arrived.elapsed());
        self.end(reason.word());
    }

    /// It failed after it was admitted.
    pub(super) fn fail(&mut self, kind: ErrorKind) {
        self.errors.with_label_values(&[kind.word(), &self.label]).inc();
        self.end("error");
    }

    fn end(&mut self, reason: &str) {
        self.ended = true;
        self.stop_waiting();
        tracing::info!(
            adapter = self.label,
            reason,
            prompt_tokens = self.prompt_tokens,
            tokens = self.tokens,
            first_token_ms = self.first_token_after.map(|t| t.as_millis() as u64),
            ms = self.arrived.elapsed().as_millis() as u64,
            "sequence ended"
        );
        self.requests.0.with_label_values(&[self.label.as_str(), reason]).inc();
        self.requests.1.with_label_values(&[self.model.as_str(), "0", reason]).inc();
    }

    fn stop_waiting(&mut self) {
        let Some((waiting, adapter)) = self.waiting.take() else { return };
        let mut waiting = lock(&waiting);
        if let Some(count) = waiting.get_mut(&adapter) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&adapter);
            }
        }
    }
}

impl Drop for Track {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}

fn observe(pair: &[Histogram; 2], time: Duration) {
    pair.iter().for_each(|histogram| histogram.observe(time.as_secs_f64()));
}

#[cfg(test)]
mod tests {
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
        }
    }

    #[test]
    fn only_the_present_residents_are_listed() {
        let metrics = Metrics::new().expect("no name twice");
        let tiers = tiers::TierStats::default();
        tiers.slot_bytes.store(400, Ordering::Relaxed);
        let stats = EngineStats::default();
        let page = |adapters: &[AdapterInfo]| {
            let live = Live {
                model: "base",
                stats: &stats,
                adapters,
                tiers: &tiers,
                slot_budget: 1000,
                block_size: 16,
                jobs: &[],
            };
            let page = metrics.render(Some(live)).expect("it renders");
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
