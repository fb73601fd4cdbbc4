//! A job's state on disk: all that an uninterrupted run would have in memory between two steps, in one file.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::{fs, io};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::job::Probe;
use crate::{Error, Result, files};

/// The file's name in a job's directory.
const FILE: &str = "state.safetensors";
/// Key of the file's metadata that has the [`JobProgress`].
const PROGRESS: &str = "progress";

/// What is measured between two optimiser steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalPass {
    /// The loss on the validation examples.
    Validation,
    /// What the adapter says of one text, to be written with it.
    Checkpoint,
}

/// Where a job is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct JobProgress {
    /// Optimiser steps done.
    pub step: usize,
    /// To be measured before the next step.
    pub todo: VecDeque<EvalPass>,
    /// Bits of the lowest validation loss so far (f64), which as a decimal may come back off by one.
    pub best_bits: Option<u64>,
    /// Validations since.
    pub stale: usize,
    /// Step and probe of the last checkpoint: whoever was to hear of it may not have.
    pub checkpoint: Option<(usize, Probe)>,
    /// AdaLoRA: whether each rank is kept, site by site, once ranks were chosen.
    pub kept: Option<Vec<Vec<bool>>>,
}

fn path(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Whether a job has left its state in `dir`.
pub fn exists(dir: &Path) -> bool {
    path(dir).is_file()
}

/// Writes the state, of tensors on the CPU; whoever reads has the old one or the new one. Errors: the disk is full or may not
/// be written.
pub fn write(dir: &Path, progress: &JobProgress, tensors: &HashMap<String, Tensor>) -> Result<()> {
    let text = serde_json::to_string(progress).map_err(|e| Error::internal(format!("a job's progress: {e}")))?;
    let metadata = HashMap::from([(PROGRESS.to_owned(), text)]);
    let serialize =
        |made: &Path| safetensors::serialize_to_file(tensors, Some(metadata), made).map_err(io::Error::other);
    files::replace(&path(dir), serialize)
        .map_err(|e| Error::internal(format!("the job's state cannot be written to {}: {e}", dir.display())))
}

/// Reads it back. Errors: it is not there or not whole.
pub fn read(dir: &Path, device: &Device) -> Result<(JobProgress, HashMap<String, Tensor>)> {
    let failed = |e: &dyn std::fmt::Display| Error::invalid(format!("{} cannot be read: {e}", path(dir).display()));
    let bytes = fs::read(path(dir)).map_err(|e| failed(&e))?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| failed(&e))?;
    let text =
        header.metadata().as_ref().and_then(|m| m.get(PROGRESS)).ok_or_else(|| failed(&"it is not a job's state"))?;
    let progress = serde_json::from_str(text).map_err(|e| failed(&e))?;
    Ok((progress, candle_core::safetensors::load_buffer(&bytes, device)?))
}

/// Removes it, if there is one.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_file(path(dir)) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::internal(format!("{} cannot be removed: {e}", path(dir).display())))
        }
        _ => Ok(()),
    }
}
