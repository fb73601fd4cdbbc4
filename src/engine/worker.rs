//! The engine thread's loop: `schedule -> run -> sample -> deliver`.

use std::iter;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::{CpuStorage, Storage, Tensor};

use super::batch::Batch;
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::{Draw, logprobs, sample};
use super::scheduler::{Scheduler, Share};
use super::sequence::Sequence;
use super::{EngineConfig, Runner, Stats, Ticket};
use crate::ops::pool::parallel_for;
use crate::{Error, Result};

/// How often an idle engine looks after retired adapters.
const IDLE_TICK: Duration = Duration::from_millis(200);

/// How often waiting for an adapter on its way asks again.
const LOADING_TICK: Duration = Duration::from_millis(1);

/// Everything the engine thread owns.
pub struct Worker<R> {
    runner: R,
    config: EngineConfig,
    scheduler: Scheduler,
    inbox: Receiver<(Request, Ticket)>,
    stats: Arc<Stats>,
}

/// What sampling one row gave.
struct Sampled {
    /// Prompt log-probabilities that this step's rows completed, in order.
    prompt: Vec<Option<Logprobs>>,
    /// The next token, where the step reached the sequence's end.
    next: Option<(u32, Option<Logprobs>)>,
}

impl<R: Runner> Worker<R> {
    /// A worker with nothing to do yet.
    pub fn new(runner: R, config: EngineConfig, inbox: Receiver<(Request, Ticket)>, stats: Arc<Stats>) -> Self {
        Self { runner, scheduler: Scheduler::new(config.clone()), config, inbox, stats }
    }

    /// Runs until every handle is gone.
    pub fn run(mut self) {
        while self.receive() {
            let shares = self.scheduler.schedule(&mut self.runner);
            if !shares.is_empty() {
                let batch = self.batch(&shares);
                let run = catch_unwind(AssertUnwindSafe(|| self.runner.forward(&batch)));
                let logits =
                    run.unwrap_or_else(|_| Err(Error::internal("the forward pass failed; see the server's log")));
                let sampled = logits.and_then(|logits| self.sample(&shares, &logits));
                self.deliver(&shares, sampled);
                self.stats.steps.fetch_add(1, Relaxed);
            }
            self.runner.sweep();
            self.publish_stats();
        }
    }

    /// Takes requests that came; with nothing to run, waits for one. False when no handle is left.
    fn receive(&mut self) -> bool {
        let idle = self.scheduler.running.is_empty();
        let received = if idle {
            let tick = if self.scheduler.waiting() > 0 { LOADING_TICK } else { IDLE_TICK };
            self.inbox.recv_timeout(tick)
        } else {
            self.inbox.try_recv().map_err(|e| match e {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            })
        };
        match received {
            Ok(request) => {
                // More may have come at once.
                for (request, ticket) in iter::once(request).chain(self.inbox.try_iter()) {
                    let seed = request.params.seed.unwrap_or_else(rand::random);
                    self.scheduler.push(Sequence::new(request, ticket, seed));
                }
                true
            }
            Err(RecvTimeoutError::Timeout) => true,
            Err(RecvTimeoutError::Disconnected) => !idle || self.scheduler.waiting() > 0,
        }
    }

    fn batch(&self, shares: &[Share]) -> Batch {
        let mut batch = Batch::default();
        for share in shares {
            let s = &self.scheduler.running[share.sequence];
            let first = batch.tokens.len();
            let tokens = &s.tokens[s.computed..s.computed + share.rows];
            batch.push(tokens, s.computed, &s.blocks, self.config.block_size, &s.slots);
            batch.logit_rows.extend(logit_positions(s, share.rows).map(|p| (first + p - s.computed) as u32));
        }
        batch
    }

    /// Tokens and log-probabilities of every share, rows in parallel.
    fn sample(&self, shares: &[Share], logits: &Tensor) -> Result<Vec<Result<Sampled>>> {
        let (rows, vocab) = logits.dims2()?;
        let logits = logits.contiguous()?;
        let (storage, layout) = logits.storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
            return Err(Error::internal("logits must be f32 on the CPU"));
        };
        let values = &values[layout.start_offset()..layout.start_offset() + rows * vocab];
        let mut work = Vec::with_capacity(shares.len());
        let mut row = 0;
        for share in shares {
            let s = &self.scheduler.running[share.sequence];
            let count = logit_positions(s, share.rows).count();
            work.push((s, share.rows, row..row + count, Mutex::new(None)));
            row += count;
        }
        let eos = &self.config.eos_token_ids;
        parallel_for(work.len(), |i| {
            let (s, rows, range, result) = &work[i];
            let logits = values[range.start * vocab..range.end * vocab].chunks_exact(vocab);
            let sampled = sample_one(s, *rows, logits, eos);
            *result.lock().unwrap_or_else(|e| e.into_inner()) = Some(sampled);
        });
        let results = work.into_iter().map(|(.., result)| result.into_inner().unwrap_or_else(|e| e.into_inner()));
        Ok(results.map(|r| r.unwrap_or_else(|| Err(Error::internal("a row was not sampled")))).collect())
    }

    /// Hands out what the step gave, and ends what has ended.
    fn deliver(&mut self, shares: &[Share], sampled: Result<Vec<Result<Sampled>>>) {
        let results: Vec<Result<Sampled>> = match sampled {
            Ok(results) => results,
            Err(error) => {
                tracing::error!(%error, sequences = shares.len(), "step failed");
                shares.iter().map(|_| Err(error.clone())).collect()
            }
        };
        let mut ended = Vec::new();
        for (share, result) in shares.iter().zip(results) {
            let index = share.sequence;
            match result {
                Ok(sampled) => {
                    self.scheduler.advance(index, share.rows);
                    if self.deliver_one(index, sampled) {
                        ended.push(index);
                    }
                }
                Err(error) => {
                    self.scheduler.running[index].fail(error);
                    ended.push(index);
                }
            }
        }
        ended.sort_unstable();
        for index in ended.into_iter().rev() {
            self.scheduler.remove(index, &mut self.runner);
        }
    }

    /// True when the sequence has ended.
    fn deliver_one(&mut self, index: usize, sampled: Sampled) -> bool {
        let s = &mut self.scheduler.running[index];
        let prompt_len = s.request.prompt.len();
        if s.wants_prompt_logprobs() && s.prompt_logprobs.is_empty() {
            // Nothing comes before the first token.
            s.prompt_logprobs.push(None);
        }
        if !sampled.prompt.is_empty() || (prompt_len == 1 && s.request.params.prompt_logprobs.is_some()) {
            s.prompt_logprobs.extend(sampled.prompt);
        }
        if s.request.params.prompt_logprobs.is_some() && s.prompt_logprobs.len() == prompt_len && s.output_len() == 0 {
            let _ = s.request.events.send(Event::Prompt(s.prompt_logprobs.clone()));
        }
        if s.request.params.max_tokens == 0 && s.computed >= prompt_len {
            s.finish(FinishReason::Length, None);
            return true;
        }
        let Some((id, logprobs)) = sampled.next else { return false };
        let params = &s.request.params;
        if params.stop_token_ids.contains(&id) {
            s.finish(FinishReason::Stop, Some(id));
            return true;
        }
        if !params.ignore_eos && self.config.eos_token_ids.contains(&id) {
            s.finish(FinishReason::Stop, None);
            return true;
        }
        s.tokens.push(id);
        *s.counts.entry(id).or_default() += 1;
        // A client that has gone is noticed before the next step.
        let _ = s.request.events.send(Event::Token { id, logprobs });
        let full = s.output_len() >= params.max_tokens || s.tokens.len() >= self.config.max_model_len;
        if full {
            s.finish(FinishReason::Length, None);
        }
        self.scheduler.charge_output(index);
        full
    }

    fn publish_stats(&self) {
        let (stats, scheduler) = (&self.stats, &self.scheduler);
        stats.running.store(scheduler.running.len() as u64, Relaxed);
        stats.waiting.store(scheduler.waiting() as u64, Relaxed);
        stats.used_blocks.store((scheduler.blocks.total() - scheduler.blocks.free()) as u64, Relaxed);
        stats.prefix_queries.store(scheduler.prefix.0, Relaxed);
        stats.prefix_hits.store(scheduler.prefix.1, Relaxed);
        stats.preemptions.store(scheduler.preemptions, Relaxed);
    }
}

/// Prompt log-probabilities and the next token of one share, from its rows of logits.
fn sample_one<'a>(
    s: &Sequence,
    rows: usize,
    logits: impl Iterator<Item = &'a [f32]>,
    eos_token_ids: &[u32],
) -> Result<Sampled> {
    let mut sampled = Sampled { prompt: Vec::new(), next: None };
    let params = &s.request.params;
    for (position, logits) in logit_positions(s, rows).zip(logits) {
        // The row at a position predicts the token after it.
        if let (Some(top), Some(&next)) = (params.prompt_logprobs, s.request.prompt.get(position + 1)) {
            sampled.prompt.push(Some(logprobs(logits, next, top)?));
            continue;
        }
        let eos: &[u32] = if params.ignore_eos { &[] } else { eos_token_ids };
        let stop_ids: Vec<u32> = params.stop_token_ids.iter().chain(eos).copied().collect();
        let draw = Draw {
            params,
            seed: s.seed,
            index: s.output_len(),
            prompt: &s.request.prompt,
            counts: &s.counts,
            stop_ids: &stop_ids,
        };
        sampled.next = Some(sample(logits, &draw)?);
    }
    Ok(sampled)
}

/// Positions of a sequence's next `rows` tokens whose logits are wanted: those that predict prompt tokens, where they are
/// asked for, and the last of all tokens, unless no output is.
fn logit_positions(s: &Sequence, rows: usize) -> impl Iterator<Item = usize> {
    let range = s.computed..s.computed + rows;
    let (last, prompt) = (s.tokens.len() - 1, s.request.prompt.len());
    let wants_prompt = s.wants_prompt_logprobs();
    // After a preemption, the leading ones are there already.
    let have = s.prompt_logprobs.len();
    let output = s.request.params.max_tokens > 0;
    range.filter(move |&p| (p == last && output) || (wants_prompt && p + 1 >= have.max(1) && p + 1 < prompt))
}
