//! The life of jobs: validated, queued, run, paused, published, ended. All of it happens on one thread, in the order of
//! messages; what takes long (reading files) happens beside it, and training on the engine's thread.
//!
//! What is true of a job is in the [`Store`] before anyone is told, so a process that dies at any point goes on with the
//! next one: jobs that ran are queued again and continue from their last state.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::context::JobContext;
use super::monitor;
use super::publish::Publisher;
use super::record::{self, FileObject, JobError, JobRecord, JobStatus};
use super::store::{ObjectKind, Store};
use crate::error::{Error, ErrorKind, Result};
use crate::train::job::{Checkpoint, Command, Job, JobReport, StepMetrics, Validation};
use crate::train::spec::JobSpec;

/// Jobs that the metrics page still shows after their end.
const SHOWN_ENDED: usize = 50;

/// What a client may do to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobAction {
    Cancel,
    Pause,
    Resume,
}

/// What the metrics page shows of a job.
#[derive(Debug, Clone)]
pub struct JobGauge {
    pub id: String,
    pub status: JobStatus,
    /// Optimiser steps done, and in all.
    pub step: usize,
    pub steps: usize,
    /// Of the last step.
    pub train_loss: Option<f64>,
    /// Of the last validation.
    pub valid_loss: Option<f64>,
    pub tokens_per_second: Option<f64>,
}

type Live = Arc<Mutex<BTreeMap<String, JobGauge>>>;

/// A handle to all jobs; clones share it.
#[derive(Clone)]
pub struct Jobs {
    store: Arc<Store>,
    inbox: Sender<ManagerMessage>,
    live: Live,
}

/// What the thread is told.
enum ManagerMessage {
    Create(Box<JobRecord>, oneshot::Sender<Result<JobRecord>>),
    Change(String, JobAction, oneshot::Sender<Result<JobRecord>>),
    /// Files were read for the first time: settings and what a person should know.
    Validated(String, Result<(Box<JobSpec>, Vec<String>)>),
    /// Files were read to be trained on.
    Loaded(String, u64, Result<Box<Job>>),
    /// From the trainer.
    Report(String, u64, JobReport),
    /// The trainer has dropped the job, with or without a word.
    Gone(String, u64),
    Stop(oneshot::Sender<()>),
}

impl Jobs {
    /// Starts the thread, which takes up what the last process left.
    pub fn start(host: JobContext, tokio: Handle) -> Result<Self> {
        let (sender, inbox) = channel();
        let jobs = Self { store: host.store.clone(), inbox: sender.clone(), live: Live::default() };
        let publisher = Publisher { runtime: host.runtime.clone(), tokio };
        let (active, queue, runs, stopping) = Default::default();
        let manager = JobManager {
            host: Arc::new(host),
            publisher,
            sender,
            active,
            queue,
            runs,
            stopping,
            live: jobs.live.clone(),
        };
        thread::Builder::new().name("jobs".into()).spawn(move || manager.run(inbox))?;
        Ok(jobs)
    }

    /// What is kept of files and jobs.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Takes a new job.
    pub async fn create(&self, record: JobRecord) -> Result<JobRecord> {
        self.ask(|reply| ManagerMessage::Create(Box::new(record), reply)).await?
    }

    /// Cancels, pauses or resumes a job. Errors: 404, or 400 when its status does not allow it.
    pub async fn change(&self, id: &str, action: JobAction) -> Result<JobRecord> {
        self.ask(|reply| ManagerMessage::Change(id.to_owned(), action, reply)).await?
    }

    /// Writes the states of the jobs that run and starts no more; they go on with the next start.
    pub async fn stop(&self) {
        // Nobody is left to be stopped if there is no answer.
        let _ = self.ask(ManagerMessage::Stop).await;
    }

    /// For the metrics page.
    pub fn gauges(&self) -> Vec<JobGauge> {
        lock(&self.live).values().cloned().collect()
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> ManagerMessage) -> Result<T> {
        let gone = || Error::internal("the thread of the training jobs has ended; see the server's log");
        let (reply, answer) = oneshot::channel();
        self.inbox.send(message(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

/// A job that takes one of the places.
struct ActiveRun {
    /// Tells this run from earlier ones of the same job.
    run: u64,
    /// The trainer has it.
    started: bool,
    /// Seconds of a step, lately.
    pace: Option<f64>,
}

/// The thread's state.
struct JobManager {
    host: Arc<JobContext>,
    publisher: Publisher,
    /// For others to write to the inbox.
    sender: Sender<ManagerMessage>,
    active: HashMap<String, ActiveRun>,
    /// Ids, next first; some may not wait any more.
    queue: VecDeque<String>,
    /// Runs begun.
    runs: u64,
    /// Who waits for the active jobs to end.
    stopping: Option<oneshot::Sender<()>>,
    live: Live,
}

impl JobManager {
    fn run(mut self, inbox: Receiver<ManagerMessage>) {
        if let Err(error) = self.recover() {
            tracing::error!(error = %format_args!("{error:#}"), "jobs of the last start were not taken up");
        }
        self.schedule();
        for message in inbox {
            if let Err(error) = self.handle(message) {
                tracing::error!(error = %format_args!("{error:#}"), "a training job's state was not kept");
            }
            self.schedule();
            if self.active.is_empty()
                && let Some(done) = self.stopping.take()
            {
                // Whoever asked may have given up waiting.
                let _ = done.send(());
                return;
            }
        }
    }

    fn store(&self) -> &Store {
        &self.host.store
    }

    /// Takes up what the last process left.
    fn recover(&mut self) -> Result<()> {
        for record in self.store().all::<JobRecord>(ObjectKind::Job, "")? {
            let id = record.id.clone();
            if !record.status.ended() {
                self.show(&record);
            }
            match record.status {
                JobStatus::ValidatingFiles => self.validate(&record)?,
                JobStatus::Queued => self.queue.push_back(id),
                JobStatus::Running => {
                    self.update(&id, |record| record.status = JobStatus::Queued)?;
                    self.note(&id, "warn", "The server was restarted; the job goes on from its last state", None)?;
                    self.queue.push_back(id);
                }
                _ => {}
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
            ManagerMessage::Report(id, run, report) if self.is_run(&id, run) => {
                if let Err(error) = self.report(&id, report) {
                    return self.fail(&id, error);
                }
            }
            ManagerMessage::Gone(id, run) if self.is_run(&id, run) => {
                self.active.remove(&id);
                if self.stopping.is_none() {
                    return self
                        .fail(&id, Error::new(ErrorKind::Unavailable, "the trainer has ended; see the server's log"));
                }
            }
            ManagerMessage::Report(..) | ManagerMessage::Gone(..) => {}
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

    fn is_run(&self, id: &str, run: u64) -> bool {
        self.active.get(id).is_some_and(|active| active.run == run)
    }

    /// To the trainer. One that has ended has dropped its jobs, which tells enough.
    fn command(&self, command: Command) {
        let _ = self.host.runtime.trainer.send(command);
    }

    fn create(&mut self, record: &JobRecord) -> Result<()> {
        self.store().put(ObjectKind::Job, &record.id, "", record)?;
        self.show(record);
        self.note(&record.id, "info", &format!("Created fine-tuning job: {}", record.id), None)?;
        if !self.host.lasting {
            let warning = "This server has no --state-dir: the model is gone when it stops";
            self.note(&record.id, "warn", warning, None)?;
        }
        self.note(&record.id, "info", &format!("Validating training file: {}", record.training_file), None)?;
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
            JobAction::Cancel => {
                (record.status, record.finished_at) = (JobStatus::Cancelled, Some(record::now()));
                record.estimated_finish = None;
            }
            JobAction::Pause => (record.status, record.estimated_finish) = (JobStatus::Paused, None),
            JobAction::Resume => record.status = JobStatus::Queued,
        })?;
        self.note(id, "info", &format!("Fine-tuning job was {word}"), None)?;
        match action {
            JobAction::Cancel if started => self.command(Command::Cancel(id.to_owned())),
            JobAction::Cancel => crate::train::state::remove(&self.store().job_dir(id))?,
            JobAction::Pause if started => self.command(Command::Pause(id.to_owned())),
            JobAction::Pause => {}
            JobAction::Resume => self.queue.push_back(id.to_owned()),
        }
        Ok(record)
    }

    /// Reads the files beside this thread.
    fn validate(&self, record: &JobRecord) -> Result<()> {
        let (host, record, sender) = (self.host.clone(), record.clone(), self.sender.clone());
        beside(move || {
            let read = || {
                let prepared = host.read(&record)?;
                host.from(&prepared.spec)?;
                Ok((Box::new(prepared.spec.clone()), prepared.notes()))
            };
            let failed = |_| Err(Error::internal("reading the files failed; see the server's log"));
            let validated = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(failed);
            let _ = sender.send(ManagerMessage::Validated(record.id, validated));
        })
    }

    fn validated(&mut self, id: &str, result: Result<(Box<JobSpec>, Vec<String>)>) -> Result<()> {
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        if record.status != JobStatus::ValidatingFiles {
            return Ok(());
        }
        let (spec, notes) = match result {
            Ok(validated) => validated,
            Err(error) => return self.fail(id, error),
        };
        self.update(id, |record| (record.spec, record.status) = (Some(*spec), JobStatus::Queued))?;
        notes.iter().try_for_each(|note| self.note(id, "warn", note, None))?;
        self.note(id, "info", "Files validated, moving job to queued state", None)?;
        self.queue.push_back(id.to_owned());
        Ok(())
    }

    /// Starts what waits, as far as there are places.
    fn schedule(&mut self) {
        let mut later = VecDeque::new();
        while self.stopping.is_none() && self.active.len() < self.host.max_running {
            let Some(id) = self.queue.pop_front() else { break };
            let waits = self.store().find::<JobRecord>(ObjectKind::Job, &id);
            match waits {
                // It is still on its way out of the trainer.
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

    /// Reads a job's files again, and everything else that the trainer needs.
    fn load(&mut self, record: JobRecord) -> Result<()> {
        self.runs += 1;
        let run = self.runs;
        self.active.insert(record.id.clone(), ActiveRun { run, started: false, pace: None });
        let (host, sender) = (self.host.clone(), self.sender.clone());
        beside(move || {
            let line = RunReporter { sender: sender.clone(), id: record.id.clone(), run };
            let job = host.job(&record, Box::new(move |report| line.tell(report)));
            let _ = sender.send(ManagerMessage::Loaded(record.id, run, job.map(Box::new)));
        })
    }

    fn loaded(&mut self, id: &str, run: u64, job: Result<Box<Job>>) -> Result<()> {
        if !self.is_run(id, run) {
            return Ok(());
        }
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        match job {
            Ok(job) if record.status == JobStatus::Queued => {
                self.active.get_mut(id).expect("it was looked up above").started = true;
                self.command(Command::Start(job));
            }
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

    fn report(&mut self, id: &str, report: JobReport) -> Result<()> {
        if matches!(report, JobReport::Paused | JobReport::Cancelled | JobReport::Succeeded | JobReport::Failed(_)) {
            self.active.remove(id);
        }
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        if record.status.ended() {
            // The trainer was done before it could hear of that, and left its state.
            if matches!(report, JobReport::Succeeded) {
                self.forget(id);
            }
            return Ok(());
        }
        match report {
            JobReport::Started { steps, done, parameters } => {
                let tokens = self.undo(id, done)?;
                self.update(id, |record| {
                    (record.steps, record.done, record.trained_tokens) = (steps, done, tokens);
                    if record.status == JobStatus::Queued {
                        record.status = JobStatus::Running;
                    }
                })?;
                let from = if done > 0 { format!(", from step {done} on") } else { String::new() };
                let message = format!("Fine-tuning job started: {steps} steps, {parameters} parameters{from}");
                self.note(id, "info", &message, None)
            }
            JobReport::Step(metrics) => self.step(&record, metrics),
            JobReport::Validation(validation) => self.measured(&record, validation),
            JobReport::Checkpoint(checkpoint) => self.checkpoint(&record, &checkpoint),
            JobReport::Resumed(checkpoint) => {
                let known =
                    self.store().find::<Value>(ObjectKind::Checkpoint, &record.checkpoint_id(checkpoint.step))?;
                let served = self.host.runtime.registry.get(&record.model_id(Some(checkpoint.step))).is_ok();
                // The last process ended before it was served, and nobody has deleted it since.
                let missed = checkpoint.dir.is_dir() && !(known.is_some() && served);
                if missed { self.checkpoint(&record, &checkpoint) } else { Ok(()) }
            }
            // At a stop, it stays one that runs.
            JobReport::Paused | JobReport::Cancelled => Ok(()),
            JobReport::Succeeded => self.succeeded(&record),
            JobReport::Failed(error) => self.fail(id, error),
        }
    }

    fn step(&mut self, record: &JobRecord, metrics: StepMetrics) -> Result<()> {
        let id = &record.id;
        self.store().put(ObjectKind::Step, &format!("{id}/step/{}", metrics.step), id, &metrics)?;
        let message = format!("Step {}/{}: training loss={:.2}", metrics.step, record.steps, metrics.train_loss);
        let mut data = record::plain(&metrics);
        data["total_steps"] = record.steps.into();
        self.note(id, "info", &message, Some(data))?;
        let pace = self.active.get_mut(id).map(|active| {
            let pace = active.pace.map_or(metrics.seconds, |pace| 0.8 * pace + 0.2 * metrics.seconds);
            *active.pace.insert(pace)
        });
        let record = self.update(id, |record| {
            record.trained_tokens += metrics.tokens as u64;
            record.done = metrics.step;
            let left = record.steps.saturating_sub(record.done) as f64;
            let runs = record.status == JobStatus::Running;
            record.estimated_finish = pace.filter(|_| runs).map(|pace| record::now() + (left * pace).ceil() as u64);
        })?;
        if let Some(gauge) = lock(&self.live).get_mut(&record.id) {
            gauge.train_loss = Some(metrics.train_loss);
            gauge.tokens_per_second = Some(metrics.tokens as f64 / metrics.seconds.max(1e-9));
        }
        Ok(())
    }

    fn measured(&self, record: &JobRecord, validation: Validation) -> Result<()> {
        let (id, step) = (&record.id, validation.step);
        self.store().put(ObjectKind::Validation, &format!("{id}/validation/{step}"), id, &validation)?;
        if let Some(gauge) = lock(&self.live).get_mut(id) {
            gauge.valid_loss = Some(validation.valid_loss);
        }
        let message = format!("Step {step}/{}: full validation loss={:.2}", record.steps, validation.valid_loss);
        let (loss, accuracy) = (validation.valid_loss, validation.valid_mean_token_accuracy);
        let data = json!({
            "step": step, "total_steps": record.steps, "valid_loss": loss, "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss, "full_valid_mean_token_accuracy": accuracy,
        });
        self.note(id, "info", &message, Some(data))
    }

    fn checkpoint(&self, record: &JobRecord, checkpoint: &Checkpoint) -> Result<()> {
        let model = record.model_id(Some(checkpoint.step));
        let off = self.publisher.checkpoint(&model, checkpoint)?;
        self.add_checkpoint(record, checkpoint.step)?;
        let message = format!(
            "Checkpoint created at step {} and served as {model} (trainer and server differ by {off:.4} nats a token)",
            checkpoint.step
        );
        self.note(&record.id, "info", &message, None)
    }

    /// Forgets the figures of steps after `done`: they are done, and counted, again. The tokens of those before.
    fn undo(&self, id: &str, done: usize) -> Result<u64> {
        let mut tokens = 0;
        for m in self.store().all::<StepMetrics>(ObjectKind::Step, id)? {
            if m.step <= done {
                tokens += m.tokens as u64;
            } else {
                self.store().delete(ObjectKind::Step, &format!("{id}/step/{}", m.step))?;
            }
        }
        for v in self.store().all::<Validation>(ObjectKind::Validation, id)?.into_iter().filter(|v| v.step > done) {
            self.store().delete(ObjectKind::Validation, &format!("{id}/validation/{}", v.step))?;
        }
        Ok(tokens)
    }

    fn add_checkpoint(&self, record: &JobRecord, step: usize) -> Result<()> {
        let id = &record.id;
        let trained = self.store().find::<StepMetrics>(ObjectKind::Step, &format!("{id}/step/{step}"))?;
        let valid = self.store().find::<Validation>(ObjectKind::Validation, &format!("{id}/validation/{step}"))?;
        let object = record::checkpoint(record, step, trained.as_ref(), valid.as_ref());
        self.store().put(ObjectKind::Checkpoint, &record.checkpoint_id(step), id, &object)
    }

    fn succeeded(&mut self, record: &JobRecord) -> Result<()> {
        let (id, model) = (&record.id, record.model_id(None));
        let dir = self.store().job_dir(id).join(format!("step-{}", record.done));
        self.publisher.again(&model, &dir)?;
        // Beside the adapter too, so that it says how it was made wherever it goes.
        monitor::write(&dir, &self.store().all(ObjectKind::Step, id)?, &self.store().all(ObjectKind::Validation, id)?)?;
        let mut result_files = Vec::new();
        for (written, name) in [(monitor::CSV, "step_metrics.csv"), (monitor::PLOT, monitor::PLOT)] {
            let id = record::new_id("file-");
            let bytes = std::fs::copy(dir.join(written), self.store().file_path(&id))?;
            let file = FileObject::new(id.clone(), bytes, name.into(), "fine-tune-results");
            self.store().put(ObjectKind::File, &id, "", &file)?;
            result_files.push(id);
        }
        self.note(id, "info", &format!("New fine-tuned model created: {model}"), None)?;
        self.update(id, |record| {
            (record.status, record.finished_at) = (JobStatus::Succeeded, Some(record::now()));
            record.estimated_finish = None;
            record.fine_tuned_model = Some(model);
            record.result_files = result_files;
        })?;
        self.note(id, "info", "The job has successfully completed", None)?;
        // Not before the job has ended: without its state it would begin anew after a kill.
        self.forget(id);
        Ok(())
    }

    /// Removes the state of a job that has ended. One that stays is only a waste of disk.
    fn forget(&self, id: &str) {
        if let Err(error) = crate::train::state::remove(&self.store().job_dir(id)) {
            tracing::warn!(job = id, error = %format_args!("{error:#}"), "the state of a job that has ended stays");
        }
    }

    fn fail(&mut self, id: &str, error: Error) -> Result<()> {
        tracing::warn!(job = id, error = %format_args!("{error:#}"), "training job failed");
        if self.active.get(id).is_some_and(|active| active.started) {
            self.command(Command::Cancel(id.to_owned()));
        }
        let message = error.public_message(&format!("job {id}")).into_owned();
        let event = format!("The job failed: {message}");
        let failed = JobError { code: error.code.unwrap_or("training_failed").to_owned(), message, param: error.param };
        self.update(id, |record| {
            (record.status, record.finished_at) = (JobStatus::Failed, Some(record::now()));
            record.estimated_finish = None;
            record.error = Some(failed);
        })?;
        self.note(id, "error", &event, None)
    }

    fn update(&self, id: &str, change: impl FnOnce(&mut JobRecord)) -> Result<JobRecord> {
        let mut record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        change(&mut record);
        self.store().put(ObjectKind::Job, id, "", &record)?;
        self.show(&record);
        Ok(record)
    }

    fn note(&self, job: &str, level: &str, message: &str, data: Option<Value>) -> Result<()> {
        let event = record::event(level, message, data);
        self.store().put(ObjectKind::Event, event["id"].as_str().unwrap_or_default(), job, &event)
    }

    /// Puts a job on the metrics page, and takes ended ones off it where there are many.
    fn show(&self, record: &JobRecord) {
        let mut live = lock(&self.live);
        let gauge = live.entry(record.id.clone()).or_insert_with(|| JobGauge {
            id: record.id.clone(),
            status: record.status,
            step: 0,
            steps: 0,
            train_loss: None,
            valid_loss: None,
            tokens_per_second: None,
        });
        (gauge.status, gauge.step, gauge.steps) = (record.status, record.done, record.steps);
        let ended: Vec<String> = live.values().filter(|g| g.status.ended()).map(|g| g.id.clone()).collect();
        for id in ended.iter().take(ended.len().saturating_sub(SHOWN_ENDED)) {
            live.remove(id);
        }
    }
}

/// The trainer's line to the thread. It is dropped with the job, however that ends.
struct RunReporter {
    sender: Sender<ManagerMessage>,
    id: String,
    run: u64,
}

impl RunReporter {
    fn tell(&self, report: JobReport) {
        // Without the thread there is nobody to tell.
        let _ = self.sender.send(ManagerMessage::Report(self.id.clone(), self.run, report));
    }
}

impl Drop for RunReporter {
    fn drop(&mut self) {
        let _ = self.sender.send(ManagerMessage::Gone(std::mem::take(&mut self.id), self.run));
    }
}

fn beside(work: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name("job files".into()).spawn(work)?;
    Ok(())
}

/// Gauges are whole between statements, whatever panicked.
fn lock(live: &Live) -> MutexGuard<'_, BTreeMap<String, JobGauge>> {
    live.lock().unwrap_or_else(PoisonError::into_inner)
}
