//! A thread that writes the files of jobs and delivers their reports, so that the engine's thread never waits for a disk.
//!
//! One thread works on one queue: files and reports keep the order in which the trainer gave them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::job::{JobReport, ReportFn};
use crate::{Error, Result};

type WriterTask = Box<dyn FnOnce() + Send>;

/// The writer's queue. Its thread ends when the queue is empty and nothing can add to it.
pub(super) struct JobWriter {
    tasks: Sender<WriterTask>,
}

impl JobWriter {
    /// Starts the thread. Errors: it cannot be started.
    pub(super) fn start() -> Result<Self> {
        let (tasks, inbox) = channel::<WriterTask>();
        thread::Builder::new().name("train files".into()).spawn(move || inbox.into_iter().for_each(|task| task()))?;
        Ok(Self { tasks })
    }

    /// The reporter of a job whose reports go to `report`.
    pub(super) fn reporter(&self, report: ReportFn) -> JobReporter {
        let state =
            ReporterState { report: Mutex::new(report), writes: AtomicUsize::new(0), failed: AtomicBool::new(false) };
        JobReporter { tasks: self.tasks.clone(), state: Arc::new(state) }
    }

    /// Waits until all files are written and all reports delivered. Not for the engine's thread.
    pub(super) fn flush(&self) {
        let (done, answer) = channel::<()>();
        // `done` is dropped by the task, or with the queue if the thread has ended. Both end the wait.
        let _ = self.tasks.send(Box::new(move || drop(done)));
        let _ = answer.recv();
    }
}

/// Queues the files and reports of one job; clones share it.
#[derive(Clone)]
pub(super) struct JobReporter {
    tasks: Sender<WriterTask>,
    state: Arc<ReporterState>,
}

/// The state that the tasks of one job share.
struct ReporterState {
    report: Mutex<ReportFn>,
    /// Number of queued and running writes.
    writes: AtomicUsize,
    /// Whether a write has failed, which was the last report.
    failed: AtomicBool,
}

impl JobReporter {
    /// Queues a report.
    pub(super) fn report(&self, report: JobReport) {
        self.add(|deliver| {
            deliver(report);
            Ok(())
        });
    }

    /// Queues a write, which may deliver reports. An error is the job's last report.
    pub(super) fn write(&self, work: impl FnOnce(&mut ReportFn) -> Result<()> + Send + 'static) {
        let state = self.state.clone();
        state.writes.fetch_add(1, SeqCst);
        self.add(move |deliver| {
            let done = work(deliver);
            state.writes.fetch_sub(1, SeqCst);
            done
        });
    }

    /// Whether a write of the job is queued or running.
    pub(super) fn is_writing(&self) -> bool {
        self.state.writes.load(SeqCst) > 0
    }

    /// Whether a write of the job has failed. The job has then ended.
    pub(super) fn has_failed(&self) -> bool {
        self.state.failed.load(SeqCst)
    }

    fn add(&self, work: impl FnOnce(&mut ReportFn) -> Result<()> + Send + 'static) {
        let state = self.state.clone();
        let task = move || {
            if state.failed.load(SeqCst) {
                return;
            }
            let mut deliver = state.report.lock().unwrap_or_else(PoisonError::into_inner);
            let done = catch_unwind(AssertUnwindSafe(|| work(&mut deliver)));
            let panicked = |_| Err(Error::internal("writing a job's files failed; see the server's log"));
            if let Err(error) = done.unwrap_or_else(panicked) {
                tracing::warn!(error = %format_args!("{error:#}"), "a job's files cannot be written");
                state.failed.store(true, SeqCst);
                (*deliver)(JobReport::Failed(error));
            }
        };
        // Fails only when the thread has ended.
        let _ = self.tasks.send(Box::new(task));
    }
}
