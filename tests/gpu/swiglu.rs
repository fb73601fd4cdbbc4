//! SwiGLU and its gradient on a GPU.

use candle_core::Tensor;
use half::bf16;
use quiver::ops::swiglu::{swiglu, swiglu_backward};

use crate::common::{ROUNDED, assert_close, both, device, random, relative_error, values};

#[test]
fn forward_matches_float64() {
    for (t, n) in [(1, 4), (3, 64), (5, 576), (64, 4096), (2, 14336)] {
        let y = swiglu(&Tensor::from_slice(&random(4, 2 * t * n), (t, 2 * n), &device()).expect("a tensor"))
            .expect("values");
        let gate_up = random(4, 2 * t * n);
        let want: Vec<f64> = gate_up
            .chunks_exact(2 * n)
            .flat_map(|row| {
                let (gate, up) = row.split_at(n);
                let silu = |g: f64| g / (1.0 + (-g).exp());
                gate.iter().zip(up).map(|(g, u)| silu(g.to_f32().into()) * f64::from(u.to_f32())).collect::<Vec<_>>()
            })
            .collect();
        assert!(relative_error(&values(&y), &want) < 3e-3, "swiglu [{t}, {n}]");
    }
}

#[test]
fn backward_equals_the_cpu() {
    for (t, n) in [(1, 2), (3, 12), (70, 160), (70, 34), (65, 4096)] {
        let gate_up: Vec<bf16> = random(1, t * 2 * n).iter().map(|x| bf16::from_f32(x.to_f32() * 8.0)).collect();
        let (gate_up, dh) = (both(&gate_up, (t, 2 * n)), both(&random(2, t * n), (t, n)));
        let on = |i: usize| swiglu_backward(&gate_up[i], &dh[i]).unwrap();
        assert_close(&on(1), &on(0), ROUNDED, &format!("[{t}, {n}]"));
    }
}
