//! One benchmark per op, in a file of the op's name, over the shapes of the default model, SmolLM2-135M.
//!
//! `cargo bench --bench ops` runs all, `cargo bench --bench ops -- lora` those whose id contains `lora`. An id is
//! `op/function/rows`.

mod adamw;
mod attention;
mod dropout;
mod gemm;
mod heads;
mod lora;
mod loss;
mod norm;
mod quant;
mod rope;
mod sample;
mod swiglu;

use candle_core::{Device, Shape, Tensor};
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Throughput, criterion_group, criterion_main};
use quiver::arch::Heads;
use quiver::ops::quant::{Codec, QMatrix, Source};

/// The default model's attention, its width, that of its MLP, and its vocabulary.
const HEADS: Heads = Heads { query: 9, kv: 3, dim: 64 };
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const VOCAB: usize = 49152;

/// Rows of one decode step, of a batch of decode steps, and of a prompt.
const ROWS: [usize; 3] = [1, 32, 512];

/// Rows of a training pass.
const TRAIN_ROWS: usize = 512;

/// Unwraps the result of an op: one that fails would look fast.
fn must<T>(result: quiver::Result<T>) {
    result.expect("the shapes fit");
}

/// A tensor of values in -1..1.
fn values(shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values = (0..shape.elem_count()).map(|i| (i * 7 % 255) as f32 / 128.0 - 1.0).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("a tensor")
}

/// A matrix `[n, k]` of 32-value blocks of `block_bytes` bytes. Any bytes are valid blocks; the small scales keep products finite.
fn matrix(codec: Codec, n: usize, k: usize, block_bytes: usize) -> QMatrix {
    let mut bytes: Vec<u8> = (0..n * k / 32 * block_bytes).map(|i| (i * 7 + i / 13) as u8).collect();
    for block in bytes.chunks_exact_mut(block_bytes) {
        block[..4].copy_from_slice(&[0x00, 0x20, 0x00, 0x20]);
    }
    let source = Source::Blocks { codec, n, k, bytes: bytes.into() };
    QMatrix::pack(&[source], &Device::Cpu).expect("the shape is whole blocks")
}

/// The embedding and output head of the default model.
fn head() -> QMatrix {
    matrix(Codec::Q8_0, VOCAB, HIDDEN, 34)
}

/// Times `f`, an op that reads or writes each value of `x` about once. The throughput is that of the bytes of `x`.
fn bench_bytes(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, x: &Tensor, mut f: impl FnMut()) {
    group.throughput(Throughput::Bytes(4 * x.elem_count() as u64));
    group.bench_function(BenchmarkId::new(name, x.dims()[0]), |b| b.iter(&mut f));
}

criterion_group!(
    benches,
    adamw::bench,
    attention::bench,
    dropout::bench,
    gemm::bench,
    heads::bench,
    lora::bench,
    loss::bench,
    norm::bench,
    quant::bench,
    rope::bench,
    sample::bench,
    swiglu::bench
);
criterion_main!(benches);
