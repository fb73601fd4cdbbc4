//! Norms of query and key heads, forward and backward.

use criterion::Criterion;
use quiver::ops::heads::{QkNorm, bias_and_qk_norm, qk_norm_backward};

use crate::{HEADS, ROWS, TRAIN_ROWS, bench_bytes, must, values};

pub fn bench(c: &mut Criterion) {
    let (bias, weight) = (values(HEADS.qkv_width()), values(HEADS.dim));
    let norm = QkNorm { query: &weight, key: &weight, eps: 1e-5 };
    let mut group = c.benchmark_group("heads");
    for rows in ROWS {
        let qkv = values((rows, HEADS.qkv_width()));
        bench_bytes(&mut group, "bias", &qkv, || must(bias_and_qk_norm(&qkv, Some(&bias), None, HEADS)));
        bench_bytes(&mut group, "qk_norm", &qkv, || must(bias_and_qk_norm(&qkv, None, Some(norm), HEADS)));
    }
    let (qkv, dqkv) = (values((TRAIN_ROWS, HEADS.qkv_width())), values((TRAIN_ROWS, HEADS.qkv_width())));
    bench_bytes(&mut group, "qk_norm_backward", &dqkv, || must(qk_norm_backward(&dqkv, &qkv, norm, HEADS)));
}
