//! The optimiser of a job: learning-rate schedule, gradient clipping, AdamW.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};

use super::adapter::TrainableParams;
use super::spec::{LrSchedule, OptimizerConfig, OptimizerKind};
use crate::Result;
use crate::ops::adamw::{self, AdamwStep};

/// AdamW over the parameter groups of one job.
pub struct Optimizer {
    config: OptimizerConfig,
    /// Learning rate of B divided by that of A (LoRA+); 1 without LoRA+.
    lr_ratio: f32,
    /// First and second moments of each group.
    pub moments: Vec<[Tensor; 2]>,
}

impl Optimizer {
    /// An optimiser with zero moments. `lr_ratio` is LoRA+'s. Errors: out of memory.
    pub fn new(config: &OptimizerConfig, lr_ratio: Option<f32>, params: &TrainableParams) -> Result<Self> {
        let moments = params.groups.iter().map(|group| {
            let (n, device) = (group.values.elem_count(), group.values.device());
            let moment = || match (group.eight_bits, config.kind) {
                (false, _) => Ok(Tensor::zeros(n, DType::F32, device)?),
                (true, OptimizerKind::PagedAdamw8bit) => adamw::zero_moments(n, &Device::Cpu),
                (true, _) => adamw::zero_moments(n, device),
            };
            Ok([moment()?, moment()?])
        });
        Ok(Self { config: config.clone(), lr_ratio: lr_ratio.unwrap_or(1.0), moments: moments.collect::<Result<_>>()? })
    }

    /// Takes step `step` (from 1) of `steps` along the accumulated gradients, which it leaves unchanged. Takes no step if the
    /// norm of the gradients is not finite.
    pub fn step(&mut self, params: &TrainableParams, step: usize, steps: usize) -> Result<OptimizerStep> {
        let squares = params.groups.iter().map(|g| Ok(f64::from(adamw::sum_of_squares(&g.grads)?)));
        let norm = squares.sum::<Result<f64>>()?.sqrt() as f32;
        // As torch's clip_grad_norm_.
        let clip = (self.config.max_grad_norm / (norm + 1e-6)).min(1.0);
        let lr = learning_rate(&self.config, step, steps);
        let taken = OptimizerStep { learning_rate: lr, grad_norm: norm, clip };
        if !norm.is_finite() {
            return Ok(taken);
        }
        for (group, moments) in params.groups.iter().zip(&mut self.moments) {
            let step = AdamwStep {
                step,
                lr: lr * if group.lora_plus { self.lr_ratio } else { 1.0 },
                beta1: self.config.beta1,
                beta2: self.config.beta2,
                eps: self.config.eps,
                weight_decay: self.config.weight_decay,
                grad_scale: clip,
            };
            let device = group.values.device();
            let [m, v] = [moments[0].to_device(device)?, moments[1].to_device(device)?];
            match group.eight_bits {
                true => adamw::adamw8bit_step(&group.values, &group.grads, &m, &v, &step)?,
                false => adamw::adamw_step(&group.values, &group.grads, &m, &v, &step)?,
            }
            // Paged moments return to host memory.
            *moments = [m.to_device(moments[0].device())?, v.to_device(moments[1].device())?];
        }
        Ok(taken)
    }
}

/// Metrics of one optimiser step.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerStep {
    pub learning_rate: f32,
    /// Global norm before clipping.
    pub grad_norm: f32,
    /// Factor of the gradients, at most 1.
    pub clip: f32,
}

/// The learning rate of step `step` (from 1) of `steps`, as in the schedules of transformers: the first step of a warm-up has
/// rate 0.
fn learning_rate(config: &OptimizerConfig, step: usize, steps: usize) -> f32 {
    let (done, warmup) = ((step - 1) as f64, config.warmup_steps as f64);
    let share = if done < warmup {
        done / warmup.max(1.0)
    } else {
        let progress = (done - warmup) / (steps as f64 - warmup).max(1.0);
        match config.schedule {
            LrSchedule::Constant => 1.0,
            LrSchedule::Linear => (1.0 - progress).max(0.0),
            LrSchedule::Cosine => 0.5 * (1.0 + (PI * progress.min(1.0)).cos()),
        }
    };
    (f64::from(config.learning_rate) * share) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(schedule: LrSchedule, warmup_steps: usize) -> OptimizerConfig {
        OptimizerConfig { learning_rate: 1.0, schedule, warmup_steps, ..OptimizerConfig::default() }
    }

    /// `get_scheduler(...)` of transformers 5.23 at steps 1..=10, with 4 steps of warm-up.
    #[test]
    fn schedules_are_those_of_transformers() {
        let rates = |schedule| (1..=10).map(|step| learning_rate(&config(schedule, 4), step, 10)).collect::<Vec<_>>();
        let linear = [0.0, 0.25, 0.5, 0.75, 1.0, 0.833_333_3, 0.666_666_7, 0.5, 0.333_333_3, 0.166_666_7];
        let cosine = [0.0, 0.25, 0.5, 0.75, 1.0, 0.933_012_7, 0.75, 0.5, 0.25, 0.066_987_3];
        let constant = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        for (schedule, expected) in
            [(LrSchedule::Linear, linear), (LrSchedule::Cosine, cosine), (LrSchedule::Constant, constant)]
        {
            let rates = rates(schedule);
            assert!(rates.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{rates:?}");
        }
        assert_eq!(learning_rate(&config(LrSchedule::Linear, 0), 1, 10), 1.0);
    }
}
