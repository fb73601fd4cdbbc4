//! A batch as it is stored, and as the API shows it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::finetune::record::now;

/// The one completion window of OpenAI's API.
pub(super) const WINDOW: &str = "24h";

/// Seconds of [`WINDOW`].
pub(super) const WINDOW_SECONDS: u64 = 24 * 3600;

/// Status of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::server) enum BatchStatus {
    Validating,
    InProgress,
    Finalizing,
    Completed,
    Failed,
    Expired,
    Cancelling,
    Cancelled,
}

impl BatchStatus {
    /// The status in the API's spelling.
    pub(in crate::server) fn word(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::InProgress => "in_progress",
            Self::Finalizing => "finalizing",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Expired => "expired",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the status is final.
    pub(in crate::server) fn ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Expired | Self::Cancelled)
    }
}

/// Why a batch failed, as the API shows it: a fault of a line of its input file, or of the whole (`line` is null).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct BatchError {
    pub(super) code: String,
    pub(super) line: Option<usize>,
    pub(super) message: String,
    pub(super) param: Option<String>,
}

/// Numbers of requests. `completed` have a line in the output file, `failed` in the error file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RequestCounts {
    pub(super) total: usize,
    pub(super) completed: usize,
    pub(super) failed: usize,
}

/// A batch, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::server) struct BatchRecord {
    pub(in crate::server) id: String,
    /// Path of the route that answers its requests.
    pub(super) endpoint: String,
    pub(in crate::server) input_file_id: String,
    /// Key-value pairs of the client.
    pub(super) metadata: Map<String, Value>,
    /// Seconds from their creation after which its result files expire.
    pub(super) output_expires_after: Option<u64>,
    pub(in crate::server) status: BatchStatus,
    pub(super) errors: Vec<BatchError>,
    pub(super) counts: RequestCounts,
    /// Ids of its result files. They become files of the API when the batch ends, if they have lines.
    pub(super) output_id: String,
    pub(super) error_id: String,
    pub(super) created_at: u64,
    pub(super) expires_at: u64,
    pub(super) in_progress_at: Option<u64>,
    pub(super) finalizing_at: Option<u64>,
    pub(super) completed_at: Option<u64>,
    pub(super) failed_at: Option<u64>,
    pub(super) expired_at: Option<u64>,
    pub(super) cancelling_at: Option<u64>,
    pub(super) cancelled_at: Option<u64>,
}

impl BatchRecord {
    /// Sets the status, and the time of the change.
    pub(super) fn enter(&mut self, status: BatchStatus) {
        self.status = status;
        let at = match status {
            BatchStatus::Validating => return,
            BatchStatus::InProgress => &mut self.in_progress_at,
            BatchStatus::Finalizing => &mut self.finalizing_at,
            BatchStatus::Completed => &mut self.completed_at,
            BatchStatus::Failed => &mut self.failed_at,
            BatchStatus::Expired => &mut self.expired_at,
            BatchStatus::Cancelling => &mut self.cancelling_at,
            BatchStatus::Cancelled => &mut self.cancelled_at,
        };
        *at = Some(now());
    }

    /// The ids and the names of its result files, each with the number of its lines.
    pub(super) fn result_files(&self) -> [(&str, String, usize); 2] {
        [
            (&self.output_id, format!("{}_output.jsonl", self.id), self.counts.completed),
            (&self.error_id, format!("{}_error.jsonl", self.id), self.counts.failed),
        ]
    }

    /// The batch in the form of OpenAI's API.
    pub(super) fn object(&self) -> Value {
        let has_files = self.status.ended() && self.status != BatchStatus::Failed;
        let [output, error] = self.result_files().map(|(id, _, lines)| (has_files && lines > 0).then_some(id));
        let errors = (!self.errors.is_empty()).then(|| json!({"object": "list", "data": self.errors}));
        json!({
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": errors,
            "input_file_id": self.input_file_id,
            "completion_window": WINDOW,
            "status": self.status,
            "output_file_id": output,
            "error_file_id": error,
            "created_at": self.created_at,
            "in_progress_at": self.in_progress_at,
            "expires_at": self.expires_at,
            "finalizing_at": self.finalizing_at,
            "completed_at": self.completed_at,
            "failed_at": self.failed_at,
            "expired_at": self.expired_at,
            "cancelling_at": self.cancelling_at,
            "cancelled_at": self.cancelled_at,
            "request_counts": self.counts,
            "metadata": self.metadata,
        })
    }
}
