//! The engine thread's loop: `schedule -> run -> sample -> deliver`, and background work in between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::background::{Filler, Slices};
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::{Choice, Sample, Task, answer};
use super::scheduler::{Scheduler, Share};
use super::sequence::Sequence;
use super::{EngineConfig, Runner, Stats, Ticket};
use crate::ops::batch::Batch;
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
    /// What happens beside.
    slices: Slices,
}

/// What a turn of the loop found to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// A step ran.
    Ran,
    /// No request can run, and a slice of background work did.
    Sliced,
    /// Requests wait, but none can run now.
    Waiting,
    /// There is nothing to do.
    Idle,
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
    pub(super) fn new(
        runner: R,
        config: EngineConfig,
        inbox: Receiver<(Request, Ticket)>,
        stats: Arc<Stats>,
        filler: Option<Filler>,
    ) -> Self {
        let (scheduler, slices) = (Scheduler::new(config.clone()), Slices::new(filler));
        Self { runner, scheduler, config, inbox, stats, slices }
    }

    /// Runs until every handle is gone and every sequence has ended.
    pub fn run(mut self) {
        loop {
            let wait = match self.turn() {
                Turn::Ran => continue,
                Turn::Sliced => Duration::ZERO,
                Turn::Waiting => LOADING_TICK,
                Turn::Idle => IDLE_TICK,
            };
            match self.inbox.recv_timeout(wait) {
                Ok(arrival) => self.take(arrival),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if self.scheduler.waiting() == 0 => return,
                Err(RecvTimeoutError::Disconnected) => thread::sleep(wait),
            }
        }
    }

    /// Takes what came, and runs one step if anything can run, then background work as far as it may.
    pub fn turn(&mut self) -> Turn {
        while let Ok(arrival) = self.inbox.try_recv() {
            self.take(arrival);
        }
        let began = Instant::now();
        let shares = self.scheduler.schedule(&mut self.runner);
        let mut turn = match self.scheduler.waiting() {
            _ if !shares.is_empty() => Turn::Ran,
            0 => Turn::Idle,
            _ => Turn::Waiting,
        };
        if turn == Turn::Ran {
            let batch = self.batch(&shares);
            // A fault of the model ends the sequences of this step; the engine goes on.
            let run = catch_unwind(AssertUnwindSafe(|| {
                let logits = self.runner.forward(&batch)?;
                self.sample(&shares, &logits)
            }));
            let panicked = || Err(Error::internal("the forward pass failed; see the server's log"));
            let sampled = run.unwrap_or_else(|_| panicked());
            self.stats.steps.fetch_add(1, Relaxed);
            self.deliver(&shares, sampled);
            let decoding = self.scheduler.running.iter().any(|s| s.output_len() > 0);
            self.publish_stats();
            self.slices.after_step(began.elapsed(), decoding, &self.stats);
        } else {
            self.publish_stats();
            if self.slices.idle(&self.stats) {
                turn = Turn::Sliced;
            }
        }
        self.runner.sweep();
        turn
    }

    /// The model, for tests that count what it was asked.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    fn take(&mut self, (request, ticket): (Request, Ticket)) {
        for (lease, _) in &request.adapters {
            self.runner.prefetch(lease);
        }
        let seed = request.params.seed.unwrap_or_else(rand::random);
        self.scheduler.push(Sequence::new(request, ticket, seed));
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

    /// Tokens and log-probabilities of every share.
    fn sample(&self, shares: &[Share], logits: &Tensor) -> Result<Vec<Result<Sampled>>> {
        let sequence = |share: &Share| &self.scheduler.running[share.sequence];
        let masked: Vec<_> = shares.iter().map(|share| sequence(share).masked(&self.config.eos_token_ids)).collect();
        let tasks: Vec<Vec<Task>> =
            shares.iter().zip(&masked).map(|(share, masked)| tasks(sequence(share), share.rows, masked)).collect();
        let counts: Vec<_> = tasks.iter().map(Vec::len).collect();
        let tasks: Vec<Task> = tasks.into_iter().flatten().collect();
        let mut answers = tasks.iter().zip(answer(logits, &tasks)?);
        Ok(counts.into_iter().map(|count| sampled(answers.by_ref().take(count).collect())).collect())
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
        if s.wants_prompt_logprobs() {
            if s.prompt_logprobs.is_empty() {
                // Nothing comes before the first token.
                s.prompt_logprobs.push(None);
            }
            s.prompt_logprobs.extend(sampled.prompt);
            if !s.wants_prompt_logprobs() {
                let _ = s.request.events.send(Event::Prompt(s.prompt_logprobs.clone()));
            }
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
        s.seen.push(id);
        // A client that has gone is noticed before the next step.
        let _ = s.request.events.send(Event::Token { id, logprobs });
        let full = s.output_len() >= params.max_tokens || s.tokens.len() >= self.config.max_model_len;
        if full {
            s.finish(FinishReason::Length, None);
        }
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

/// What is asked of the rows of logits of one share.
fn tasks<'a>(s: &'a Sequence, rows: usize, masked: &'a [u32]) -> Vec<Task<'a>> {
    let params = &s.request.params;
    let task = |position| match (params.prompt_logprobs, s.request.prompt.get(position + 1)) {
        // The row at a position predicts the token after it.
        (Some(top), Some(&next)) => Task::Score(next, top),
        _ => Task::Next(Choice { params, seen: &s.seen, masked, seed: s.seed, index: s.output_len() }),
    };
    logit_positions(s, rows).map(task).collect()
}

/// Prompt log-probabilities and the next token of one share, from what came of its tasks.
fn sampled(answers: Vec<(&Task, Result<Sample>)>) -> Result<Sampled> {
    let mut sampled = Sampled { prompt: Vec::new(), next: None };
    for (task, answer) in answers {
        let Sample { id, logprobs } = answer?;
        match task {
            Task::Score(..) => sampled.prompt.push(logprobs),
            Task::Next(_) => sampled.next = Some((id, logprobs)),
        }
    }
    Ok(sampled)
}

/// Positions of a sequence's next `rows` tokens whose logits are wanted: those that give prompt log-probabilities, where
/// they are asked for, and the last of all tokens, unless no output is.
fn logit_positions(s: &Sequence, rows: usize) -> impl Iterator<Item = usize> {
    let end = s.computed + rows;
    let last = end == s.tokens.len() && s.request.params.max_tokens > 0;
    s.scoring(s.computed..end).chain(last.then_some(end - 1))
}
