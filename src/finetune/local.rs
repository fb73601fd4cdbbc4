//! A fine-tuning job without a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::history::MetricsHistory;
use super::prepare::{Prepared, provenance};
use super::{results, tensorboard};
use crate::adapter::reader;
use crate::arch::ModelConfig;
use crate::engine::BackgroundWork;
use crate::lora::weights::AdapterWeights;
use crate::model::decoder::Decoder;
use crate::runtime::BaseModel;
use crate::train::job::{Command, Job, JobReport};
use crate::train::spec::JobSpec;
use crate::train::state;
use crate::train::trainer::Trainer;
use crate::{Error, Result};

/// Id of the job in commands.
const ID: &str = "train";

/// A job that this process runs to its end.
pub(crate) struct LocalJob {
    trainer: Trainer,
    commands: Sender<Command>,
    reports: Receiver<JobReport>,
    /// Directory of the adapter.
    out: PathBuf,
}

/// A job that has ended or was paused.
pub(crate) struct FinishedJob {
    /// Time of training since the last start.
    pub(crate) took: Duration,
    /// Steps of earlier runs.
    pub(crate) done: usize,
    /// Metrics of all runs.
    pub(crate) history: MetricsHistory,
    /// The last checkpoint; `None` if the job was paused.
    adapter: Option<PathBuf>,
    /// Directory of the adapter.
    out: PathBuf,
}

impl LocalJob {
    /// Starts a job whose adapter goes to `out`. With `resume`, it continues from the state in `out`, if there is one.
    ///
    /// # Errors
    /// `Invalid`: `out` has checkpoints and `resume` is false, or the adapter to continue from cannot be read.
    pub(crate) fn start(base: BaseModel, prepared: Prepared, out: &Path, resume: bool) -> Result<Self> {
        let BaseModel { files, codec, weights, .. } = base;
        let dir = checkpoints(out);
        if !resume && dir.exists() {
            return Err(Error::invalid(format!(
                "{} has checkpoints already: pass --resume to continue from them, or another --out",
                out.display()
            )));
        }
        std::fs::create_dir_all(&dir)?;
        let from = adapter_to_continue(&prepared.spec, &weights.config)?;
        let (sender, reports) = channel();
        let job = Job {
            id: ID.into(),
            provenance: provenance(&files.name, &weights.fingerprint, &codec, &prepared.train)?,
            train: prepared.train.examples,
            valid: prepared.valid.map(|valid| valid.examples).unwrap_or_default(),
            spec: prepared.spec,
            from,
            resume: state::exists(&dir),
            dir,
            // The receiver lives as long as the loop that trains.
            report: tensorboard::with_events(out, move |report| drop(sender.send(report))),
        };
        let (commands, inbox) = channel();
        let trainer = Trainer::new(Arc::new(Decoder::new(weights)?), inbox)?;
        // The trainer holds the receiver.
        let _ = commands.send(Command::Start(Box::new(job)));
        Ok(Self { trainer, commands, reports, out: out.to_owned() })
    }

    /// Returns a function that pauses the job: its state is kept, so that it can be resumed.
    pub(crate) fn pause(&self) -> impl Fn() + Send + use<> {
        let commands = self.commands.clone();
        // A trainer that is gone has nothing to pause.
        move || drop(commands.send(Command::Pause(ID.into())))
    }

    /// Trains to the job's end or until it is paused, and passes each report to `show`. Errors: the job failed.
    pub(crate) fn run(mut self, mut show: impl FnMut(&JobReport)) -> Result<FinishedJob> {
        let began = Instant::now();
        let history = MetricsHistory::new(&checkpoints(&self.out));
        let mut job = FinishedJob { took: Duration::ZERO, done: 0, history, adapter: None, out: self.out };
        let mut last = None;
        loop {
            let worked = self.trainer.run_slice() || self.trainer.settle();
            for report in self.reports.try_iter() {
                job.history.add(&report)?;
                show(&report);
                match report {
                    JobReport::Started { done, .. } => job.done = done,
                    JobReport::Checkpoint(checkpoint) | JobReport::Resumed(checkpoint) => last = Some(checkpoint.dir),
                    JobReport::Succeeded => job.adapter = last.take(),
                    JobReport::Failed(error) => return Err(error),
                    JobReport::Step(_) | JobReport::Validation(_) | JobReport::Paused | JobReport::Cancelled => {}
                }
            }
            if !worked {
                job.took = began.elapsed();
                return Ok(job);
            }
        }
    }
}

impl FinishedJob {
    /// Copies the last checkpoint to the job's directory and writes its metrics there. Errors: the job was paused.
    pub(crate) fn install(&self) -> Result<()> {
        let Some(last) = &self.adapter else {
            return Err(Error::invalid("interrupted: the same command with --resume continues from here"));
        };
        for entry in std::fs::read_dir(last)? {
            let entry = entry?;
            std::fs::copy(entry.path(), self.out.join(entry.file_name()))?;
        }
        results::write(&self.out, &self.history.steps, &self.history.validations)
    }

    /// Removes the state to resume from. Call it last: after a kill, a job without state starts over.
    pub(crate) fn remove_state(&self) -> Result<()> {
        state::remove(&checkpoints(&self.out))
    }
}

/// Reads a file of examples.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::invalid(format!("{} cannot be read: {e}", path.display())))
}

/// The adapter that a job continues from, by its directory.
pub(crate) fn adapter_to_continue(spec: &JobSpec, model: &ModelConfig) -> Result<Option<AdapterWeights>> {
    let read = |dir: &String| Ok(reader::read(Path::new(dir), model)?.weights);
    spec.from_checkpoint.as_ref().map(read).transpose()
}

/// Directory of a job's checkpoints.
fn checkpoints(out: &Path) -> PathBuf {
    out.join("checkpoints")
}
