//! Keeps to a schedule, whatever the server does, and times every reply.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::Reply;
use super::target::{Observed, Target};
use super::traffic::{Arrivals, Plan, Planned, Traffic};
use crate::Result;

/// Where a run ends.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// After this many requests.
    pub requests: Option<usize>,
    /// After sending for this long; replies on their way are waited for.
    pub duration: Option<Duration>,
}

/// One request, done. Times in seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// When it was due, from the start.
    pub due: f64,
    /// How much later it was sent: the generator's fault, not the server's.
    pub lag: f64,
    /// From when it was due to the first text.
    pub first: Option<f64>,
    /// From when it was due to the end.
    pub end: f64,
    /// Between pieces of text, milliseconds. Too many to write down.
    #[serde(skip)]
    pub gaps: Vec<f32>,
    /// Tokens of the prompt.
    pub input: usize,
    /// Tokens of the reply.
    pub output: usize,
    /// Its adapter's number.
    pub adapter: Option<usize>,
    /// What went wrong.
    pub failure: Option<String>,
    /// After how many seconds to come again, as the refusal said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<f64>,
}

/// A whole run.
pub struct Run {
    /// By the time they were done.
    pub records: Vec<Record>,
    /// Requests sent that were not done when the run was broken off.
    pub unfinished: usize,
    /// From the first request to the last reply, seconds.
    pub seconds: f64,
    /// Processors that the generator itself kept busy.
    pub generator_cpus: f64,
    /// The server before and after.
    pub server: [Observed; 2],
    /// Its memory meanwhile, bytes, a sample a second; empty where it does not say.
    pub memory: Vec<u64>,
    /// Someone pressed ctrl-C.
    pub interrupted: bool,
}

/// Becomes true when someone presses ctrl-C.
pub type Stop = watch::Receiver<bool>;

/// Listens for ctrl-C: the first breaks the run off, the second ends the process.
pub fn stop_on_ctrl_c() -> Stop {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            sender.send_replace(true);
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        }
        // The sender lives on: a closed channel would look like a stop.
        std::future::pending::<()>().await;
    });
    receiver
}

/// Sent and done so far, for the progress bar.
#[derive(Default)]
struct Progress {
    sent: AtomicUsize,
    done: AtomicUsize,
    failed: AtomicUsize,
}

/// What the tasks of a run share.
struct Shared {
    target: Target,
    start: Instant,
    records: Mutex<Vec<Record>>,
    progress: Progress,
}

impl Shared {
    /// Sends a request that was due `due` after the start, and writes down how it went. After a failure, how long a client
    /// waits before it sends the next.
    async fn send(&self, due: Duration, adapter: Option<usize>, body: hyper::body::Bytes) -> Option<Duration> {
        self.progress.sent.fetch_add(1, Relaxed);
        let due_at = self.start + due;
        let since = |at: Instant| at.saturating_duration_since(due_at).as_secs_f64();
        let lag = since(Instant::now());
        let Reply { first, gaps, prompt_tokens, tokens, retry_after, failure, .. } =
            self.target.client.stream(self.target.path(), body).await;
        let end = since(Instant::now());
        self.progress.done.fetch_add(1, Relaxed);
        self.progress.failed.fetch_add(usize::from(failure.is_some()), Relaxed);
        let first = first.map(since);
        let (due, input, output) = (due.as_secs_f64(), prompt_tokens, tokens);
        let pause =
            failure.as_ref().map(|_| Duration::try_from_secs_f64(retry_after.unwrap_or(1.0)).unwrap_or_default());
        let record = Record { due, lag, first, end, gaps, input, output, adapter, failure, retry_after };
        // Nothing panics while it holds this lock, nor the others below.
        self.records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
        pause
    }
}

/// Runs traffic against a server. Errors: traffic that cannot be planned; what goes wrong with requests stands in the records.
pub async fn run(target: &Target, traffic: &Traffic, bounds: Bounds, mut stop: Stop, label: &str) -> Result<Run> {
    let plan = traffic.plan()?;
    let before = target.observe().await;
    let cpu = cpu_seconds();
    let shared = Arc::new(Shared {
        target: target.clone(),
        start: Instant::now(),
        records: Mutex::default(),
        progress: Progress::default(),
    });
    let bar = tokio::spawn(show(shared.clone(), bounds, label.to_owned()));
    let memory = target.watch_memory();
    let mut tasks = JoinSet::new();
    let work = async {
        match traffic.arrivals {
            Arrivals::Open { .. } => open(&shared, plan, bounds, &mut tasks).await,
            Arrivals::Closed { clients } => closed(&shared, plan, bounds, clients, &mut tasks),
        }
        while tasks.join_next().await.is_some() {}
    };
    let interrupted = tokio::select! {
        () = work => false,
        _ = stop.wait_for(|stopped| *stopped) => true,
    };
    let seconds = shared.start.elapsed().as_secs_f64();
    tasks.shutdown().await;
    bar.abort();
    let records = std::mem::take(&mut *shared.records.lock().unwrap_or_else(PoisonError::into_inner));
    let unfinished = shared.progress.sent.load(Relaxed) - records.len();
    let generator_cpus = (cpu_seconds() - cpu) / seconds;
    let server = [before, target.observe().await];
    let memory = memory.samples();
    Ok(Run { records, unfinished, seconds, generator_cpus, server, memory, interrupted })
}

/// Sends each request when it is due.
async fn open(shared: &Arc<Shared>, plan: Plan, bounds: Bounds, tasks: &mut JoinSet<()>) {
    for planned in plan.take(bounds.requests.unwrap_or(usize::MAX)) {
        let Planned { due, adapter, .. } = planned;
        if bounds.duration.is_some_and(|duration| due > duration) {
            break;
        }
        // Before it is due, so that only the sending is left then.
        let body = shared.target.body(&planned);
        tokio::time::sleep_until((shared.start + due).into()).await;
        let shared = shared.clone();
        tasks.spawn(async move {
            shared.send(due, adapter, body).await;
        });
        while tasks.try_join_next().is_some() {}
    }
}

/// Clients that take the next request when they have a reply.
fn closed(shared: &Arc<Shared>, plan: Plan, bounds: Bounds, clients: usize, tasks: &mut JoinSet<()>) {
    let plan = Arc::new(Mutex::new(plan.take(bounds.requests.unwrap_or(usize::MAX))));
    for _ in 0..clients {
        let (shared, plan) = (shared.clone(), plan.clone());
        tasks.spawn(async move {
            loop {
                let due = shared.start.elapsed();
                if bounds.duration.is_some_and(|duration| due > duration) {
                    break;
                }
                let Some(planned) = plan.lock().unwrap_or_else(PoisonError::into_inner).next() else { break };
                let body = shared.target.body(&planned);
                // A client that was refused and asks again at once would be an attack, not load.
                if let Some(pause) = shared.send(due, planned.adapter, body).await {
                    let left = bounds.duration.map(|duration| duration.saturating_sub(shared.start.elapsed()));
                    tokio::time::sleep(left.map_or(pause, |left| pause.min(left))).await;
                }
            }
        });
    }
}

/// Moves the progress bar until it is aborted.
async fn show(shared: Arc<Shared>, bounds: Bounds, label: String) {
    let (length, by_time) = match (bounds.duration, bounds.requests) {
        (Some(duration), _) => (duration.as_millis() as u64, true),
        (None, requests) => (requests.unwrap_or(0) as u64, false),
    };
    let style = ProgressStyle::with_template("{prefix} {bar:30} {msg}");
    let bar =
        ProgressBar::new(length).with_prefix(label).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let clear = Clear(bar);
    loop {
        let Progress { sent, done, failed } = &shared.progress;
        let (sent, done, failed) = (sent.load(Relaxed), done.load(Relaxed), failed.load(Relaxed));
        let seconds = shared.start.elapsed();
        clear.0.set_position(if by_time { (seconds.as_millis() as u64).min(length) } else { done as u64 });
        let running = sent.saturating_sub(done);
        clear.0.set_message(format!("{:.0} s, {done} done, {running} running, {failed} failed", seconds.as_secs_f64()));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Takes the bar off the screen when its task is aborted.
struct Clear(ProgressBar);

impl Drop for Clear {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    let Ok(pid) = sysinfo::get_current_pid() else { return 0.0 };
    let mut system = sysinfo::System::new();
    system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), false);
    system.process(pid).map_or(0.0, |process| process.accumulated_cpu_time() as f64 / 1e3)
}
