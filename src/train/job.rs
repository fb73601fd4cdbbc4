//! Input and output of the trainer: jobs and commands, reports and checkpoints.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::data::Example;
use super::spec::JobSpec;
use crate::Error;
use crate::lora::weights::AdapterWeights;

/// A training job, with everything it needs.
pub struct Job {
    /// Identifies the job in commands.
    pub id: String,
    pub spec: JobSpec,
    /// Examples to train on.
    pub train: Vec<Example>,
    /// Held-out examples for validation; may be empty.
    pub valid: Vec<Example>,
    /// Directory of its checkpoints (`step-N/`, PEFT directories) and of its state.
    pub dir: PathBuf,
    /// Keys that are added to PEFT's in `adapter_config.json`: base model, its fingerprint, hashes of tokenizer and template.
    pub provenance: serde_json::Map<String, serde_json::Value>,
    /// The adapter to continue from; `None`: initial values.
    pub from: Option<AdapterWeights>,
    /// Whether to resume from the state in `dir`.
    pub resume: bool,
    /// Receives the job's reports.
    pub report: ReportFn,
}

/// Receives the reports of a job, in order, on the thread that writes the files of jobs.
pub type ReportFn = Box<dyn FnMut(JobReport) + Send>;

/// A command to the trainer.
pub enum Command {
    /// Start a job.
    Start(Box<Job>),
    /// Save the job's state and drop the job.
    Pause(String),
    /// Drop the job and remove its state.
    Cancel(String),
}

/// A report on a job.
#[derive(Debug, Clone)]
pub enum JobReport {
    /// The job runs.
    Started {
        /// Optimiser steps in all.
        steps: usize,
        /// Steps done by earlier runs of the job.
        done: usize,
        /// Number of trained values.
        parameters: usize,
    },
    /// An optimiser step is done.
    Step(StepMetrics),
    /// A validation is done.
    Validation(Validation),
    /// A checkpoint is on disk.
    Checkpoint(Checkpoint),
    /// Follows [`JobReport::Started`] when a job resumes: its last checkpoint, which may not have been reported before.
    Resumed(Checkpoint),
    /// The job has stopped and can be resumed.
    Paused,
    /// The job has stopped and its state is removed.
    Cancelled,
    /// The job has ended. Its last checkpoint is its result. The receiver removes its state (`state::remove`).
    Succeeded,
    /// The job has ended with an error.
    Failed(Error),
}

/// Metrics of an optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Number of the step, from 1.
    pub step: usize,
    /// Mean negative log-likelihood of the step's trained tokens, nats.
    pub train_loss: f64,
    /// Fraction of these tokens that had the highest probability.
    pub train_mean_token_accuracy: f64,
    pub learning_rate: f32,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f32,
    /// Tokens of the step, trained on or not.
    pub tokens: usize,
    /// Tokens of the step that are trained on.
    pub trained_tokens: usize,
    /// Wall time of the step, including requests served in between.
    pub seconds: f64,
}

/// Metrics of a validation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Number of optimiser steps done before it.
    pub step: usize,
    /// Mean negative log-likelihood of the validation file's trained tokens, nats.
    pub valid_loss: f64,
    /// Fraction of these tokens that had the highest probability.
    pub valid_mean_token_accuracy: f64,
}

/// An adapter that a job wrote at some step.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Number of optimiser steps done before it.
    pub step: usize,
    /// A PEFT directory.
    pub dir: PathBuf,
    /// The trainer's log-probabilities of one text, to compare with the server's before the checkpoint is published.
    pub probe: Probe,
}

/// Log-probabilities of one text under an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub tokens: Vec<u32>,
    /// Log-probability of each token after the first, given those before it.
    pub logprobs: Vec<f32>,
}
