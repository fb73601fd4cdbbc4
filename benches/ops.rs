//! One benchmark an op, over the shapes of the default model: `cargo bench --bench ops`.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quiver::ops::quant::{Codec, QMatrix, Source, matmul};

/// Any bytes are valid blocks; small scales keep products finite.
fn matrix(codec: Codec, n: usize, k: usize, block: usize) -> Arc<QMatrix> {
    let mut bytes: Vec<u8> = (0..n * k / 32 * block).map(|i| (i * 7 + i / 13) as u8).collect();
    for block in bytes.chunks_exact_mut(block) {
        block[..4].copy_from_slice(&[0x00, 0x20, 0x00, 0x20]);
    }
    Arc::new(
        QMatrix::pack(&[Source::Blocks { codec, n, k, bytes: bytes.into() }], &Device::Cpu)
            .expect("the shape is whole blocks"),
    )
}

fn quant(c: &mut Criterion) {
    let shapes = [
        ("qkv Q4_1", Codec::Q4_1, 960, 576, 20),
        ("gate_up Q4_1", Codec::Q4_1, 3072, 576, 20),
        ("down Q4_1", Codec::Q4_1, 576, 1536, 20),
        ("head Q8_0", Codec::Q8_0, 49152, 576, 34),
    ];
    let mut group = c.benchmark_group("quant");
    group.sample_size(10);
    for (name, codec, n, k, block) in shapes {
        let w = matrix(codec, n, k, block);
        for m in [1usize, 8, 64, 512] {
            if n > 10_000 && m > 8 {
                continue;
            }
            let x: Vec<f32> = (0..m * k).map(|i| (i % 255) as f32 / 128.0 - 1.0).collect();
            let x = Tensor::from_vec(x, (m, k), &Device::Cpu).expect("a tensor");
            // Elements are multiply-accumulates.
            group.throughput(Throughput::Elements((n * k * m) as u64));
            group.bench_with_input(BenchmarkId::new(name, m), &x, |b, x| b.iter(|| matmul(&w, x, DType::F32)));
        }
    }
}

criterion_group!(benches, quant);
criterion_main!(benches);
