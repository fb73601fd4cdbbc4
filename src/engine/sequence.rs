//! A request as the engine works on it.

use std::ops::Range;
use std::sync::Arc;

use super::RequestPermit;
use super::block_pool::{BlockHash, chain_hash, root_hash};
use super::fair_queue::QueueId;
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::TokenCounts;
use crate::Error;

/// Which adapters answer: generation ids and the bits of their weights, in order. The prefix cache goes by it.
pub type AdapterKey = Arc<[(String, u32)]>;

/// A request with its progress.
pub struct Sequence {
    /// What was asked.
    pub request: Request,
    /// Its adapters, for the prefix cache.
    pub key: AdapterKey,
    /// The flow it is accounted to, set when it is queued.
    pub queue: QueueId,
    /// Decides the draws; the request's, or drawn when it came.
    pub seed: u64,
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    /// Leading tokens whose keys and values are written.
    pub computed: usize,
    /// Tokens after those that this step computes.
    pub planned: usize,
    /// Blocks of those and the next tokens, while running.
    pub blocks: Vec<u32>,
    /// Names of the leading full blocks.
    pub hashes: Vec<BlockHash>,
    /// Leading blocks that are published under their name.
    pub published: usize,
    /// Adapter slots and weights, while running.
    pub slots: Vec<(u32, f32)>,
    /// What penalties apply to.
    pub counts: TokenCounts,
    /// Log-probabilities of leading prompt tokens, while they are collected.
    pub prompt_logprobs: Vec<Option<Logprobs>>,
    /// Prompt tokens that the prefix cache gave.
    pub cached_tokens: usize,
    /// It has been admitted before: queue time has ended.
    pub admitted: bool,
    /// Gives its place in the engine back with it.
    _permit: RequestPermit,
}

impl Sequence {
    /// A sequence that has not run.
    pub fn new(request: Request, permit: RequestPermit, seed: u64) -> Self {
        let key = request.adapters.iter().map(|(lease, weight)| (lease.id.clone(), weight.to_bits())).collect();
        Self {
            key,
            queue: 0,
            seed,
            tokens: request.prompt.clone(),
            computed: 0,
            planned: 0,
            blocks: Vec::new(),
            hashes: Vec::new(),
            published: 0,
            slots: Vec::new(),
            counts: TokenCounts::new(&request.params, &request.prompt),
            prompt_logprobs: Vec::new(),
            cached_tokens: 0,
            admitted: false,
            _permit: permit,
            request,
        }
    }

    /// Tokens generated.
    pub fn output_len(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Tokens whose keys and values are not written yet: one while decoding.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Nobody listens any more.
    pub fn cancelled(&self) -> bool {
        self.request.events.is_closed()
    }

    /// Ids that may not come yet.
    pub fn masked(&self, eos_token_ids: &[u32]) -> Vec<u32> {
        let params = &self.request.params;
        if self.output_len() >= params.min_tokens {
            return Vec::new();
        }
        let eos = if params.ignore_eos { &[] } else { eos_token_ids };
        eos.iter().chain(&params.stop_token_ids).copied().collect()
    }

    /// Whether prompt log-probabilities are still to be computed.
    pub fn wants_prompt_logprobs(&self) -> bool {
        self.request.params.prompt_logprobs.is_some() && self.prompt_logprobs.len() < self.request.prompt.len()
    }

    /// Which of `positions` give the log-probability of a prompt token, the one after them, that is still wanted.
    pub fn scoring(&self, positions: Range<usize>) -> Range<usize> {
        if !self.wants_prompt_logprobs() {
            return positions.end..positions.end;
        }
        // After a preemption, the leading ones are there already; the first token has none.
        let start = positions.start.max(self.prompt_logprobs.len().max(1) - 1);
        start..positions.end.min(self.request.prompt.len() - 1).max(start)
    }

    /// Names of the first `count` blocks of its tokens.
    pub fn block_hashes(&mut self, count: usize, block_size: usize) -> &[BlockHash] {
        while self.hashes.len() < count {
            let at = self.hashes.len() * block_size;
            let parent = self.hashes.last().copied().unwrap_or_else(|| root_hash(&self.key));
            self.hashes.push(chain_hash(&parent, &self.tokens[at..at + block_size]));
        }
        &self.hashes[..count]
    }

    /// Tells the client the end. A client that has gone does not mind.
    pub fn finish(&self, reason: FinishReason, stop_token: Option<u32>) {
        let cached_tokens = self.cached_tokens;
        let _ = self.request.events.send(Event::Finished { reason, cached_tokens, stop_token });
    }

    /// Tells the client that it failed.
    pub fn fail(&self, error: Error) {
        let _ = self.request.events.send(Event::Failed(error));
    }
}
