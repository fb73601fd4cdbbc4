//! RMS norm and its gradient on a GPU.

use candle_core::Tensor;
use half::bf16;
use quiver::ops::norm::{add_rms_norm, rms_norm, rms_norm_backward};

use crate::common::{assert_close, both, both_f32, device, random, relative_error, values};

#[test]
fn forward_matches_float64() {
    for (t, n) in [(1, 4), (3, 64), (5, 576), (64, 4096), (2, 14336)] {
        let (x, delta, weight) = (random(1, t * n), random(2, t * n), random(3, n));
        let f32s = |v: &[bf16]| v.iter().map(|v| v.to_f32()).collect::<Vec<f32>>();
        let on = |v: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(v, shape, &device()).expect("a tensor");
        let w = Tensor::from_vec(f32s(&weight), n, &device()).expect("a tensor");
        let delta_gpu = Tensor::from_slice(&delta, (t, n), &device()).expect("a tensor");
        let (sum, y) = add_rms_norm(&on(f32s(&x), (t, n)), &delta_gpu, &w, 1e-5).expect("a norm");
        let plain: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| x.to_f32() + d.to_f32()).collect();
        assert_eq!(sum.flatten_all().unwrap().to_vec1::<f32>().unwrap(), plain);
        let alone = rms_norm(&on(plain.clone(), (t, n)), &w, 1e-5).expect("a norm");
        assert_eq!(values(&alone), values(&y));
        let want: Vec<f64> = plain
            .chunks_exact(n)
            .flat_map(|row| {
                let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                row.iter().zip(&weight).map(|(v, w)| f64::from(*v) * scale * f64::from(w.to_f32())).collect::<Vec<_>>()
            })
            .collect();
        assert!(relative_error(&values(&y), &want) < 3e-3, "[{t}, {n}]");
    }
}

#[test]
fn backward_equals_the_cpu() {
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
