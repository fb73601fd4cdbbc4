//! Matrix products of strided views, added to a view in place. Training needs them for the low-rank pairs: its operands are columns
//! of activations and ranges of flat parameter buffers.
//!
//! The CPU half calls the `gemm` crate, as candle does; the CUDA half calls cuBLAS.

#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, InplaceOp3, Layout, Tensor};
use gemm::Parallelism;

use super::pool::threads;
use crate::{Error, Result};

/// Products with fewer multiply-adds run on one thread.
const PARALLEL: usize = 1 << 18;

/// `c = beta · c + alpha · a · b` in place, for `c [m, n]`, `a [m, k]`, `b [k, n]`. The views may have any strides, one of which is 1,
/// and `c` has a storage of its own. f32; on a GPU `a` and `b` are bf16, `c` is bf16 or f32 with contiguous rows. With `beta` 0,
/// `c` is overwritten whatever it held. The result's bits depend on shapes and values alone. Errors: shapes that do not fit.
pub fn gemm(c: &Tensor, beta: f32, a: &Tensor, b: &Tensor, alpha: f32) -> Result<()> {
    let ((m, n), (rows, k), (inner, columns)) = (c.dims2()?, a.dims2()?, b.dims2()?);
    if (m, n, k) != (rows, columns, inner) {
        return Err(Error::internal(format!("gemm of [{rows}, {k}] and [{inner}, {columns}] into [{m}, {n}]")));
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    Ok(c.inplace_op3(a, b, &Gemm { beta, alpha })?)
}

struct Gemm {
    beta: f32,
    alpha: f32,
}

/// The values of a view `[rows, columns]`, from its first one on, and its strides. Errors: the view leaves its storage.
fn view<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<(&'a [f32], [isize; 2])> {
    let values = storage.as_slice::<f32>()?;
    check(values.len(), layout)?;
    Ok((&values[layout.start_offset()..], strides(layout)))
}

fn strides(layout: &Layout) -> [isize; 2] {
    let strides = layout.stride();
    [strides[0] as isize, strides[1] as isize]
}

fn check(len: usize, layout: &Layout) -> candle_core::Result<()> {
    let last: usize =
        layout.dims().iter().zip(layout.stride()).map(|(dim, stride)| dim.saturating_sub(1) * stride).sum();
    if layout.start_offset() + last >= len {
        candle_core::bail!("gemm: {layout:?} leaves its storage of {len} values");
    }
    Ok(())
}

impl InplaceOp3 for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn cpu_fwd(
        &self,
        s1: &mut CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<()> {
        let ((m, n), (_, k)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let CpuStorage::F32(c) = s1 else { candle_core::bail!("gemm takes f32 tensors") };
        check(c.len(), l1)?;
        let (c, [c_row, c_column]) = (&mut c[l1.start_offset()..], strides(l1));
        let (a, [a_row, a_column]) = view(s2, l2)?;
        let (b, [b_row, b_column]) = view(s3, l3)?;
        let parallelism = match threads() {
            1 => Parallelism::None,
            _ if m * n * k < PARALLEL => Parallelism::None,
            threads => Parallelism::Rayon(threads),
        };
        // SAFETY: `view` and `check` made sure that every element of the three views lies in its slice. `c` is borrowed for
        // writing, so it overlaps neither of the others.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                c_column,
                c_row,
                self.beta != 0.0,
                a.as_ptr(),
                a_column,
                a_row,
                b.as_ptr(),
                b_column,
                b_row,
                self.beta,
                self.alpha,
                false,
                false,
                false,
                parallelism,
            );
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        s1: &mut CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> candle_core::Result<()> {
        cuda::gemm(self, (s1, l1), (s2, l2), (s3, l3))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, random};

    #[test]
    fn matches_f64_on_views_and_changes_nothing_else() {
        // `c` is a window of a wider tensor, `a` is transposed, `b` a range of a flat buffer.
        for (m, n, k) in [(1, 1, 1), (5, 7, 3), (70, 8, 130), (33, 100, 16)] {
            let (wide, at, flat) = (random(1, (m + 2) * (n + 5)), random(2, k * m), random(3, 11 + k * n));
            let tensor = |v: &[f32], shape: (usize, usize)| Tensor::from_slice(v, shape, &Device::Cpu).unwrap();
            let whole = tensor(&wide, (m + 2, n + 5));
            let c = whole.narrow(0, 2, m).unwrap().narrow(1, 3, n).unwrap();
            let a = tensor(&at, (k, m)).t().unwrap();
            let b = tensor(&flat, (1, 11 + k * n)).flatten_all().unwrap();
            let b = b.narrow(0, 11, k * n).unwrap().reshape((k, n)).unwrap();
            gemm(&c, 0.5, &a, &b, 2.0).unwrap();
            let mut expected: Vec<f64> = wide.iter().map(|&x| f64::from(x)).collect();
            for i in 0..m {
                for j in 0..n {
                    let sum: f64 = (0..k).map(|l| f64::from(at[l * m + i]) * f64::from(flat[11 + l * n + j])).sum();
                    let c = &mut expected[(i + 2) * (n + 5) + 3 + j];
                    *c = 0.5 * *c + 2.0 * sum;
                }
            }
            assert_close(&whole.flatten_all().unwrap().to_vec1().unwrap(), &expected, 1e-6);
        }
    }

    #[test]
    fn overwrites_with_beta_zero_and_refuses_other_shapes() {
        let c = Tensor::full(f32::NAN, (2, 3), &Device::Cpu).unwrap();
        let ones = |m: usize, n: usize| Tensor::ones((m, n), candle_core::DType::F32, &Device::Cpu).unwrap();
        gemm(&c, 0.0, &ones(2, 4), &ones(4, 3), 1.0).unwrap();
        assert_eq!(c.to_vec2::<f32>().unwrap(), [[4.0; 3]; 2]);
        assert!(gemm(&c, 0.0, &ones(2, 4), &ones(5, 3), 1.0).is_err());
        assert!(gemm(&c, 0.0, &ones(3, 4), &ones(4, 3), 1.0).is_err());
    }
}
