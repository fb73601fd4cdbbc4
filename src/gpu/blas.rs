//! Matrix products by cuBLAS into a given buffer. Candle's matmul supports neither strides nor another output dtype.

use std::ffi::c_void;

use candle_core::DType;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};

use super::Context;
use crate::{Error, Result};

/// `c [m, n] = a [m, k] · b`, all row-major, `a` and `b` bf16, accumulated in f32.
#[derive(Debug)]
pub struct BlasProduct {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Address of `a`, and its row stride in values.
    pub a: (u64, usize),
    /// Address of `b`, `[k, n]`.
    pub b: u64,
    /// Whether `b` is `[n, k]` instead.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: u64,
    /// Type of `c`: bf16 or f32.
    pub dtype: DType,
}

impl BlasProduct {
    /// Launches the product on the device's stream. Errors: cuBLAS refuses it.
    ///
    /// # Safety
    /// The addresses are of live device memory of these shapes, used by nothing else at that point of the stream.
    pub unsafe fn launch(&self, context: &Context) -> Result<()> {
        let &Self { m, n, k, a: (a, a_stride), b, b_transposed, c, dtype } = self;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let failed = |e: &dyn std::fmt::Debug| Error::internal(format!("{self:?} by cuBLAS: {e:?}"));
        context.driver().bind_to_thread().map_err(|e| failed(&e))?;
        let (one, zero) = (1f32, 0f32);
        let number = |x: &f32| std::ptr::from_ref(x).cast::<c_void>();
        let bf16 = sys::cudaDataType::CUDA_R_16BF;
        let c_type = if dtype == DType::F32 { sys::cudaDataType::CUDA_R_32F } else { bf16 };
        // cuBLAS is column-major: to it, rows are columns, and this is cᵀ = bᵀ · aᵀ.
        let (operation, b_stride) = match b_transposed {
            true => (sys::cublasOperation_t::CUBLAS_OP_T, k),
            false => (sys::cublasOperation_t::CUBLAS_OP_N, n),
        };
        // SAFETY: the caller's promise; the factors are read before the call returns.
        unsafe {
            result::gemm_ex(
                *context.device().cublas_handle().handle(),
                operation,
                sys::cublasOperation_t::CUBLAS_OP_N,
                n as i32,
                m as i32,
                k as i32,
                number(&one),
                b as *const c_void,
                bf16,
                b_stride as i32,
                a as *const c_void,
                bf16,
                a_stride as i32,
                number(&zero),
                c as *mut c_void,
                c_type,
                n as i32,
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(|e| failed(&e))
    }
}
