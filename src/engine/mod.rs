//! The engine: one thread owns the device, the model, the KV cache and the adapter slots, and runs
//! `schedule -> run -> sample -> deliver`. Async code talks to it through [`request`]'s types only.

pub mod batch;
pub mod request;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use candle_core::Tensor;

use crate::adapter::Lease;
use crate::{Error, Result};
use batch::Batch;
use request::Request;

/// Whether an adapter can be used by the next forward pass.
#[derive(Debug, Clone)]
pub enum Residency {
    /// It is in this slot, which stays its own until released.
    Ready(u32),
    /// It is on its way from disk or host memory: ask again at a later step.
    Loading,
    /// Every slot byte is leased by running sequences: wait for one to end.
    Full,
    /// It cannot be loaded any more (file gone or changed): fail the request.
    Failed(Error),
}

/// What the engine thread drives: the model with its KV cache and adapter slots, or a fake in scheduler tests.
pub trait Runner: Send + 'static {
    /// Asks for an adapter in a slot. Each `Ready` answer counts one use that [`Runner::release`] ends.
    fn acquire(&mut self, lease: &Lease) -> Residency;

    /// Ends one use of a slot.
    fn release(&mut self, slot: u32);

    /// Runs the batch, writes its keys and values to the KV cache, and returns logits `[batch.logit_rows.len(), vocab]`
    /// f32 in the order of `logit_rows`.
    fn forward(&mut self, batch: &Batch) -> Result<Tensor>;
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
    /// Requests that wait; one more is refused (429).
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
pub struct Stats {
    /// Sequences in the running set.
    pub running: AtomicU64,
    /// Requests in the queue.
    pub waiting: AtomicU64,
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
}

/// A handle to the engine thread; clones share it.
#[derive(Clone)]
pub struct Engine {
    stats: Arc<Stats>,
}

impl Engine {
    /// Starts the engine thread on a runner.
    pub fn start(_runner: impl Runner, _config: EngineConfig) -> Result<Self> {
        Err(Error::internal("not written yet"))
    }

    /// Hands a request to the engine. Errors: `Overloaded` when the queue is full, `Unavailable` while draining,
    /// `Invalid` when prompt and output cannot fit.
    pub fn submit(&self, _request: Request) -> Result<()> {
        Err(Error::internal("not written yet"))
    }

    /// Takes no more requests, and returns once what runs and waits has ended.
    pub async fn drain(&self) {}

    /// Live counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}
