//! `quiver bench serve`: a running server under load; `quiver bench page`: a page of the reports.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use crate::bench::client::Client;
use crate::bench::grid::GridKind;
use crate::bench::load::{self, Stop};
use crate::bench::report::{self, BenchReport};
use crate::bench::secrets::Secrets;
use crate::bench::series::{Series, SeriesSettings};
use crate::bench::soak::Soak;
use crate::bench::target::{AdapterField, ServerProcess, TargetServer};
use crate::bench::traffic::{Arrivals, Lengths, Popularity, Prompts, Traffic};
use crate::bench::verdict::Verdict;
use crate::config::seconds;
use crate::{Error, Result};

/// Arguments of `quiver bench serve`.
#[derive(Debug, Args)]
pub(super) struct ServeBenchArgs {
    /// URL of the server
    #[arg(long, default_value = "http://127.0.0.1:8000", help_heading = "Server")]
    url: String,
    /// Start the server with this shell command, and stop it afterwards
    #[arg(long, value_name = "COMMAND", help_heading = "Server")]
    start: Option<String>,
    /// Key for inference
    #[arg(long, env = "QUIVER_API_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Server")]
    api_key: Option<String>,
    /// Key for the admin routes, which a soak uses
    #[arg(long, env = "QUIVER_ADMIN_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Server")]
    admin_key: Option<String>,
    /// Name of the base in requests [default: the first in /v1/models]
    #[arg(long, help_heading = "Server")]
    model: Option<String>,
    /// Timeout of a request, seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds, help_heading = "Server")]
    timeout: Duration,

    #[command(flatten)]
    series: SeriesSettings,

    /// Tokens of a prompt: 128, 8..512 or lognormal:MEDIAN:SIGMA:MAX [default: 128; 8..512 in the S-LoRA grid]
    #[arg(long, value_name = "LENGTHS", help_heading = "Traffic")]
    input: Option<Lengths>,
    /// Tokens of a reply, in the same format
    #[arg(long, value_name = "LENGTHS", help_heading = "Traffic")]
    output: Option<Lengths>,
    /// Content of prompts: random token ids, or English words for servers that accept only text
    #[arg(long, value_enum, default_value = "tokens", help_heading = "Traffic")]
    prompts: PromptKind,
    /// Upper bound (exclusive) of random token ids
    #[arg(long, value_name = "IDS", default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Traffic")]
    vocab: u32,
    /// Take prompts and lengths of replies from a file in ShareGPT's format
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "output"], help_heading = "Traffic")]
    conversations: Option<PathBuf>,
    /// Send chat messages; prompts must be text
    #[arg(long, help_heading = "Traffic")]
    chat: bool,
    /// Add these JSON fields to every request
    #[arg(
        long,
        value_name = "JSON",
        default_value = r#"{"ignore_eos": true, "temperature": 0}"#,
        help_heading = "Traffic"
    )]
    body: String,
    /// Seed of the traffic: the same seed gives the same traffic
    #[arg(long, default_value_t = 0, help_heading = "Traffic")]
    seed: u64,

    /// Number of adapters that requests choose from [default: none; all in grids]
    #[arg(long, value_name = "N", help_heading = "Adapters")]
    adapters: Option<usize>,
    /// Names of the adapters, with {} or {:04} for the index [default: those in /v1/models]
    #[arg(long, value_name = "PATTERN", help_heading = "Adapters")]
    adapter_names: Option<String>,
    /// Request field that names the adapter
    #[arg(long, value_enum, default_value = "model", help_heading = "Adapters")]
    adapter_field: AdapterField,
    /// How requests choose adapters: uniform, distinct, one, zipf:ALPHA, power:ALPHA (S-LoRA's) or geometric:RATIO (Punica's
    /// Zipf)
    #[arg(long, default_value = "uniform", help_heading = "Adapters")]
    popularity: Popularity,

    /// Objective for the time to first token, seconds; S-LoRA's is 6
    #[arg(long, value_name = "SECONDS", default_value_t = 6.0, help_heading = "Report")]
    slo_ttft: f64,
    /// Name of the server in charts
    #[arg(long, default_value = "server", help_heading = "Report")]
    name: String,
    /// Write the report to this file, as JSON
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    out: Option<PathBuf>,
    /// Write charts to this file, as HTML
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    page: Option<PathBuf>,
}

/// Content of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PromptKind {
    /// Random token ids
    Tokens,
    /// English words
    Words,
}

/// Arguments of `quiver bench page`.
#[derive(Debug, Args)]
pub(super) struct PageArgs {
    /// Reports that `bench serve --out` wrote
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Write the page to this file
    #[arg(long, value_name = "FILE", default_value = "bench.html")]
    out: PathBuf,
    /// Also write each chart of a series to this directory, as SVG
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

impl PageArgs {
    pub(super) fn run(self) -> Result<()> {
        let reports = self.files.iter().map(|file| BenchReport::read(file)).collect::<Result<Vec<_>>>()?;
        report::page(&reports, &self.out)?;
        if let Some(dir) = &self.svg {
            std::fs::create_dir_all(dir)?;
            for chart in report::charts(&reports) {
                std::fs::write(dir.join(chart.title.to_lowercase().replace(' ', "-") + ".svg"), chart.svg()?)?;
            }
        }
        println!("{}", self.out.display());
        Ok(())
    }
}

impl ServeBenchArgs {
    /// Measures, prints a table and writes the files. Errors: no server, invalid settings, a verdict with faults.
    pub(super) async fn run(self) -> Result<()> {
        let secrets = self.secrets();
        self.load().await.map_err(|mut e| {
            e.message = secrets.hide(&e.message);
            e
        })
    }

    fn secrets(&self) -> Secrets {
        Secrets::new([self.api_key.clone(), self.admin_key.clone()])
    }

    async fn load(self) -> Result<()> {
        let traffic = self.traffic()?;
        let extra: Map<String, Value> =
            serde_json::from_str(&self.body).map_err(|e| Error::invalid(format!("--body: {e}")))?;
        let client = Client::new(&self.url, self.api_key.clone(), self.timeout)?;
        let mut stop = load::stop_on_ctrl_c();
        let mut process = None;
        if let Some(command) = &self.start {
            if client.get("/v1/models").await.is_some() {
                return Err(Error::invalid(format!("a server runs at {} already: stop it, or omit --start", self.url)));
            }
            let process = process.insert(ServerProcess::start(command)?);
            tokio::select! {
                ready = process.ready(&client) => ready?,
                _ = stop.wait_for(|stopped| *stopped) => return Err(Error::invalid("interrupted")),
            }
        }
        let pid = process.as_ref().and_then(ServerProcess::pid);
        let field = self.adapter_field;
        let target =
            TargetServer { client, model: String::new(), adapters: Vec::new(), field, chat: self.chat, extra, pid };
        let result = self.measure(target, traffic, stop).await;
        if let Some(process) = process {
            process.stop().await?;
        }
        result
    }

    /// Runs the soak or the series against a server that is ready.
    async fn measure(&self, mut target: TargetServer, mut base: Traffic, stop: Stop) -> Result<()> {
        target.discover(self.model.clone(), self.adapter_names.as_deref(), self.adapters).await?;
        let settings = &self.series;
        let default = if settings.grid.is_some() { target.adapters.len() } else { 0 };
        base.adapters = self.adapters.unwrap_or(default);
        let mut report = BenchReport::new(&self.name, target.version().await, &self.secrets());
        if settings.grid == Some(GridKind::Soak) {
            let admin = Client::new(&self.url, self.admin_key.clone(), self.timeout)?;
            let (duration, clients) = (settings.soak_duration(), settings.clients());
            let soak = Soak { target, admin, duration, clients, seed: self.seed };
            report.verdict = Some(soak.run(stop).await?);
            return self.finish(report);
        }
        let mut series = Series { target, base, settings, slo_ttft: self.slo_ttft, stop, report };
        if series.warm_up().await? {
            println!("{}", report::HEAD);
            series.run(|run| println!("{}", report::row(&run.label, &run.summary))).await?;
        }
        self.finish(series.report)
    }

    /// Prints notes and the verdict, and writes the files. Errors: the verdict has faults.
    fn finish(&self, report: BenchReport) -> Result<()> {
        for run in &report.runs {
            println!("\n{}: {}", run.label, run.traffic);
            report::notes(&run.summary).iter().for_each(|note| println!("  {note}"));
        }
        if let Some(out) = &self.out {
            report.write(out)?;
        }
        let Verdict { facts, faults } = report.verdict.clone().unwrap_or_default();
        if let Some(page) = &self.page {
            report::page(&[report], page)?;
        }
        facts.iter().for_each(|fact| println!("{fact}"));
        faults.iter().for_each(|fault| println!("FAULT: {fault}"));
        if faults.is_empty() { Ok(()) } else { Err(Error::invalid(format!("{} faults", faults.len()))) }
    }

    /// The traffic that the runs share. Errors: invalid settings.
    fn traffic(&self) -> Result<Traffic> {
        let wrong = |what: &str| Err(Error::invalid(what));
        let SeriesSettings { rate, cv, concurrency, duration, grid, scale, .. } = &self.series;
        if rate.iter().any(|rate| !rate.is_finite() || *rate <= 0.0) || concurrency.contains(&0) {
            return wrong("--rate and --concurrency must be above 0");
        }
        if !(cv.is_finite() && *cv >= 0.0 && scale.is_finite() && *scale > 0.0) {
            return wrong("--cv must be a number of at least 0, --scale a number above 0");
        }
        if duration.is_some() && matches!(grid, Some(GridKind::SLora | GridKind::Punica | GridKind::Growth)) {
            return wrong("--duration is for overload and soak; --scale shortens the runs of the other grids");
        }
        let prompts = match (&self.conversations, self.prompts) {
            (Some(file), _) => Prompts::share_gpt(file)?,
            (None, PromptKind::Tokens) if self.chat => return wrong("--chat needs text: add --prompts words"),
            (None, PromptKind::Tokens) => Prompts::Tokens(self.vocab),
            (None, PromptKind::Words) => Prompts::Words,
        };
        let default = if *grid == Some(GridKind::SLora) { Lengths::Uniform(8, 512) } else { Lengths::Fixed(128) };
        Ok(Traffic {
            arrivals: Arrivals::Closed { clients: 1 },
            input: self.input.unwrap_or(default),
            output: self.output.unwrap_or(default),
            prompts,
            adapters: 0,
            popularity: self.popularity,
            seed: self.seed,
        })
    }
}
