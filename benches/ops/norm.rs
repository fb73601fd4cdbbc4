//! RMSNorm, alone and with a residual sum, forward and backward.

use criterion::Criterion;
use quiver::ops::norm::{add_rms_norm, rms_norm, rms_norm_backward};

use crate::{HIDDEN, ROWS, TRAIN_ROWS, bench_bytes, must, values};

pub fn bench(c: &mut Criterion) {
    let weight = values(HIDDEN);
    let mut group = c.benchmark_group("norm");
    for rows in ROWS {
        let x = values((rows, HIDDEN));
        bench_bytes(&mut group, "rms_norm", &x, || must(rms_norm(&x, &weight, 1e-5)));
        bench_bytes(&mut group, "add_rms_norm", &x, || must(add_rms_norm(&x, &x, &weight, 1e-5)));
    }
    let x = values((TRAIN_ROWS, HIDDEN));
    bench_bytes(&mut group, "rms_norm_backward", &x, || must(rms_norm_backward(&x, &weight, &x, Some(&x), 1e-5)));
}
