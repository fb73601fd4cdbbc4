//! The engine: one thread owns the device, the model, the KV cache and the adapter slots, and runs
//! `schedule -> run -> sample -> deliver`. Async code talks to it through [`request`]'s types only. What time is left goes to
//! background work.

mod background;
mod block_pool;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "stub.rs"]
pub mod cuda;
mod fair_queue;
pub mod request;
pub mod runner;
pub mod sampler;
mod scheduler;
mod sequence;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use candle_core::Tensor;

use crate::adapter::Lease;
use crate::adapter::tiers::Residency;
use crate::error::ErrorKind;
use crate::ops::batch::Batch;
use crate::{Error, Result};
pub use background::{BackgroundTask, BackgroundWork};
use request::Request;
use worker::Worker;

/// Runs steps for the engine thread: the model with its KV cache and adapter slots, or a fake in tests of the scheduler.
///
/// A step is cut in two, so that the engine can prepare the next one while a GPU still runs it. At most one step is in
/// flight: after [`Runner::launch`], [`Runner::collect`] comes first and its logits are read before the next launch,
/// because the next step reuses the buffers of the one before. Between launch and collect, the engine may acquire, prefetch
/// and sweep adapters, schedule, and build the next batch. It must not release a slot or free a KV block that the step reads.
pub trait Runner: Send + 'static {
    /// Asks for an adapter in a slot. Each [`Residency::Ready`] counts one use, which [`Runner::release`] ends.
    fn acquire(&mut self, lease: &Lease) -> Residency;

    /// Starts to bring an adapter into a slot: a request that needs it has been queued.
    fn prefetch(&mut self, _: &Lease) {}

    /// Ends one use of a slot.
    fn release(&mut self, slot: u32);

    /// Moves arrived adapters into their slots and frees those of retired ones. Called after every step and at intervals
    /// while idle.
    fn sweep(&mut self) {}

    /// Enqueues a step, which writes the batch's keys and values to the KV cache. On a GPU it may return before the step has
    /// run, and nothing is synchronised.
    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep>;

    /// The logits of a launched step, `[batch.logit_rows.len(), vocab]` f32 in the order of `logit_rows`. On a GPU they stay
    /// on the device: work that reads them is enqueued behind the step.
    fn collect(&mut self, step: InFlightStep) -> Result<Tensor>;
}

/// A launched step whose logits have not been collected.
#[must_use = "the logits of a launched step must be collected"]
pub struct InFlightStep {
    /// Where the step writes its logits, in the order of its device's stream.
    logits: Tensor,
}

impl InFlightStep {
    /// A step that writes, or has written, these logits.
    pub fn new(logits: Tensor) -> Self {
        Self { logits }
    }

    /// The logits, to be read behind the step.
    pub fn into_logits(self) -> Tensor {
        self.logits
    }
}

/// Limits of the engine, all checked when it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Tokens per KV block; the attention op's key tile.
    pub block_size: usize,
    /// KV blocks in all.
    pub num_blocks: usize,
    /// Rows per step: decode rows first, the rest is prompt chunks.
    pub max_batch_tokens: usize,
    /// Sequences that run at once.
    pub max_running: usize,
    /// Requests taken beyond `max_running`; one more is refused (429).
    pub max_waiting: usize,
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// The model's end-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Reuse KV blocks between requests with the same adapter generations and prefix.
    pub prefix_cache: bool,
}

/// Counters that the metrics page reads while the engine runs.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Sequences in the running set.
    pub running: AtomicU64,
    /// Requests that wait for room, those put back included.
    pub waiting: AtomicU64,
    /// Requests taken and not ended, to tell when a drain is over.
    pub open: AtomicU64,
    /// KV blocks held by running sequences (cached but unreferenced ones are free).
    pub used_blocks: AtomicU64,
    /// KV blocks in all.
    pub total_blocks: AtomicU64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: AtomicU64,
    /// Prompt tokens found there.
    pub prefix_hits: AtomicU64,
    /// Sequences put back for lack of blocks.
    pub preemptions: AtomicU64,
    /// Steps run.
    pub steps: AtomicU64,
    /// Time of those, microseconds.
    pub serving_micros: AtomicU64,
    /// Slices of background work.
    pub background_slices: AtomicU64,
    /// Time of those, microseconds.
    pub background_micros: AtomicU64,
}

/// A place in the engine, from `submit` until the sequence is gone, however it ends.
struct RequestPermit(Arc<EngineStats>);

impl RequestPermit {
    /// Takes one of `limit` places. Counting and taking are one step, so two callers cannot both have the last.
    fn take(stats: &Arc<EngineStats>, limit: u64) -> Option<Self> {
        let more = |open| (open < limit).then_some(open + 1);
        stats.open.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok().map(|_| Self(stats.clone()))
    }
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A handle to the engine thread; clones share it.
#[derive(Clone)]
pub struct Engine {
    /// Limits that `submit` checks.
    config: Arc<EngineConfig>,
    stats: Arc<EngineStats>,
    /// To the thread.
    requests: Sender<(Request, RequestPermit)>,
    /// No more requests are taken.
    draining: Arc<AtomicBool>,
}

impl Engine {
    /// Starts the engine thread on a runner, with what it does beside. Errors: limits that contradict each other.
    pub fn start(runner: impl Runner, config: EngineConfig, background: Option<BackgroundTask>) -> Result<Self> {
        let (engine, worker) = Self::new(runner, config, background)?;
        thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok(engine)
    }

    /// An engine whose work the caller does, turn by turn. Errors as [`Engine::start`].
    pub fn new<R: Runner>(
        runner: R,
        config: EngineConfig,
        background: Option<BackgroundTask>,
    ) -> Result<(Self, Worker<R>)> {
        let limits = [
            ("block_size", config.block_size),
            ("num_blocks", config.num_blocks),
            ("max_running", config.max_running),
            ("max_model_len", config.max_model_len),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, limit)| *limit == 0) {
            return Err(Error::invalid(format!("{name} is 0; it must be at least 1")));
        }
        if config.max_batch_tokens < config.max_running {
            return Err(Error::invalid(format!(
                "max_batch_tokens ({}) must be at least max_running ({}): every running sequence has a row in a step",
                config.max_batch_tokens, config.max_running
            )));
        }
        if let Some(BackgroundTask { share, .. }) = background.as_ref().filter(|f| !(0.0..=1.0).contains(&f.share)) {
            return Err(Error::invalid(format!("the share of background work is {share}; it must be from 0 to 1")));
        }
        let stats = Arc::new(EngineStats::default());
        stats.total_blocks.store(config.num_blocks as u64, Ordering::Relaxed);
        let (requests, inbox) = mpsc::channel();
        let worker = Worker::new(runner, config.clone(), inbox, stats.clone(), background);
        Ok((Self { config: Arc::new(config), stats, requests, draining: Arc::default() }, worker))
    }

    /// Hands a request to the engine. Errors: `Overloaded` when the queue is full, `Unavailable` while draining,
    /// `Invalid` when prompt and output cannot fit.
    pub fn submit(&self, request: Request) -> Result<()> {
        let config = &self.config;
        let prompt = request.prompt.len();
        if self.draining.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Unavailable, "the server is shutting down").code("shutting_down"));
        }
        if prompt == 0 {
            return Err(Error::invalid("the prompt is empty: it needs at least one token").param("prompt"));
        }
        let divided = request.adapters.len() > 1 || request.adapters.iter().any(|(_, weight)| *weight != 1.0);
        if let Some((lease, _)) = request.adapters.iter().find(|(lease, _)| divided && lease.exclusive) {
            return Err(Error::invalid(format!(
                "adapter {:?} is a DoRA, which is used alone and at weight 1: its rows' norms do not add up with others'",
                lease.name
            ))
            .param("adapter"));
        }
        // A prompt that fills the context has room for no output, which only scoring asks for.
        let needed = prompt + request.params.max_tokens.min(1);
        if needed > config.max_model_len {
            return Err(Error::invalid(format!(
                "the prompt has {prompt} tokens and the longest sequence is {} tokens, output included",
                config.max_model_len
            ))
            .param("prompt")
            .code("context_length_exceeded"));
        }
        let longest = prompt.saturating_add(request.params.max_tokens).min(config.max_model_len);
        // A generated token that ends the sequence leaves no key or value.
        let keys = prompt.max(longest - 1);
        if keys.div_ceil(config.block_size) > config.num_blocks {
            return Err(Error::invalid(format!(
                "prompt and output may take {longest} tokens and the KV cache holds {}: ask for fewer tokens",
                config.num_blocks * config.block_size
            ))
            .param("max_tokens")
            .code("context_length_exceeded"));
        }
        let limit = (config.max_running + config.max_waiting) as u64;
        let permit = RequestPermit::take(&self.stats, limit).ok_or_else(|| {
            let message = format!("the queue is full: {limit} requests run and wait; try again later");
            Error::new(ErrorKind::Overloaded, message).code("queue_full")
        })?;
        self.requests.send((request, permit)).map_err(|_| Error::internal("the engine thread has ended"))
    }

    /// Takes no more requests, and returns once what runs and waits has ended.
    pub async fn drain(&self) {
        self.draining.store(true, Ordering::Release);
        while self.stats.open.load(Ordering::Acquire) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The limits it was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Live counters.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }
}
