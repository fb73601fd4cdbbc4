//! What jobs write and say, on a thread of its own, so that whoever decodes beside training never waits for a disk.
//!
//! There is one thread and one queue: files and reports come in the order in which the trainer gave them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::job::JobReport;
use crate::{Error, Result};

type WriterTask = Box<dyn FnOnce() + Send>;
type ReportFn = Box<dyn FnMut(JobReport) + Send>;

/// The queue. The thread ends when all is done and nobody can add to it.
pub struct JobWriter {
    tasks: Sender<WriterTask>,
}

impl JobWriter {
    /// Starts the thread. Errors: there can be no more threads.
    pub fn start() -> Result<Self> {
        let (tasks, inbox) = channel::<WriterTask>();
        thread::Builder::new().name("train files".into()).spawn(move || inbox.into_iter().for_each(|task| task()))?;
        Ok(Self { tasks })
    }

    /// A job's way to whoever hears its reports.
    pub fn line(&self, report: ReportFn) -> JobReporter {
        let told =
            ReporterState { report: Mutex::new(report), writing: AtomicUsize::new(0), failed: AtomicBool::new(false) };
        JobReporter { tasks: self.tasks.clone(), told: Arc::new(told) }
    }

    /// Waits until everything that was given is written and told. Not for the engine's thread.
    pub fn flush(&self) {
        let (done, answer) = channel::<()>();
        // The answer is that the sender is gone, with the task or with the thread.
        let _ = self.tasks.send(Box::new(move || drop(done)));
        let _ = answer.recv();
    }
}

/// A job's part of the queue; clones share it.
#[derive(Clone)]
pub struct JobReporter {
    tasks: Sender<WriterTask>,
    told: Arc<ReporterState>,
}

/// What the job's tasks share.
struct ReporterState {
    report: Mutex<ReportFn>,
    /// Writes that are not done.
    writing: AtomicUsize,
    /// One of them failed, which was the last report.
    failed: AtomicBool,
}

impl JobReporter {
    /// Reports after everything before.
    pub fn tell(&self, report: JobReport) {
        self.add(|told| {
            told(report);
            Ok(())
        });
    }

    /// Writes after everything before; `work` may report. An error is the job's last report.
    pub fn write(&self, work: impl FnOnce(&mut ReportFn) -> Result<()> + Send + 'static) {
        let told = self.told.clone();
        told.writing.fetch_add(1, SeqCst);
        self.add(move |tell| {
            let done = work(tell);
            told.writing.fetch_sub(1, SeqCst);
            done
        });
    }

    /// Whether a write is not done.
    pub fn writes(&self) -> bool {
        self.told.writing.load(SeqCst) > 0
    }

    /// Whether the job has failed here.
    pub fn failed(&self) -> bool {
        self.told.failed.load(SeqCst)
    }

    fn add(&self, work: impl FnOnce(&mut ReportFn) -> Result<()> + Send + 'static) {
        let told = self.told.clone();
        let task = move || {
            if told.failed.load(SeqCst) {
                return;
            }
            let mut tell = told.report.lock().unwrap_or_else(PoisonError::into_inner);
            let done = catch_unwind(AssertUnwindSafe(|| work(&mut tell)));
            let panicked = |_| Err(Error::internal("writing a job's files failed; see the server's log"));
            if let Err(error) = done.unwrap_or_else(panicked) {
                tracing::warn!(error = %format_args!("{error:#}"), "a job's files");
                told.failed.store(true, SeqCst);
                (*tell)(JobReport::Failed(error));
            }
        };
        // Without the thread there is nobody to tell.
        let _ = self.tasks.send(Box::new(task));
    }
}
