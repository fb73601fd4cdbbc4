//! The state of a job on disk: everything that changes from step to step, in one file, from which a job resumes bit for bit.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::{fs, io};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::job::Probe;
use crate::{Error, Result, files};

/// Name of the file in a job's directory.
const FILE: &str = "state.safetensors";
/// Key of the [`JobProgress`] in the metadata of the file.
const PROGRESS: &str = "progress";

/// A pass without gradients, between two optimiser steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalPass {
    /// Passes over the validation examples.
    Validation,
    /// A pass over the probe of a checkpoint, which is then written.
    Checkpoint,
}

/// Progress of a job. The names of the fields are part of the file format.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobProgress {
    /// Optimiser steps done.
    pub step: usize,
    /// Passes to run before the next step.
    pub todo: VecDeque<EvalPass>,
    /// Bits of the lowest validation loss so far (f64). A decimal might change the last bit.
    pub best_bits: Option<u64>,
    /// Number of validations since the lowest loss.
    pub stale: usize,
    /// Step and probe of the last checkpoint, which is reported again when the job resumes.
    pub checkpoint: Option<(usize, Probe)>,
    /// With AdaLoRA, whether each rank is left, site by site; `None` until the first ranks are removed.
    pub kept: Option<Vec<Vec<bool>>>,
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Whether there is a state in a job's directory.
pub fn exists(dir: &Path) -> bool {
    path(dir).is_file()
}

/// Writes the state atomically. `tensors` are in host memory. Errors: the file cannot be written.
pub(super) fn write(dir: &Path, progress: &JobProgress, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let text = serde_json::to_string(progress).map_err(|e| Error::internal(format!("a job's progress: {e}")))?;
    let metadata = HashMap::from([(PROGRESS.to_owned(), text)]);
    let serialize =
        |temporary: &Path| safetensors::serialize_to_file(tensors, Some(metadata), temporary).map_err(io::Error::other);
    files::replace(&path(dir), serialize).map_err(|e| {
        Error::internal(format!("the job's state cannot be written to {}: {e}", dir.display())).path(dir).caused_by(e)
    })
}

/// Reads the state. Errors: it does not exist or is damaged.
pub(super) fn read(dir: &Path, device: &Device) -> Result<(JobProgress, HashMap<String, Tensor>)> {
    // Without the path, because clients get the error with the job.
    let failed = |e: &dyn std::fmt::Display| {
        Error::invalid(format!("the job's saved state cannot be read: {e}")).code("state_unreadable").path(path(dir))
    };
    let bytes = fs::read(path(dir)).map_err(|e| failed(&e))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
    let text =
        header.metadata().as_ref().and_then(|m| m.get(PROGRESS)).ok_or_else(|| failed(&"it is not a job's state"))?;
    let progress = serde_json::from_str(text).map_err(|e| failed(&e))?;
    Ok((progress, candle_core::safetensors::load_buffer(&bytes, device)?))
}

/// Removes the state, if there is one. Errors: the file cannot be removed.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_file(path(dir)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::internal(format!("{} cannot be removed: {e}", path(dir).display())).path(path(dir)).caused_by(e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_state_is_an_error_without_its_path() {
        let dir = tempfile::tempdir().unwrap();
        for content in [None, Some("no tensors")] {
            content.iter().for_each(|text| fs::write(path(dir.path()), text).unwrap());
            let error = read(dir.path(), &Device::Cpu).err().unwrap();
            assert!(!error.message.contains(dir.path().to_str().unwrap()), "clients get it: {error}");
            assert!(format!("{error:#}").contains(dir.path().to_str().unwrap()), "the log has it: {error:#}");
        }
    }
}
