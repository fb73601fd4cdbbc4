//! The CUDA half: a chunk of targets at a time, cuBLAS computes the logits, `kernels/loss.cu` turns them into gradients, and cuBLAS
//! multiplies these by the head.

use candle_core::{DType, Tensor};
use half::bf16;

use super::{Loss, LossTarget};
use crate::Result;
use crate::gpu::blas::BlasProduct;
use crate::gpu::constants::LOSS_THREADS;
use crate::gpu::kernels::{LaunchGrid, kernel_set};
use crate::gpu::{Context, address, input};
use crate::ops::quant::QMatrix;

/// Targets of a chunk: with a vocabulary of 128 thousand, their logits take half a gigabyte.
const CHUNK: usize = 1024;

kernel_set!(LossKernels { copy_rows_2, copy_rows_16, cross_entropy_1, cross_entropy_4 });

/// As [`super::cross_entropy`], whose checks were made.
pub fn cross_entropy(head: &QMatrix, x: &Tensor, targets: &[LossTarget], gradient: bool) -> Result<Loss> {
    let ((vocab, hidden), count) = ((head.n(), head.k()), targets.len());
    let dx = if gradient { Some(Tensor::zeros(x.dims2()?, DType::BF16, x.device())?) } else { None };
    if targets.is_empty() {
        return Ok(Loss { nll: Vec::new(), correct: Vec::new(), dx });
    }
    let gpu = Context::of_tensor(x)?;
    let kernels = gpu.kernels::<LossKernels>()?;
    // These live until the results are read, by when all copies are done.
    let rows: Vec<u32> = targets.iter().map(|t| t.row).collect();
    let words: Vec<u32> = targets.iter().flat_map(|t| [t.row, t.id, t.scale.to_bits(), 0]).collect();
    let (rows, words) = (gpu.device().clone_htod(&rows)?, gpu.device().clone_htod(&words)?);
    let weights = head.values_cuda()?;
    let weights_at = input::<bf16>(&weights)?;
    let chunk = CHUNK.min(count);
    let (_logits, logits_at) = gpu.output::<f32>((chunk, vocab))?;
    let (_x, x_at) = gpu.output::<bf16>((chunk, hidden))?;
    let (results, results_at) = gpu.output::<f32>(2 * count)?;
    let kernel = if vocab.is_multiple_of(4) { &kernels.cross_entropy_4 } else { &kernels.cross_entropy_1 };
    for first in (0..count).step_by(CHUNK) {
        let m = chunk.min(count - first);
        let rows_at = address(&rows) + 4 * first as u64;
        // SAFETY: rows of `x`, by the caller's checks, to a chunk of as many.
        unsafe { copy_rows(&gpu, RowCopy::Gather, input::<bf16>(x)?, x_at, rows_at, (m, hidden))? };
        let product = BlasProduct {
            m,
            n: vocab,
            k: hidden,
            a: (x_at, hidden),
            b: weights_at,
            b_transposed: true,
            c: logits_at,
            dtype: DType::F32,
        };
        // SAFETY: `m` rows of the chunk, the whole matrix, and room for `m` rows of logits.
        unsafe { product.launch(&gpu)? };
        let args = [
            logits_at.into(),
            (address(&words) + 16 * first as u64).into(),
            vocab.into(),
            usize::from(gradient).into(),
            (results_at + 8 * first as u64).into(),
        ];
        // SAFETY: `m` rows of logits, as many targets with ids of them, and two results for each.
        unsafe { gpu.launch(kernel, LaunchGrid::new(m, LOSS_THREADS), &args)? };
        let Some(dx) = &dx else { continue };
        // The logits have become bf16 gradients, each row in the first half of its logits' memory. The gradient of the chunk's
        // rows of `x` overwrites these rows.
        let product = BlasProduct {
            m,
            n: hidden,
            k: vocab,
            a: (logits_at, 2 * vocab),
            b: weights_at,
            b_transposed: false,
            c: x_at,
            dtype: DType::BF16,
        };
        // SAFETY: as above, and the chunk has room for `m` rows.
        unsafe { product.launch(&gpu)? };
        // SAFETY: as above; every target has a row of its own.
        unsafe { copy_rows(&gpu, RowCopy::Scatter, x_at, input::<bf16>(dx)?, rows_at, (m, hidden))? };
    }
    let results: Vec<f32> = results.to_vec1()?;
    let (nll, correct) = results.chunks_exact(2).map(|r| (r[0], r[1].to_bits() == 1)).unzip();
    Ok(Loss { nll, correct, dx })
}

/// The side of a copy that the list of rows refers to.
enum RowCopy {
    /// Rows `rows[i]` of `from` become rows `i` of `to`.
    Gather,
    /// Rows `i` of `from` become rows `rows[i]` of `to`.
    Scatter,
}

/// Copies `count` rows of `width` bf16.
///
/// # Safety
/// Live device memory of these rows, used by nothing else.
unsafe fn copy_rows(
    gpu: &Context,
    direction: RowCopy,
    from: u64,
    to: u64,
    rows: u64,
    (count, width): (usize, usize),
) -> Result<()> {
    let kernels = gpu.kernels::<LossKernels>()?;
    let (kernel, pieces) =
        if width.is_multiple_of(8) { (&kernels.copy_rows_16, width / 8) } else { (&kernels.copy_rows_2, width) };
    let scatter = usize::from(matches!(direction, RowCopy::Scatter));
    let args = [from.into(), to.into(), rows.into(), pieces.into(), scatter.into()];
    // SAFETY: the caller's promise.
    unsafe { gpu.launch(kernel, LaunchGrid::new(count, 256), &args) }
}
