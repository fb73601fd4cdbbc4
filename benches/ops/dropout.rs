//! Dropout of a training pass.

use criterion::Criterion;
use quiver::ops::dropout::dropout;

use crate::{HIDDEN, TRAIN_ROWS, bench_bytes, must, values};

pub fn bench(c: &mut Criterion) {
    let x = values((TRAIN_ROWS, HIDDEN));
    let mut group = c.benchmark_group("dropout");
    bench_bytes(&mut group, "dropout", &x, || must(dropout(&x, 0.1, 1)));
}
