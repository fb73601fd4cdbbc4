//! The optimiser's steps on a GPU against the CPU half.

use candle_core::{DType, Device, Tensor};
use quiver::ops::adamw::{AdamwStep, adamw_step, adamw8bit_step, sum_of_squares, zero_moments};

use crate::common::{assert_close, both_f32, device, random};

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
        // A value near the middle of two codes may be rounded either way.
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
