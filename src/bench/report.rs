//! Reports: JSON with every request, a table, and an HTML page of charts.

use std::path::Path;

use bytesize::ByteSize;
use minijinja::{Environment, context};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::load::RequestRecord;
use super::secrets::Secrets;
use super::stats::{AdapterStats, Quantiles, Summary};
use super::verdict::Verdict;
use crate::plot::Chart;
use crate::{Error, Result};

/// Adapters that a page shows per run, those with the longest time to first token first. The JSON has all.
const ADAPTERS_SHOWN: usize = 20;

/// Points of a timeline.
const TIMELINE: usize = 60;

/// Report of one invocation of the generator.
#[derive(Debug, Serialize, Deserialize)]
pub struct BenchReport {
    /// Name of the server in charts.
    pub name: String,
    /// Arguments of the command line.
    pub command: Vec<String>,
    /// Start time, RFC 3339.
    pub date: String,
    /// Version of the generator.
    pub version: String,
    /// Machine of the generator.
    pub machine: Machine,
    /// Name and version as the server reports them.
    pub server: Value,
    /// Its runs, in order.
    pub runs: Vec<RunReport>,
    /// Verdict of an overload or soak.
    pub verdict: Option<Verdict>,
}

/// Description of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Brand of the CPU.
    pub cpu: String,
    /// Hardware threads available to the process.
    pub threads: usize,
    /// Bytes of memory.
    pub memory: u64,
    /// Operating system.
    pub system: String,
}

/// Report of one run.
#[derive(Debug, Serialize, Deserialize)]
pub struct RunReport {
    /// Label, such as `adapters 20`.
    pub label: String,
    /// The variable of its series, such as `adapters`.
    pub varies: String,
    /// Value of this variable.
    pub x: f64,
    /// Description of its traffic.
    pub traffic: String,
    /// Names of the adapters, by index.
    pub adapters: Vec<String>,
    /// Its statistics.
    pub summary: Summary,
    /// Every request.
    pub records: Vec<RequestRecord>,
}

impl Machine {
    /// This machine.
    fn here() -> Self {
        let system = sysinfo::System::new_with_specifics(
            sysinfo::RefreshKind::nothing()
                .with_cpu(sysinfo::CpuRefreshKind::nothing())
                .with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
        );
        Self {
            cpu: system.cpus().first().map_or("unknown", |cpu| cpu.brand().trim()).to_owned(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            memory: system.total_memory(),
            system: sysinfo::System::long_os_version().unwrap_or_default(),
        }
    }
}

impl BenchReport {
    /// A report without runs, which starts now on this machine. It holds no keys.
    pub(crate) fn new(name: &str, mut server: Value, secrets: &Secrets) -> Self {
        secrets.hide_in(&mut server);
        Self {
            name: name.to_owned(),
            command: secrets.hide_arguments(std::env::args()),
            date: chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            machine: Machine::here(),
            server,
            runs: Vec::new(),
            verdict: None,
        }
    }

    /// Reads a report from JSON.
    pub fn read(file: &Path) -> Result<Self> {
        let fail = |e: &dyn std::fmt::Display| Error::invalid(format!("{}: {e}", file.display()));
        serde_json::from_slice(&std::fs::read(file).map_err(|e| fail(&e))?).map_err(|e| fail(&e))
    }

    /// Writes the report as JSON.
    pub(crate) fn write(&self, file: &Path) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|e| Error::internal(e.to_string()))?;
        write(file, &text)
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    std::fs::write(file, text).map_err(|e| Error::invalid(format!("{}: {e}", file.display())))
}

/// Header of the table, in Markdown.
pub(crate) const HEAD: &str = "| | req/s | out tok/s | TTFT p50/p90/p99 ms | ITL p50/p99 ms | whole p50/p99 ms | SLO | Jain | failed | lag p99 ms |\n\
                        |---|---|---|---|---|---|---|---|---|---|";

/// Row of a run in the table.
pub(crate) fn row(label: &str, s: &Summary) -> String {
    let failed: Vec<String> = s.failed.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let short = |ms: f64| if ms < 100.0 { format!("{ms:.1}") } else { format!("{ms:.0}") };
    let ends = |q: &Quantiles| format!("{}/{}", short(q.p50), short(q.p99));
    format!(
        "| {label} | {:.2} | {:.1} | {}/{}/{} | {} | {} | {:.0}% | {:.2} | {} | {} |",
        s.requests_per_s,
        s.output_per_s,
        short(s.first_ms.p50),
        short(s.first_ms.p90),
        short(s.first_ms.p99),
        ends(&s.between_ms),
        ends(&s.whole_ms),
        s.slo_attained * 100.0,
        s.fairness.jain_speed,
        if failed.is_empty() { "0".to_owned() } else { failed.join(", ") },
        short(s.lag_ms.p99),
    )
}

/// Notes about a run that do not fit into the table.
pub(crate) fn notes(s: &Summary) -> Vec<String> {
    let mut notes = vec![format!(
        "{} of {} requests in {:.1} s; latencies count from the time a request was due, not from the time it was sent",
        s.completed, s.requests, s.seconds
    )];
    if s.fairness.adapters.len() > 1 {
        notes.push(format!(
            "{} adapters: Jain's index {:.3} for speed and {:.3} for throughput; the worst adapter's p99 TTFT is {:.2} times the median one",
            s.fairness.adapters.len(),
            s.fairness.jain_speed,
            s.fairness.jain_throughput,
            s.fairness.worst_p99_over_median
        ));
    }
    if let Some(misses) = s.adapter_misses {
        let disk = s.disk_reads.unwrap_or(0);
        notes.push(format!("{misses} adapter loads into slots, {disk} of them from disk"));
    }
    if let [Some(before), Some(after)] = s.resident_bytes {
        notes.push(format!("server memory {} before, {} after", ByteSize(before), ByteSize(after)));
    }
    notes.extend(s.unfinished.gt(&0).then(|| format!("{} requests were interrupted", s.unfinished)));
    notes.extend(s.warning.iter().map(|warning| format!("WARNING: {warning}")));
    notes
}

/// Charts of throughput and time to first token over each variable that a series of the reports varies.
pub fn charts(reports: &[BenchReport]) -> Vec<Chart> {
    let mut names: Vec<&str> = Vec::new();
    let runs = || reports.iter().flat_map(|report| report.runs.iter().map(move |run| (report, run)));
    for (_, run) in runs() {
        let same = runs().filter(|(_, other)| other.varies == run.varies).map(|(_, other)| other.x.to_bits());
        let several = same.collect::<std::collections::HashSet<_>>().len() > 1;
        if several && !names.contains(&run.varies.as_str()) {
            names.push(&run.varies);
        }
    }
    let series = |varies: &str, of: fn(&Summary) -> f64, suffix: &str| {
        let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
        // A logarithmic axis has no zero: only the table shows that run.
        for (report, run) in runs().filter(|(_, run)| run.varies == varies && run.x > 0.0) {
            let name = format!("{}{suffix}", report.name);
            let point = (run.x, of(&run.summary));
            match lines.iter_mut().find(|line| line.0 == name) {
                Some(line) => line.1.push(point),
                None => lines.push((name, vec![point])),
            }
        }
        lines.iter_mut().for_each(|line| line.1.sort_by(|a, b| a.0.total_cmp(&b.0)));
        lines
    };
    let both = |varies: &str| {
        let log_x = matches!(varies, "adapters" | "adapters, closed loop" | "clients");
        let chart = |title: &str, y: &str, lines| Chart {
            title: format!("{title} over {varies}"),
            x: varies.to_owned(),
            y: y.to_owned(),
            log_x,
            lines,
            ..Chart::default()
        };
        let mut latency = series(varies, |s| s.first_ms.p50, " p50");
        latency.extend(series(varies, |s| s.first_ms.p99, " p99"));
        [chart("Throughput", "tokens/s", series(varies, |s| s.output_per_s, "")), chart("First token", "ms", latency)]
    };
    names.into_iter().flat_map(both).collect()
}

/// Charts of a run over time: generated tokens per second, and each request's time to first token.
fn timeline(run: &RunReport) -> [Chart; 2] {
    let of = |failed: bool| {
        let chosen = run.records.iter().filter(move |r| r.failure.is_some() == failed);
        chosen.map(|r| (r.due, r.first.unwrap_or(r.end) * 1e3)).collect::<Vec<_>>()
    };
    let width = (run.summary.seconds / TIMELINE as f64).max(1e-9);
    let mut tokens = vec![0.0; TIMELINE];
    for record in run.records.iter().filter(|r| r.failure.is_none()) {
        // Its tokens are spread evenly from its first token to its last.
        let (from, to) = (record.due + record.first.unwrap_or(record.end), record.due + record.end);
        let bins = ((from / width) as usize).min(TIMELINE - 1)..=((to / width) as usize).min(TIMELINE - 1);
        let share = record.output as f64 / bins.clone().count() as f64;
        bins.for_each(|bin| tokens[bin] += share / width);
    }
    let rate = tokens.iter().enumerate().map(|(i, tokens)| ((i as f64 + 0.5) * width, *tokens)).collect();
    let chart = |y: &str, dots, lines| Chart {
        title: run.label.clone(),
        x: "s".into(),
        y: y.into(),
        dots,
        lines,
        ..Chart::default()
    };
    let mut latency = vec![("first token".to_owned(), of(false))];
    if run.summary.failures() > 0 {
        latency.push(("failed".into(), of(true)));
    }
    [chart("tokens/s", false, vec![("tokens/s".into(), rate)]), chart("first token, ms", true, latency)]
}

/// Rows of the adapters with the longest time to first token: name, requests, tokens per second, TTFT p50 and p99 in
/// milliseconds.
fn slowest(run: &RunReport) -> Vec<[String; 5]> {
    let mut adapters: Vec<&AdapterStats> = run.summary.fairness.adapters.iter().collect();
    adapters.sort_by(|a, b| b.first_ms.p99.total_cmp(&a.first_ms.p99));
    let row = |a: &&AdapterStats| {
        let name = a.adapter.map_or("none", |i| run.adapters[i].as_str()).to_owned();
        let (p50, p99) = (format!("{:.0}", a.first_ms.p50), format!("{:.0}", a.first_ms.p99));
        [name, a.requests.to_string(), format!("{:.1}", a.tokens_per_s), p50, p99]
    };
    adapters.iter().take(ADAPTERS_SHOWN).map(row).collect()
}

/// Writes an HTML page of several reports: tables, charts of all series, and a timeline per run.
pub(crate) fn page(reports: &[BenchReport], file: &Path) -> Result<()> {
    let draw = |charts: &[Chart]| charts.iter().map(Chart::svg).collect::<Result<Vec<_>>>();
    let mut views = Vec::new();
    for report in reports {
        let mut runs = Vec::new();
        for run in &report.runs {
            let cells: Vec<String> =
                row("", &run.summary).split(" | ").skip(1).map(|c| c.trim_matches(['|', ' ']).into()).collect();
            runs.push(context! {
                label => &run.label, traffic => &run.traffic, cells, notes => notes(&run.summary), plots => draw(&timeline(run))?,
                adapters => slowest(run),
            });
        }
        views.push(context! {
            name => &report.name, date => &report.date, command => report.command.join(" "), runs,
            machine => format!("{}, {} threads, {}, {}", report.machine.cpu, report.machine.threads, ByteSize(report.machine.memory), report.machine.system),
        });
    }
    let head = HEAD.lines().next().unwrap_or_default().trim_matches([' ', '|']);
    let head: Vec<&str> = head.split('|').map(str::trim).collect();
    let environment = Environment::new();
    let text = environment
        .render_named_str(
            "page.html",
            include_str!("page.html"),
            context! {
                reports => views, plots => draw(&charts(reports))?, head,
            },
        )
        .map_err(|e| Error::internal(format!("cannot render the page: {e:#}")))?;
    write(file, &text)
}
