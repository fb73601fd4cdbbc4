//! The engine thread's loop: `schedule -> run -> sample -> deliver`, and background work in between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use candle_core::Tensor;

use super::background::{BackgroundTask, TimeSlicer};
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::{LogitsTask, SampledToken, SamplingMetadata, answer};
use super::scheduler::{ScheduledRows, Scheduler};
use super::sequence::Sequence;
use super::{EngineConfig, EngineStats, RequestPermit, Runner};
use crate::ops::batch::Batch;
use crate::{Error, Result};

/// How often an idle engine looks after retired adapters.
const IDLE_POLL: Duration = Duration::from_millis(200);

/// How often waiting for an adapter on its way asks again.
const LOADING_POLL: Duration = Duration::from_millis(1);

/// Everything the engine thread owns.
pub struct Worker<R> {
    runner: R,
    config: EngineConfig,
    scheduler: Scheduler,
    inbox: Receiver<(Request, RequestPermit)>,
    stats: Arc<EngineStats>,
    /// What happens beside.
    time_slicer: TimeSlicer,
}

/// What a tick of the loop found to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// A step ran.
    Stepped,
    /// No request can run, and a slice of background work did.
    Sliced,
    /// Requests wait, but none can run now.
    Waiting,
    /// There is nothing to do.
    Idle,
}

/// What sampling one row gave.
struct SequenceOutput {
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
        inbox: Receiver<(Request, RequestPermit)>,
        stats: Arc<EngineStats>,
        background: Option<BackgroundTask>,
    ) -> Self {
        let (scheduler, time_slicer) = (Scheduler::new(config.clone()), TimeSlicer::new(background));
        Self { runner, scheduler, config, inbox, stats, time_slicer }
    }

    /// Runs until every handle is gone and every sequence has ended.
    pub fn run(mut self) {
        loop {
            let wait = match self.tick() {
                Tick::Stepped => continue,
                Tick::Sliced => Duration::ZERO,
                Tick::Waiting => LOADING_POLL,
                Tick::Idle => IDLE_POLL,
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
    pub fn tick(&mut self) -> Tick {
        while let Ok(arrival) = self.inbox.try_recv() {
            self.take(arrival);
        }
        let began = Instant::now();
        let scheduled = self.scheduler.schedule(&mut self.runner);
        let mut tick = match self.scheduler.waiting() {
            _ if !scheduled.is_empty() => Tick::Stepped,
            0 => Tick::Idle,
            _ => Tick::Waiting,
        };
        if tick == Tick::Stepped {
            let batch = self.batch(&scheduled);
            // A fault of the model ends the sequences of this step; the engine goes on.
            let run = catch_unwind(AssertUnwindSafe(|| {
                let step = self.runner.launch(&batch)?;
                let logits = self.runner.collect(step)?;
                self.sample(&scheduled, &logits)
            }));
            let panicked = || Err(Error::internal("the forward pass failed; see the server's log"));
            let sampled = run.unwrap_or_else(|_| panicked());
            self.stats.steps.fetch_add(1, Relaxed);
            self.deliver(&scheduled, sampled);
            let decoding = self.scheduler.running.iter().any(|s| s.output_len() > 0);
            self.publish_stats();
            self.time_slicer.after_step(began.elapsed(), decoding, &self.stats);
        } else {
            self.publish_stats();
            if self.time_slicer.idle(&self.stats) {
                tick = Tick::Sliced;
            }
        }
        self.runner.sweep();
        tick
    }

    /// The model, for tests that count what it was asked.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    fn take(&mut self, (request, permit): (Request, RequestPermit)) {
        for (lease, _) in &request.adapters {
            self.runner.prefetch(lease);
        }
        let seed = request.params.seed.unwrap_or_else(rand::random);
        self.scheduler.push(Sequence::new(request, permit, seed));
    }

    fn batch(&self, scheduled: &[ScheduledRows]) -> Batch {
        let mut batch = Batch::default();
        for rows in scheduled {
            let s = &self.scheduler.running[rows.sequence];
            let first = batch.tokens.len();
            let tokens = &s.tokens[s.computed..s.computed + rows.rows];
            batch.push(tokens, s.computed, &s.blocks, self.config.block_size, &s.slots);
            batch.logit_rows.extend(logit_positions(s, rows.rows).map(|p| (first + p - s.computed) as u32));
        }
        batch
    }

    /// Tokens and log-probabilities of every rows.
    fn sample(&self, scheduled: &[ScheduledRows], logits: &Tensor) -> Result<Vec<Result<SequenceOutput>>> {
        let sequence = |rows: &ScheduledRows| &self.scheduler.running[rows.sequence];
        let masked: Vec<_> = scheduled.iter().map(|rows| sequence(rows).masked(&self.config.eos_token_ids)).collect();
        let tasks: Vec<Vec<LogitsTask>> =
            scheduled.iter().zip(&masked).map(|(rows, masked)| tasks(sequence(rows), rows.rows, masked)).collect();
        let counts: Vec<_> = tasks.iter().map(Vec::len).collect();
        let tasks: Vec<LogitsTask> = tasks.into_iter().flatten().collect();
        let mut answers = tasks.iter().zip(answer(logits, &tasks)?);
        Ok(counts.into_iter().map(|count| sampled(answers.by_ref().take(count).collect())).collect())
    }

    /// Hands out what the step gave, and ends what has ended.
    fn deliver(&mut self, scheduled: &[ScheduledRows], sampled: Result<Vec<Result<SequenceOutput>>>) {
        let results: Vec<Result<SequenceOutput>> = match sampled {
            Ok(results) => results,
            Err(error) => {
                tracing::error!(error = %format_args!("{error:#}"), sequences = scheduled.len(), "step failed");
                scheduled.iter().map(|_| Err(error.clone())).collect()
            }
        };
        let mut ended = Vec::new();
        for (rows, result) in scheduled.iter().zip(results) {
            let index = rows.sequence;
            match result {
                Ok(sampled) => {
                    self.scheduler.advance(index, rows.rows);
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
    fn deliver_one(&mut self, index: usize, sampled: SequenceOutput) -> bool {
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
        s.counts.push(id);
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

/// What is asked of the rows of logits of one rows.
fn tasks<'a>(s: &'a Sequence, rows: usize, masked: &'a [u32]) -> Vec<LogitsTask<'a>> {
    let params = &s.request.params;
    let task = |position| match (params.prompt_logprobs, s.request.prompt.get(position + 1)) {
        // The row at a position predicts the token after it.
        (Some(top), Some(&next)) => LogitsTask::Score(next, top),
        _ => LogitsTask::Next(SamplingMetadata {
            params,
            counts: &s.counts,
            masked,
            seed: s.seed,
            index: s.output_len(),
        }),
    };
    logit_positions(s, rows).map(task).collect()
}

/// Prompt log-probabilities and the next token of one rows, from what came of its tasks.
fn sampled(answers: Vec<(&LogitsTask, Result<SampledToken>)>) -> Result<SequenceOutput> {
    let mut sampled = SequenceOutput { prompt: Vec::new(), next: None };
    for (task, answer) in answers {
        let SampledToken { id, logprobs } = answer?;
        match task {
            LogitsTask::Score(..) => sampled.prompt.push(logprobs),
            LogitsTask::Next(_) => sampled.next = Some((id, logprobs)),
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
