//! A series of runs against one server: the warm-up, a measurement of the sustained rate if the grid needs it, and the runs.

use std::time::Duration;

use clap::Args;

use super::grid::{self, GridKind, GridPoint};
use super::load::{self, RunLimits, Stop};
use super::report::{BenchReport, RunReport};
use super::stats::Summary;
use super::target::TargetServer;
use super::traffic::{Arrivals, Traffic};
use super::verdict;
use crate::Result;
use crate::config::seconds;

/// Clients of the run that measures the sustained rate.
const SUSTAINED_CLIENTS: usize = 32;

/// Seconds of that run.
const SUSTAINED_SECONDS: f64 = 60.0;

/// Least seconds of that run, whatever `--scale` says.
const MIN_SUSTAINED_SECONDS: f64 = 20.0;

/// Clients of a closed loop by default.
const CLIENTS: usize = 8;

/// Duration of a run by default.
const DURATION: Duration = Duration::from_secs(60);

/// Seconds of a soak by default.
const SOAK_SECONDS: f64 = 1800.0;

/// The runs of a series.
#[derive(Debug, Clone, Args)]
pub(crate) struct SeriesSettings {
    /// Open loop: requests per second; several values, separated by commas, make a run each
    #[arg(long, value_name = "PER-SECOND", value_delimiter = ',', help_heading = "Traffic")]
    pub(crate) rate: Vec<f64>,
    /// Coefficient of variation of the gaps between requests: 1 is a Poisson process, more is burstier
    #[arg(long, default_value_t = 1.0, help_heading = "Traffic")]
    pub(crate) cv: f64,
    /// Closed loop: clients that wait for each reply; several values, separated by commas, make a run each [default: 8, without
    /// --rate]
    #[arg(long, value_name = "CLIENTS", value_delimiter = ',', conflicts_with = "rate", help_heading = "Traffic")]
    pub(crate) concurrency: Vec<usize>,
    /// Stop sending after this many requests
    #[arg(long, value_name = "N", help_heading = "Traffic")]
    pub(crate) requests: Option<usize>,
    /// Stop sending after this many seconds [default: 60, without --requests]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Traffic")]
    pub(crate) duration: Option<Duration>,
    /// Requests before the first run, which are not measured
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Traffic")]
    pub(crate) warmup: usize,

    /// Run a predefined series
    #[arg(long, value_enum, conflicts_with_all = ["rate", "requests"], help_heading = "Grids")]
    pub(crate) grid: Option<GridKind>,
    /// Multiply the duration of a grid's runs
    #[arg(long, default_value_t = 1.0, help_heading = "Grids")]
    pub(crate) scale: f64,
    /// Requests per second that the server sustains [default: measured first]
    #[arg(long, value_name = "PER-SECOND", help_heading = "Grids")]
    pub(crate) sustained: Option<f64>,
}

impl SeriesSettings {
    /// Number of clients of a growth curve or a soak.
    pub(crate) fn clients(&self) -> usize {
        self.concurrency.first().copied().unwrap_or(CLIENTS)
    }

    /// Duration of a soak.
    pub(crate) fn soak_duration(&self) -> Duration {
        self.duration.unwrap_or(Duration::from_secs_f64(SOAK_SECONDS * self.scale))
    }

    /// The runs; `base` has their common settings.
    fn points(&self, base: &Traffic, sustained: f64) -> Vec<GridPoint> {
        match self.grid {
            Some(GridKind::SLora) => grid::s_lora(base, sustained, self.scale),
            Some(GridKind::Punica) => grid::punica(base, self.scale),
            Some(GridKind::Growth) => grid::growth(base, self.clients(), self.scale),
            Some(GridKind::Overload) => {
                let limits = self.duration.map(|duration| RunLimits { requests: None, duration: Some(duration) });
                grid::overload(base, sustained, self.cv, limits, self.scale)
            }
            Some(GridKind::Soak) | None => self.plain(base),
        }
    }

    /// A run for each rate or number of clients.
    fn plain(&self, base: &Traffic) -> Vec<GridPoint> {
        let default = self.requests.is_none().then_some(DURATION);
        let limits = RunLimits { requests: self.requests, duration: self.duration.or(default) };
        let point = |varies, x, arrivals| GridPoint::new(varies, x, Traffic { arrivals, ..base.clone() }, limits);
        if self.rate.is_empty() {
            let clients = if self.concurrency.is_empty() { &[CLIENTS][..] } else { &self.concurrency };
            clients.iter().map(|&n| point("clients", n as f64, Arrivals::Closed { clients: n })).collect()
        } else {
            self.rate.iter().map(|&rate| point("rate", rate, Arrivals::Open { rate, cv: self.cv })).collect()
        }
    }
}

/// A series in progress.
pub(crate) struct Series<'a> {
    /// The server.
    pub(crate) target: TargetServer,
    /// Traffic that the runs share.
    pub(crate) base: Traffic,
    /// The runs.
    pub(crate) settings: &'a SeriesSettings,
    /// Objective of the time to first token, seconds.
    pub(crate) slo_ttft: f64,
    /// Interrupts the series.
    pub(crate) stop: Stop,
    /// Gets the runs and the verdict.
    pub(crate) report: BenchReport,
}

impl Series<'_> {
    /// Sends the requests that are not measured. False if they were interrupted.
    pub(crate) async fn warm_up(&self) -> Result<bool> {
        if self.settings.warmup == 0 {
            return Ok(true);
        }
        let base = &self.base;
        let traffic = Traffic { arrivals: Arrivals::Closed { clients: 2 }, seed: !base.seed, ..base.clone() };
        let limits = RunLimits { requests: Some(self.settings.warmup), duration: None };
        Ok(!load::run(&self.target, &traffic, limits, self.stop.clone(), "warm-up").await?.interrupted)
    }

    /// Measures all runs until one is interrupted, and passes each to `show`.
    pub(crate) async fn run(&mut self, mut show: impl FnMut(&RunReport)) -> Result<()> {
        let mut sustained = self.settings.sustained.unwrap_or(0.0);
        let scaled = matches!(self.settings.grid, Some(GridKind::SLora | GridKind::Overload));
        if scaled && self.settings.sustained.is_none() {
            let summary = self.measure(self.sustained_run(), None, &mut show).await?;
            if summary.interrupted {
                return Ok(());
            }
            sustained = summary.requests_per_s;
        }
        let judged = (self.settings.grid == Some(GridKind::Overload)).then_some(sustained);
        for point in self.settings.points(&self.base, sustained) {
            if self.measure(point, judged, &mut show).await?.interrupted {
                break;
            }
        }
        Ok(())
    }

    /// The run that measures the sustained rate.
    fn sustained_run(&self) -> GridPoint {
        let seconds = (SUSTAINED_SECONDS * self.settings.scale).max(MIN_SUSTAINED_SECONDS);
        let arrivals = Arrivals::Closed { clients: SUSTAINED_CLIENTS };
        GridPoint {
            varies: "",
            x: 0.0,
            label: "sustained".into(),
            traffic: Traffic { arrivals, ..self.base.clone() },
            limits: RunLimits::seconds(seconds),
        }
    }

    /// Measures one run and adds it to the report. With `sustained`, judges it as an overload of a server that sustains that rate.
    async fn measure(
        &mut self,
        point: GridPoint,
        sustained: Option<f64>,
        show: &mut impl FnMut(&RunReport),
    ) -> Result<Summary> {
        let GridPoint { varies, x, label, mut traffic, limits } = point;
        // A different seed for each run, so that no run finds the prompts of an earlier one in the server's prefix cache.
        traffic.seed = traffic.seed.wrapping_add(self.report.runs.len() as u64);
        let run = load::run(&self.target, &traffic, limits, self.stop.clone(), &label).await?;
        let summary = Summary::of(&run, traffic.arrivals, self.slo_ttft);
        // An interrupted run has no end to judge.
        if let Some(sustained) = sustained.filter(|_| !summary.interrupted) {
            self.report.verdict = Some(verdict::overload(&run, &summary, sustained));
        }
        let run = RunReport {
            label,
            varies: varies.to_owned(),
            x,
            traffic: traffic.to_string(),
            adapters: self.target.adapters[..traffic.adapters].to_vec(),
            summary: summary.clone(),
            records: run.records,
        };
        show(&run);
        self.report.runs.push(run);
        Ok(summary)
    }
}
