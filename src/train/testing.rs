//! Helpers of the unit tests of training.

use super::spec::{JobSpec, LoraConfig, LrSchedule, OptimizerConfig};

/// A short job: plain LoRA on all modules, one example a step.
pub fn spec() -> JobSpec {
    JobSpec {
        epochs: 1,
        batch_size: 1,
        max_length: 64,
        seed: 7,
        lora: LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() },
        optimizer: OptimizerConfig {
            learning_rate: 1e-3,
            schedule: LrSchedule::Constant,
            ..OptimizerConfig::default()
        },
        ..JobSpec::default()
    }
}
