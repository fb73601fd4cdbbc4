//! The server's handles that jobs use: runtime, store, limits.

use std::sync::Arc;

use super::prepare::{self, Prepared};
use super::record::JobRecord;
use super::store::Store;
use super::tensorboard;
use crate::adapter::reader;
use crate::error::{AtPath, Error, Result};
use crate::lora::weights::AdapterWeights;
use crate::runtime::Runtime;
use crate::train::job::{Job, ReportFn};
use crate::train::spec::JobSpec;
use crate::train::state;

/// The parts of a server that jobs use.
pub struct JobContext {
    /// The base, the engine that scores probes, the registry that checkpoints are published to, and the trainer.
    pub runtime: Arc<Runtime>,
    /// Most jobs that run at once.
    pub max_running: usize,
    /// Files and jobs on disk.
    pub store: Arc<Store>,
    /// Whether the store outlives the server: it is in a `--state-dir`.
    pub persistent: bool,
}

impl JobContext {
    /// Reads a job's files and chooses its settings. Blocks. Errors: as [`prepare::prepare`]; a file cannot be read.
    pub(crate) fn read(&self, record: &JobRecord) -> Result<Prepared> {
        let content = |id: &str, param: &str| {
            let path = self.store.file_path(id);
            let message = |e: &std::io::Error| format!("file {id:?} cannot be read: {e}");
            std::fs::read(&path).map_err(|e| Error::invalid(message(&e)).param(param).path(path).caused_by(e))
        };
        let train = content(&record.training_file, "training_file")?;
        let valid = record.validation_file.as_ref().map(|id| content(id, "validation_file")).transpose()?;
        let longest = self.runtime.engine.config().max_model_len;
        prepare::prepare(&self.runtime.codec, &record.settings, longest, &train, valid.as_deref())
    }

    /// The weights of the adapter that a job continues from, if it names one. Errors: it is not there or cannot be read.
    pub(super) fn continued_adapter(&self, spec: &JobSpec) -> Result<Option<AdapterWeights>> {
        let Some(name) = &spec.from_checkpoint else { return Ok(None) };
        let Runtime { base, registry, .. } = &*self.runtime;
        let read = || {
            let source = registry.get(name)?.source;
            let read = reader::read(&source, &base.shape).map(|adapter| adapter.weights);
            read.map_err(|e| e.hide_path(&source, &format!("the directory of {name:?}")))
        };
        read().map(Some).map_err(|e| e.param("training.from_checkpoint"))
    }

    /// A job for the trainer, which sends its reports to `report`. Blocks. Errors: as [`Self::read`] and
    /// [`Self::continued_adapter`]; the job's directory cannot be made.
    pub(super) fn job(&self, record: &JobRecord, report: ReportFn) -> Result<Job> {
        let Prepared { train, valid, spec } = self.read(record)?;
        // A job keeps the settings that were chosen first, also when it resumes.
        let spec = record.spec.clone().unwrap_or(spec);
        let dir = self.store.job_dir(&record.id);
        let Runtime { base, codec, .. } = &*self.runtime;
        std::fs::create_dir_all(&dir).at(&dir)?;
        Ok(Job {
            id: record.id.clone(),
            provenance: prepare::provenance(base.name(), &base.fingerprint, codec, &train)?,
            from: self.continued_adapter(&spec)?,
            resume: state::exists(&dir),
            train: train.examples,
            valid: valid.map(|valid| valid.examples).unwrap_or_default(),
            spec,
            report: tensorboard::with_events(&dir, report),
            dir,
        })
    }
}
