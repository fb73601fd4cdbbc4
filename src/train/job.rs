//! What goes into the trainer and what comes out of it.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::data::Example;
use super::spec::JobSpec;
use crate::Error;
use crate::lora::weights::AdapterWeights;

/// A job, ready to run.
pub struct Job {
    /// Its name in commands.
    pub id: String,
    /// Its settings.
    pub spec: JobSpec,
    /// What it learns from.
    pub train: Vec<Example>,
    /// What its loss is measured on, which it does not learn from.
    pub valid: Vec<Example>,
    /// Where its checkpoints (`step-N/`, as PEFT's directories) and its state go.
    pub dir: PathBuf,
    /// Keys that every `adapter_config.json` gets beside PEFT's: base model, its fingerprint, template and tokenizer hashes.
    pub provenance: serde_json::Map<String, serde_json::Value>,
    /// The adapter it continues from; none: new values.
    pub from: Option<AdapterWeights>,
    /// Whether it goes on from the state in `dir`.
    pub resume: bool,
    /// ReporterState what happens, in order, on the thread that writes jobs' files.
    pub report: Box<dyn FnMut(JobReport) + Send>,
}

/// What the trainer is told.
pub enum Command {
    /// Start, or queue, a job.
    Start(Box<Job>),
    /// Write the job's state and leave it.
    Pause(String),
    /// StopKind the job for good, and remove its state.
    Cancel(String),
}

/// What happens to a job.
#[derive(Debug, Clone)]
pub enum JobReport {
    /// It runs.
    Started {
        /// Optimiser steps in all.
        steps: usize,
        /// Steps done before, by the run that this one continues.
        done: usize,
        /// Values that are trained.
        parameters: usize,
    },
    /// An optimiser step is done.
    Step(StepMetrics),
    /// A validation is done.
    Validation(Validation),
    /// An adapter is on disk.
    Checkpoint(Checkpoint),
    /// After [`JobReport::Started`]: it goes on from a state with this last checkpoint, of which nobody may have heard.
    Resumed(Checkpoint),
    /// It stopped, and can resume.
    Paused,
    /// It stopped for good.
    Cancelled,
    /// It has ended; its last checkpoint is its result. Its state stays until whoever hears this has no more need of it.
    Succeeded,
    /// It cannot go on.
    Failed(Error),
}

/// Figures of an optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// From 1 on.
    pub step: usize,
    /// Mean negative log-likelihood of the step's trained tokens, nats.
    pub train_loss: f64,
    /// Share of them that were the likeliest.
    pub train_mean_token_accuracy: f64,
    pub learning_rate: f32,
    /// Global norm before clipping.
    pub grad_norm: f32,
    /// Tokens of the step, trained on or not.
    pub tokens: usize,
    /// Of those, trained on.
    pub trained_tokens: usize,
    /// Wall time of the step, serving in between included.
    pub seconds: f64,
}

/// Figures of a validation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Optimiser steps done before it.
    pub step: usize,
    /// Mean negative log-likelihood of the validation file's trained tokens, nats.
    pub valid_loss: f64,
    pub valid_mean_token_accuracy: f64,
}

/// An adapter on disk.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Optimiser steps done before it.
    pub step: usize,
    /// A PEFT directory.
    pub dir: PathBuf,
    /// What the trainer gives for one example, to be compared with the server's before anyone gets the adapter.
    pub probe: Probe,
}

/// Log-probabilities of one text under an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    pub tokens: Vec<u32>,
    /// Of each token after the first, given those before it.
    pub logprobs: Vec<f32>,
}
