//! What training adds to the ops, on a GPU: against the CPU half, against itself, and beside other sequences.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use half::bf16;
use quiver::arch::Heads;
use quiver::ops::adamw::{AdamwStep, adamw_step, adamw8bit_step, sum_of_squares, zero_moments};
use quiver::ops::attention::{causal, causal_backward};
use quiver::ops::heads::{QkNorm, qk_norm_backward};
use quiver::ops::loss::{LossTarget, cross_entropy};
use quiver::ops::norm::rms_norm_backward;
use quiver::ops::quant::{Codec, QMatrix, matmul_transposed};
use quiver::ops::rope::{RopeTable, apply_rope, apply_rope_backward};
use quiver::ops::swiglu::swiglu_backward;

use crate::common::{device, random, relative_error};
use crate::quant::{codebook, source};

/// One rounding of a result to bf16: 2^-9 / sqrt(3) of the values, with room for chance.
const ROUNDED: f64 = 3e-3;

/// The same values on the CPU as f32 and on the GPU as bf16.
fn both(values: &[bf16], shape: (usize, usize)) -> [Tensor; 2] {
    let gpu = Tensor::from_slice(values, shape, &device()).unwrap();
    [gpu.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap(), gpu]
}

/// The same values on both as f32.
fn both_f32(values: &[bf16], shape: &[usize]) -> [Tensor; 2] {
    let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
    [Device::Cpu, device()].map(|device| Tensor::from_slice(&values, shape, &device).unwrap())
}

fn values(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    values(x).iter().map(|v| v.to_bits()).collect()
}

fn error(got: &Tensor, want: &Tensor) -> f64 {
    assert_eq!(got.dims(), want.dims());
    relative_error(&values(got), &values(want).into_iter().map(f64::from).collect::<Vec<_>>())
}

#[track_caller]
fn assert_close(got: &Tensor, want: &Tensor, bound: f64, what: &str) {
    let error = error(got, want);
    assert!(error < bound, "{what}: {error}");
}

#[test]
fn norms_equal_the_cpu() {
    for (t, n) in [(1, 4), (3, 64), (33, 576), (70, 4096), (2, 14336)] {
        let (x, residual) = (both_f32(&random(1, t * n), &[t, n]), both_f32(&random(2, t * n), &[t, n]));
        let (weight, dy) = (both_f32(&random(3, n), &[n]), both(&random(4, t * n), (t, n)));
        for with in [false, true] {
            let on =
                |i: usize| rms_norm_backward(&x[i], &weight[i], &dy[i], with.then_some(&residual[i]), 1e-5).unwrap();
            assert_close(&on(1), &on(0), 1e-5, &format!("[{t}, {n}], residual: {with}"));
        }
    }
}

#[test]
fn swiglu_equals_the_cpu() {
    for (t, n) in [(1, 2), (3, 12), (70, 160), (70, 34), (65, 4096)] {
        let gate_up: Vec<bf16> = random(1, t * 2 * n).iter().map(|x| bf16::from_f32(x.to_f32() * 8.0)).collect();
        let (gate_up, dh) = (both(&gate_up, (t, 2 * n)), both(&random(2, t * n), (t, n)));
        let on = |i: usize| swiglu_backward(&gate_up[i], &dh[i]).unwrap();
        assert_close(&on(1), &on(0), ROUNDED, &format!("[{t}, {n}]"));
    }
}

type Rope = fn(&Tensor, usize, &[u32], &RopeTable) -> quiver::Result<()>;

#[test]
fn turns_equal_the_cpu_and_go_back() {
    for (heads, spare, dim, t) in [(1, 0, 2, 3), (6, 2, 12, 5), (5, 1, 64, 33), (40, 8, 128, 70)] {
        let width = (heads + spare) * dim;
        let inv_freq: Vec<f32> = (0..dim / 2).map(|i| 1e4f32.powf(-2.0 * i as f32 / dim as f32)).collect();
        let positions: Vec<u32> = (0..t as u32).map(|i| i * 97 % 3000).collect();
        let start = random(1, t * width);
        for back in [false, true] {
            let (rotate, undo) = if back {
                (apply_rope_backward as Rope, apply_rope as Rope)
            } else {
                (apply_rope as Rope, apply_rope_backward as Rope)
            };
            let x = both(&start, (t, width));
            for x in &x {
                let table = RopeTable::new(&inv_freq, 3000, x.device()).unwrap();
                rotate(x, heads, &positions, &table).unwrap();
            }
            assert_close(&x[1], &x[0], ROUNDED, &format!("{heads} heads of {dim}, back: {back}"));
            let table = RopeTable::new(&inv_freq, 3000, &device()).unwrap();
            undo(&x[1], heads, &positions, &table).unwrap();
            assert_close(&x[1], &both(&start, (t, width))[1], 2.0 * ROUNDED, "there and back");
        }
    }
}

#[test]
fn norms_of_heads_equal_the_cpu() {
    for (query, kv, dim, t) in [(1, 1, 2, 1), (4, 2, 12, 5), (9, 3, 64, 33), (32, 8, 128, 70), (2, 1, 256, 2)] {
        let heads = Heads { query, kv, dim };
        let shape = (t, heads.qkv_width());
        let (raw, dqkv) = (both(&random(1, shape.0 * shape.1), shape), both(&random(2, shape.0 * shape.1), shape));
        let norms = [random(3, dim), random(4, dim)].map(|norm| both_f32(&norm, &[dim]));
        for i in 0..2 {
            let norm = QkNorm { query: &norms[0][i], key: &norms[1][i], eps: 1e-6 };
            qk_norm_backward(&dqkv[i], &raw[i], norm, heads).unwrap();
        }
        assert_close(&dqkv[1], &dqkv[0], ROUNDED, &format!("{heads:?}"));
    }
}

/// Rows of sequences of these lengths.
fn sequences(lens: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    lens.iter()
        .map(|len| {
            end += len;
            end - len..end
        })
        .collect()
}

/// Scores with a deviation of about 2.
fn qkv(seed: u64, rows: usize, heads: Heads) -> Vec<bf16> {
    random(seed, rows * heads.qkv_width()).iter().map(|x| bf16::from_f32(x.to_f32() * 2.5)).collect()
}

/// Output, logarithms and gradient.
fn attend(qkv: &Tensor, dout: &Tensor, lens: &[usize], heads: Heads) -> [Tensor; 3] {
    let sequences = sequences(lens);
    let (out, lse) = causal(qkv, &sequences, heads).unwrap();
    let dqkv = causal_backward(qkv, &out, &lse, dout, &sequences, heads).unwrap();
    [out, lse, dqkv]
}

/// Shapes of all kernels: widths on tensor cores and others, groups that divide a tile and others.
const SHAPES: [Heads; 12] = [
    Heads { query: 2, kv: 1, dim: 8 },
    Heads { query: 3, kv: 3, dim: 12 },
    Heads { query: 8, kv: 2, dim: 16 },
    Heads { query: 4, kv: 2, dim: 64 },
    Heads { query: 9, kv: 3, dim: 64 },
    Heads { query: 20, kv: 1, dim: 64 },
    Heads { query: 5, kv: 5, dim: 80 },
    Heads { query: 3, kv: 1, dim: 96 },
    Heads { query: 8, kv: 2, dim: 128 },
    Heads { query: 7, kv: 1, dim: 128 },
    Heads { query: 2, kv: 2, dim: 128 },
    Heads { query: 2, kv: 1, dim: 256 },
];

#[test]
fn attention_equals_the_cpu() {
    let lens = [1, 65, 17, 300, 128, 2, 413];
    let rows: usize = lens.iter().sum();
    for heads in SHAPES {
        let Heads { query, kv, dim } = heads;
        let width = query * dim;
        let (qkv, dout) =
            (both(&qkv(1, rows, heads), (rows, heads.qkv_width())), both(&random(2, rows * width), (rows, width)));
        let [want_out, want_lse, want] = attend(&qkv[0], &dout[0], &lens, heads);
        let [out, lse, got] = attend(&qkv[1], &dout[1], &lens, heads);
        assert_close(&out, &want_out, 4e-3, &format!("{heads:?}: output"));
        let farthest = values(&lse).iter().zip(values(&want_lse)).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert!(farthest < 1e-3, "{heads:?}: logarithms {farthest}");
        // Probabilities and their gradients are rounded to bf16, and so is the output in the dot products.
        for (what, first, count) in [("queries", 0, query), ("keys", query, kv), ("values", query + kv, kv)] {
            let part = |x: &Tensor, rows: Range<usize>| {
                x.narrow(1, first * dim, count * dim).unwrap().narrow(0, rows.start, rows.len()).unwrap()
            };
            assert_close(&part(&got, 0..rows), &part(&want, 0..rows), 8e-3, &format!("{heads:?}: {what}"));
            // No sequence is farther off than its part of all, the smallest gradients being differences of larger numbers.
            let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            let all = norm(&values(&part(&want, 0..rows)));
            for range in sequences(&lens) {
                let [got, want] = [&got, &want].map(|x| values(&part(x, range.clone())));
                let off = norm(&got.iter().zip(&want).map(|(g, w)| g - w).collect::<Vec<_>>());
                let bound = 3e-2 * all * (range.len() as f64 / rows as f64).sqrt();
                assert!(off < bound, "{heads:?}: {what} of rows {range:?}: {off}, {bound}");
            }
        }
    }
}

#[test]
fn attention_has_the_same_bits_again_and_beside_others() {
    let lens = [200, 1, 77, 130];
    let rows: usize = lens.iter().sum();
    for heads in SHAPES {
        let (x, width) = (qkv(1, rows, heads), heads.query * heads.dim);
        let d = random(2, rows * width);
        let run = |x: &[bf16], d: &[bf16], lens: &[usize]| {
            let rows: usize = lens.iter().sum();
            let on = |values: &[bf16], width| Tensor::from_slice(values, (rows, width), &device()).unwrap();
            attend(&on(x, heads.qkv_width()), &on(d, width), lens, heads)
        };
        let first = run(&x, &d, &lens);
        for _ in 0..5 {
            let again = run(&x, &d, &lens);
            assert!(first.iter().zip(&again).all(|(a, b)| bits(a) == bits(b)), "{heads:?}: again");
        }
        // The third sequence with others before and behind it.
        let rows = sequences(&lens)[2].clone();
        let of = |values: &[bf16], width: usize| values[rows.start * width..rows.end * width].to_vec();
        let before = 33;
        let others = |seed, count: usize, width: usize| random(seed, count * width);
        let pack = |seed, own: &[bf16], width: usize| {
            [&others(seed, before, width)[..], &of(own, width), &others(seed + 1, 300, width)].concat()
        };
        let beside = run(&pack(3, &x, heads.qkv_width()), &pack(5, &d, width), &[before, 77, 300]);
        for (a, b) in first.iter().zip(&beside) {
            let (a, b) = (a.narrow(0, rows.start, 77).unwrap(), b.narrow(0, before, 77).unwrap());
            assert!(bits(&a) == bits(&b), "{heads:?}: beside others");
            assert!(values(&a).iter().all(|v| v.is_finite()), "{heads:?}");
        }
    }
}

#[test]
fn transposed_products_equal_the_cpu() {
    let sources = [
        source(Codec::Q4_0, 100, 512, 1),
        source(Codec::Q4K, 960, 768, 2),
        source(Codec::Q6K, 17, 256, 3),
        source(Codec::BF16, 64, 96, 4),
        codebook(130, 320, 64, 5),
        codebook(5, 64, 64, 6),
    ];
    for source in sources {
        let [cpu, gpu] = [Device::Cpu, device()].map(|d| QMatrix::pack(std::slice::from_ref(&source), &d).unwrap());
        for m in [1, 7, 65, 300] {
            let dy = both(&random(7, m * gpu.n()), (m, gpu.n()));
            let want = matmul_transposed(&cpu, &dy[0], DType::F32).unwrap();
            for dtype in [DType::BF16, DType::F32] {
                let got = matmul_transposed(&gpu, &dy[1], dtype).unwrap();
                assert_eq!(got.dtype(), dtype);
                assert_close(&got, &want, 6e-3, &format!("{m} rows of [{}, {}], {dtype:?}", gpu.n(), gpu.k()));
                assert!(bits(&got) == bits(&matmul_transposed(&gpu, &dy[1], dtype).unwrap()));
            }
        }
    }
}

#[test]
fn losses_equal_the_cpu() {
    // More targets than fit a chunk; a vocabulary that is not a multiple of four.
    for (vocab, hidden, t) in [(1001, 64, 1700), (512, 256, 40), (70, 32, 1), (33, 36, 5)] {
        let source = source(Codec::BF16, vocab, hidden, 1);
        let [cpu, gpu] = [Device::Cpu, device()].map(|d| QMatrix::pack(std::slice::from_ref(&source), &d).unwrap());
        let x = both(&random(2, t * hidden), (t, hidden));
        let target = |row: usize| LossTarget {
            row: row as u32,
            id: (row * 7919 % vocab) as u32,
            scale: 0.25 + (row % 5) as f32,
        };
        let targets: Vec<LossTarget> = (0..t).filter(|row| row % 7 != 3).map(target).collect();
        let want = cross_entropy(&cpu, &x[0], &targets, true).unwrap();
        let got = cross_entropy(&gpu, &x[1], &targets, true).unwrap();
        let farthest = got.nll.iter().zip(&want.nll).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
        assert_eq!(got.nll.len(), targets.len());
        assert!(farthest < 1e-4, "[{vocab}, {hidden}]: {farthest}");
        // Of two ids about as likely, either may come first.
        let other = got.correct.iter().zip(&want.correct).filter(|(a, b)| a != b).count();
        assert!(other * 200 <= targets.len(), "[{vocab}, {hidden}]: {other} of {}", targets.len());
        let (dx, want_dx) = (got.dx.unwrap(), want.dx.unwrap());
        assert_close(&dx, &want_dx, 6e-3, &format!("[{vocab}, {hidden}]"));
        for row in (0..t).filter(|row| row % 7 == 3) {
            assert!(values(&dx.narrow(0, row, 1).unwrap()).iter().all(|v| *v == 0.0), "row {row}");
        }
        let again = cross_entropy(&gpu, &x[1], &targets, true).unwrap();
        assert!(again.nll == got.nll && bits(&again.dx.unwrap()) == bits(&dx));
        let plain = cross_entropy(&gpu, &x[1], &targets, false).unwrap();
        assert!(plain.dx.is_none() && plain.nll == got.nll && plain.correct == got.correct);
        let none = cross_entropy(&gpu, &x[1], &[], true).unwrap();
        assert!(none.nll.is_empty() && values(&none.dx.unwrap()).iter().all(|v| *v == 0.0));
    }
}

/// A head that makes the row's own id the likeliest.
#[test]
fn likeliest_ids_are_correct() {
    let n = 64;
    let unit: Vec<f32> = (0..n * n).map(|i| if i % (n + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let bytes: Vec<u8> = unit.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
    let source = quiver::ops::quant::Source::Blocks { codec: Codec::BF16, n, k: n, bytes: bytes.into() };
    let head = QMatrix::pack(&[source], &device()).unwrap();
    let x = Tensor::from_vec(unit, (n, n), &device()).unwrap().to_dtype(DType::BF16).unwrap();
    let target = |row: usize| LossTarget { row: row as u32, id: (row - row % 2) as u32, scale: 1.0 };
    let loss = cross_entropy(&head, &x, &(0..n).map(target).collect::<Vec<_>>(), false).unwrap();
    assert_eq!(loss.correct, (0..n).map(|row| row % 2 == 0).collect::<Vec<_>>());
}

#[test]
fn optimiser_steps_equal_the_cpu() {
    for n in [1, 5, 255, 256, 700, 1024, 5000, 70_001] {
        let on = |seed| both_f32(&random(seed, n), &[n]);
        let zeros = || [Device::Cpu, device()].map(|d| Tensor::zeros(n, DType::F32, &d).unwrap());
        let zeros8 = || [Device::Cpu, device()].map(|d| zero_moments(n, &d).unwrap());
        let (params, m, v) = (on(1), zeros(), zeros());
        let (params8, m8, v8) = (on(1), zeros8(), zeros8());
        for step in 1..=3 {
            let step =
                AdamwStep { step, lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1, grad_scale: 0.5 };
            let grads = on(1 + step.step as u64);
            for i in 0..2 {
                adamw_step(&params[i], &grads[i], &m[i], &v[i], &step).unwrap();
                adamw8bit_step(&params8[i], &grads[i], &m8[i], &v8[i], &step).unwrap();
            }
        }
        for (what, [want, got]) in [("parameters", &params), ("m", &m), ("v", &v)] {
            assert_close(got, want, 1e-5, &format!("{what} of {n}"));
        }
        // A value between two codes may go either way, once in a while.
        assert_close(&params8[1], &params8[0], 1e-4, &format!("parameters of {n} with 8 bits"));
        for (what, [want, got]) in [("m", &m8), ("v", &v8)] {
            let [want, got] = [want, got].map(|t| t.flatten_all().unwrap().to_vec1::<u8>().unwrap());
            let other = want.iter().zip(&got).filter(|(a, b)| a != b).count();
            assert!(other * 50 <= want.len(), "{what} of {n}: {other} of {} bytes", want.len());
        }
        let [want, got] = [0, 1].map(|i| sum_of_squares(&params[i]).unwrap());
        assert!((got / want - 1.0).abs() < 1e-5, "{n}: {got}, {want}");
    }
}
