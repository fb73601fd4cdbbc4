//! Series of runs: what papers vary, and what shows how a server grows.

use std::time::Duration;

use super::load::Bounds;
use super::traffic::{Arrivals, Popularity, Traffic};

/// Requests a second that S-LoRA's A10G sustained with its default traffic: its rates are scaled by what this machine
/// sustains over that.
const S_LORA_SUSTAINED: f64 = 1.6;

/// Seconds of each of its runs.
const S_LORA_SECONDS: f64 = 300.0;

/// Requests of each of Punica's runs, and how many run at once.
const PUNICA: (usize, usize) = (1000, 32);

/// Seconds of each run of the growth curve.
const GROWTH_SECONDS: f64 = 60.0;

/// One run of a series.
pub struct Point {
    /// The variable.
    pub varies: &'static str,
    /// Its value.
    pub x: f64,
    /// For tables.
    pub label: String,
    /// What is sent.
    pub traffic: Traffic,
    /// For how long.
    pub bounds: Bounds,
}

impl Point {
    /// A run for one value of a variable.
    pub fn new(varies: &'static str, x: f64, traffic: Traffic, bounds: Bounds) -> Self {
        let value = format!("{x:.2}");
        let label = format!("{varies} {}", value.trim_end_matches('0').trim_end_matches('.'));
        Self { varies, x, label, traffic, bounds }
    }
}

fn seconds(seconds: f64) -> Bounds {
    Bounds { requests: None, duration: Some(Duration::from_secs_f64(seconds)) }
}

/// S-LoRA's sweeps (Sheng et al., 2023), one variable at a time around 200 adapters, alpha 1, variation 1, rate 2. `sustained` is
/// what the machine does, requests a second; `scale` shortens the runs.
pub fn s_lora(base: &Traffic, sustained: f64, scale: f64) -> Vec<Point> {
    let rate = |rate: f64| rate * sustained / S_LORA_SUSTAINED;
    let point = |varies, x: f64, adapters: usize, alpha, cv, rate: f64| {
        let traffic = Traffic {
            arrivals: Arrivals::Open { rate, cv },
            adapters: adapters.min(base.adapters),
            popularity: Popularity::Power(alpha),
            ..base.clone()
        };
        Point::new(varies, x, traffic, seconds(S_LORA_SECONDS * scale))
    };
    let adapters = [1, 20, 50, 100, 200].into_iter().filter(|n| *n <= base.adapters.max(1));
    let adapters = adapters.map(|n| point("adapters", n as f64, n, 1.0, 1.0, rate(2.0)));
    let alphas = [0.1, 0.3, 0.6, 1.0].map(|alpha| point("alpha", alpha, 200, alpha, 1.0, rate(2.0)));
    let cvs = [1.0, 2.0, 4.0, 6.0, 8.0].map(|cv| point("cv", cv, 200, 1.0, cv, rate(2.0)));
    let rates = [1.0, 1.5, 2.0, 2.5].map(rate).map(|rate| point("rate", rate, 200, 1.0, 1.0, rate));
    adapters.chain(alphas).chain(cvs).chain(rates).collect()
}

/// Punica's four popularities (Chen et al., 2023): each request its own adapter, the root of their number of adapters, each adapter
/// 1.5 times the next one's requests, all the same. A closed loop, as their server takes requests first come, first served.
pub fn punica(base: &Traffic, scale: f64) -> Vec<Point> {
    let requests = ((PUNICA.0 as f64 * scale) as usize).max(1);
    let root = (requests as f64).sqrt().ceil() as usize;
    let kinds = [
        ("distinct", requests, Popularity::Distinct),
        ("uniform", root, Popularity::Uniform),
        ("skewed", requests, Popularity::Geometric(1.5)),
        ("identical", 1, Popularity::One),
    ];
    let point = |(label, adapters, popularity): (&str, usize, Popularity)| Point {
        varies: "popularity",
        x: 0.0,
        label: label.to_owned(),
        traffic: Traffic {
            arrivals: Arrivals::Closed { clients: PUNICA.1 },
            adapters: adapters.min(base.adapters),
            popularity,
            ..base.clone()
        },
        bounds: Bounds { requests: Some(requests), duration: None },
    };
    kinds.map(point).into()
}

/// From the base alone to as many adapters as there are, up to 2,000, uniform, in a closed loop.
pub fn growth(base: &Traffic, clients: usize, scale: f64) -> Vec<Point> {
    let counts = [0, 1, 10, 50, 100, 200, 500, 1000, 2000].into_iter().filter(|n| *n <= base.adapters);
    let arrivals = Arrivals::Closed { clients };
    let traffic = |n| Traffic { arrivals, adapters: n, popularity: Popularity::Uniform, ..base.clone() };
    counts.map(|n| Point::new("adapters", n as f64, traffic(n), seconds(GROWTH_SECONDS * scale))).collect()
}
