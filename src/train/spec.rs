//! The settings of one training job. The API and the command line both build a [`JobSpec`]; it contains a value for each setting
//! that the user left out or set to "auto".
//!
//! The defaults are the values of a job without settings. Where a default follows from the training file (epochs, batch
//! size, warm-up), `finetune::settings` chooses it.

use serde::{Deserialize, Serialize};

use crate::arch::Module;

/// Settings of one job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Passes over the training file.
    pub epochs: usize,
    /// Number of optimiser steps, whatever `epochs` says.
    pub max_steps: Option<usize>,
    /// Rows of one forward and backward pass: examples, or packs of examples with `packing`.
    pub batch_size: usize,
    /// Passes whose gradients are summed for one optimiser step.
    pub gradient_accumulation: usize,
    /// Longest example in tokens. Longer examples are cut at the end.
    pub max_length: usize,
    /// Packs several examples into a row of up to `max_length` tokens. Each keeps its own positions and attention.
    pub packing: bool,
    /// Whether the loss covers prompts too.
    pub train_on_inputs: bool,
    /// Seed of initial values, of the order of examples and of dropout.
    pub seed: u64,
    /// Shape and method of the adapter.
    pub lora: LoraConfig,
    pub optimizer: OptimizerConfig,
    /// Optimiser steps between checkpoints; `None`: one checkpoint an epoch.
    pub checkpoint_every: Option<usize>,
    /// Optimiser steps between validations; `None`: one validation before each checkpoint.
    pub eval_every: Option<usize>,
    /// Number of validations in a row without a lower loss after which the job ends.
    pub early_stopping: Option<usize>,
    /// Name of the adapter to continue from.
    pub from_checkpoint: Option<String>,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self {
            epochs: 3,
            max_steps: None,
            batch_size: 4,
            gradient_accumulation: 1,
            max_length: 2048,
            packing: false,
            train_on_inputs: false,
            seed: 42,
            lora: LoraConfig::default(),
            optimizer: OptimizerConfig::default(),
            checkpoint_every: None,
            eval_every: None,
            early_stopping: None,
            from_checkpoint: None,
        }
    }
}

/// Shape and method of the adapter, as PEFT's `LoraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f32,
    pub dropout: f32,
    /// Modules that get a pair in every decoder block.
    pub target_modules: Vec<Module>,
    /// Scales deltas by `alpha / sqrt(r)` instead of `alpha / r` (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Learning rate of B divided by that of A (LoRA+, Hayou et al., 2024).
    pub loraplus_lr_ratio: Option<f32>,
    /// Trains a magnitude for each output row (DoRA, Liu et al., 2024).
    pub use_dora: bool,
    pub init: LoraInit,
    /// Assigns ranks by importance (AdaLoRA, Zhang et al., 2023). Its `init_r` then replaces `r`.
    pub adalora: Option<AdaLoraConfig>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: Module::BLOCK.to_vec(),
            use_rslora: false,
            loraplus_lr_ratio: None,
            use_dora: false,
            init: LoraInit::Default,
            adalora: None,
        }
    }
}

/// Initial values of A and B (PEFT's `init_lora_weights`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// A uniform in ±1/sqrt(in) (PEFT's Kaiming with a = sqrt(5)), B zero.
    Default,
    /// A normal with deviation 1/r, B zero.
    Gaussian,
    /// Orthogonal A and B with a product of zero.
    Orthogonal,
}

/// PEFT's `AdaLoraConfig`. All steps are optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdaLoraConfig {
    /// Rank of every pair at the start.
    #[serde(rename = "init_r")]
    pub init_r: usize,
    /// Mean rank of a pair at the end.
    #[serde(rename = "target_r")]
    pub target_r: usize,
    /// Steps before the first rank is removed.
    pub tinit: usize,
    /// Steps after the last rank is removed.
    pub tfinal: usize,
    /// Steps between two allocations of ranks.
    #[serde(rename = "deltaT")]
    pub delta_t: usize,
    /// Decay of the smoothed importance.
    pub beta1: f32,
    /// Decay of its uncertainty.
    pub beta2: f32,
    /// Weight of the penalty that keeps A and B orthonormal.
    #[serde(rename = "orth_reg_weight")]
    pub orth_reg_weight: f32,
}

impl Default for AdaLoraConfig {
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
        }
    }
}

/// AdamW and its learning-rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    /// Highest rate of the schedule.
    pub learning_rate: f32,
    pub schedule: LrSchedule,
    /// Optimiser steps of linear warm-up.
    pub warmup_steps: usize,
    pub weight_decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// Global norm to which gradients are clipped.
    pub max_grad_norm: f32,
    pub kind: OptimizerKind,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            schedule: LrSchedule::Linear,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            kind: OptimizerKind::Adamw,
        }
    }
}

/// Learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// Falls linearly to zero at the end of the last step.
    Linear,
    /// Falls to zero at the end of the last step, along half a cosine.
    Cosine,
    /// Stays the same.
    Constant,
}

/// Storage of AdamW's moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// f32.
    #[value(name = "adamw")]
    Adamw,
    /// 8 bits with a scale for each block of 256, as in bitsandbytes.
    #[value(name = "adamw_8bit")]
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// 8 bits in host memory when training on a GPU.
    #[value(name = "paged_adamw_8bit")]
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}
