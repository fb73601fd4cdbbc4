//! Grids: the series of runs of several papers, and series that measure scaling and overload.

use clap::ValueEnum;

use super::load::RunLimits;
use super::traffic::{Arrivals, Popularity, Traffic};

/// Requests per second that S-LoRA's A10G sustained with its default traffic. Its rates are scaled by this machine's sustained
/// rate over that one.
const S_LORA_SUSTAINED: f64 = 1.6;

/// Seconds of each of S-LoRA's runs.
const S_LORA_SECONDS: f64 = 300.0;

/// Requests of each of Punica's runs.
const PUNICA_REQUESTS: f64 = 1000.0;

/// Requests that Punica runs at once.
const PUNICA_CLIENTS: usize = 32;

/// Seconds of each run of the growth curve.
const GROWTH_SECONDS: f64 = 60.0;

/// Seconds of an overload.
const OVERLOAD_SECONDS: f64 = 300.0;

/// Kinds of grids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum GridKind {
    /// S-LoRA's sweeps: adapters, skew, burstiness and rate, one at a time, scaled to the machine
    SLora,
    /// Punica's popularities: distinct, uniform, skewed and identical adapters in a closed loop
    Punica,
    /// From no adapter to 2,000
    Growth,
    /// Twice the sustained rate for 5 minutes; fails unless the server refuses requests and continues to serve
    Overload,
    /// 30 minutes while adapters are loaded, replaced and unloaded; checks every reply (quiver only)
    Soak,
}

/// One run of a series.
pub(super) struct GridPoint {
    /// The variable of the series.
    pub(super) varies: &'static str,
    /// Its value.
    pub(super) x: f64,
    /// Label in tables.
    pub(super) label: String,
    /// Traffic of the run.
    pub(super) traffic: Traffic,
    /// Limits of the run.
    pub(super) limits: RunLimits,
}

impl GridPoint {
    /// A run for one value of a variable.
    pub(super) fn new(varies: &'static str, x: f64, traffic: Traffic, limits: RunLimits) -> Self {
        let value = format!("{x:.2}");
        let label = format!("{varies} {}", value.trim_end_matches('0').trim_end_matches('.'));
        Self { varies, x, label, traffic, limits }
    }
}

/// S-LoRA's sweeps (Sheng et al., 2023): one variable at a time around 200 adapters, alpha 1, variation 1, rate 2. `sustained` is
/// this machine's rate, requests per second; `scale` multiplies the duration of the runs.
pub(super) fn s_lora(base: &Traffic, sustained: f64, scale: f64) -> Vec<GridPoint> {
    let rate = |rate: f64| rate * sustained / S_LORA_SUSTAINED;
    let point = |varies, x: f64, adapters: usize, alpha, cv, rate: f64| {
        let traffic = Traffic {
            arrivals: Arrivals::Open { rate, cv },
            adapters: adapters.min(base.adapters),
            popularity: Popularity::Power(alpha),
            ..base.clone()
        };
        GridPoint::new(varies, x, traffic, RunLimits::seconds(S_LORA_SECONDS * scale))
    };
    let adapters = [1, 20, 50, 100, 200].into_iter().filter(|n| *n <= base.adapters.max(1));
    let adapters = adapters.map(|n| point("adapters", n as f64, n, 1.0, 1.0, rate(2.0)));
    let alphas = [0.1, 0.3, 0.6, 1.0].map(|alpha| point("alpha", alpha, 200, alpha, 1.0, rate(2.0)));
    let cvs = [1.0, 2.0, 4.0, 6.0, 8.0].map(|cv| point("cv", cv, 200, 1.0, cv, rate(2.0)));
    let rates = [1.0, 1.5, 2.0, 2.5].map(rate).map(|rate| point("rate", rate, 200, 1.0, 1.0, rate));
    adapters.chain(alphas).chain(cvs).chain(rates).collect()
}

/// Punica's four popularities (Chen et al., 2023): an adapter per request; as many adapters as the square root of the number of
/// requests; each adapter with 1.5 times the requests of the next; one adapter. A closed loop, because Punica's server takes
/// requests first come, first served.
pub(super) fn punica(base: &Traffic, scale: f64) -> Vec<GridPoint> {
    let requests = ((PUNICA_REQUESTS * scale) as usize).max(1);
    let root = (requests as f64).sqrt().ceil() as usize;
    let kinds = [
        ("distinct", requests, Popularity::Distinct),
        ("uniform", root, Popularity::Uniform),
        ("skewed", requests, Popularity::Geometric(1.5)),
        ("identical", 1, Popularity::One),
    ];
    let point = |(label, adapters, popularity): (&str, usize, Popularity)| GridPoint {
        varies: "popularity",
        x: 0.0,
        label: label.to_owned(),
        traffic: Traffic {
            arrivals: Arrivals::Closed { clients: PUNICA_CLIENTS },
            adapters: adapters.min(base.adapters),
            popularity,
            ..base.clone()
        },
        limits: RunLimits { requests: Some(requests), duration: None },
    };
    kinds.map(point).into()
}

/// From the base alone to all adapters, at most 2,000, with uniform popularity in a closed loop.
pub(super) fn growth(base: &Traffic, clients: usize, scale: f64) -> Vec<GridPoint> {
    let counts = [0, 1, 10, 50, 100, 200, 500, 1000, 2000].into_iter().filter(|n| *n <= base.adapters);
    let arrivals = Arrivals::Closed { clients };
    let traffic = |n| Traffic { arrivals, adapters: n, popularity: Popularity::Uniform, ..base.clone() };
    let limits = RunLimits::seconds(GROWTH_SECONDS * scale);
    counts.map(|n| GridPoint::new("adapters", n as f64, traffic(n), limits)).collect()
}

/// Twice the sustained rate. `limits` replace the default duration, which `scale` multiplies.
pub(super) fn overload(
    base: &Traffic,
    sustained: f64,
    cv: f64,
    limits: Option<RunLimits>,
    scale: f64,
) -> Vec<GridPoint> {
    let rate = 2.0 * sustained;
    let traffic = Traffic { arrivals: Arrivals::Open { rate, cv }, ..base.clone() };
    vec![GridPoint::new("rate", rate, traffic, limits.unwrap_or(RunLimits::seconds(OVERLOAD_SECONDS * scale)))]
}
