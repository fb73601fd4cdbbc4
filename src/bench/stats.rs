//! Statistics of a run. Quantiles are exact, because every sample is kept.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::load::{LoadRun, RequestRecord};
use super::target::Observed;
use super::traffic::Arrivals;

/// Largest 99th percentile of the lag, milliseconds, without a warning.
const MAX_LAG_MS: f64 = 10.0;

/// Largest share of the CPUs that the generator may keep busy without a warning.
const MAX_CPU_SHARE: f64 = 0.25;

/// Quantiles of samples (nearest rank); all 0 without samples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Number of samples.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Quantiles {
    /// Quantiles of samples in any order.
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

/// Jain's fairness index (Jain, Chiu and Hawe, 1984): 1 if all shares are equal, 1/n if one has everything.
pub fn jain(shares: &[f64]) -> f64 {
    let (sum, squares) = shares.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares > 0.0 { sum * sum / (shares.len() as f64 * squares) } else { 1.0 }
}

/// Statistics of one adapter's requests.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AdapterStats {
    /// Index of the adapter; `None` is the base.
    pub adapter: Option<usize>,
    /// Requests that have ended.
    pub requests: usize,
    /// Generated tokens per second, all its requests together.
    pub tokens_per_s: f64,
    /// Mean over its requests of generated tokens per second, from the time each was due.
    pub speed: f64,
    /// Time to first token, milliseconds.
    pub first_ms: Quantiles,
}

/// Fairness between adapters.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fairness {
    /// Jain's index of the adapters' throughput. It depends on their popularity: compare it for equal traffic only.
    pub jain_throughput: f64,
    /// Jain's index of the adapters' speed, which does not depend on their popularity.
    pub jain_speed: f64,
    /// Largest over median of the adapters' 99th percentiles of the time to first token.
    pub worst_p99_over_median: f64,
    /// The adapters that had requests.
    pub adapters: Vec<AdapterStats>,
}

/// Statistics of a run. Latencies count from the time a request was due.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// Requests sent.
    pub requests: usize,
    /// Requests answered in full.
    pub completed: usize,
    /// Failed requests by kind of failure.
    pub failed: BTreeMap<String, usize>,
    /// Requests that had not ended when the run was interrupted.
    pub unfinished: usize,
    /// From the first request to the last reply, seconds.
    pub seconds: f64,
    /// Requests due per second; `None` in a closed loop, whose rate depends on the server.
    pub offered_per_s: Option<f64>,
    /// Requests answered in full per second.
    pub requests_per_s: f64,
    /// Prompt tokens of these per second.
    pub input_per_s: f64,
    /// Generated tokens of these per second.
    pub output_per_s: f64,
    /// Time to first token, milliseconds.
    pub first_ms: Quantiles,
    /// Inter-token latency, milliseconds: between pieces of text, mostly single tokens.
    pub between_ms: Quantiles,
    /// Mean time per token after the first, per request, milliseconds.
    pub token_ms: Quantiles,
    /// Time of the whole request, milliseconds.
    pub whole_ms: Quantiles,
    /// Objective of the time to first token, seconds.
    pub slo_s: f64,
    /// Share of all requests that met it. Failed requests did not.
    pub slo_attained: f64,
    /// Fairness between adapters.
    pub fairness: Fairness,
    /// Delay of sending, milliseconds.
    pub lag_ms: Quantiles,
    /// CPUs that the generator kept busy, on average.
    pub generator_cpus: f64,
    /// Why the generator may have distorted the results.
    pub warning: Option<String>,
    /// Adapters that the server loaded into slots during the run, if it reports them.
    pub adapter_misses: Option<u64>,
    /// Those that were read from disk.
    pub disk_reads: Option<u64>,
    /// The server's resident memory before and after the run, bytes.
    pub resident_bytes: [Option<u64>; 2],
    /// ctrl-C interrupted the run.
    pub interrupted: bool,
}

impl Summary {
    /// Summarises a run.
    pub fn of(run: &LoadRun, arrivals: Arrivals, slo_s: f64) -> Self {
        let records = &run.records;
        let good: Vec<&RequestRecord> = records.iter().filter(|r| r.failure.is_none()).collect();
        let ms =
            |of: fn(&RequestRecord) -> Option<f64>| Quantiles::of(good.iter().filter_map(|r| of(r)).map(|s| s * 1e3));
        let mut failed = BTreeMap::new();
        records.iter().filter_map(|r| r.failure.clone()).for_each(|kind| *failed.entry(kind).or_default() += 1);
        let a_second = |of: fn(&RequestRecord) -> usize| good.iter().map(|r| of(r)).sum::<usize>() as f64 / run.seconds;
        let requests = records.len() + run.unfinished;
        let attained = good.iter().filter(|r| r.first.is_some_and(|first| first <= slo_s)).count();
        let grown = |of: fn(&Observed) -> Option<u64>| Some(of(&run.server[1])?.saturating_sub(of(&run.server[0])?));
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

    /// Number of failed requests.
    pub fn failures(&self) -> usize {
        self.failed.values().sum()
    }
}

impl Fairness {
    fn of(records: &[RequestRecord], seconds: f64) -> Self {
        let mut groups: BTreeMap<Option<usize>, Vec<&RequestRecord>> = BTreeMap::new();
        records.iter().for_each(|r| groups.entry(r.adapter).or_default().push(r));
        let stats = |(adapter, records): (Option<usize>, Vec<&RequestRecord>)| {
            let good: Vec<&&RequestRecord> = records.iter().filter(|r| r.failure.is_none()).collect();
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

/// Explains why the generator may have distorted the results, if it may.
fn warning(lag: &Quantiles, cpus: f64) -> Option<String> {
    if lag.p99 > MAX_LAG_MS {
        return Some(format!(
            "requests were sent {:.1} ms late at the 99th percentile: the generator or its machine was too slow",
            lag.p99
        ));
    }
    let all = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let busy = cpus > MAX_CPU_SHARE * all;
    busy.then(|| {
        format!("the generator kept {cpus:.2} of {all} CPUs busy, which a server on this machine could not use")
    })
}
