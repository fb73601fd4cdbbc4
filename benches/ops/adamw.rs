//! The optimiser, on a million parameters.

use candle_core::Device;
use criterion::{Criterion, Throughput};
use quiver::ops::adamw::{AdamwStep, adamw_step, adamw8bit_step, sum_of_squares, zero_moments};

use crate::{must, values};

const PARAMETERS: usize = 1 << 20;

pub fn bench(c: &mut Criterion) {
    let (params, grads, m, v) = (values(PARAMETERS), values(PARAMETERS), values(PARAMETERS), values(PARAMETERS));
    let moments = || zero_moments(PARAMETERS, &Device::Cpu).expect("memory");
    let (m8, v8) = (moments(), moments());
    let step =
        AdamwStep { step: 1, lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, grad_scale: 1.0 };
    let mut group = c.benchmark_group("adamw");
    group.sample_size(20).throughput(Throughput::Elements(PARAMETERS as u64));
    group.bench_function("adamw_step", |b| b.iter(|| must(adamw_step(&params, &grads, &m, &v, &step))));
    group.bench_function("adamw8bit_step", |b| b.iter(|| must(adamw8bit_step(&params, &grads, &m8, &v8, &step))));
    group.bench_function("sum_of_squares", |b| b.iter(|| must(sum_of_squares(&grads))));
}
