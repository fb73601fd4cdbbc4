//! Handles the trainer's reports in the job manager: stores metrics, publishes checkpoints and ends jobs.

use serde_json::{Value, json};

use super::manager::JobManager;
use super::record::{self, FileObject, JobRecord, JobStatus};
use super::results;
use super::store::ObjectKind;
use crate::Result;
use crate::train::job::{Checkpoint, JobReport, StepMetrics, Validation};
use crate::train::state;

impl JobManager {
    /// Handles a report about a job's current run. An error ends the job.
    pub(super) fn report(&mut self, id: &str, report: JobReport) -> Result<()> {
        if matches!(report, JobReport::Paused | JobReport::Cancelled | JobReport::Succeeded | JobReport::Failed(_)) {
            self.active.remove(id);
        }
        let record: JobRecord = self.store().get(ObjectKind::Job, id, "")?;
        if record.status.ended() {
            // It was cancelled, but the trainer finished it first and left its state.
            if matches!(report, JobReport::Succeeded) {
                self.remove_state(id);
            }
            return Ok(());
        }
        match report {
            JobReport::Started { steps, done, parameters } => self.started(id, steps, done, parameters),
            JobReport::Step(metrics) => self.step_done(&record, metrics),
            JobReport::Validation(validation) => self.validation_done(&record, validation),
            JobReport::Checkpoint(checkpoint) => self.checkpoint_written(&record, &checkpoint),
            JobReport::Resumed(checkpoint) => self.resumed(&record, &checkpoint),
            // A job that is paused because the server stops keeps its status, so that the next process continues it.
            JobReport::Paused | JobReport::Cancelled => Ok(()),
            JobReport::Succeeded => self.succeeded(&record),
            JobReport::Failed(error) => self.fail(id, error),
        }
    }

    fn started(&self, id: &str, steps: usize, done: usize, parameters: usize) -> Result<()> {
        let tokens = self.discard_metrics_after(id, done)?;
        self.update(id, |record| {
            (record.steps, record.done, record.trained_tokens) = (steps, done, tokens);
            if record.status == JobStatus::Queued {
                record.status = JobStatus::Running;
            }
        })?;
        let from = if done > 0 { format!(", continuing from step {done}") } else { String::new() };
        let message = format!("Fine-tuning job started: {steps} steps, {parameters} parameters{from}");
        self.add_event(id, "info", &message, None)
    }

    /// Deletes the metrics of steps after `done`, which will run again. Returns the number of tokens of those up to `done`.
    fn discard_metrics_after(&self, id: &str, done: usize) -> Result<u64> {
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

    fn step_done(&mut self, record: &JobRecord, metrics: StepMetrics) -> Result<()> {
        let id = &record.id;
        self.store().put(ObjectKind::Step, &format!("{id}/step/{}", metrics.step), id, &metrics)?;
        let message = format!("Step {}/{}: training loss={:.2}", metrics.step, record.steps, metrics.train_loss);
        let mut data = record::shortest_floats(&metrics);
        data["total_steps"] = record.steps.into();
        self.add_event(id, "info", &message, Some(data))?;
        let step_seconds = self.active.get_mut(id).map(|active| {
            let mean = active.step_seconds.map_or(metrics.seconds, |mean| 0.8 * mean + 0.2 * metrics.seconds);
            *active.step_seconds.insert(mean)
        });
        self.update(id, |record| {
            record.trained_tokens += metrics.tokens as u64;
            record.done = metrics.step;
            let left = record.steps.saturating_sub(record.done) as f64;
            let running = record.status == JobStatus::Running;
            record.estimated_finish =
                step_seconds.filter(|_| running).map(|seconds| record::now() + (left * seconds).ceil() as u64);
        })?;
        self.gauges.update(id, |gauge| {
            gauge.train_loss = Some(metrics.train_loss);
            gauge.tokens_per_second = Some(metrics.tokens as f64 / metrics.seconds.max(1e-9));
        });
        Ok(())
    }

    fn validation_done(&self, record: &JobRecord, validation: Validation) -> Result<()> {
        let (id, step) = (&record.id, validation.step);
        self.store().put(ObjectKind::Validation, &format!("{id}/validation/{step}"), id, &validation)?;
        self.gauges.update(id, |gauge| gauge.valid_loss = Some(validation.valid_loss));
        let message = format!("Step {step}/{}: full validation loss={:.2}", record.steps, validation.valid_loss);
        let (loss, accuracy) = (validation.valid_loss, validation.valid_mean_token_accuracy);
        let data = json!({
            "step": step, "total_steps": record.steps, "valid_loss": loss, "valid_mean_token_accuracy": accuracy,
            "full_valid_loss": loss, "full_valid_mean_token_accuracy": accuracy,
        });
        self.add_event(id, "info", &message, Some(data))
    }

    fn checkpoint_written(&self, record: &JobRecord, checkpoint: &Checkpoint) -> Result<()> {
        let (id, step) = (&record.id, checkpoint.step);
        let model = record.model_id(Some(step));
        let difference = self.publisher.publish_checkpoint(&model, checkpoint)?;
        let trained = self.store().find::<StepMetrics>(ObjectKind::Step, &format!("{id}/step/{step}"))?;
        let valid = self.store().find::<Validation>(ObjectKind::Validation, &format!("{id}/validation/{step}"))?;
        let object = record::checkpoint(record, step, trained.as_ref(), valid.as_ref());
        self.store().put(ObjectKind::Checkpoint, &record.checkpoint_id(step), id, &object)?;
        let message = format!(
            "Checkpoint created at step {step} and served as {model} (trainer and server differ by {difference:.4} nats a token)"
        );
        self.add_event(id, "info", &message, None)
    }

    /// Publishes the last checkpoint of a resumed job if the previous process ended before it could.
    fn resumed(&self, record: &JobRecord, checkpoint: &Checkpoint) -> Result<()> {
        let known = self.store().find::<Value>(ObjectKind::Checkpoint, &record.checkpoint_id(checkpoint.step))?;
        let served = self.context.runtime.registry.get(&record.model_id(Some(checkpoint.step))).is_ok();
        // Without a directory, the user has deleted the checkpoint.
        let missed = checkpoint.dir.is_dir() && !(known.is_some() && served);
        if missed { self.checkpoint_written(record, checkpoint) } else { Ok(()) }
    }

    fn succeeded(&mut self, record: &JobRecord) -> Result<()> {
        let (id, model) = (&record.id, record.model_id(None));
        let dir = self.store().job_dir(id).join(format!("step-{}", record.done));
        self.publisher.publish(&model, &dir)?;
        // In the adapter's directory too, so that the metrics go with it.
        results::write(&dir, &self.store().all(ObjectKind::Step, id)?, &self.store().all(ObjectKind::Validation, id)?)?;
        let mut result_files = Vec::new();
        for (written, name) in [(results::CSV, results::METRICS_FILE), (results::PLOT, results::PLOT)] {
            let mut content = std::fs::read(dir.join(written))?;
            if name == results::METRICS_FILE {
                content = results::encode_metrics(&content);
            }
            let file =
                FileObject::new(record::new_id("file-"), content.len() as u64, name.into(), record::FINE_TUNE_RESULTS);
            std::fs::write(self.store().file_path(&file.id), content)?;
            self.store().put(ObjectKind::File, &file.id, "", &file)?;
            result_files.push(file.id);
        }
        self.add_event(id, "info", &format!("New fine-tuned model created: {model}"), None)?;
        // Before the status: a client that polls for the end then finds every event.
        self.add_event(id, "info", "The job has successfully completed", None)?;
        self.update(id, |record| {
            record.end(JobStatus::Succeeded);
            record.fine_tuned_model = Some(model);
            record.result_files = result_files;
        })?;
        // Last: a job that has not ended and has no state would start from the beginning after a kill.
        self.remove_state(id);
        Ok(())
    }

    /// Removes the state of a job that has ended. If that fails, the leftover state only wastes disk space.
    fn remove_state(&self, id: &str) {
        if let Err(error) = state::remove(&self.store().job_dir(id)) {
            tracing::warn!(job = id, error = %format_args!("{error:#}"), "the state of an ended job cannot be removed");
        }
    }
}
