//! What jobs need of the server that they run in.

use std::sync::Arc;

use super::monitor;
use super::prepare::{self, Prepared};
use super::record::JobRecord;
use super::store::Store;
use crate::adapter::peft;
use crate::lora::weights::AdapterWeights;
use crate::runtime::Runtime;
use crate::train::job::{Job, JobReport};
use crate::train::spec::JobSpec;
use crate::train::state;
use crate::{Error, Result};

/// The parts of a server that jobs touch.
pub struct JobContext {
    /// The base, the engine that scores probes, the registry that gets the adapters, and the trainer.
    pub runtime: Arc<Runtime>,
    /// Jobs that run at once.
    pub max_running: usize,
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
        let longest = self.runtime.engine.config().max_model_len;
        prepare::prepare(&self.runtime.codec, &record.settings, longest, &train, valid.as_deref())
    }

    /// The adapter that a job continues from.
    pub fn from(&self, spec: &JobSpec) -> Result<Option<AdapterWeights>> {
        let Some(name) = &spec.from_checkpoint else { return Ok(None) };
        let Runtime { base, registry, .. } = &*self.runtime;
        let read = || peft::read(&registry.get(name)?.source, &base.shape).map(|(weights, _)| weights);
        read().map(Some).map_err(|e| e.param("training.from_checkpoint"))
    }

    /// Everything that the trainer needs of a job.
    pub fn job(&self, record: &JobRecord, report: Box<dyn FnMut(JobReport) + Send>) -> Result<Job> {
        let Prepared { train, valid, spec } = self.read(record)?;
        // Chosen once: a job that goes on must not find other settings.
        let spec = record.spec.clone().unwrap_or(spec);
        let dir = self.store.job_dir(&record.id);
        let Runtime { base, codec, .. } = &*self.runtime;
        std::fs::create_dir_all(&dir)?;
        Ok(Job {
            id: record.id.clone(),
            provenance: prepare::provenance(base.name(), &base.fingerprint, codec, &train)?,
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
