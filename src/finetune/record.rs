//! Files and jobs as they are stored, and the other objects of OpenAI's fine-tuning API.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::time::unix_seconds;
use crate::train::job::{StepMetrics, Validation};
use crate::train::spec::JobSpec;

/// The organisation in the names of models. A server has only one.
const ORGANISATION: &str = "quiver";

/// Status of a job.
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
    /// The status in the API's spelling.
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

    /// Whether the status is final.
    pub fn ended(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// Why a job failed, as the API shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobError {
    pub code: String,
    pub message: String,
    pub param: Option<String>,
}

/// A job, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JobRecord {
    pub id: String,
    pub created_at: u64,
    pub finished_at: Option<u64>,
    pub status: JobStatus,
    /// Name of the base model.
    pub base: String,
    /// Id of the training file.
    pub training_file: String,
    pub validation_file: Option<String>,
    /// Part of the names of its models.
    pub suffix: Option<String>,
    /// Key-value pairs of the client.
    pub metadata: Map<String, Value>,
    /// The settings of the request (see [`super::settings`]).
    pub settings: Value,
    pub seed: u64,
    /// The final settings, once the files are validated.
    pub spec: Option<JobSpec>,
    /// Optimiser steps in all; 0 until the job runs.
    pub steps: usize,
    /// Optimiser steps done.
    pub done: usize,
    /// Tokens of the steps done, trained on or not.
    pub trained_tokens: u64,
    pub estimated_finish: Option<u64>,
    pub fine_tuned_model: Option<String>,
    pub result_files: Vec<String>,
    pub error: Option<JobError>,
}

impl JobRecord {
    /// Sets a final status.
    pub(super) fn end(&mut self, status: JobStatus) {
        (self.status, self.finished_at) = (status, Some(now()));
        self.estimated_finish = None;
    }

    /// Name of the job's model, or of its checkpoint after `step` steps.
    pub fn model_id(&self, step: Option<usize>) -> String {
        let suffix = self.suffix.as_deref().unwrap_or_default();
        let model = format!("ft:{}:{ORGANISATION}:{suffix}:{}", self.base, self.short_id());
        step.map_or(model.clone(), |step| format!("{model}:ckpt-step-{step}"))
    }

    /// Id of the checkpoint after `step` steps, as an object of the API.
    pub fn checkpoint_id(&self, step: usize) -> String {
        format!("ftckpt_{}_{step}", self.short_id())
    }

    /// The first characters of its id, enough to tell jobs apart.
    fn short_id(&self) -> &str {
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

/// Purpose of a file to train on.
pub const FINE_TUNE: &str = "fine-tune";
/// Purpose of a result of a fine-tuning job.
pub const FINE_TUNE_RESULTS: &str = "fine-tune-results";

impl FileObject {
    /// A new file that is ready to be used.
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

    /// Whether the time has passed after which the file is no longer there for clients.
    pub fn expired(&self) -> bool {
        self.expires_at.is_some_and(|at| at <= now())
    }
}

/// An object as JSON in which f32 values keep their shortest decimals. `serde_json::to_value` would convert them to f64 first.
pub(super) fn shortest_floats(object: &impl Serialize) -> Value {
    serde_json::to_string(object).and_then(|text| serde_json::from_str(&text)).unwrap_or_default()
}

/// A new unique id.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}{}", uuid::Uuid::new_v4().simple())
}

/// Seconds since 1970.
pub fn now() -> u64 {
    unix_seconds(SystemTime::now())
}

/// A new event of a job, as the API shows it.
pub(super) fn event(level: &str, message: &str, data: Option<Value>) -> Value {
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

/// A new checkpoint of a job, as the API shows it.
pub(super) fn checkpoint(
    record: &JobRecord,
    step: usize,
    trained: Option<&StepMetrics>,
    valid: Option<&Validation>,
) -> Value {
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
            // Every validation measures the whole file.
            "valid_loss": valid_loss,
            "valid_mean_token_accuracy": valid_accuracy,
            "full_valid_loss": valid_loss,
            "full_valid_mean_token_accuracy": valid_accuracy,
        },
    })
}
