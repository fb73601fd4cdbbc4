//! Products of strided views: the shrink of a training pass, to rank 16.

use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::ops::gemm::gemm;

use crate::{HIDDEN, TRAIN_ROWS, must, values};

const RANK: usize = 16;

pub fn bench(c: &mut Criterion) {
    let (x, a, h) = (values((TRAIN_ROWS, HIDDEN)), values((RANK, HIDDEN)), values((TRAIN_ROWS, RANK)));
    let a = a.t().expect("a matrix");
    let mut group = c.benchmark_group("gemm");
    // Elements are multiply-adds.
    group.sample_size(20).throughput(Throughput::Elements((TRAIN_ROWS * HIDDEN * RANK) as u64));
    group.bench_function(BenchmarkId::new("shrink", TRAIN_ROWS), |b| b.iter(|| must(gemm(&h, 0.0, &x, &a, 1.0))));
}
