//! The engine: one thread that owns the device, the model, the KV cache and the adapter slots, and serves requests in steps.
//!
//! Async code sends it a [`request::Request`] and receives [`request::Event`]s. The thread ([`worker`]) repeats: schedule a
//! step (`scheduler.rs`), run it ([`runner`]), sample the next tokens ([`sampler`]), and deliver events. `fair_queue.rs` orders
//! the waiting requests, `block_pool.rs` holds the KV blocks and the prefix cache, and `background.rs` runs slices of training
//! between steps.

mod background;
mod block_pool;
pub mod constraint;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "stub.rs"]
pub mod cuda;
mod fair_queue;
mod pooling;
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

pub use background::{BackgroundTask, BackgroundWork};
use request::Request;
pub use runner::{InFlightStep, Runner};
use worker::Worker;

use crate::error::ErrorKind;
use crate::{Error, Result};

/// Limits of the engine, which are checked when it starts.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Tokens per KV block, which is also the key tile of the attention op.
    pub block_size: usize,
    /// Number of KV blocks.
    pub num_blocks: usize,
    /// Most rows of a step. Decode rows come first; the rest goes to chunks of prompts.
    pub max_batch_tokens: usize,
    /// Most sequences that run at once.
    pub max_running: usize,
    /// Most requests that wait beyond `max_running`. One more is rejected (`Overloaded`).
    pub max_waiting: usize,
    /// Most tokens of a sequence, prompt plus output.
    pub max_model_len: usize,
    /// The model's end-of-sequence ids.
    pub eos_token_ids: Vec<u32>,
    /// Whether requests with the same adapter generations and prefix share KV blocks.
    pub prefix_cache: bool,
}

/// The error of a sequence that is longer than `limit`: a prompt that leaves no room, or a prompt and its `output`. The words
/// are OpenAI's, which gateways look for before they fall back to a model with a longer context.
pub(crate) fn context_length_exceeded(limit: usize, prompt: usize, output: Option<usize>, param: &str) -> Error {
    let requested = match output {
        None => format!("{prompt} tokens in the prompt alone. Please reduce the length of the prompt"),
        Some(output) => format!(
            "{} tokens ({prompt} in the prompt, {output} in the completion). Please reduce the length of the prompt or of \
             the completion",
            prompt.saturating_add(output)
        ),
    };
    let message = format!("This model's maximum context length is {limit} tokens. However, you requested {requested}.");
    Error::invalid(message).param(param).code("context_length_exceeded")
}

impl EngineConfig {
    /// Checks the limits. Errors: a limit is 0, or two limits contradict each other.
    fn check(&self) -> Result<()> {
        let limits = [
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_running", self.max_running),
            ("max_model_len", self.max_model_len),
        ];
        if let Some((name, _)) = limits.iter().find(|(_, limit)| *limit == 0) {
            return Err(Error::invalid(format!("{name} is 0; it must be at least 1")));
        }
        if self.max_batch_tokens < self.max_running {
            return Err(Error::invalid(format!(
                "max_batch_tokens ({}) must be at least max_running ({}): every running sequence has a row in a step",
                self.max_batch_tokens, self.max_running
            )));
        }
        Ok(())
    }
}

/// Counters that the metrics page reads while the engine runs.
#[derive(Debug, Default)]
pub struct EngineStats {
    /// Sequences that run.
    pub running: AtomicU64,
    /// Requests that wait, including preempted ones.
    pub waiting: AtomicU64,
    /// Requests that were accepted and have not ended. A drain waits until there are none.
    pub open: AtomicU64,
    /// KV blocks that running sequences use. Cached blocks without a user are free.
    pub used_blocks: AtomicU64,
    /// Number of KV blocks.
    pub total_blocks: AtomicU64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: AtomicU64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hits: AtomicU64,
    /// Preemptions for lack of KV blocks.
    pub preemptions: AtomicU64,
    /// Steps that ran.
    pub steps: AtomicU64,
    /// Total time of steps, in microseconds.
    pub serving_micros: AtomicU64,
    /// Time slices of background work that ran.
    pub background_slices: AtomicU64,
    /// Total time of these slices, in microseconds.
    pub background_micros: AtomicU64,
}

/// One of the engine's places for requests, held from `submit` until the sequence is dropped.
struct RequestPermit(Arc<EngineStats>);

impl RequestPermit {
    /// Takes one of `limit` places, if one is free. Checking and taking are one atomic operation, so that two callers cannot
    /// both take the last place.
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

/// A handle to the engine thread. Clones share the engine.
#[derive(Clone)]
pub struct Engine {
    config: Arc<EngineConfig>,
    stats: Arc<EngineStats>,
    /// The worker's inbox.
    requests: Sender<(Request, RequestPermit)>,
    /// Whether new requests are rejected.
    draining: Arc<AtomicBool>,
}

impl Engine {
    /// Spawns the engine thread, with an optional background task. Errors: invalid limits.
    pub fn start(runner: impl Runner, config: EngineConfig, background: Option<BackgroundTask>) -> Result<Self> {
        let (engine, worker) = Self::new(runner, config, background)?;
        thread::Builder::new().name("engine".into()).spawn(move || worker.run())?;
        Ok(engine)
    }

    /// An engine without a thread: the caller runs the worker, tick by tick. Errors: invalid limits.
    pub fn new<R: Runner>(
        runner: R,
        config: EngineConfig,
        background: Option<BackgroundTask>,
    ) -> Result<(Self, Worker<R>)> {
        config.check()?;
        if let Some(background) = &background {
            background.check()?;
        }
        let stats = Arc::new(EngineStats::default());
        stats.total_blocks.store(config.num_blocks as u64, Ordering::Relaxed);
        let (requests, inbox) = mpsc::channel();
        let worker = Worker::new(runner, config.clone(), inbox, stats.clone(), background);
        Ok((Self { config: Arc::new(config), stats, requests, draining: Arc::default() }, worker))
    }

    /// Queues a request. Errors: `Unavailable` while draining, `Invalid` for a request that can never run, `Overloaded` when
    /// the queue is full.
    pub fn submit(&self, request: Request) -> Result<()> {
        if self.draining.load(Ordering::Acquire) {
            return Err(Error::new(ErrorKind::Unavailable, "the server is shutting down").code("shutting_down"));
        }
        if request.prompt.is_empty() {
            return Err(Error::invalid("the prompt is empty: it needs at least one token").param("prompt"));
        }
        self.check_adapters(&request)?;
        self.check_length(&request)?;
        let limit = (self.config.max_running + self.config.max_waiting) as u64;
        let permit = RequestPermit::take(&self.stats, limit).ok_or_else(|| {
            let message = format!("the queue is full: {limit} requests run or wait; try again later");
            Error::new(ErrorKind::Overloaded, message).code("queue_full")
        })?;
        self.requests.send((request, permit)).map_err(|_| Error::internal("the engine thread has ended"))
    }

    /// An exclusive adapter must be alone and have weight 1.
    fn check_adapters(&self, request: &Request) -> Result<()> {
        let adapters = &request.adapters;
        let mixed = adapters.len() > 1 || adapters.iter().any(|(_, weight)| *weight != 1.0);
        let Some((lease, _)) = adapters.iter().find(|(lease, _)| mixed && lease.exclusive) else { return Ok(()) };
        let message = format!(
            "adapter {:?} is a DoRA, which must be used alone and at weight 1: its gains scale the whole output row",
            lease.name
        );
        Err(Error::invalid(message).param("adapter"))
    }

    /// The prompt and the output must fit into the context length and into the KV cache.
    fn check_length(&self, request: &Request) -> Result<()> {
        let config = &self.config;
        let (prompt, max_tokens) = (request.prompt.len(), request.params.max_tokens);
        // A prompt that fills the context leaves no room for output, and is only valid for scoring.
        if prompt + max_tokens.min(1) > config.max_model_len {
            return Err(context_length_exceeded(config.max_model_len, prompt, None, "prompt"));
        }
        let longest = prompt.saturating_add(max_tokens).min(config.max_model_len);
        // The last generated token needs no key or value.
        let cached = prompt.max(longest - 1);
        if cached.div_ceil(config.block_size) > config.num_blocks {
            let limit = config.num_blocks * config.block_size;
            return Err(context_length_exceeded(limit, prompt, Some(longest - prompt), "max_tokens"));
        }
        Ok(())
    }

    /// Rejects new requests, and returns once all accepted ones have ended.
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

    /// The engine's counters.
    pub fn stats(&self) -> &EngineStats {
        &self.stats
    }
}
