//! Strided products added in place on a GPU, against the CPU half.

use candle_core::{DType, Tensor};
use quiver::ops::gemm::gemm;

use crate::common::{assert_close, both, both_f32, random};

/// Largest relative error of one rounding to bf16, which a single value can have.
const ONE_ROUNDING: f64 = 1.0 / 256.0;

#[test]
fn products_equal_the_cpu() {
    for (m, k, n) in [(1, 1, 1), (3, 64, 5), (70, 33, 16), (256, 512, 96)] {
        let (a, b) = (both(&random(1, m * k), (m, k)), both(&random(2, k * n), (k, n)));
        let (a_t, b_t) = (both(&random(3, k * m), (k, m)), both(&random(4, n * k), (n, k)));
        let start = both_f32(&random(5, m * n), &[m, n]);
        let views = |i: usize| [(a[i].clone(), b[i].clone()), (a_t[i].t().unwrap(), b_t[i].t().unwrap())];
        let on = |i: usize, which: usize, beta: f32, dtype: DType| -> Tensor {
            let (a, b) = &views(i)[which];
            let c = start[i].to_dtype(dtype).unwrap().copy().unwrap();
            gemm(&c, beta, a, b, 0.5).unwrap();
            c
        };
        for which in [0, 1] {
            for beta in [0.0, 1.0] {
                let want = on(0, which, beta, DType::F32);
                let what = format!("[{m}, {k}, {n}], transposed: {which}, beta {beta}");
                assert_close(&on(1, which, beta, DType::F32), &want, 1e-5, &what);
                assert_close(&on(1, which, beta, DType::BF16), &want, ONE_ROUNDING, &what);
            }
        }
    }
}
