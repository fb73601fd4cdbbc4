//! The manager of fine-tuning jobs: one thread that changes their states, in the order of the messages it gets. Files are read
//! on other threads, and training runs on the engine's thread.
//!
//! A change is written to the [`Store`] before it is reported. So a process may end at any point: at the next start, jobs that ran
//! are queued again and continue from their last saved state.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread;

use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::context::JobContext;
use super::gauges::JobGauges;
use super::jobs::JobAction;
use super::publish::Publisher;
use super::record::{self, JobError, JobRecord, JobStatus};
use super::store::{ObjectKind, Store};
use crate::error::ErrorKind;
use crate::train::job::{Command, Job, JobReport};
use crate::train::spec::JobSpec;
use crate::train::state;
use crate::{Error, Result};

/// A message to the manager's thread.
pub(super) enum ManagerMessage {
    Create(Box<JobRecord>, oneshot::Sender<Result<JobRecord>>),
    Change(String, JobAction, oneshot::Sender<Result<JobRecord>>),
    /// The files of a new job were read: its settings, and remarks for the user.
    Validated(String, Result<(Box<JobSpec>, Vec<String>)>),
    /// A job was loaded, for this run, to be sent to the trainer.
    Loaded(String, u64, Result<Box<Job>>),
    /// From the trainer, about this run of a job.
    Report(String, u64, JobReport),
    /// The trainer has dropped this run of a job, with or without a last report.
    Dropped(String, u64),
    Stop(oneshot::Sender<()>),
}

/// A job that takes one of the places.
pub(super) struct ActiveRun {
    /// Tells this run from earlier ones of the same job.
    run: u64,
    /// Whether the trainer has the job.
    started: bool,
    /// Seconds of a step, averaged over the last ones.
    pub(super) step_seconds: Option<f64>,
}

/// State of the manager's thread.
pub(super) struct JobManager {
    pub(super) context: Arc<JobContext>,
    pub(super) publisher: Publisher,
    pub(super) gauges: JobGauges,
    /// Sends to the manager's own inbox.
    sender: Sender<ManagerMessage>,
    pub(super) active: HashMap<String, ActiveRun>,
    /// Ids of queued jobs, next first. Some may have been paused or cancelled since.
    queue: VecDeque<String>,
    /// Number of runs started.
    runs: u64,
    /// Answered when no job is active any more. No job starts while it is set.
    stopping: Option<oneshot::Sender<()>>,
}

impl JobManager {
    pub(super) fn new(
        context: Arc<JobContext>,
        tokio: Handle,
        sender: Sender<ManagerMessage>,
        gauges: JobGauges,
    ) -> Self {
        let publisher = Publisher { runtime: context.runtime.clone(), tokio };
        let (active, queue, runs, stopping) = Default::default();
        Self { context, publisher, gauges, sender, active, queue, runs, stopping }
    }

    /// Continues the jobs of the last process, then handles messages until it is told to stop.
    pub(super) fn run(mut self, inbox: Receiver<ManagerMessage>) {
        if let Err(error) = self.recover() {
            tracing::error!(error = %format_args!("{error:#}"), "jobs of the last start cannot be continued");
        }
        self.schedule();
        for message in inbox {
            if let Err(error) = self.handle(message) {
                tracing::error!(error = %format_args!("{error:#}"), "the state of a fine-tuning job was not saved");
            }
            self.schedule();
            if self.active.is_empty()
                && let Some(done) = self.stopping.take()
            {
                // The receiver is gone if the server no longer waits.
                let _ = done.send(());
                return;
            }
        }
    }

    pub(super) fn store(&self) -> &Store {
        &self.context.store
    }

    /// Queues the jobs that the last process left unfinished.
    fn recover(&mut self) -> Result<()> {
        for record in self.store().all::<JobRecord>(ObjectKind::Job, "")? {
            let id = record.id.clone();
            if !record.status.ended() {
                self.gauges.show(&record);
            }
            match record.status {
                JobStatus::ValidatingFiles => self.validate(&record)?,
                JobStatus::Queued => self.queue.push_back(id),
                JobStatus::Running => {
                    self.update(&id, |record| record.status = JobStatus::Queued)?;
                    let message = "The server was restarted; the job continues from its last saved state";
                    self.add_event(&id, "warn", message, None)?;
                    self.queue.push_back(id);
                }
                JobStatus::Paused | JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => {}
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: ManagerMessage) -> Result<()> {
        match message {
            ManagerMessage::Create(record, reply) => {
                let created = self.create(&record).map(|()| *record);
                let _ = reply.send(created);
            }
            ManagerMessage::Change(id, action, reply) => {
                let changed = self.change(&id, action);
                let _ = reply.send(changed);
            }
            ManagerMessage::Validated(id, result) => return self.validated(&id, result),
            ManagerMessage::Loaded(id, run, job) => return self.loaded(&id, run, job),
            ManagerMessage::Report(id, run, report) if self.is_active(&id, run) => {
                if let Err(error) = self.report(&id, report) {
                    return self.fail(&id, error);
                }
            }
            ManagerMessage::Dropped(id, run) if self.is_active(&id, run) => {
                self.active.remove(&id);
                if self.stopping.is_none() {
                    let error = Error::new(ErrorKind::Unavailable, "the trainer has ended; see the server's log");
                    return self.fail(&id, error);
                }
            }
            // Of an earlier run.
            ManagerMessage::Report(..) | ManagerMessage::Dropped(..) => {}
            ManagerMessage::Stop(reply) => {
                self.stopping = Some(reply);
                self.active.retain(|_, active| active.started);
                for id in self.active.keys() {
                    self.command(Command::Pause(id.clone()));
                }
            }
        }
        Ok(())
    }

    fn is_active(&self, id: &str, run: u64) -> bool {
        self.active.get(id).is_some_and(|active| active.run == run)
    }

    /// Sends a command to the trainer. If the trainer has ended, it has dropped its jobs, and the manager is notified of that.
    fn command(&self, command: Command) {
        let _ = self.context.runtime.trainer.send(command);
    }

    fn create(&mut self, record: &JobRecord) -> Result<()> {
        self.store().put(ObjectKind::Job, &record.id, "", record)?;
        self.gauges.show(record);
        self.add_event(&record.id, "info", &format!("Created fine-tuning job: {}", record.id), None)?;
        if !self.context.persistent {
            let warning = "This server has no --state-dir: the model is lost when it stops";
            self.add_event(&record.id, "warn", warning, None)?;
        }
        let message = format!("Validating training file: {}", record.training_file);
        self.add_event(&record.id, "info", &message, None)?;
        self.validate(record)
    }

    fn change(&mut self, id: &str, action: JobAction) -> Result<JobRecord> {
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "fine_tuning_job_id")?;
        let (word, allowed) = match action {
            JobAction::Cancel => ("cancelled", !record.status.ended()),
            JobAction::Pause => ("paused", matches!(record.status, JobStatus::Queued | JobStatus::Running)),
            JobAction::Resume => ("resumed", record.status == JobStatus::Paused),
        };
        if !allowed {
            let message = format!("job {id} is {} and cannot be {word}", record.status.word());
            return Err(Error::invalid(message).param("fine_tuning_job_id").code("invalid_job_status"));
        }
        let started = self.active.get(id).is_some_and(|active| active.started);
        let record = self.update(id, |record| match action {
            JobAction::Cancel => record.end(JobStatus::Cancelled),
            JobAction::Pause => (record.status, record.estimated_finish) = (JobStatus::Paused, None),
            JobAction::Resume => record.status = JobStatus::Queued,
        })?;
        self.add_event(id, "info", &format!("Fine-tuning job was {word}"), None)?;
        match action {
            JobAction::Cancel if started => self.command(Command::Cancel(id.to_owned())),
            JobAction::Cancel => state::remove(&self.store().job_dir(id))?,
            JobAction::Pause if started => self.command(Command::Pause(id.to_owned())),
            JobAction::Pause => {}
            JobAction::Resume => self.queue.push_back(id.to_owned()),
        }
        Ok(record)
    }

    /// Reads the files of a new job on another thread, which answers with [`ManagerMessage::Validated`].
    fn validate(&self, record: &JobRecord) -> Result<()> {
        let (context, record, sender) = (self.context.clone(), record.clone(), self.sender.clone());
        spawn(move || {
            let read = || {
                let prepared = context.read(&record)?;
                context.continued_adapter(&prepared.spec)?;
                Ok((Box::new(prepared.spec.clone()), prepared.remarks()))
            };
            let panicked = |_| Err(Error::internal("reading the files failed; see the server's log"));
            let validated = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked);
            let _ = sender.send(ManagerMessage::Validated(record.id, validated));
        })
    }

    fn validated(&mut self, id: &str, result: Result<(Box<JobSpec>, Vec<String>)>) -> Result<()> {
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        if record.status != JobStatus::ValidatingFiles {
            return Ok(());
        }
        let (spec, remarks) = match result {
            Ok(validated) => validated,
            Err(error) => return self.fail(id, error),
        };
        self.update(id, |record| (record.spec, record.status) = (Some(*spec), JobStatus::Queued))?;
        remarks.iter().try_for_each(|remark| self.add_event(id, "warn", remark, None))?;
        self.add_event(id, "info", "Files validated, moving job to queued state", None)?;
        self.queue.push_back(id.to_owned());
        Ok(())
    }

    /// Starts queued jobs while there are places.
    fn schedule(&mut self) {
        let mut later = VecDeque::new();
        while self.stopping.is_none() && self.active.len() < self.context.max_running {
            let Some(id) = self.queue.pop_front() else { break };
            match self.store().find::<JobRecord>(ObjectKind::Job, &id) {
                // The trainer still has the run that was paused.
                Ok(Some(record)) if record.status == JobStatus::Queued && self.active.contains_key(&id) => {
                    later.push_back(id)
                }
                Ok(Some(record)) if record.status == JobStatus::Queued => {
                    if let Err(error) = self.load(record) {
                        tracing::error!(error = %format_args!("{error:#}"), job = id, "not started");
                    }
                }
                Ok(_) => {}
                Err(error) => tracing::error!(error = %format_args!("{error:#}"), job = id, "not started"),
            }
        }
        later.append(&mut self.queue);
        self.queue = later;
    }

    /// Reads the files of a queued job on another thread, which answers with [`ManagerMessage::Loaded`].
    fn load(&mut self, record: JobRecord) -> Result<()> {
        self.runs += 1;
        let run = self.runs;
        self.active.insert(record.id.clone(), ActiveRun { run, started: false, step_seconds: None });
        let (context, sender) = (self.context.clone(), self.sender.clone());
        spawn(move || {
            let reporter = RunReporter { sender: sender.clone(), id: record.id.clone(), run };
            let job = context.job(&record, Box::new(move |report| reporter.send(report)));
            let _ = sender.send(ManagerMessage::Loaded(record.id, run, job.map(Box::new)));
        })
    }

    fn loaded(&mut self, id: &str, run: u64, job: Result<Box<Job>>) -> Result<()> {
        if !self.is_active(id, run) {
            return Ok(());
        }
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        match job {
            Ok(job) if record.status == JobStatus::Queued => {
                self.active.get_mut(id).expect("checked above").started = true;
                self.command(Command::Start(job));
            }
            // It was paused or cancelled meanwhile.
            Ok(_) => {
                self.active.remove(id);
            }
            Err(error) => {
                self.active.remove(id);
                return self.fail(id, error);
            }
        }
        Ok(())
    }

    /// Ends a job with an error, and takes it from the trainer.
    pub(super) fn fail(&mut self, id: &str, error: Error) -> Result<()> {
        tracing::warn!(job = id, error = %format_args!("{error:#}"), "fine-tuning job failed");
        if self.active.get(id).is_some_and(|active| active.started) {
            self.command(Command::Cancel(id.to_owned()));
        }
        let message = error.public_message(&format!("job {id}")).into_owned();
        let event = format!("The job failed: {message}");
        let failed = JobError { code: error.code.unwrap_or("training_failed").to_owned(), message, param: error.param };
        // Before the status: a client that polls for the end then finds every event.
        self.add_event(id, "error", &event, None)?;
        self.update(id, |record| {
            record.end(JobStatus::Failed);
            record.error = Some(failed);
        })?;
        Ok(())
    }

    /// Changes a job in the store and on the metrics page.
    pub(super) fn update(&self, id: &str, change: impl FnOnce(&mut JobRecord)) -> Result<JobRecord> {
        let mut record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        change(&mut record);
        self.store().put(ObjectKind::Job, id, "", &record)?;
        self.gauges.show(&record);
        Ok(record)
    }

    /// Adds an event to a job. `level` is info, warn or error.
    pub(super) fn add_event(&self, job: &str, level: &str, message: &str, data: Option<Value>) -> Result<()> {
        let event = record::event(level, message, data);
        self.store().put(ObjectKind::Event, event["id"].as_str().unwrap_or_default(), job, &event)
    }
}

/// Forwards the reports of one run to the manager. Dropping it tells the manager that the trainer has dropped the job.
struct RunReporter {
    sender: Sender<ManagerMessage>,
    id: String,
    run: u64,
}

impl RunReporter {
    fn send(&self, report: JobReport) {
        // Fails only when the manager has ended.
        let _ = self.sender.send(ManagerMessage::Report(self.id.clone(), self.run, report));
    }
}

impl Drop for RunReporter {
    fn drop(&mut self) {
        let _ = self.sender.send(ManagerMessage::Dropped(std::mem::take(&mut self.id), self.run));
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name("job files".into()).spawn(work)?;
    Ok(())
}
