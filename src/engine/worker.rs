//! The loop of the engine thread: schedule a step, run it, sample, deliver; background work in between.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::background::{BackgroundTask, TimeSlicer};
use super::constraint::{MASK_TIMEOUT, NextMask};
use super::request::{Event, FinishReason, Logprobs, Request};
use super::sampler::{LogitsTask, SampledToken, SamplingMetadata, run_tasks};
use super::scheduler::{ScheduledRows, Scheduler};
use super::sequence::Sequence;
use super::{EngineConfig, EngineStats, RequestPermit, Runner};
use crate::model::decoder::StepOutput;
use crate::ops::batch::Batch;
use crate::{Error, Result};

/// How often an idle engine frees the slots of retired adapters.
const IDLE_POLL: Duration = Duration::from_millis(200);

/// How often the engine asks again for an adapter that is being loaded, while nothing else can run.
const LOADING_POLL: Duration = Duration::from_millis(1);

/// Everything that the engine thread owns.
pub struct Worker<R> {
    runner: R,
    config: EngineConfig,
    scheduler: Scheduler,
    inbox: Receiver<(Request, RequestPermit)>,
    stats: Arc<EngineStats>,
    time_slicer: TimeSlicer,
}

/// The outcome of one pass of the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tick {
    /// A step ran.
    Stepped,
    /// No request could run, and a slice of background work ran.
    Sliced,
    /// Requests wait, but none can run now.
    Waiting,
    /// There is nothing to do.
    Idle,
}

/// The results of a step for one sequence.
struct SequenceOutput {
    /// The prompt log-probabilities of this step's rows, in order.
    prompt: Vec<Option<Logprobs>>,
    /// The hidden states of this step's rows that are pooled, in order.
    hidden: Vec<Vec<f32>>,
    /// The next token, if the step reached the end of the sequence.
    next: NextToken,
}

/// The token that follows the rows of a step.
enum NextToken {
    /// None: the sequence has more rows, or no output was requested.
    None,
    /// A token, and its log-probabilities if they were requested.
    Sampled(u32, Option<Logprobs>),
    /// None: the output is complete under the sequence's constraint.
    Complete,
    /// The sequence's mask is not ready. The step does not count for this sequence.
    Postponed,
}

impl<R: Runner> Worker<R> {
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

    /// Runs until all handles have been dropped and all sequences have ended.
    pub(super) fn run(mut self) {
        loop {
            let wait = match self.tick() {
                Tick::Stepped => continue,
                Tick::Sliced => Duration::ZERO,
                Tick::Waiting => LOADING_POLL,
                Tick::Idle => IDLE_POLL,
            };
            match self.inbox.recv_timeout(wait) {
                Ok(arrival) => self.accept(arrival),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) if self.scheduler.waiting() == 0 => return,
                Err(RecvTimeoutError::Disconnected) => thread::sleep(wait),
            }
        }
    }

    /// One pass of the loop: accepts new requests, runs a step if any request can run, and then background work within its
    /// limits.
    pub fn tick(&mut self) -> Tick {
        while let Ok(arrival) = self.inbox.try_recv() {
            self.accept(arrival);
        }
        let began = Instant::now();
        let schedule = self.scheduler.schedule(&mut self.runner);
        let tick = if schedule.is_empty() {
            self.publish_stats();
            if self.time_slicer.run_idle(&self.stats) {
                Tick::Sliced
            } else if self.scheduler.waiting() > 0 {
                Tick::Waiting
            } else {
                Tick::Idle
            }
        } else {
            self.step(&schedule);
            self.publish_stats();
            let decoding = self.scheduler.running.iter().any(|s| s.output_len() > 0);
            self.time_slicer.run_after_step(began.elapsed(), decoding, &self.stats);
            Tick::Stepped
        };
        self.runner.update_slots();
        tick
    }

    /// The runner, for tests that inspect a fake one.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    fn accept(&mut self, (request, permit): (Request, RequestPermit)) {
        for (lease, _) in &request.adapters {
            self.runner.prefetch(lease);
        }
        let seed = request.params.seed.unwrap_or_else(rand::random);
        self.scheduler.push(Sequence::new(request, permit, seed));
    }

    /// Runs a step and delivers its results. An error or a panic ends the sequences of this step, and the engine continues.
    fn step(&mut self, schedule: &[ScheduledRows]) {
        let batch = self.build_batch(schedule);
        let run = catch_unwind(AssertUnwindSafe(|| {
            let step = self.runner.launch(&batch)?;
            let output = self.runner.collect(step)?;
            self.sample(schedule, &output)
        }));
        let panicked = || Err(Error::internal("the forward pass failed; see the server's log"));
        let outputs = run.unwrap_or_else(|_| panicked());
        self.stats.steps.fetch_add(1, Relaxed);
        self.deliver(schedule, outputs);
    }

    fn build_batch(&self, schedule: &[ScheduledRows]) -> Batch {
        let mut batch = Batch::default();
        for &ScheduledRows { sequence, rows } in schedule {
            let s = &self.scheduler.running[sequence];
            let first = batch.tokens.len();
            let tokens = &s.tokens[s.computed..s.computed + rows];
            batch.push(tokens, s.computed, &s.blocks, self.config.block_size, &s.slots);
            let row = |position: usize| (first + position - s.computed) as u32;
            batch.logit_rows.extend(logit_positions(s, rows).map(row));
            batch.hidden_rows.extend(s.pooling(s.computed..s.computed + rows).map(row));
        }
        batch
    }

    /// Samples from the output of a step, and returns the results of each scheduled sequence.
    fn sample(&mut self, schedule: &[ScheduledRows], output: &StepOutput) -> Result<Vec<Result<SequenceOutput>>> {
        let deadline = Instant::now() + MASK_TIMEOUT;
        for &ScheduledRows { sequence, rows } in schedule {
            let s = &mut self.scheduler.running[sequence];
            if s.samples(rows) {
                s.next_mask.iter_mut().for_each(|mask| mask.wait(deadline.saturating_duration_since(Instant::now())));
            }
        }
        let scheduled = || schedule.iter().map(|s| (&self.scheduler.running[s.sequence], s.rows));
        let masked: Vec<_> = scheduled().map(|(s, _)| s.masked(&self.config.eos_token_ids)).collect();
        let by_sequence: Vec<Vec<LogitsTask>> =
            scheduled().zip(&masked).map(|((s, rows), masked)| logits_tasks(s, rows, masked)).collect();
        let counts: Vec<_> = by_sequence.iter().map(Vec::len).collect();
        let tasks: Vec<LogitsTask> = by_sequence.into_iter().flatten().collect();
        let mut results = tasks.iter().zip(run_tasks(&output.logits, &tasks)?);
        let mut hidden = match &output.hidden {
            Some(hidden) => hidden.to_vec2::<f32>()?,
            None => Vec::new(),
        }
        .into_iter();
        let outputs = scheduled().zip(counts).map(|((s, rows), count)| {
            let pooled = s.pooling(s.computed..s.computed + rows).len();
            let hidden = hidden.by_ref().take(pooled).collect();
            sequence_output(s, results.by_ref().take(count).collect(), hidden)
        });
        Ok(outputs.collect())
    }

    /// Delivers the results of a step, and removes the sequences that have ended.
    fn deliver(&mut self, schedule: &[ScheduledRows], outputs: Result<Vec<Result<SequenceOutput>>>) {
        let outputs: Vec<Result<SequenceOutput>> = match outputs {
            Ok(outputs) => outputs,
            Err(error) => {
                tracing::error!(error = %format_args!("{error:#}"), sequences = schedule.len(), "step failed");
                schedule.iter().map(|_| Err(error.clone())).collect()
            }
        };
        let mut ended = Vec::new();
        for (&ScheduledRows { sequence: index, rows }, output) in schedule.iter().zip(outputs) {
            match output {
                Ok(SequenceOutput { next: NextToken::Postponed, .. }) => {}
                Ok(output) => {
                    self.scheduler.advance(index, rows);
                    if self.deliver_one(index, output) {
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

    /// Delivers the results of one sequence. Returns whether it has ended.
    fn deliver_one(&mut self, index: usize, output: SequenceOutput) -> bool {
        let s = &mut self.scheduler.running[index];
        s.add_prompt_logprobs(output.prompt);
        if let Err(error) = s.pool(&output.hidden) {
            s.fail(error);
            return true;
        }
        if s.request.params.max_tokens == 0 && s.computed >= s.request.prompt.len() {
            s.finish(FinishReason::Length);
            return true;
        }
        let (id, logprobs) = match output.next {
            NextToken::Sampled(id, logprobs) => (id, logprobs),
            NextToken::Complete => {
                s.finish(FinishReason::Stop);
                return true;
            }
            NextToken::None | NextToken::Postponed => return false,
        };
        let params = &s.request.params;
        let end_of_sequence = !params.ignore_eos && self.config.eos_token_ids.contains(&id);
        if end_of_sequence || params.stop_token_ids.contains(&id) {
            s.finish_by(id, logprobs);
            return true;
        }
        s.tokens.push(id);
        s.counts.push(id);
        // If the client has gone, the next step drops the sequence.
        let _ = s.request.events.send(Event::Token { id, logprobs });
        let full = s.output_len() >= params.max_tokens || s.tokens.len() >= self.config.max_model_len;
        if let Some(mask) = &mut s.next_mask {
            mask.accept(id);
            if full {
                mask.wait(MASK_TIMEOUT);
            }
        }
        if full {
            let complete = matches!(s.next_mask, Some(NextMask::Complete));
            s.finish(if complete { FinishReason::Stop } else { FinishReason::Length });
        }
        full
    }

    fn publish_stats(&self) {
        let (stats, scheduler) = (&self.stats, &self.scheduler);
        stats.running.store(scheduler.running.len() as u64, Relaxed);
        stats.waiting.store(scheduler.waiting() as u64, Relaxed);
        stats.used_blocks.store((scheduler.blocks.total() - scheduler.blocks.available()) as u64, Relaxed);
        stats.prefix_queries.store(scheduler.prefix_queries, Relaxed);
        stats.prefix_hits.store(scheduler.prefix_hits, Relaxed);
        stats.preemptions.store(scheduler.preemptions, Relaxed);
    }
}

/// The tasks for the logits of one sequence's rows in a step, in the order of [`logit_positions`].
fn logits_tasks<'a>(s: &'a Sequence, rows: usize, masked: &'a [u32]) -> Vec<LogitsTask<'a>> {
    let params = &s.request.params;
    let task = |position| match (params.prompt_logprobs, s.request.prompt.get(position + 1)) {
        // The logits at a position are for the token after it.
        (Some(top), Some(&id)) => LogitsTask::Score { id, top },
        _ => LogitsTask::Sample(SamplingMetadata {
            params,
            counts: &s.counts,
            masked,
            allowed: s.allowed(),
            seed: s.seed,
            index: s.output_len(),
        }),
    };
    logit_positions(s, rows).map(task).collect()
}

/// The results of one sequence, from those of its tasks and its hidden states.
fn sequence_output(
    s: &Sequence,
    results: Vec<(&LogitsTask, Result<SampledToken>)>,
    hidden: Vec<Vec<f32>>,
) -> Result<SequenceOutput> {
    let mut output = SequenceOutput { prompt: Vec::new(), hidden, next: NextToken::None };
    for (task, result) in results {
        match (task, &s.next_mask) {
            (LogitsTask::Score { .. }, _) => output.prompt.push(result?.logprobs),
            // Sampled without a mask, and not used.
            (LogitsTask::Sample(_), Some(NextMask::Complete)) => output.next = NextToken::Complete,
            (LogitsTask::Sample(_), Some(NextMask::Computing(_))) => output.next = NextToken::Postponed,
            (LogitsTask::Sample(_), Some(NextMask::Failed(error))) => return Err(error.clone()),
            (LogitsTask::Sample(_), Some(NextMask::Ready { .. }) | None) => {
                let SampledToken { id, logprobs } = result?;
                output.next = NextToken::Sampled(id, logprobs);
            }
        }
    }
    Ok(output)
}

/// The positions of a sequence's next `rows` tokens whose logits the step computes: those that give requested prompt
/// log-probabilities, and the last token's, if output is requested.
fn logit_positions(s: &Sequence, rows: usize) -> impl Iterator<Item = usize> {
    let end = s.computed + rows;
    s.scoring(s.computed..end).chain(s.samples(rows).then_some(end - 1))
}
