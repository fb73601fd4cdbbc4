//! Background work on the engine thread, in time slices between steps.
//!
//! While no request can run, slices run back to back. Between the steps of requests, a slice runs only while background work
//! has had less than its share of the recent time, and, while sequences decode, only if it is predicted to end within the
//! maximum delay of their next token.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::EngineStats;
use crate::{Error, Result};

/// Work that can run in time slices, such as training.
pub trait BackgroundWork: Send {
    /// Runs one bounded piece of work, such as a decoder block or an optimiser step. The piece has also ended on the device
    /// when this returns, so that its time is known. Returns false if there is nothing to do.
    fn run_slice(&mut self) -> bool;
}

/// Background work and its limits.
pub struct BackgroundTask {
    /// The work.
    pub work: Box<dyn BackgroundWork>,
    /// Largest share of the time that it gets while requests run, from 0 to 1.
    pub share: f64,
    /// Target for the longest pause between two steps while sequences decode.
    pub max_delay: Duration,
}

impl BackgroundTask {
    /// Checks the share. Errors: it is not from 0 to 1.
    pub(super) fn check(&self) -> Result<()> {
        if (0.0..=1.0).contains(&self.share) {
            return Ok(());
        }
        Err(Error::invalid(format!("the share of background work is {}; it must be from 0 to 1", self.share)))
    }
}

/// Seconds after which past time counts half, both for shares and for the predicted time of a slice. A slice that took twice
/// the maximum delay is therefore tried again after one half-life.
const HALF_LIFE: f64 = 5.0;

/// Recent use of the engine thread, in seconds that decay exponentially.
#[derive(Debug, Default)]
struct RecentUsage {
    /// Time of steps.
    serving: f64,
    /// Time of slices between steps. Slices in idle time do not count.
    background: f64,
    /// Predicted time of the next slice: the longest recent one.
    predicted: f64,
}

impl RecentUsage {
    fn decay(&mut self, seconds: f64) {
        let factor = f64::exp2(-seconds / HALF_LIFE);
        for value in [&mut self.serving, &mut self.background, &mut self.predicted] {
            *value *= factor;
        }
    }

    fn add_step(&mut self, seconds: f64) {
        self.decay(seconds);
        self.serving += seconds;
    }

    fn add_slice(&mut self, seconds: f64, idle: bool) {
        self.decay(seconds);
        self.background += if idle { 0.0 } else { seconds };
        self.predicted = self.predicted.max(seconds);
    }

    /// Whether background work has had less than `share` of the time.
    fn below(&self, share: f64) -> bool {
        self.background < share * (self.serving + self.background)
    }
}

/// Runs the background task on the engine thread.
pub(super) struct TimeSlicer {
    /// `None` without a task, or after the task has panicked.
    task: Option<BackgroundTask>,
    usage: RecentUsage,
}

impl TimeSlicer {
    pub(super) fn new(task: Option<BackgroundTask>) -> Self {
        Self { task, usage: RecentUsage::default() }
    }

    /// Runs one slice while no request can run. Returns false if there is nothing to do.
    pub(super) fn run_idle(&mut self, stats: &EngineStats) -> bool {
        self.run_slice(stats, true).is_some()
    }

    /// Runs the slices that fit after a step of requests that took `step`. `decoding`: sequences wait for their next token.
    pub(super) fn run_after_step(&mut self, step: Duration, decoding: bool, stats: &EngineStats) {
        stats.serving_micros.fetch_add(step.as_micros() as u64, Relaxed);
        self.usage.add_step(step.as_secs_f64());
        let mut delay = 0.0;
        while let Some(task) = &self.task {
            // While no sequence decodes, one slice may exceed the maximum delay.
            let in_time = delay + self.usage.predicted <= task.max_delay.as_secs_f64() || (!decoding && delay == 0.0);
            if !in_time || !self.usage.below(task.share) {
                return;
            }
            let Some(seconds) = self.run_slice(stats, false) else { return };
            delay += seconds;
        }
    }

    /// Runs one slice and returns its seconds, or `None` if there is nothing to do.
    fn run_slice(&mut self, stats: &EngineStats, idle: bool) -> Option<f64> {
        let task = self.task.as_mut()?;
        let began = Instant::now();
        let Ok(worked) = catch_unwind(AssertUnwindSafe(|| task.work.run_slice())) else {
            // Its state may be inconsistent, so it is dropped. Clients that wait for it see its channels close.
            tracing::error!("the background task panicked and has ended; serving continues");
            self.task = None;
            return None;
        };
        let took = began.elapsed();
        if !worked {
            return None;
        }
        self.usage.add_slice(took.as_secs_f64(), idle);
        stats.background_slices.fetch_add(1, Relaxed);
        stats.background_micros.fetch_add(took.as_micros() as u64, Relaxed);
        Some(took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_kept_over_time_and_old_time_is_forgotten() {
        let mut usage = RecentUsage::default();
        assert!(!usage.below(0.3), "nothing was served yet");
        let (mut serving, mut background) = (0.0_f64, 0.0_f64);
        for _ in 0..10_000 {
            usage.add_step(0.01);
            serving += 0.01;
            if usage.below(0.3) {
                usage.add_slice(0.04, false);
                background += 0.04;
            }
        }
        let share = background / (serving + background);
        assert!((share - 0.3).abs() < 0.01, "{share}");
        // A minute of steps without background work does not earn a minute of background time.
        (0..6000).for_each(|_| usage.add_step(0.01));
        let mut burst: f64 = 0.0;
        while usage.below(0.3) {
            usage.add_slice(0.04, false);
            burst += 0.04;
        }
        assert!(burst < HALF_LIFE, "{burst}");
    }

    #[test]
    fn idle_time_costs_no_share_and_a_long_slice_is_forgotten_by_halves() {
        let mut usage = RecentUsage::default();
        (0..100).for_each(|_| usage.add_slice(0.5, true));
        usage.add_step(0.001);
        assert!(usage.below(0.01));
        assert!((usage.predicted - 0.5).abs() < 1e-3);
        (0..50).for_each(|_| usage.add_step(0.1));
        assert!((usage.predicted - 0.25).abs() < 1e-3, "{}", usage.predicted);
        usage.add_slice(0.01, false);
        assert!(usage.predicted > 0.2, "a short one does not hide that others were long");
    }
}
