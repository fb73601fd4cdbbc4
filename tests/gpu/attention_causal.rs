//! Training's attention on a GPU: against the CPU half, against itself, and among other sequences.

use std::ops::Range;

use candle_core::Tensor;
use half::bf16;
use quiver::arch::Heads;
use quiver::ops::attention::{causal, causal_backward};

use crate::common::{assert_close, bits, both, device, random, values};

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

/// The output, the logarithms of the softmax sums, and the gradient.
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
            // Each sequence's error is bounded by its share of all rows: the smallest gradients are differences of larger numbers.
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
        // The third sequence, with others before and after it.
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
