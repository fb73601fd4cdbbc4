//! A sequence: a request and its progress in the engine.

use std::ops::Range;
use std::sync::Arc;

use super::RequestPermit;
use super::block_pool::{BlockHash, chain_hash, root_hash};
use super::constraint::{AllowedTokens, NextMask, TokenMask};
use super::fair_queue::QueueId;
use super::pooling::PooledPrompt;
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::TokenCounts;
use crate::{Error, Result};

/// Generation ids of a sequence's adapters and the bits of their weights, in order, and the request's salt. The prefix cache is
/// keyed by it.
type AdapterKey = Arc<[(String, u32)]>;

/// A request and its progress.
pub(super) struct Sequence {
    /// Its place in the engine. Dropped before the request, whose channel tells the client that the place is free.
    _permit: RequestPermit,
    pub(super) request: Request,
    /// Its adapters, for the prefix cache.
    key: AdapterKey,
    /// Its queue, which is set when it is queued.
    pub(super) queue: QueueId,
    /// Seed of the draws: the request's, or a random one.
    pub(super) seed: u64,
    /// The prompt, then the output.
    pub(super) tokens: Vec<u32>,
    /// Number of leading tokens whose keys and values are written.
    pub(super) computed: usize,
    /// Number of tokens after those that the step being scheduled computes.
    pub(super) planned: usize,
    /// KV blocks of the computed and the next tokens, while it runs.
    pub(super) blocks: Vec<u32>,
    /// Hashes of the leading full blocks.
    pub(super) hashes: Vec<BlockHash>,
    /// Number of leading blocks that are in the prefix cache.
    pub(super) cached_blocks: usize,
    /// Adapter slots and weights, while it runs.
    pub(super) slots: Vec<(u32, f32)>,
    /// Counts of its tokens, for the penalties.
    pub(super) counts: TokenCounts,
    /// The mask of its next token, if its tokens are constrained.
    pub(super) next_mask: Option<NextMask>,
    /// Log-probabilities of leading prompt tokens, while they are collected.
    pub(super) prompt_logprobs: Vec<Option<Logprobs>>,
    /// The pooled hidden states of the prompt, if they were requested.
    pub(super) pooled: Option<PooledPrompt>,
    /// Whether it has been admitted before: its queue time has ended.
    pub(super) admitted: bool,
}

impl Sequence {
    /// A sequence that has not run.
    pub(super) fn new(mut request: Request, permit: RequestPermit, seed: u64) -> Self {
        let constraint = match (&request.params.allowed_token_ids[..], request.constraint.take()) {
            ([], constraint) => constraint,
            (ids, constraint) => Some(Box::new(AllowedTokens::new(ids, constraint)) as _),
        };
        let adapters = request.adapters.iter().map(|(lease, weight)| (lease.id.clone(), weight.to_bits()));
        // A generation id is a hash, which no salt with its prefix equals.
        let salt = request.cache_salt.iter().map(|salt| (format!("salt:{salt}"), 0));
        let key = adapters.chain(salt).collect();
        Self {
            key,
            queue: 0,
            seed,
            tokens: request.prompt.clone(),
            computed: 0,
            planned: 0,
            blocks: Vec::new(),
            hashes: Vec::new(),
            cached_blocks: 0,
            slots: Vec::new(),
            counts: TokenCounts::new(&request.params, &request.prompt),
            next_mask: constraint.map(NextMask::start),
            prompt_logprobs: Vec::new(),
            pooled: request.params.pooling.map(|pooling| PooledPrompt::new(pooling, request.prompt.len())),
            admitted: false,
            _permit: permit,
            request,
        }
    }

    /// Number of generated tokens.
    pub(super) fn output_len(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Number of tokens whose keys and values are not written yet: one while decoding.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether its next `rows` tokens reach its end, so that the next token is sampled.
    pub(super) fn samples(&self, rows: usize) -> bool {
        self.computed + rows == self.tokens.len() && self.request.params.max_tokens > 0
    }

    /// Whether the client has gone.
    pub(super) fn cancelled(&self) -> bool {
        self.request.events.is_closed()
    }

    /// The tokens that its constraint allows next, if it has one.
    pub(super) fn allowed(&self) -> Option<&TokenMask> {
        self.next_mask.as_ref().and_then(NextMask::mask)
    }

    /// Ids that must not be generated now: those that would end the output before `min_tokens`, and the last ids of `bad_words`.
    pub(super) fn masked(&self, eos_token_ids: &[u32]) -> Vec<u32> {
        let params = &self.request.params;
        let mut masked = Vec::new();
        if self.output_len() < params.min_tokens {
            let eos = if params.ignore_eos { &[] } else { eos_token_ids };
            masked.extend(eos.iter().chain(&params.stop_token_ids));
            // An output that is complete under its constraint can only end.
            if self.allowed().is_some_and(|allowed| !allowed.allows_other_than(&masked)) {
                masked.clear();
            }
        }
        let output = &self.tokens[self.request.prompt.len()..];
        let banned = params.bad_words.iter().filter_map(|word| word.split_last());
        masked.extend(banned.filter(|(_, begun)| output.ends_with(begun)).map(|(last, _)| last));
        masked
    }

    /// Whether prompt log-probabilities were requested and are not complete.
    pub(super) fn wants_prompt_logprobs(&self) -> bool {
        self.request.params.prompt_logprobs.is_some() && self.prompt_logprobs.len() < self.request.prompt.len()
    }

    /// Adds the prompt log-probabilities of a step, and tells the client once they are complete.
    pub(super) fn add_prompt_logprobs(&mut self, logprobs: Vec<Option<Logprobs>>) {
        if !self.wants_prompt_logprobs() {
            return;
        }
        if self.prompt_logprobs.is_empty() {
            // Nothing comes before the first token.
            self.prompt_logprobs.push(None);
        }
        self.prompt_logprobs.extend(logprobs);
        if !self.wants_prompt_logprobs() {
            let _ = self.request.events.send(Event::Prompt(self.prompt_logprobs.clone()));
        }
    }

    /// The subrange of `positions` whose logits give a prompt log-probability that is still missing. The logits at a position
    /// are for the token after it.
    pub(super) fn scoring(&self, positions: Range<usize>) -> Range<usize> {
        if !self.wants_prompt_logprobs() {
            return positions.end..positions.end;
        }
        // After a preemption, the leading ones are known already. The first token has none.
        let start = positions.start.max(self.prompt_logprobs.len().max(1) - 1);
        start..positions.end.min(self.request.prompt.len() - 1).max(start)
    }

    /// The subrange of `positions` whose hidden states are still to be pooled.
    pub(super) fn pooling(&self, positions: Range<usize>) -> Range<usize> {
        self.pooled.as_ref().map_or(positions.end..positions.end, |pooled| pooled.needed(positions))
    }

    /// Pools the hidden states of a step, and tells the client once the prompt is complete. Errors: a value that is not finite.
    pub(super) fn pool(&mut self, hidden: &[Vec<f32>]) -> Result<()> {
        let Some(pooled) = &mut self.pooled else { return Ok(()) };
        if let Some(pooled) = pooled.add(hidden)? {
            let _ = self.request.events.send(Event::Pooled(pooled));
        }
        Ok(())
    }

    /// Number of leading tokens whose rows need not run if the prefix cache has their keys and values. The last token always
    /// runs, for its logits, and so do rows that give prompt log-probabilities or are pooled.
    pub(super) fn skippable(&self) -> usize {
        let last = self.tokens.len() - 1;
        match &self.pooled {
            _ if self.wants_prompt_logprobs() => 0,
            Some(pooled) => last.min(pooled.next()),
            None => last,
        }
    }

    /// Hashes of the first `count` blocks of its tokens, which must be full.
    pub(super) fn block_hashes(&mut self, count: usize, block_size: usize) -> &[BlockHash] {
        while self.hashes.len() < count {
            let at = self.hashes.len() * block_size;
            let parent = self.hashes.last().copied().unwrap_or_else(|| root_hash(&self.key));
            self.hashes.push(chain_hash(&parent, &self.tokens[at..at + block_size]));
        }
        &self.hashes[..count]
    }

    /// Tells the client that the sequence has ended. Does nothing if the client has gone.
    pub(super) fn finish(&self, reason: FinishReason) {
        self.send_end(reason, None, None);
    }

    /// Tells the client that a token has ended the sequence.
    pub(super) fn finish_by(&self, end_token: u32, logprobs: Option<Logprobs>) {
        self.send_end(FinishReason::Stop, Some(end_token), logprobs);
    }

    fn send_end(&self, reason: FinishReason, end_token: Option<u32>, end_logprobs: Option<Logprobs>) {
        let requested_stop = end_token.is_some_and(|id| self.request.params.stop_token_ids.contains(&id));
        let _ = self.request.events.send(Event::Finished { reason, end_token, end_logprobs, requested_stop });
    }

    /// Tells the client that the sequence has failed.
    pub(super) fn fail(&self, error: Error) {
        let _ = self.request.events.send(Event::Failed(error));
    }
}
