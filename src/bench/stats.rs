//! Figures of a run. Quantiles are exact: every sample is kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::{Record, Run};
use super::traffic::Arrivals;

/// A generator that sends later than this, milliseconds at the 99th percentile, blurs what it measures.
const LAG_MS: f64 = 10.0;

/// Share of all processors beyond which a generator takes them from a server on the same machine.
const CPU_SHARE: f64 = 0.25;

/// Quantiles of a set of samples (nearest rank), all 0 of none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// How many.
    pub count: usize,
    /// Arithmetic.
    pub mean: f64,
    /// Half are at most this.
    pub p50: f64,
    /// 9 of 10 are.
    pub p90: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// All are.
    pub max: f64,
}

impl Quantiles {
    /// Of samples in any order.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        let count = samples.len();
        let Some(&max) = samples.last() else { return Self::default() };
        let at = |q: f64| samples[((q * count as f64).ceil() as usize).clamp(1, count) - 1];
        let mean = samples.iter().sum::<f64>() / count as f64;
        Self { count, mean, p50: at(0.5), p90: at(0.9), p99: at(0.99), max }
    }
}

/// Jain's index of fairness (Jain, Chiu and Hawe, 1984): 1 where all have the same, 1/n where one has it all.
pub fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares > 0.0 { sum * sum / (shares.len() as f64 * squares) } else { 1.0 }
}

/// What one adapter's requests saw.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdapterStats {
    /// Its number; none is the base.
    pub adapter: Option<usize>,
    /// Sent.
    pub requests: usize,
    /// Tokens generated a second, of all its requests together.
    pub tokens_per_s: f64,
    /// Tokens a second that one of its requests saw, from when it was due, on average.
    pub speed: f64,
    /// First token, milliseconds.
    pub first_ms: Quantiles,
}

/// How evenly adapters were served.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fairness {
    /// Jain's index of the adapters' throughput. Follows their popularity: compare it between equal traffic only.
    pub jain_throughput: f64,
    /// Jain's index of the speed that a request of each adapter saw, which popularity leaves alone.
    pub jain_speed: f64,
    /// Worst of the adapters' 99th percentiles of the first token over the median one.
    pub worst_p99_over_median: f64,
    /// Each that had requests.
    pub adapters: Vec<AdapterStats>,
}

/// Figures of a run. Latencies count from when a request was due.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// Sent.
    pub requests: usize,
    /// Answered in full.
    pub completed: usize,
    /// Failed, by what went wrong.
    pub failed: BTreeMap<String, usize>,
    /// Broken off with the run.
    pub unfinished: usize,
    /// From the first request to the last reply.
    pub seconds: f64,
    /// Requests a second that were due; none in a closed loop, which follows the server.
    pub offered_per_s: Option<f64>,
    /// Answered in full, a second.
    pub requests_per_s: f64,
    /// Prompt tokens of these, a second.
    pub input_per_s: f64,
    /// Tokens generated for these, a second.
    pub output_per_s: f64,
    /// First token, milliseconds.
    pub first_ms: Quantiles,
    /// Between pieces of text, mostly single tokens, milliseconds.
    pub between_ms: Quantiles,
    /// Mean time of a token after the first, by request, milliseconds.
    pub token_ms: Quantiles,
    /// Whole request, milliseconds.
    pub whole_ms: Quantiles,
    /// The first-token objective, seconds.
    pub slo_s: f64,
    /// Share of all requests that met it; what failed did not.
    pub slo_attained: f64,
    /// How evenly adapters were served.
    pub fairness: Fairness,
    /// How late the generator sent, milliseconds.
    pub lag_ms: Quantiles,
    /// Processors the generator kept busy.
    pub generator_cpus: f64,
    /// The generator was in the way.
    pub warning: Option<String>,
    /// Adapters the server brought into slots meanwhile, where it says.
    pub adapter_misses: Option<u64>,
    /// Of these, from disk.
    pub disk_reads: Option<u64>,
    /// The server's memory before and after, bytes.
    pub resident_bytes: [Option<u64>; 2],
    /// The run was broken off.
    pub interrupted: bool,
}

impl Summary {
    /// Sums a run up.
    pub fn of(run: &Run, arrivals: Arrivals, slo_s: f64) -> Self {
        let records = &run.records;
        let good: Vec<&Record> = records.iter().filter(|r| r.failure.is_none()).collect();
        let ms = |of: fn(&Record) -> Option<f64>| Quantiles::of(good.iter().filter_map(|r| of(r)).map(|s| s * 1e3));
        let mut failed = BTreeMap::new();
        records.iter().filter_map(|r| r.failure.clone()).for_each(|kind| *failed.entry(kind).or_default() += 1);
        let a_second = |of: fn(&Record) -> usize| good.iter().map(|r| of(r)).sum::<usize>() as f64 / run.seconds;
        let requests = records.len() + run.unfinished;
        let attained = good.iter().filter(|r| r.first.is_some_and(|first| first <= slo_s)).count();
        let grown = |of: fn(&super::target::Observed) -> Option<u64>| {
            Some(of(&run.server[1])?.saturating_sub(of(&run.server[0])?))
        };
        let lag_ms = Quantiles::of(records.iter().map(|r| r.lag * 1e3));
        Self {
            requests,
            completed: good.len(),
            failed,
            unfinished: run.unfinished,
            seconds: run.seconds,
            offered_per_s: match arrivals {
                Arrivals::Open { rate, .. } => Some(rate),
                Arrivals::Closed { .. } => None,
            },
            requests_per_s: good.len() as f64 / run.seconds,
            input_per_s: a_second(|r| r.input),
            output_per_s: a_second(|r| r.output),
            first_ms: ms(|r| r.first),
            between_ms: Quantiles::of(good.iter().flat_map(|r| &r.gaps).map(|gap| f64::from(*gap))),
            token_ms: ms(|r| (r.output > 1).then(|| Some((r.end - r.first?) / (r.output - 1) as f64))?),
            whole_ms: ms(|r| Some(r.end)),
            slo_s,
            slo_attained: attained as f64 / requests.max(1) as f64,
            fairness: Fairness::of(records, run.seconds),
            warning: warning(&lag_ms, run.generator_cpus),
            lag_ms,
            generator_cpus: run.generator_cpus,
            adapter_misses: grown(|o| o.adapter_misses),
            disk_reads: grown(|o| o.disk_reads),
            resident_bytes: run.server.map(|o| o.resident_bytes),
            interrupted: run.interrupted,
        }
    }

    /// All that failed.
    pub fn failures(&self) -> usize {
        self.failed.values().sum()
    }
}

impl Fairness {
    fn of(records: &[Record], seconds: f64) -> Self {
        let mut groups: BTreeMap<Option<usize>, Vec<&Record>> = BTreeMap::new();
        records.iter().for_each(|r| groups.entry(r.adapter).or_default().push(r));
        let stats = |(adapter, records): (Option<usize>, Vec<&Record>)| {
            let good: Vec<&&Record> = records.iter().filter(|r| r.failure.is_none()).collect();
            let tokens: usize = good.iter().map(|r| r.output).sum();
            let speeds: f64 = good.iter().map(|r| r.output as f64 / r.end.max(1e-9)).sum();
            AdapterStats {
                adapter,
                requests: records.len(),
                tokens_per_s: tokens as f64 / seconds,
                speed: speeds / good.len().max(1) as f64,
                first_ms: Quantiles::of(good.iter().filter_map(|r| r.first).map(|s| s * 1e3)),
            }
        };
        let adapters: Vec<AdapterStats> = groups.into_iter().map(stats).collect();
        let all = |of: fn(&AdapterStats) -> f64| adapters.iter().map(of).collect::<Vec<f64>>();
        let p99 = Quantiles::of(all(|a| a.first_ms.p99));
        Self {
            jain_throughput: jain(&all(|a| a.tokens_per_s)),
            jain_speed: jain(&all(|a| a.speed)),
            worst_p99_over_median: if p99.p50 > 0.0 { p99.max / p99.p50 } else { 1.0 },
            adapters,
        }
    }
}

/// Says when the generator was in the way.
fn warning(lag: &Quantiles, cpus: f64) -> Option<String> {
    if lag.p99 > LAG_MS {
        return Some(format!(
            "requests left {:.1} ms late at the 99th percentile: the generator, or a machine that it shares, was too slow",
            lag.p99
        ));
    }
    let all = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let busy = cpus > CPU_SHARE * all;
    busy.then(|| format!("the generator kept {cpus:.2} of {all} processors busy: a server on this machine had fewer"))
}
