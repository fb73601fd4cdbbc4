//! What jobs need of the server that they run in.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::monitor;
use super::prepare::{self, Prepared};
use super::record::JobRecord;
use super::store::Store;
use crate::adapter::peft;
use crate::adapter::registry::Registry;
use crate::arch::ModelConfig;
use crate::engine::Engine;
use crate::lora::weights::AdapterWeights;
use crate::text::prompt::TextCodec;
use crate::train::job::{Command, Job, JobReport};
use crate::train::spec::JobSpec;
use crate::train::state;
use crate::{Error, Result};

/// The parts of a server that jobs touch.
pub struct JobContext {
    /// Scores probes.
    pub engine: Engine,
    /// Gets the adapters.
    pub registry: Registry,
    /// Reads files.
    pub codec: Arc<TextCodec>,
    /// Shape of the base, for adapters to continue from.
    pub model: Arc<ModelConfig>,
    /// Name of the base.
    pub base: String,
    /// Of the base's tensors.
    pub fingerprint: String,
    /// Longest text that the server answers.
    pub max_model_len: usize,
    /// Jobs that run at once.
    pub max_running: usize,
    /// To the trainer.
    pub commands: Sender<Command>,
    /// Keeps everything.
    pub store: Arc<Store>,
    /// Whether it is still there at the next start.
    pub lasting: bool,
}

impl JobContext {
    /// Reads a job's files.
    pub fn read(&self, record: &JobRecord) -> Result<Prepared> {
        let content = |id: &str, param: &str| {
            let unreadable = |e| Error::invalid(format!("file {id:?} cannot be read: {e}")).param(param);
            std::fs::read(self.store.file_path(id)).map_err(unreadable)
        };
        let train = content(&record.training_file, "training_file")?;
        let valid = record.validation_file.as_ref().map(|id| content(id, "validation_file")).transpose()?;
        prepare::prepare(&self.codec, &record.settings, self.max_model_len, &train, valid.as_deref())
    }

    /// The adapter that a job continues from.
    pub fn from(&self, spec: &JobSpec) -> Result<Option<AdapterWeights>> {
        let Some(name) = &spec.from_checkpoint else { return Ok(None) };
        let read = || peft::read(&self.registry.get(name)?.source, &self.model).map(|(weights, _)| weights);
        read().map(Some).map_err(|e| e.param("training.from_checkpoint"))
    }

    /// Everything that the trainer needs of a job.
    pub fn job(&self, record: &JobRecord, report: Box<dyn FnMut(JobReport) + Send>) -> Result<Job> {
        let Prepared { train, valid, spec } = self.read(record)?;
        // Chosen once: a job that goes on must not find other settings.
        let spec = record.spec.clone().unwrap_or(spec);
        let dir = self.store.job_dir(&record.id);
        std::fs::create_dir_all(&dir)?;
        Ok(Job {
            id: record.id.clone(),
            provenance: prepare::provenance(&self.base, &self.fingerprint, &self.codec, &train)?,
            from: self.from(&spec)?,
            resume: state::exists(&dir),
            train: train.examples,
            valid: valid.map(|valid| valid.examples).unwrap_or_default(),
            spec,
            report: monitor::watched(&dir, report),
            dir,
        })
    }
}
