//! Verdicts: facts and faults of a run, and the judgement of an overload.

use serde::{Deserialize, Serialize};

use super::load::{LoadRun, RequestRecord};
use super::stats::{Quantiles, Summary};

/// Bytes by which memory may grow, in addition to a twentieth, without counting as a leak.
const ALLOWED_GROWTH: u64 = 32 << 20;

/// Samples of memory that a verdict lists.
const MEMORY_SAMPLES: usize = 20;

/// Judgement of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// Observations.
    pub facts: Vec<String>,
    /// Violations; a run without any has passed.
    pub faults: Vec<String>,
}

impl Verdict {
    /// Adds a fault unless `good`.
    pub(super) fn check(&mut self, good: bool, fault: impl Into<String>) {
        if !good {
            self.faults.push(fault.into());
        }
    }

    /// Judges samples of a server's memory, bytes. Caches fill in the first third of a run; the peak of the last third must not be
    /// much above the peak of the middle third.
    pub(super) fn memory(&mut self, samples: &[u64]) {
        let Some([middle, end]) = peaks(samples) else {
            return self.facts.push("memory: the server does not report it, or the run was too short".into());
        };
        let shown = (0..MEMORY_SAMPLES).map(|i| samples[i * (samples.len() - 1) / (MEMORY_SAMPLES - 1)] >> 20);
        let shown: Vec<String> = shown.map(|mib| mib.to_string()).collect();
        self.facts.push(format!("memory over time, MiB: {}", shown.join(" ")));
        self.check(
            end <= middle + middle / 20 + ALLOWED_GROWTH,
            format!(
                "memory grew from {} MiB to {} MiB after the first third (a KV cache that is still filling grows too: start the \
                 server with a small one)",
                middle >> 20,
                end >> 20
            ),
        );
    }
}

/// Peaks of the middle and the last third of the samples.
fn peaks(samples: &[u64]) -> Option<[u64; 2]> {
    let third = samples.len() / 3;
    Some([*samples[third..2 * third].iter().max()?, *samples[2 * third..].iter().max()?])
}

/// Judges a run at a rate above the `sustained` rate, requests per second: the server must refuse requests with `Retry-After`,
/// keep the latency of admitted requests steady, and answer nearly as many requests as without overload.
pub fn overload(run: &LoadRun, summary: &Summary, sustained: f64) -> Verdict {
    let mut verdict = Verdict::default();
    refusals(&mut verdict, run, summary);
    // The queue fills in the first third.
    let third = |i: usize| {
        let part = |r: &&RequestRecord| (r.due * 3.0 / summary.seconds) as usize == i;
        Quantiles::of(run.records.iter().filter(part).filter(|r| r.failure.is_none()).filter_map(|r| r.first))
    };
    let (middle, end) = (third(1), third(2));
    verdict
        .facts
        .push(format!("time to first token of admitted requests: p50 {:.2} s, p99 {:.2} s", middle.p50, middle.p99));
    verdict.check(end.p50 <= middle.p50 * 1.5 + 0.5, format!("latency still rises: p50 {:.2} s at the end", end.p50));
    verdict
        .facts
        .push(format!("{:.2} requests/s answered, {sustained:.2} requests/s without overload", summary.requests_per_s));
    verdict.check(summary.requests_per_s >= 0.8 * sustained, "the server answered less than 80% of the sustained rate");
    verdict.memory(&run.memory);
    verdict
}

/// Judges how a server refused requests.
fn refusals(verdict: &mut Verdict, run: &LoadRun, summary: &Summary) {
    let refused: Vec<_> = run.records.iter().filter(|r| r.failure.as_deref() == Some("http 429")).collect();
    verdict.facts.push(format!(
        "{} requests offered, {} answered, {} refused with 429",
        summary.requests,
        summary.completed,
        refused.len()
    ));
    verdict.check(
        !refused.is_empty(),
        "nothing was refused: the queue holds the whole run; start the server with a shorter one",
    );
    let silent = refused.iter().filter(|r| r.retry_after.is_none()).count();
    verdict.check(silent == 0, format!("{silent} refusals without Retry-After"));
    let other = summary.failures() - refused.len();
    verdict.check(other == 0, format!("{other} requests failed otherwise: {:?}", summary.failed));
}
