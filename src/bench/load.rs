//! The load generator: keeps to the schedule independent of the server, and times every reply.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::client::StreamedReply;
use super::target::{Observed, TargetServer};
use super::traffic::{Arrivals, PlannedRequest, Traffic, TrafficPlan};
use crate::Result;

/// Limits of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunLimits {
    /// Most requests.
    pub requests: Option<usize>,
    /// Longest time of sending. Replies under way are waited for.
    pub duration: Option<Duration>,
}

impl RunLimits {
    /// A run that sends for a number of seconds.
    pub(crate) fn seconds(seconds: f64) -> Self {
        Self { requests: None, duration: Some(Duration::from_secs_f64(seconds)) }
    }

    /// Whether sending is over at a time from the start.
    fn over(self, at: Duration) -> bool {
        self.duration.is_some_and(|duration| at > duration)
    }
}

/// A request that has ended. Times are in seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RequestRecord {
    /// Time at which it was due, from the start of the run.
    pub due: f64,
    /// Delay from then until it was sent, which is the generator's fault and not the server's.
    pub lag: f64,
    /// From the time it was due to the first text.
    pub first: Option<f64>,
    /// From the time it was due to the end.
    pub end: f64,
    /// Gaps between pieces of text, milliseconds. Not written: there are too many.
    #[serde(skip)]
    pub gaps: Vec<f32>,
    /// Prompt tokens.
    pub input: usize,
    /// Generated tokens.
    pub output: usize,
    /// Index of its adapter.
    pub adapter: Option<usize>,
    /// Kind of failure.
    pub failure: Option<String>,
    /// `Retry-After` of a refusal, seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<f64>,
}

/// Everything that a run observed.
pub struct LoadRun {
    /// The requests, in the order in which they ended.
    pub records: Vec<RequestRecord>,
    /// Requests that were sent but had not ended when the run was interrupted.
    pub unfinished: usize,
    /// From the first request to the last reply, seconds.
    pub seconds: f64,
    /// CPUs that the generator kept busy, on average.
    pub generator_cpus: f64,
    /// The server before and after the run.
    pub server: [Observed; 2],
    /// Samples of the server's memory, bytes, one per second; empty if the server does not report it.
    pub memory: Vec<u64>,
    /// ctrl-C interrupted the run.
    pub interrupted: bool,
}

/// Becomes true on ctrl-C.
pub type Stop = watch::Receiver<bool>;

/// Listens for ctrl-C. The first one interrupts the run, the second one ends the process.
pub(crate) fn stop_on_ctrl_c() -> Stop {
    let (sender, receiver) = watch::channel(false);
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            sender.send_replace(true);
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        }
        // The sender stays alive: receivers take a closed channel for a stop.
        std::future::pending::<()>().await;
    });
    receiver
}

/// Requests so far, for the progress bar.
#[derive(Default)]
struct RequestCounts {
    sent: AtomicUsize,
    done: AtomicUsize,
    failed: AtomicUsize,
}

/// State shared by the tasks of a run.
struct LoadState {
    target: TargetServer,
    start: Instant,
    records: Mutex<Vec<RequestRecord>>,
    counts: RequestCounts,
}

impl LoadState {
    /// Sends a request that was due at `due` from the start, and records the reply. Returns how long a client waits before its
    /// next request if this one failed.
    async fn send(&self, due: Duration, adapter: Option<usize>, body: hyper::body::Bytes) -> Option<Duration> {
        self.counts.sent.fetch_add(1, Relaxed);
        let due_at = self.start + due;
        let since = |at: Instant| at.saturating_duration_since(due_at).as_secs_f64();
        let lag = since(Instant::now());
        let StreamedReply { first, gaps, prompt_tokens, tokens, retry_after, failure, .. } =
            self.target.client.stream(self.target.path(), body).await;
        let end = since(Instant::now());
        self.counts.done.fetch_add(1, Relaxed);
        self.counts.failed.fetch_add(usize::from(failure.is_some()), Relaxed);
        let first = first.map(since);
        let (due, input, output) = (due.as_secs_f64(), prompt_tokens, tokens);
        let pause =
            failure.as_ref().map(|_| Duration::try_from_secs_f64(retry_after.unwrap_or(1.0)).unwrap_or_default());
        let record = RequestRecord { due, lag, first, end, gaps, input, output, adapter, failure, retry_after };
        // Nothing panics while it holds this lock or those below.
        self.records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
        pause
    }
}

/// Runs traffic against a server. Records hold the failures of requests. Errors: invalid parameters of the traffic.
pub async fn run(
    target: &TargetServer,
    traffic: &Traffic,
    limits: RunLimits,
    mut stop: Stop,
    label: &str,
) -> Result<LoadRun> {
    let plan = traffic.plan()?;
    let before = target.observe().await;
    let cpu = cpu_seconds();
    let state = Arc::new(LoadState {
        target: target.clone(),
        start: Instant::now(),
        records: Mutex::default(),
        counts: RequestCounts::default(),
    });
    let bar = tokio::spawn(show(state.clone(), limits, label.to_owned()));
    let memory = target.watch_memory();
    let mut tasks = JoinSet::new();
    let work = async {
        match traffic.arrivals {
            Arrivals::Open { .. } => open_loop(&state, plan, limits, &mut tasks).await,
            Arrivals::Closed { clients } => closed_loop(&state, plan, limits, clients, &mut tasks),
        }
        while tasks.join_next().await.is_some() {}
    };
    let interrupted = tokio::select! {
        () = work => false,
        _ = stop.wait_for(|stopped| *stopped) => true,
    };
    let seconds = state.start.elapsed().as_secs_f64();
    tasks.shutdown().await;
    bar.abort();
    let records = std::mem::take(&mut *state.records.lock().unwrap_or_else(PoisonError::into_inner));
    let unfinished = state.counts.sent.load(Relaxed) - records.len();
    let generator_cpus = (cpu_seconds() - cpu) / seconds;
    let server = [before, target.observe().await];
    let memory = memory.samples();
    Ok(LoadRun { records, unfinished, seconds, generator_cpus, server, memory, interrupted })
}

/// Sends each request at the time it is due.
async fn open_loop(state: &Arc<LoadState>, plan: TrafficPlan, limits: RunLimits, tasks: &mut JoinSet<()>) {
    for planned in plan.take(limits.requests.unwrap_or(usize::MAX)) {
        let PlannedRequest { due, adapter, .. } = planned;
        if limits.over(due) {
            break;
        }
        // The body is made ahead of time, so that only the sending remains.
        let body = state.target.body(&planned);
        tokio::time::sleep_until((state.start + due).into()).await;
        let state = state.clone();
        tasks.spawn(async move {
            state.send(due, adapter, body).await;
        });
        while tasks.try_join_next().is_some() {}
    }
}

/// Starts clients, each of which sends its next request after the reply to its last one.
fn closed_loop(state: &Arc<LoadState>, plan: TrafficPlan, limits: RunLimits, clients: usize, tasks: &mut JoinSet<()>) {
    let plan = Arc::new(Mutex::new(plan.take(limits.requests.unwrap_or(usize::MAX))));
    for _ in 0..clients {
        let (state, plan) = (state.clone(), plan.clone());
        tasks.spawn(async move {
            loop {
                let due = state.start.elapsed();
                if limits.over(due) {
                    break;
                }
                let Some(planned) = plan.lock().unwrap_or_else(PoisonError::into_inner).next() else { break };
                let body = state.target.body(&planned);
                // A refused client waits: sending again at once would be an attack.
                if let Some(pause) = state.send(due, planned.adapter, body).await {
                    let left = limits.duration.map(|duration| duration.saturating_sub(state.start.elapsed()));
                    tokio::time::sleep(left.map_or(pause, |left| pause.min(left))).await;
                }
            }
        });
    }
}

/// Updates the progress bar until the task is aborted.
async fn show(state: Arc<LoadState>, limits: RunLimits, label: String) {
    let (length, by_time) = match (limits.duration, limits.requests) {
        (Some(duration), _) => (duration.as_millis() as u64, true),
        (None, requests) => (requests.unwrap_or(0) as u64, false),
    };
    let style = ProgressStyle::with_template("{prefix} {bar:30} {msg}");
    let bar =
        ProgressBar::new(length).with_prefix(label).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let bar = ClearOnDrop(bar);
    loop {
        let RequestCounts { sent, done, failed } = &state.counts;
        let (sent, done, failed) = (sent.load(Relaxed), done.load(Relaxed), failed.load(Relaxed));
        let seconds = state.start.elapsed();
        bar.0.set_position(if by_time { (seconds.as_millis() as u64).min(length) } else { done as u64 });
        let running = sent.saturating_sub(done);
        bar.0.set_message(format!("{:.0} s, {done} done, {running} running, {failed} failed", seconds.as_secs_f64()));
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A progress bar that is removed from the screen when its task is aborted.
struct ClearOnDrop(ProgressBar);

impl Drop for ClearOnDrop {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// CPU time of this process so far, seconds.
fn cpu_seconds() -> f64 {
    let Ok(pid) = sysinfo::get_current_pid() else { return 0.0 };
    let mut system = sysinfo::System::new();
    system.refresh_processes(sysinfo::ProcessesToUpdate::Some(&[pid]), false);
    system.process(pid).map_or(0.0, |process| process.accumulated_cpu_time() as f64 / 1e3)
}
