//! Cross-entropy of 32 targets of a training pass.

use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::ops::loss::{LossTarget, cross_entropy};

use crate::{HIDDEN, TRAIN_ROWS, head, must, values};

pub fn bench(c: &mut Criterion) {
    let (head, x) = (head(), values((TRAIN_ROWS, HIDDEN)));
    let targets: Vec<LossTarget> = (0..32).map(|i| LossTarget { row: i * 16, id: i, scale: 1.0 }).collect();
    let mut group = c.benchmark_group("loss");
    group.sample_size(20).throughput(Throughput::Elements(targets.len() as u64));
    for (name, gradient) in [("cross_entropy", false), ("cross_entropy and gradient", true)] {
        group.bench_function(BenchmarkId::new(name, targets.len()), |b| {
            b.iter(|| must(cross_entropy(&head, &x, &targets, gradient)))
        });
    }
}
