//! What is kept of files and jobs.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::time::unix_seconds;
use crate::train::job::{StepMetrics, Validation};
use crate::train::spec::JobSpec;

/// Stands for the organisation in names of models: a server has one.
const ORGANISATION: &str = "quiver";

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    ValidatingFiles,
    Queued,
    Running,
    Paused,
    Succeeded,
    Failed,
    Cancelled,
}

impl JobStatus {
    /// As the API spells it.
    pub fn word(self) -> &'static str {
        match self {
            Self::ValidatingFiles => "validating_files",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Nothing will happen to the job any more.
    pub fn ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Why a job failed, in the form of OpenAI's API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    pub code: String,
    pub message: String,
    pub param: Option<String>,
}

/// A job.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: String,
    pub created_at: u64,
    pub finished_at: Option<u64>,
    pub status: JobStatus,
    /// Name of the base.
    pub base: String,
    /// Id of a file.
    pub training_file: String,
    pub validation_file: Option<String>,
    /// Becomes part of the names of its models.
    pub suffix: Option<String>,
    /// The client's own.
    pub metadata: Map<String, Value>,
    /// What was asked for (see [`super::settings`]).
    pub settings: Value,
    pub seed: u64,
    /// What came of it, once the files were read.
    pub spec: Option<JobSpec>,
    /// Optimiser steps in all, once it runs, and those done.
    pub steps: usize,
    pub done: usize,
    /// Tokens that went through the model.
    pub trained_tokens: u64,
    pub estimated_finish: Option<u64>,
    pub fine_tuned_model: Option<String>,
    pub result_files: Vec<String>,
    pub error: Option<JobError>,
}

impl JobRecord {
    /// Name of the model that it makes, or of a checkpoint after `step` steps.
    pub fn model_id(&self, step: Option<usize>) -> String {
        let suffix = self.suffix.as_deref().unwrap_or_default();
        let model = format!("ft:{}:{ORGANISATION}:{suffix}:{}", self.base, self.short_id());
        step.map_or(model.clone(), |step| format!("{model}:ckpt-step-{step}"))
    }

    /// Id of the checkpoint after `step` steps.
    pub fn checkpoint_id(&self, step: usize) -> String {
        format!("ftckpt_{}_{step}", self.short_id())
    }

    /// Enough of its id to tell jobs apart.
    pub fn short_id(&self) -> &str {
        let random = self.id.trim_start_matches("ftjob-");
        &random[..random.len().min(8)]
    }
}

/// A file, as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FileObject {
    pub id: String,
    pub object: String,
    pub bytes: u64,
    pub created_at: u64,
    pub expires_at: Option<u64>,
    pub filename: String,
    pub purpose: String,
    pub status: String,
    pub status_details: Option<String>,
}

impl FileObject {
    /// A file that is ready to be used.
    pub fn new(id: String, bytes: u64, filename: String, purpose: &str) -> Self {
        Self {
            id,
            object: "file".into(),
            bytes,
            created_at: now(),
            expires_at: None,
            filename,
            purpose: purpose.into(),
            status: "processed".into(),
            status_details: None,
        }
    }
}

/// An object with f32 values as short as they can be written, not as the f64 beside them.
pub fn plain(object: &impl Serialize) -> Value {
    serde_json::to_string(object).and_then(|text| serde_json::from_str(&text)).unwrap_or_default()
}

/// An id of its own.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    unix_seconds(SystemTime::now())
}

/// An event of a job, as the API shows it.
pub fn event(level: &str, message: &str, data: Option<Value>) -> Value {
    json!({
        "id": new_id("ftevent-"),
        "object": "fine_tuning.job.event",
        "created_at": now(),
        "level": level,
        "message": message,
        "type": if data.is_some() { "metrics" } else { "message" },
        "data": data,
    })
}

/// A checkpoint of a job, as the API shows it.
pub fn checkpoint(record: &JobRecord, step: usize, trained: Option<&StepMetrics>, valid: Option<&Validation>) -> Value {
    let valid_loss = valid.map(|v| v.valid_loss);
    let valid_accuracy = valid.map(|v| v.valid_mean_token_accuracy);
    json!({
        "id": record.checkpoint_id(step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": now(),
        "fine_tuning_job_id": record.id,
        "fine_tuned_model_checkpoint": record.model_id(Some(step)),
        "step_number": step,
        "metrics": {
            "step": step,
            "train_loss": trained.map(|t| t.train_loss),
            "train_mean_token_accuracy": trained.map(|t| t.train_mean_token_accuracy),
            // Every validation reads the whole file.
            "valid_loss": valid_loss,
            "valid_mean_token_accuracy": valid_accuracy,
            "full_valid_loss": valid_loss,
            "full_valid_mean_token_accuracy": valid_accuracy,
        },
    })
}
