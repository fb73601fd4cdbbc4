//! What a fine-tuning job asks for, with every "auto" resolved: the API and the command line both make one of these.

use serde::{Deserialize, Serialize};

use crate::arch::Module;

/// Settings of one job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Passes over the training file.
    pub epochs: usize,
    /// Ends after this many optimiser steps, whatever `epochs` says.
    pub max_steps: Option<usize>,
    /// Examples of one forward and backward pass.
    pub batch_size: usize,
    /// Passes whose gradients make one optimiser step.
    pub gradient_accumulation: usize,
    /// Longest example, tokens; longer ones are cut at the end.
    pub max_length: usize,
    /// Whether examples share rows of up to `max_length` tokens, each with positions and attention of its own.
    pub packing: bool,
    /// Whether prompts are trained on too.
    pub train_on_inputs: bool,
    /// Seeds initial values, order of examples and dropout.
    pub seed: u64,
    /// What the adapter is.
    pub lora: LoraConfig,
    /// How it is moved.
    pub optimizer: OptimizerConfig,
    /// Optimiser steps between checkpoints; none: one an epoch.
    pub checkpoint_every: Option<usize>,
    /// Optimiser steps between validations; none: one a checkpoint.
    pub eval_every: Option<usize>,
    /// Validations without a better loss after which the job ends.
    pub early_stopping: Option<usize>,
    /// Name of an adapter to continue from.
    pub from_checkpoint: Option<String>,
}

/// Shape and method of the adapter (PEFT's LoraConfig).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f32,
    pub dropout: f32,
    /// Linears with a pair in every decoder block.
    pub target_modules: Vec<Module>,
    /// Scale by alpha / sqrt(r) (Kalajdzievski, 2023).
    pub use_rslora: bool,
    /// Learning rate of B over that of A (LoRA+, Hayou et al., 2024).
    pub loraplus_lr_ratio: Option<f32>,
    /// TrainableMagnitude and direction apart (DoRA, Liu et al., 2024).
    pub use_dora: bool,
    pub init: LoraInit,
    /// Ranks by importance (AdaLoRA, Zhang et al., 2023); `r` and `alpha / r` scaling are then its own.
    pub adalora: Option<AdaLoraConfig>,
}

/// PairInit values of A (B is zero).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LoraInit {
    /// Uniform in ±1/sqrt(in): PEFT's Kaiming with a = sqrt(5).
    Default,
    /// Normal with deviation 1/r.
    Gaussian,
    /// Orthonormal rows of A and columns of B, whose product starts at zero (PEFT's `orthogonal`).
    Orthogonal,
}

/// PEFT's AdaLoraConfig; steps are optimiser steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdaLoraConfig {
    #[serde(rename = "init_r")]
    pub init_r: usize,
    #[serde(rename = "target_r")]
    pub target_r: usize,
    pub tinit: usize,
    pub tfinal: usize,
    #[serde(rename = "deltaT")]
    pub delta_t: usize,
    pub beta1: f32,
    pub beta2: f32,
    #[serde(rename = "orth_reg_weight")]
    pub orth_reg_weight: f32,
}

/// AdamW and its schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OptimizerConfig {
    pub learning_rate: f32,
    pub schedule: LrSchedule,
    /// Optimiser steps of linear warm-up.
    pub warmup_steps: usize,
    pub weight_decay: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    /// Largest global norm of the gradients.
    pub max_grad_norm: f32,
    pub kind: OptimizerKind,
}

/// What happens to the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedule {
    /// To zero at the last step, in a line.
    Linear,
    /// To zero at the last step, as half a cosine.
    Cosine,
    /// It stays.
    Constant,
}

/// How AdamW keeps its moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerKind {
    /// In f32.
    #[value(name = "adamw")]
    Adamw,
    /// In 8 bits by blocks of 256, as bitsandbytes.
    #[value(name = "adamw_8bit")]
    #[serde(rename = "adamw_8bit")]
    Adamw8bit,
    /// In 8 bits, in host memory on a GPU.
    #[value(name = "paged_adamw_8bit")]
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
}
