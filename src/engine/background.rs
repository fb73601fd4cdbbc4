//! Work that fills what serving leaves of the engine's thread, a slice at a time.
//!
//! While no request can run, slices follow each other. Between the steps of requests, one runs only while the background has
//! had less than its share of the recent time, and, while sequences decode, only if it is likely to end before their next
//! token is late.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use super::EngineStats;

/// Something to do beside serving, such as training.
pub trait BackgroundWork: Send {
    /// Does one bounded piece of work (a decoder block, an optimiser step), to its end on the device too, so that its time
    /// is known; false when there is nothing to do.
    fn run_slice(&mut self) -> bool;
}

/// Background work and what it may take from requests.
pub struct BackgroundTask {
    /// What to do.
    pub work: Box<dyn BackgroundWork>,
    /// Largest part of the time that it gets while requests run, 0 to 1.
    pub share: f64,
    /// Longest pause that it may put between two steps while sequences decode.
    pub max_delay: Duration,
}

/// Seconds after which past time counts half, in shares and in the prediction of a slice's time. A slice that was twice too
/// long for the delay is so tried again after as long.
const HALF_LIFE: f64 = 5.0;

/// Where recent time went, all of it fading.
#[derive(Debug, Default)]
struct RecentUsage {
    /// Seconds of steps.
    serving: f64,
    /// Seconds of slices between steps; those of idle time are nobody's loss.
    background: f64,
    /// Seconds that a slice may well take: the longest recent one.
    predicted: f64,
}

impl RecentUsage {
    fn pass(&mut self, seconds: f64) {
        let left = f64::exp2(-seconds / HALF_LIFE);
        for value in [&mut self.serving, &mut self.background, &mut self.predicted] {
            *value *= left;
        }
    }

    fn step(&mut self, seconds: f64) {
        self.pass(seconds);
        self.serving += seconds;
    }

    fn slice(&mut self, seconds: f64, idle: bool) {
        self.pass(seconds);
        self.background += if idle { 0.0 } else { seconds };
        self.predicted = self.predicted.max(seconds);
    }

    /// Whether the background has had less than `share` of the time.
    fn below(&self, share: f64) -> bool {
        self.background < share * (self.serving + self.background)
    }
}

/// The task on the engine's thread.
pub(super) struct TimeSlicer {
    /// `None` once it is over: there was none, or it panicked.
    task: Option<BackgroundTask>,
    usage: RecentUsage,
}

impl TimeSlicer {
    pub(super) fn new(task: Option<BackgroundTask>) -> Self {
        Self { task, usage: RecentUsage::default() }
    }

    /// One slice while no request can run; false when there is nothing to do.
    pub(super) fn idle(&mut self, stats: &EngineStats) -> bool {
        self.slice(stats, true).is_some()
    }

    /// The slices that fit after a step of requests that took `step`.
    pub(super) fn after_step(&mut self, step: Duration, decoding: bool, stats: &EngineStats) {
        stats.serving_micros.fetch_add(step.as_micros() as u64, Relaxed);
        self.usage.step(step.as_secs_f64());
        let mut delay = 0.0;
        while let Some(task) = &self.task {
            // Where nobody waits for a next token, a slice may be longer than the delay.
            let in_time = delay + self.usage.predicted <= task.max_delay.as_secs_f64() || (!decoding && delay == 0.0);
            if !in_time || !self.usage.below(task.share) {
                return;
            }
            let Some(seconds) = self.slice(stats, false) else { return };
            delay += seconds;
        }
    }

    /// Seconds that it took, where there was something to do.
    fn slice(&mut self, stats: &EngineStats, idle: bool) -> Option<f64> {
        let task = self.task.as_mut()?;
        let began = Instant::now();
        let Ok(worked) = catch_unwind(AssertUnwindSafe(|| task.work.run_slice())) else {
            // What it left half done is not to be trusted. Whoever waits for it sees its channels close.
            tracing::error!("background work panicked and is over; serving goes on");
            self.task = None;
            return None;
        };
        let took = began.elapsed();
        if !worked {
            return None;
        }
        self.usage.slice(took.as_secs_f64(), idle);
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
            usage.step(0.01);
            serving += 0.01;
            if usage.below(0.3) {
                usage.slice(0.04, false);
                background += 0.04;
            }
        }
        let share = background / (serving + background);
        assert!((share - 0.3).abs() < 0.01, "{share}");
        // A minute of steps without any work to do does not save up a minute for later.
        (0..6000).for_each(|_| usage.step(0.01));
        let mut burst: f64 = 0.0;
        while usage.below(0.3) {
            usage.slice(0.04, false);
            burst += 0.04;
        }
        assert!(burst < HALF_LIFE, "{burst}");
    }

    #[test]
    fn idle_time_costs_no_share_and_a_long_slice_is_forgotten_by_halves() {
        let mut usage = RecentUsage::default();
        (0..100).for_each(|_| usage.slice(0.5, true));
        usage.step(0.001);
        assert!(usage.below(0.01));
        assert!((usage.predicted - 0.5).abs() < 1e-3);
        (0..50).for_each(|_| usage.step(0.1));
        assert!((usage.predicted - 0.25).abs() < 1e-3, "{}", usage.predicted);
        usage.slice(0.01, false);
        assert!(usage.predicted > 0.2, "a short one does not hide that others were long");
    }
}
