//! The metric families: every Prometheus name with its help and its labels, once.

use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry,
};

use crate::finetune::jobs::JobGauge;
use crate::{Error, Result};

/// Bucket bounds of the first-token, queue and whole-request histograms, seconds.
const REQUEST_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// Bucket bounds of the inter-token histograms, seconds.
const TOKEN_SECONDS: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5];

/// Bucket bounds of the histograms of tokens per sequence.
const REQUEST_TOKENS: &[f64] =
    &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5];

/// Label of requests by their adapter: empty for the base, names joined by `+` for a sum.
const ADAPTER: &[&str] = &["adapter"];

/// vLLM's labels of an engine.
const ENGINE: &[&str] = &["model_name", "engine"];

/// Label of fine-tuning jobs.
const JOB: &[&str] = &["job"];

/// Adds metric families to a registry.
pub(super) struct Registrar<'a>(pub(super) &'a Registry);

impl Registrar<'_> {
    /// Adds a metric. Fails if its name is taken or invalid.
    pub(super) fn add<C: Collector + Clone + 'static>(&self, metric: prometheus::Result<C>) -> Result<C> {
        let added = metric.and_then(|metric| self.0.register(Box::new(metric.clone())).map(|()| metric));
        added.map_err(|e| Error::internal(e.to_string()).caused_by(e))
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter> {
        self.add(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn seconds_counter(&self, name: &str, help: &str) -> Result<Counter> {
        self.add(Counter::new(name, help))
    }

    fn seconds_counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec> {
        self.add(CounterVec::new(Opts::new(name, help), labels))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<GaugeVec> {
        self.add(GaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> Result<HistogramVec> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }

    /// The process's CPU time, memory and open files, and the version of this server.
    pub(super) fn process(&self) -> Result<()> {
        #[cfg(target_os = "linux")]
        self.0
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
        let info = self.gauges("quiver_build_info", "Version of this server.", &["version"])?;
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        Ok(())
    }
}

/// Requests and their sequences, by adapter.
pub(super) struct RequestMetrics {
    pub(super) requests: IntCounterVec,
    pub(super) prompt_tokens: IntCounterVec,
    pub(super) generated_tokens: IntCounterVec,
    pub(super) first_token: HistogramVec,
    pub(super) inter_token: HistogramVec,
    pub(super) request: HistogramVec,
    pub(super) queue: HistogramVec,
    pub(super) errors: IntCounterVec,
}

impl RequestMetrics {
    pub(super) fn register(r: &Registrar) -> Result<Self> {
        Ok(Self {
            requests: r.counters(
                "quiver_requests_total",
                "Sequences that ended, by how: stop, length, abort (client gone), error.",
                &["adapter", "finished_reason"],
            )?,
            prompt_tokens: r.counters("quiver_prompt_tokens_total", "Prompt tokens of admitted sequences.", ADAPTER)?,
            generated_tokens: r.counters("quiver_generated_tokens_total", "Tokens generated.", ADAPTER)?,
            first_token: r.histogram(
                "quiver_time_to_first_token_seconds",
                "From arrival to the first token.",
                REQUEST_SECONDS,
                ADAPTER,
            )?,
            inter_token: r.histogram("quiver_inter_token_seconds", "Between tokens.", TOKEN_SECONDS, ADAPTER)?,
            request: r.histogram(
                "quiver_request_seconds",
                "From arrival to the last token.",
                REQUEST_SECONDS,
                ADAPTER,
            )?,
            queue: r.histogram("quiver_queue_seconds", "From arrival to the first step.", REQUEST_SECONDS, ADAPTER)?,
            errors: r.counters("quiver_errors_total", "Requests answered with an error.", &["kind", "adapter"])?,
        })
    }
}

/// Where adapters are, and how they moved.
pub(super) struct AdapterMetrics {
    pub(super) count: GaugeVec,
    pub(super) bytes: GaugeVec,
    pub(super) loads: IntCounterVec,
    pub(super) load_seconds: Counter,
    pub(super) slot_loads: IntCounter,
    pub(super) disk_reads: IntCounter,
    pub(super) evictions: IntCounterVec,
}

impl AdapterMetrics {
    pub(super) fn register(r: &Registrar) -> Result<Self> {
        Ok(Self {
            count: r.gauges("quiver_adapters", "Adapters by the tier of their weights.", &["level"])?,
            bytes: r.gauges("quiver_adapter_resident_bytes", "Bytes of adapter weights, by tier.", &["level"])?,
            loads: r.counters("quiver_adapter_loads_total", "Loads by result: ok, failed.", &["result"])?,
            load_seconds: r
                .seconds_counter("quiver_adapter_load_seconds_total", "Total time of the loads that succeeded.")?,
            slot_loads: r.counter("quiver_adapter_slot_loads_total", "Adapters brought into a slot.")?,
            disk_reads: r.counter("quiver_adapter_disk_reads_total", "Slot loads that read the disk again.")?,
            evictions: r.counters("quiver_adapter_evictions_total", "Evictions of adapters, by tier.", &["level"])?,
        })
    }
}

/// The engine's steps and how its thread divides its time.
pub(super) struct EngineMetrics {
    pub(super) steps: IntCounter,
    pub(super) time_slices: IntCounter,
    pub(super) busy_seconds: CounterVec,
}

impl EngineMetrics {
    pub(super) fn register(r: &Registrar) -> Result<Self> {
        Ok(Self {
            steps: r.counter("quiver_steps_total", "Forward passes.")?,
            time_slices: r.counter("quiver_train_slices_total", "Time slices of training on the engine's thread.")?,
            busy_seconds: r.seconds_counters(
                "quiver_engine_busy_seconds_total",
                "Time of the engine's thread by its work: serve, train.",
                &["work"],
            )?,
        })
    }
}

/// Fine-tuning jobs.
pub(super) struct TrainingMetrics {
    state: GaugeVec,
    step: GaugeVec,
    steps: GaugeVec,
    train_loss: GaugeVec,
    valid_loss: GaugeVec,
    tokens_per_second: GaugeVec,
}

impl TrainingMetrics {
    pub(super) fn register(r: &Registrar) -> Result<Self> {
        Ok(Self {
            state: r.gauges("quiver_train_job_state", "1 for the state that a job is in.", &["job", "state"])?,
            step: r.gauges("quiver_train_step", "Optimiser steps done.", JOB)?,
            steps: r.gauges("quiver_train_steps", "Optimiser steps in all.", JOB)?,
            train_loss: r.gauges("quiver_train_loss", "Training loss of the last step, nats a token.", JOB)?,
            valid_loss: r.gauges("quiver_valid_loss", "Loss of the last validation, nats a token.", JOB)?,
            tokens_per_second: r.gauges("quiver_train_tokens_per_second", "Speed of the last step.", JOB)?,
        })
    }

    /// Shows these jobs in their present states, and no others.
    pub(super) fn refresh(&self, jobs: &[JobGauge]) {
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

/// vLLM's names, labelled as there.
pub(super) struct VllmMetrics {
    pub(super) running: GaugeVec,
    pub(super) waiting: GaugeVec,
    pub(super) kv_usage: GaugeVec,
    pub(super) cache_config: GaugeVec,
    pub(super) prefix_queries: IntCounterVec,
    pub(super) prefix_hits: IntCounterVec,
    pub(super) preemptions: IntCounterVec,
    pub(super) prompt_tokens: IntCounterVec,
    pub(super) generation_tokens: IntCounterVec,
    pub(super) success: IntCounterVec,
    pub(super) first_token: HistogramVec,
    pub(super) inter_token: HistogramVec,
    pub(super) request: HistogramVec,
    pub(super) queue: HistogramVec,
    pub(super) prefill: HistogramVec,
    pub(super) decode: HistogramVec,
    pub(super) per_token: HistogramVec,
    pub(super) request_prompt: HistogramVec,
    pub(super) request_generation: HistogramVec,
    pub(super) lora: GaugeVec,
}

impl VllmMetrics {
    pub(super) fn register(r: &Registrar) -> Result<Self> {
        let latency = |name, help| r.histogram(name, help, REQUEST_SECONDS, ENGINE);
        let tokens = |name, help| r.histogram(name, help, REQUEST_TOKENS, ENGINE);
        Ok(Self {
            running: r.gauges("vllm:num_requests_running", "Sequences in the running set.", ENGINE)?,
            waiting: r.gauges("vllm:num_requests_waiting", "Sequences in the queue.", ENGINE)?,
            kv_usage: r.gauges("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", ENGINE)?,
            cache_config: r.gauges(
                "vllm:cache_config_info",
                "Shape of the KV cache.",
                &["block_size", "num_gpu_blocks", "model_name", "engine"],
            )?,
            prefix_queries: r.counters("vllm:prefix_cache_queries_total", "Prompt tokens looked up.", ENGINE)?,
            prefix_hits: r.counters("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", ENGINE)?,
            preemptions: r.counters("vllm:num_preemptions_total", "Sequences preempted for lack of blocks.", ENGINE)?,
            prompt_tokens: r.counters("vllm:prompt_tokens_total", "Prompt tokens of admitted sequences.", ENGINE)?,
            generation_tokens: r.counters("vllm:generation_tokens_total", "Tokens generated.", ENGINE)?,
            success: r.counters(
                "vllm:request_success_total",
                "Sequences that ended, by how.",
                &["model_name", "engine", "finished_reason"],
            )?,
            first_token: latency("vllm:time_to_first_token_seconds", "From arrival to the first token.")?,
            inter_token: r.histogram("vllm:inter_token_latency_seconds", "Between tokens.", TOKEN_SECONDS, ENGINE)?,
            request: latency("vllm:e2e_request_latency_seconds", "From arrival to the last token.")?,
            queue: latency("vllm:request_queue_time_seconds", "From arrival to the first step.")?,
            prefill: latency("vllm:request_prefill_time_seconds", "From the first step to the first token.")?,
            decode: latency("vllm:request_decode_time_seconds", "From the first token to the last.")?,
            per_token: r.histogram(
                "vllm:request_time_per_output_token_seconds",
                "Decode time of a sequence over its tokens after the first.",
                TOKEN_SECONDS,
                ENGINE,
            )?,
            request_prompt: tokens("vllm:request_prompt_tokens", "Prompt tokens of a sequence that ended.")?,
            request_generation: tokens("vllm:request_generation_tokens", "Tokens generated by a sequence that ended.")?,
            lora: r.gauges(
                "vllm:lora_requests_info",
                "Unix time; labels list the adapters resident in slots and those that requests wait for.",
                &["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
            )?,
        })
    }
}
