//! Settings of `quiver train` and `quiver sweep`, as flags.

use clap::Args;
use serde_json::{Map, Value, json};

use crate::train::data::AlpacaEnding;
use crate::train::spec::{LoraInit, LrSchedule, OptimizerKind};

/// The settings that a sweep varies.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct SweptSettings {
    /// Learning rate [default: 2e-4]
    #[arg(long, help_heading = "Training")]
    pub(super) lr: Option<f64>,
    /// Rank [default: 16]
    #[arg(long, value_name = "RANK", help_heading = "Adapter")]
    pub(super) r: Option<u64>,
    /// Modules to train, separated by commas [default: all-linear]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Adapter")]
    pub(super) target_modules: Vec<String>,
}

/// The other settings of a job. Omitted settings have the API's defaults.
#[derive(Debug, Args)]
#[command(next_help_heading = "Training")]
pub(super) struct TrainSettings {
    /// Passes over the training file [default: 3; more for few examples]
    #[arg(long, value_name = "N")]
    pub(super) epochs: Option<u64>,
    /// Stop after this many optimiser steps
    #[arg(long, value_name = "N")]
    pub(super) max_steps: Option<u64>,
    /// Examples of a forward pass [default: 4 to 16, by the number of examples]
    #[arg(long, value_name = "N")]
    batch_size: Option<u64>,
    /// Forward passes of an optimiser step [default: 1]
    #[arg(long, value_name = "N")]
    gradient_accumulation: Option<u64>,
    /// Schedule of the learning rate after the warm-up [default: linear]
    #[arg(long)]
    scheduler: Option<LrSchedule>,
    /// Warm-up, optimiser steps
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// Warm-up, share of all steps [default: 0.03]
    #[arg(long, value_name = "SHARE")]
    warmup_ratio: Option<f64>,
    /// Weight decay of AdamW [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Clip gradients to this norm [default: 1]
    #[arg(long)]
    clip: Option<f64>,
    /// Optimiser [default: adamw]
    #[arg(long)]
    optim: Option<OptimizerKind>,
    /// Longest example; longer ones are truncated at the end [default: 2048]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<u64>,
    /// Pack several examples into a sequence
    #[arg(long)]
    packing: bool,
    /// Train on prompts too
    #[arg(long)]
    train_on_inputs: bool,
    /// Ending of Alpaca prompts [default: colon]
    #[arg(long)]
    alpaca_ending: Option<AlpacaEnding>,
    /// Optimiser steps between checkpoints [default: one epoch]
    #[arg(long, value_name = "N")]
    pub(super) checkpoint_every: Option<u64>,
    /// Optimiser steps between validations [default: as between checkpoints]
    #[arg(long, value_name = "N")]
    pub(super) eval_every: Option<u64>,
    /// Stop after this many validations without a lower loss
    #[arg(long, value_name = "N")]
    early_stopping: Option<u64>,
    /// Adapter directory to continue from
    #[arg(long, value_name = "DIR")]
    from_checkpoint: Option<String>,
    /// Seed of initial values, order and dropout [default: 42]
    #[arg(long)]
    seed: Option<u64>,
    /// LoRA alpha: the scale times the rank [default: twice the rank]
    #[arg(long, help_heading = "Adapter")]
    alpha: Option<f64>,
    /// Dropout of the inputs [default: 0]
    #[arg(long, help_heading = "Adapter")]
    dropout: Option<f64>,
    /// Scale by alpha / sqrt(r) (rsLoRA)
    #[arg(long, help_heading = "Adapter")]
    use_rslora: bool,
    /// Ratio of B's learning rate to A's (LoRA+)
    #[arg(long, value_name = "RATIO", help_heading = "Adapter")]
    loraplus_lr_ratio: Option<f64>,
    /// Train magnitude and direction separately (DoRA)
    #[arg(long, help_heading = "Adapter")]
    use_dora: bool,
    /// Initialisation [default: default]
    #[arg(long, help_heading = "Adapter")]
    init: Option<LoraInit>,
    /// Allocate ranks by importance (AdaLoRA), with settings such as init_r=12,target_r=8,tinit=20,tfinal=60,deltaT=1
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = pairs,
        help_heading = "Adapter"
    )]
    adalora: Option<Map<String, Value>>,
}

/// Parses `a=1,b=2` to an object of numbers.
fn pairs(text: &str) -> Result<Map<String, Value>, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        Some((key.to_owned(), serde_json::from_str::<serde_json::Number>(value).ok()?.into()))
    };
    let pairs = text.split(',').filter(|part| !part.is_empty());
    pairs.map(pair).collect::<Option<_>>().ok_or_else(|| "must be KEY=NUMBER, separated by commas".to_owned())
}

impl TrainSettings {
    /// The settings as in a request to the fine-tuning API.
    pub(super) fn json(&self, swept: &SweptSettings) -> Value {
        let target_modules = match &swept.target_modules[..] {
            [] => Value::Null,
            [all] if all == "all-linear" => json!(all),
            names => json!(names),
        };
        json!({
            "hyperparameters": {"n_epochs": self.epochs, "batch_size": self.batch_size},
            "seed": self.seed,
            "lora": {
                "r": swept.r,
                "alpha": self.alpha,
                "dropout": self.dropout,
                "target_modules": target_modules,
                "use_rslora": self.use_rslora,
                "loraplus_lr_ratio": self.loraplus_lr_ratio,
                "use_dora": self.use_dora,
                "init": self.init,
                "adalora": self.adalora,
            },
            "training": {
                "lr": swept.lr,
                "scheduler": self.scheduler,
                "warmup_steps": self.warmup_steps,
                "warmup_ratio": self.warmup_ratio,
                "weight_decay": self.weight_decay,
                "clip": self.clip,
                "optim": self.optim,
                "gradient_accumulation": self.gradient_accumulation,
                "max_length": self.max_length,
                "packing": self.packing,
                "train_on_inputs": self.train_on_inputs,
                "alpaca_ending": self.alpaca_ending,
                "max_steps": self.max_steps,
                "checkpoint_every": self.checkpoint_every,
                "eval_every": self.eval_every,
                "early_stopping": self.early_stopping,
                "from_checkpoint": self.from_checkpoint,
            },
        })
    }
}
