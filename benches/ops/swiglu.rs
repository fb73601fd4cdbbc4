//! SwiGLU, forward and backward.

use criterion::Criterion;
use quiver::ops::swiglu::{swiglu, swiglu_backward};

use crate::{INTERMEDIATE, ROWS, TRAIN_ROWS, bench_bytes, must, values};

pub fn bench(c: &mut Criterion) {
    let mut group = c.benchmark_group("swiglu");
    for rows in ROWS {
        let gate_up = values((rows, 2 * INTERMEDIATE));
        bench_bytes(&mut group, "swiglu", &gate_up, || must(swiglu(&gate_up)));
    }
    let (gate_up, dh) = (values((TRAIN_ROWS, 2 * INTERMEDIATE)), values((TRAIN_ROWS, INTERMEDIATE)));
    bench_bytes(&mut group, "swiglu_backward", &gate_up, || must(swiglu_backward(&gate_up, &dh)));
}
