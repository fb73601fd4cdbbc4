//! Biases and norms of heads, and the norms' gradient, on a GPU against the CPU half.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use quiver::arch::Heads;
use quiver::ops::heads::{QkNorm, bias_and_qk_norm, qk_norm_backward};

use crate::common::{ROUNDED, assert_close, both, both_f32, device, random, relative_error};

fn run(x: &[bf16], heads: Heads, bias: Option<&[bf16]>, norms: Option<[&[bf16]; 2]>, device: &Device) -> Vec<f32> {
    let width = heads.qkv_width();
    let floats = |v: &[bf16]| Tensor::from_slice(v, v.len(), device).unwrap().to_dtype(DType::F32).unwrap();
    let mut qkv = Tensor::from_slice(x, (x.len() / width, width), device).unwrap();
    if device.is_cpu() {
        qkv = qkv.to_dtype(DType::F32).unwrap();
    }
    let bias = bias.map(floats);
    let norms = norms.map(|n| n.map(floats));
    let norm = norms.as_ref().map(|[query, key]| QkNorm { query, key, eps: 1e-6 });
    bias_and_qk_norm(&qkv, bias.as_ref(), norm, heads).unwrap();
    qkv.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn equals_the_cpu_and_rows_stand_alone() {
    for (query, kv, dim, rows) in
        [(1, 1, 2, 1), (4, 2, 12, 5), (9, 3, 64, 33), (5, 1, 80, 3), (32, 8, 128, 64), (2, 1, 256, 2)]
    {
        let heads = Heads { query, kv, dim };
        let width = heads.qkv_width();
        let x = random(1, rows * width);
        let (bias, q, k) = (random(2, width), random(3, dim), random(4, dim));
        for (with_bias, with_norms) in [(true, false), (false, true), (true, true)] {
            let on = |x: &[bf16], device: &Device| {
                run(x, heads, with_bias.then_some(&bias[..]), with_norms.then_some([&q, &k]), device)
            };
            let got = on(&x, &device());
            let want: Vec<f64> = on(&x, &Device::Cpu).into_iter().map(f64::from).collect();
            // One rounding to bf16: 2^-8 of each value at most.
            let error = relative_error(&got, &want);
            assert!(error < 1.0 / 256.0, "{heads:?} {with_bias} {with_norms}: {error}");
            let last = (rows - 1) * width;
            assert_eq!(on(&x[last..], &device()), got[last..]);
        }
    }
}

#[test]
fn backward_equals_the_cpu() {
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
