//! The CUDA half: cuBLAS, to which row-major matrices are transposed column-major ones.

use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{CudaStorage, Layout, Result};

use super::Gemm;
use crate::gpu::address;

/// A view of a matrix as cuBLAS takes it.
struct View {
    address: u64,
    dtype: sys::cudaDataType,
    /// Elements between rows, or between columns if `transposed`.
    stride: i32,
    /// Whether columns are contiguous instead of rows.
    transposed: bool,
}

impl View {
    /// The view of a tensor. Errors: neither rows nor columns are contiguous, or a dtype other than bf16 and f32.
    fn new(storage: &CudaStorage, layout: &Layout) -> Result<Self> {
        let (start, (rows, columns)) = (layout.start_offset() as u64, layout.shape().dims2()?);
        let (address, dtype) = match &storage.slice {
            CudaStorageSlice::F32(values) => (address(values) + 4 * start, sys::cudaDataType::CUDA_R_32F),
            CudaStorageSlice::BF16(values) => (address(values) + 2 * start, sys::cudaDataType::CUDA_R_16BF),
            _ => candle_core::bail!("gemm takes bf16 and f32 tensors"),
        };
        // The stride of a dimension of one element has no effect, but cuBLAS checks it.
        let (stride, transposed) = match *layout.stride() {
            [stride, 1] => (stride.max(columns), false),
            [1, stride] => (stride.max(rows), true),
            [stride, _] if columns == 1 => (stride, false),
            [_, stride] if rows == 1 => (stride, true),
            _ => candle_core::bail!("gemm of {layout:?}: neither rows nor columns are contiguous"),
        };
        Ok(Self { address, dtype, stride: stride as i32, transposed })
    }

    fn operation(&self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }
}

/// As [`super::gemm`], on the device's stream.
pub fn gemm(
    op: &Gemm,
    c: (&CudaStorage, &Layout),
    a: (&CudaStorage, &Layout),
    b: (&CudaStorage, &Layout),
) -> Result<()> {
    let ((m, n), (_, k)) = (c.1.shape().dims2()?, a.1.shape().dims2()?);
    let device = &c.0.device;
    let blas = device.cublas_handle();
    let (c, a, b) = (View::new(c.0, c.1)?, View::new(a.0, a.1)?, View::new(b.0, b.1)?);
    if c.transposed && m > 1 {
        candle_core::bail!("gemm into a matrix whose rows are not contiguous");
    }
    if a.dtype != b.dtype {
        candle_core::bail!("gemm of {:?} and {:?}", a.dtype, b.dtype);
    }
    device.cuda_stream().context().bind_to_thread().map_err(candle_core::Error::wrap)?;
    // SAFETY: views of live tensors, whose elements are inside them; `c` is held for writing. The transposed product is
    // `cᵀ [n, m] = bᵀ · aᵀ`.
    unsafe {
        result::gemm_ex(
            *blas.handle(),
            b.operation(),
            a.operation(),
            n as i32,
            m as i32,
            k as i32,
            (&raw const op.alpha).cast(),
            b.address as *const _,
            b.dtype,
            b.stride,
            a.address as *const _,
            a.dtype,
            a.stride,
            (&raw const op.beta).cast(),
            c.address as *mut _,
            c.dtype,
            c.stride,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e:?}")))
}
