//! How a job's values move: schedule, clipping, AdamW.

use std::f64::consts::PI;

use candle_core::{DType, Device, Tensor};

use super::adapter::TrainableParams;
use super::spec::{self, LrSchedule, OptimizerKind};
use crate::Result;
use crate::ops::adamw::{self, AdamwStep};

/// AdamW over a job's groups.
pub struct Optimizer {
    spec: spec::OptimizerConfig,
    /// LoRA+'s rate of B over that of A, or 1.
    ratio: f32,
    /// Per group, the first and second moments.
    pub moments: Vec<[Tensor; 2]>,
}

impl Optimizer {
    /// Moments of zero for `params`. Errors: no memory.
    pub fn new(spec: &spec::OptimizerConfig, ratio: Option<f32>, params: &TrainableParams) -> Result<Self> {
        let moments = params.groups.iter().map(|group| {
            let (n, device) = (group.values.elem_count(), group.values.device());
            let moment = || match (group.eight_bits, spec.kind) {
                (false, _) => Ok(Tensor::zeros(n, DType::F32, device)?),
                (true, OptimizerKind::PagedAdamw8bit) => adamw::zero_moments(n, &Device::Cpu),
                (true, _) => adamw::zero_moments(n, device),
            };
            Ok([moment()?, moment()?])
        });
        Ok(Self { spec: spec.clone(), ratio: ratio.unwrap_or(1.0), moments: moments.collect::<Result<_>>()? })
    }

    /// Step `step` (from 1) of `steps`, by the sums in the gradients, which stay as they are.
    pub fn step(&mut self, params: &TrainableParams, step: usize, steps: usize) -> Result<OptimizerStep> {
        let squares = params.groups.iter().map(|g| Ok(f64::from(adamw::sum_of_squares(&g.grads)?)));
        let norm = squares.sum::<Result<f64>>()?.sqrt() as f32;
        // As torch's clip_grad_norm_.
        let clip = (self.spec.max_grad_norm / (norm + 1e-6)).min(1.0);
        let lr = learning_rate(&self.spec, step, steps);
        let moved = OptimizerStep { learning_rate: lr, grad_norm: norm, clip };
        // A job whose gradients are not numbers keeps its values.
        if !norm.is_finite() {
            return Ok(moved);
        }
        for (group, moments) in params.groups.iter().zip(&mut self.moments) {
            let step = AdamwStep {
                step,
                lr: lr * if group.fast { self.ratio } else { 1.0 },
                beta1: self.spec.beta1,
                beta2: self.spec.beta2,
                eps: self.spec.eps,
                weight_decay: self.spec.weight_decay,
                grad_scale: clip,
            };
            let device = group.values.device();
            let [m, v] = [moments[0].to_device(device)?, moments[1].to_device(device)?];
            match group.eight_bits {
                true => adamw::adamw8bit_step(&group.values, &group.grads, &m, &v, &step)?,
                false => adamw::adamw_step(&group.values, &group.grads, &m, &v, &step)?,
            }
            // Where they came from: host memory, if they are paged.
            *moments = [m.to_device(moments[0].device())?, v.to_device(moments[1].device())?];
        }
        Ok(moved)
    }
}

/// What a step was.
#[derive(Debug, Clone, Copy)]
pub struct OptimizerStep {
    pub learning_rate: f32,
    /// Global norm before clipping.
    pub grad_norm: f32,
    /// What gradients were multiplied by.
    pub clip: f32,
}

/// The learning rate of step `step` (from 1) of `steps`, as transformers' schedules give it: the first step of a warm-up
/// has rate 0.
fn learning_rate(spec: &spec::OptimizerConfig, step: usize, steps: usize) -> f32 {
    let (done, warmup) = ((step - 1) as f64, spec.warmup_steps as f64);
    let share = if done < warmup {
        done / warmup.max(1.0)
    } else {
        let progress = (done - warmup) / (steps as f64 - warmup).max(1.0);
        match spec.schedule {
            LrSchedule::Constant => 1.0,
            LrSchedule::Linear => (1.0 - progress).max(0.0),
            LrSchedule::Cosine => 0.5 * (1.0 + (PI * progress.min(1.0)).cos()),
        }
    };
    (f64::from(spec.learning_rate) * share) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(schedule: LrSchedule, warmup_steps: usize) -> spec::OptimizerConfig {
        spec::OptimizerConfig {
            learning_rate: 1.0,
            schedule,
            warmup_steps,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            kind: OptimizerKind::Adamw,
        }
    }

    /// `get_scheduler(...)` of transformers 5.23 at steps 1..=10, with 4 steps of warm-up.
    #[test]
    fn schedules_are_those_of_transformers() {
        let rates = |schedule| (1..=10).map(|step| learning_rate(&spec(schedule, 4), step, 10)).collect::<Vec<_>>();
        let linear = [0.0, 0.25, 0.5, 0.75, 1.0, 0.833_333_3, 0.666_666_7, 0.5, 0.333_333_3, 0.166_666_7];
        let cosine = [0.0, 0.25, 0.5, 0.75, 1.0, 0.933_012_7, 0.75, 0.5, 0.25, 0.066_987_3];
        let constant = [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
        for (schedule, expected) in
            [(LrSchedule::Linear, linear), (LrSchedule::Cosine, cosine), (LrSchedule::Constant, constant)]
        {
            let rates = rates(schedule);
            assert!(rates.iter().zip(expected).all(|(a, b): (&f32, f32)| (a - b).abs() < 1e-6), "{rates:?}");
        }
        assert_eq!(learning_rate(&spec(LrSchedule::Linear, 0), 1, 10), 1.0);
    }
}
