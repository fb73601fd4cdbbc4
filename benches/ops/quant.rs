//! Products with quantised matrices, forward and backward, and rows of the embedding.

use candle_core::DType;
use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::ops::quant::{Codec, gather_rows, matmul, matmul_transposed};

use crate::{HIDDEN, INTERMEDIATE, ROWS, TRAIN_ROWS, VOCAB, bench_bytes, head, matrix, must, values};

pub fn bench(c: &mut Criterion) {
    let shapes = [
        ("qkv Q4_1", Codec::Q4_1, 960, HIDDEN, 20),
        ("gate_up Q4_1", Codec::Q4_1, 2 * INTERMEDIATE, HIDDEN, 20),
        ("down Q4_1", Codec::Q4_1, HIDDEN, INTERMEDIATE, 20),
        ("head Q8_0", Codec::Q8_0, VOCAB, HIDDEN, 34),
    ];
    let mut group = c.benchmark_group("quant");
    group.sample_size(10);
    for (name, codec, n, k, block_bytes) in shapes {
        let w = matrix(codec, n, k, block_bytes);
        for m in [1usize, 8, 64, 512] {
            // The head sees the logit rows only.
            if n == VOCAB && m > 8 {
                continue;
            }
            let x = values((m, k));
            // Elements are multiply-adds.
            group.throughput(Throughput::Elements((n * k * m) as u64));
            group.bench_with_input(BenchmarkId::new(name, m), &x, |b, x| b.iter(|| must(matmul(&w, x, DType::F32))));
        }
    }

    let (down, dy) = (matrix(Codec::Q4_1, HIDDEN, INTERMEDIATE, 20), values((TRAIN_ROWS, HIDDEN)));
    group.throughput(Throughput::Elements((TRAIN_ROWS * HIDDEN * INTERMEDIATE) as u64));
    group.bench_function(BenchmarkId::new("matmul_transposed", TRAIN_ROWS), |b| {
        b.iter(|| must(matmul_transposed(&down, &dy, DType::F32)))
    });

    let embedding = head();
    for rows in ROWS {
        let ids: Vec<u32> = (0..rows as u32).collect();
        bench_bytes(&mut group, "gather_rows", &values((rows, HIDDEN)), || must(gather_rows(&embedding, &ids, None)));
    }
}
