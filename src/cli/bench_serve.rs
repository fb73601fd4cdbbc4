//! `quiver bench serve`: load on a running server, this one's or another's; `quiver bench page`: plots of what came out.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use crate::bench::client::Client;
use crate::bench::grid::{self, Point};
use crate::bench::load::{self, Bounds, Stop};
use crate::bench::report::{self, Machine, Report, RunReport};
use crate::bench::stats::Summary;
use crate::bench::target::{AdapterField, Process, Target};
use crate::bench::traffic::{Arrivals, Lengths, Popularity, Prompts, Traffic};
use crate::bench::trial::{self, Soak, Verdict};
use crate::config::seconds;
use crate::{Error, Result};

/// Clients of the run that finds what a server sustains, its seconds, and how few these may be scaled to.
const SUSTAIN: (usize, f64, f64) = (32, 60.0, 20.0);

/// What to send, where to, for how long.
#[derive(Debug, Args)]
pub struct ServeBench {
    /// Where the server is
    #[arg(long, default_value = "http://127.0.0.1:8000", help_heading = "Server")]
    url: String,
    /// Start the server with this shell command, and end it afterwards
    #[arg(long, value_name = "COMMAND", help_heading = "Server")]
    start: Option<String>,
    /// Key for inference
    #[arg(long, env = "QUIVER_API_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Server")]
    api_key: Option<String>,
    /// Key for the admin routes, which a soak uses
    #[arg(long, env = "QUIVER_ADMIN_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Server")]
    admin_key: Option<String>,
    /// Name of the base in requests [default: the first that /v1/models lists]
    #[arg(long, help_heading = "Server")]
    model: Option<String>,
    /// A request that takes longer has failed, seconds
    #[arg(long, value_name = "SECONDS", default_value = "600", value_parser = seconds, help_heading = "Server")]
    timeout: Duration,

    /// Open loop: requests a second; several, separated by commas, are a run each
    #[arg(long, value_name = "PER-SECOND", value_delimiter = ',', help_heading = "Traffic")]
    rate: Vec<f64>,
    /// Coefficient of variation of the gaps between requests: 1 is a Poisson process, more comes in bursts
    #[arg(long, default_value_t = 1.0, help_heading = "Traffic")]
    cv: f64,
    /// Closed loop: clients that wait for each reply; several, separated by commas, are a run each [default: 8, without --rate]
    #[arg(long, value_name = "CLIENTS", value_delimiter = ',', conflicts_with = "rate", help_heading = "Traffic")]
    concurrency: Vec<usize>,
    /// Stop sending after this many requests
    #[arg(long, value_name = "N", help_heading = "Traffic")]
    requests: Option<usize>,
    /// Stop sending after this many seconds [default: 60, without --requests]
    #[arg(long, value_name = "SECONDS", value_parser = seconds, help_heading = "Traffic")]
    duration: Option<Duration>,
    /// Requests before the first run that do not count
    #[arg(long, value_name = "N", default_value_t = 4, help_heading = "Traffic")]
    warmup: usize,
    /// Tokens of a prompt: 128, 8..512 or lognormal:MEDIAN:SIGMA:MAX [default: 128; 8..512 in the S-LoRA grid]
    #[arg(long, value_name = "LENGTHS", help_heading = "Traffic")]
    input: Option<Lengths>,
    /// Tokens of a reply, in the same form
    #[arg(long, value_name = "LENGTHS", help_heading = "Traffic")]
    output: Option<Lengths>,
    /// What prompts are: random token ids, or English words for servers that take only text
    #[arg(long, value_enum, default_value = "tokens", help_heading = "Traffic")]
    prompts: PromptKind,
    /// Random token ids are below this
    #[arg(long, value_name = "IDS", default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1..), help_heading = "Traffic")]
    vocab: u32,
    /// Prompts and lengths of replies from a file in ShareGPT's form
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input", "output"], help_heading = "Traffic")]
    conversations: Option<PathBuf>,
    /// Send chat messages; prompts are text then
    #[arg(long, help_heading = "Traffic")]
    chat: bool,
    /// Put these JSON fields into every request
    #[arg(
        long,
        value_name = "JSON",
        default_value = r#"{"ignore_eos": true, "temperature": 0}"#,
        help_heading = "Traffic"
    )]
    body: String,
    /// Same seed, same traffic
    #[arg(long, default_value_t = 0, help_heading = "Traffic")]
    seed: u64,

    /// Adapters that requests choose among [default: none, in grids all]
    #[arg(long, value_name = "N", help_heading = "Adapters")]
    adapters: Option<usize>,
    /// Their names, {} or {:04} for the number [default: those that /v1/models lists]
    #[arg(long, value_name = "PATTERN", help_heading = "Adapters")]
    adapter_names: Option<String>,
    /// Where a request names its adapter
    #[arg(long, value_enum, default_value = "model", help_heading = "Adapters")]
    adapter_field: AdapterField,
    /// Who has which: uniform, distinct, one, zipf:ALPHA, power:ALPHA (S-LoRA's) or geometric:RATIO (Punica's Zipf)
    #[arg(long, default_value = "uniform", help_heading = "Adapters")]
    popularity: Popularity,

    /// A series of runs
    #[arg(long, value_enum, conflicts_with_all = ["rate", "requests"], help_heading = "Grids")]
    grid: Option<Grid>,
    /// Shorten the runs of a grid
    #[arg(long, default_value_t = 1.0, help_heading = "Grids")]
    scale: f64,
    /// Requests a second that the server sustains [default: measured first]
    #[arg(long, value_name = "PER-SECOND", help_heading = "Grids")]
    sustained: Option<f64>,

    /// The objective for the first token, seconds; S-LoRA's is 6
    #[arg(long, value_name = "SECONDS", default_value_t = 6.0, help_heading = "Report")]
    slo_ttft: f64,
    /// Name of the server in plots
    #[arg(long, default_value = "server", help_heading = "Report")]
    name: String,
    /// Write everything here, as JSON
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    out: Option<PathBuf>,
    /// Write plots here, as HTML
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    page: Option<PathBuf>,
}

/// What prompts are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PromptKind {
    /// Random token ids
    Tokens,
    /// English words
    Words,
}

/// Series of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Grid {
    /// Adapters, skew, burstiness and rate, one at a time, scaled to the machine
    SLora,
    /// Distinct, uniform, skewed and identical adapters in a closed loop
    Punica,
    /// From no adapter to 2,000
    Growth,
    /// Twice the sustainable rate for 5 minutes; fails unless the server refuses and goes on
    Overload,
    /// 30 minutes while adapters come and go; every reply is checked (quiver only)
    Soak,
}

/// Plots of several results on one page.
#[derive(Debug, Args)]
pub struct Page {
    /// Files that `bench serve --out` wrote
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Where the page goes
    #[arg(long, value_name = "FILE", default_value = "bench.html")]
    out: PathBuf,
    /// Also write the charts of series here, an SVG each
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
}

impl Page {
    /// Writes it.
    pub fn run(self) -> Result<()> {
        let reports = self.files.iter().map(|file| Report::read(file)).collect::<Result<Vec<_>>>()?;
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

impl ServeBench {
    /// Measures, prints a table and writes the files. Errors: no server, bad settings, a trial that found faults.
    pub fn run(self) -> Result<()> {
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(self.measure())
    }

    async fn measure(self) -> Result<()> {
        let base = self.traffic()?;
        let extra: Map<String, Value> =
            serde_json::from_str(&self.body).map_err(|e| Error::invalid(format!("--body: {e}")))?;
        let client = Client::new(&self.url, self.api_key.clone(), self.timeout)?;
        let mut stop = load::stop_on_ctrl_c();
        let mut process = None;
        if let Some(command) = &self.start {
            if client.get("/v1/models").await.is_some() {
                return Err(Error::invalid(format!(
                    "{} answers already: end that server, or leave --start out",
                    self.url
                )));
            }
            let process = process.insert(Process::start(command)?);
            tokio::select! {
                ready = process.ready(&client) => ready?,
                _ = stop.wait_for(|stopped| *stopped) => return Err(Error::invalid("broken off")),
            }
        }
        let pid = process.as_ref().and_then(Process::pid);
        let field = self.adapter_field;
        let target = Target { client, model: String::new(), adapters: Vec::new(), field, chat: self.chat, extra, pid };
        let result = self.against(target, base, stop).await;
        if let Some(process) = process {
            process.stop().await?;
        }
        result
    }

    /// All runs against a server that is there.
    async fn against(&self, mut target: Target, mut base: Traffic, stop: Stop) -> Result<()> {
        target.discover(self.model.clone(), self.adapter_names.as_deref(), self.adapters).await?;
        let default = if self.grid.is_some() { target.adapters.len() } else { 0 };
        base.adapters = self.adapters.unwrap_or(default);
        let mut report = Report {
            name: self.name.clone(),
            command: std::env::args().collect(),
            date: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: Machine::here(),
            server: target.version().await,
            runs: Vec::new(),
            verdict: None,
        };
        if self.grid == Some(Grid::Soak) {
            let admin = Client::new(&self.url, self.admin_key.clone(), self.timeout)?;
            let clients = self.concurrency.first().copied().unwrap_or(8);
            let duration = self.duration.unwrap_or(Duration::from_secs_f64(1800.0 * self.scale));
            let soak = Soak { target, admin, duration, clients, seed: self.seed };
            report.verdict = Some(soak.run(stop).await?);
            return self.finish(report);
        }
        if self.warmup > 0 {
            let traffic = Traffic { arrivals: Arrivals::Closed { clients: 2 }, seed: !self.seed, ..base.clone() };
            let bounds = Bounds { requests: Some(self.warmup), duration: None };
            if load::run(&target, &traffic, bounds, stop.clone(), "warm-up").await?.interrupted {
                return self.finish(report);
            }
        }
        println!("{}", report::HEAD);
        let mut sustained = self.sustained.unwrap_or(0.0);
        if matches!(self.grid, Some(Grid::SLora | Grid::Overload)) && self.sustained.is_none() {
            let (clients, seconds, least) = SUSTAIN;
            let bounds =
                Bounds { requests: None, duration: Some(Duration::from_secs_f64((seconds * self.scale).max(least))) };
            let traffic = Traffic { arrivals: Arrivals::Closed { clients }, ..base.clone() };
            let point = Point { varies: "", x: 0.0, label: "sustained".into(), traffic, bounds };
            let summary = self.point(&target, point, &mut report, &stop, None).await?;
            if summary.interrupted {
                return self.finish(report);
            }
            sustained = summary.requests_per_s;
        }
        let judged = (self.grid == Some(Grid::Overload)).then_some(sustained);
        for point in self.points(&base, sustained) {
            if self.point(&target, point, &mut report, &stop, judged).await?.interrupted {
                break;
            }
        }
        self.finish(report)
    }

    /// One run; its row is printed and kept. With `sustained` it is judged as an overload.
    async fn point(
        &self,
        target: &Target,
        point: Point,
        report: &mut Report,
        stop: &Stop,
        sustained: Option<f64>,
    ) -> Result<Summary> {
        let Point { varies, x, label, mut traffic, bounds } = point;
        // No run may find the prompts of an earlier one in the server's prefix cache.
        traffic.seed = traffic.seed.wrapping_add(report.runs.len() as u64);
        let run = load::run(target, &traffic, bounds, stop.clone(), &label).await?;
        let summary = Summary::of(&run, traffic.arrivals, self.slo_ttft);
        println!("{}", report::row(&label, &summary));
        // What was broken off has no end to judge.
        if let Some(sustained) = sustained.filter(|_| !summary.interrupted) {
            report.verdict = Some(trial::overload(&run, &summary, sustained));
        }
        report.runs.push(RunReport {
            label,
            varies: varies.to_owned(),
            x,
            traffic: traffic.to_string(),
            adapters: target.adapters[..traffic.adapters].to_vec(),
            summary: summary.clone(),
            records: run.records,
        });
        Ok(summary)
    }

    /// Prints what the table has no room for, and writes the files. Errors: a trial found faults.
    fn finish(&self, report: Report) -> Result<()> {
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

    fn traffic(&self) -> Result<Traffic> {
        let wrong = |what: &str| Err(Error::invalid(what));
        if self.rate.iter().any(|rate| !rate.is_finite() || *rate <= 0.0) || self.concurrency.contains(&0) {
            return wrong("--rate and --concurrency must be above 0");
        }
        if !(self.cv.is_finite() && self.cv >= 0.0 && self.scale.is_finite() && self.scale > 0.0) {
            return wrong("--cv must be a number of at least 0, --scale one above 0");
        }
        if self.duration.is_some() && matches!(self.grid, Some(Grid::SLora | Grid::Punica | Grid::Growth)) {
            return wrong("--duration is for overload and soak; --scale shortens the runs of the other grids");
        }
        let prompts = match (&self.conversations, self.prompts) {
            (Some(file), _) => Prompts::share_gpt(file)?,
            (None, PromptKind::Tokens) if self.chat => return wrong("--chat needs text: add --prompts words"),
            (None, PromptKind::Tokens) => Prompts::Tokens(self.vocab),
            (None, PromptKind::Words) => Prompts::Words,
        };
        let usual = if self.grid == Some(Grid::SLora) { Lengths::Uniform(8, 512) } else { Lengths::Fixed(128) };
        Ok(Traffic {
            arrivals: Arrivals::Closed { clients: 1 },
            input: self.input.unwrap_or(usual),
            output: self.output.unwrap_or(usual),
            prompts,
            adapters: 0,
            popularity: self.popularity,
            seed: self.seed,
        })
    }

    /// The runs that were asked for.
    fn points(&self, base: &Traffic, sustained: f64) -> Vec<Point> {
        let clients = if self.concurrency.is_empty() { &[8][..] } else { &self.concurrency };
        let usual = self.requests.is_none().then_some(Duration::from_secs(60));
        let bounds = Bounds { requests: self.requests, duration: self.duration.or(usual) };
        let point = |varies, x, arrivals, bounds| Point::new(varies, x, Traffic { arrivals, ..base.clone() }, bounds);
        let open = |rate| Arrivals::Open { rate, cv: self.cv };
        match self.grid {
            Some(Grid::SLora) => grid::s_lora(base, sustained, self.scale),
            Some(Grid::Punica) => grid::punica(base, self.scale),
            Some(Grid::Growth) => grid::growth(base, clients[0], self.scale),
            Some(Grid::Overload) => {
                let duration = self.duration.unwrap_or(Duration::from_secs_f64(300.0 * self.scale));
                let bounds = Bounds { requests: None, duration: Some(duration) };
                vec![point("rate", 2.0 * sustained, open(2.0 * sustained), bounds)]
            }
            Some(Grid::Soak) | None if self.rate.is_empty() => {
                clients.iter().map(|&n| point("clients", n as f64, Arrivals::Closed { clients: n }, bounds)).collect()
            }
            Some(Grid::Soak) | None => self.rate.iter().map(|&rate| point("rate", rate, open(rate), bounds)).collect(),
        }
    }
}
