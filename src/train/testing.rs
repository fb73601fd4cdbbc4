//! What the tests of training share.

use super::spec::{JobSpec, LoraConfig, LoraInit, LrSchedule, OptimizerConfig, OptimizerKind};
use crate::arch::Module;

/// Plain LoRA on all linears.
pub fn spec() -> JobSpec {
    JobSpec {
        epochs: 1,
        max_steps: None,
        batch_size: 1,
        gradient_accumulation: 1,
        max_length: 64,
        packing: false,
        train_on_inputs: false,
        seed: 7,
        lora: LoraConfig {
            r: 4,
            alpha: 8.0,
            dropout: 0.0,
            target_modules: Module::BLOCK.to_vec(),
            use_rslora: false,
            loraplus_lr_ratio: None,
            use_dora: false,
            init: LoraInit::Default,
            adalora: None,
        },
        optimizer: OptimizerConfig {
            learning_rate: 1e-3,
            schedule: LrSchedule::Constant,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            kind: OptimizerKind::Adamw,
        },
        checkpoint_every: None,
        eval_every: None,
        early_stopping: None,
        from_checkpoint: None,
    }
}
