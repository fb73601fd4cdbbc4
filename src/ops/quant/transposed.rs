//! Products `dy · W`, which carry gradients back through a linear.
//!
//! The sum runs over the matrix's rows, whose scales differ, so these products are in f32. A task dequantises 64 columns of the
//! matrix, some rows at a time, and multiplies its rows of gradients with them.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor};

use super::affine::PANEL;
use super::{MatrixStorage, PanelMatrix, QMatrix};
use crate::ops::cpu;
use crate::ops::pool::{SharedMut, parallel_for, threads};
use crate::ops::simd::{self, LANES, Lanes, SimdKernel};
use crate::ops::task_gemm::{Strides, TaskGemm};
use crate::{Error, Result};

/// Columns of a task.
pub const COLUMNS: usize = 64;
/// Rows of the matrix that are dequantised at a time: as many, of 64 columns, as fit in the first-level cache next to the gradients.
const DEPTH: usize = 96;
/// Fewest rows of gradients of a task. With these, dequantisation takes a fifth of the time.
const FEWEST_ROWS: usize = 64;
/// Most rows of gradients of a task. The sums of these stay in the second-level cache.
const MOST_ROWS: usize = 512;

/// The gradient of [`super::matmul`] with respect to `x`: `dx [m, k] = dy [m, n] · W`. On the CPU all is f32, and a row of `dx` depends on
/// its row of `dy` alone, bit for bit. On a GPU `dy` is bf16 and `dx` is of `dtype`, bf16 or f32. Errors: shapes that do not fit, a
/// dtype that the device does not have.
pub fn matmul_transposed(w: &QMatrix, dy: &Tensor, dtype: DType) -> Result<Tensor> {
    let (m, n) = dy.dims2()?;
    if n != w.n {
        return Err(Error::internal(format!("transposed product of [{m}, {n}] with a [{}, {}] matrix", w.n, w.k)));
    }
    match &w.storage {
        MatrixStorage::Panels(panels) if dtype == DType::F32 => Ok(dy.apply_op1_no_bwd(&MatMulTransposed(panels))?),
        MatrixStorage::Panels(_) => {
            Err(Error::internal(format!("a product in {dtype:?} on the CPU: only f32 is supported")))
        }
        #[cfg(feature = "cuda")]
        MatrixStorage::Tiles(parts) => w.multiply_transposed_cuda(parts, dy, dtype),
    }
}

struct MatMulTransposed<'a>(&'a PanelMatrix);

impl CustomOp1 for MatMulTransposed<'_> {
    fn name(&self) -> &'static str {
        "quant-matmul-transposed"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let PanelMatrix { n, k, .. } = *self.0;
        let dy = cpu::slice(self.name(), s, l)?;
        let m = dy.len() / n;
        let wide = k.div_ceil(COLUMNS);
        // Enough tasks for threads to finish together.
        let pieces = (8 * threads()).div_ceil(wide);
        let rows = m.div_ceil(pieces).clamp(FEWEST_ROWS, MOST_ROWS);
        let mut dx = vec![0.0; m * k];
        let out = SharedMut::new(&mut dx);
        parallel_for(wide * m.div_ceil(rows), |task| {
            let rows = cpu::chunk(task / wide, rows, m);
            simd::run(TransposedTile {
                panels: self.0,
                dy,
                rows,
                columns: cpu::chunk(task % wide, COLUMNS, k),
                dx: out,
            });
        });
        Ok((CpuStorage::F32(dx), (m, k).into()))
    }
}

/// Some rows and up to [`COLUMNS`] columns of `dx`.
struct TransposedTile<'a> {
    panels: &'a PanelMatrix,
    dy: &'a [f32],
    rows: Range<usize>,
    columns: Range<usize>,
    dx: SharedMut<f32>,
}

impl SimdKernel for TransposedTile<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { panels: PanelMatrix { n, k, parts }, dy, rows, columns, dx } = self;
        let mut weights = vec![[0.0; COLUMNS]; DEPTH];
        let mut sums = vec![[0.0; COLUMNS]; rows.len()];
        let mut first = 0;
        for part in parts {
            for start in (0..part.n()).step_by(DEPTH) {
                let depth = DEPTH.min(part.n() - start);
                let panels = start / PANEL..(start + depth).div_ceil(PANEL);
                for (panel, weights) in panels.zip(weights.as_chunks_mut().0) {
                    part.columns::<L>(panel, columns.clone(), weights);
                }
                let product = TaskGemm {
                    rows: rows.len(),
                    inner: depth,
                    columns: COLUMNS / LANES,
                    a: &dy[rows.start * n + first + start..],
                    a_strides: Strides { row: *n, column: 1 },
                    b: weights.as_flattened().as_chunks().0,
                    b_stride: COLUMNS / LANES,
                    c: sums.as_flattened_mut().as_chunks_mut().0,
                    c_stride: COLUMNS / LANES,
                };
                product.run::<L>();
            }
            first += part.n();
        }
        for (row, sums) in rows.zip(&sums) {
            // Sums past the last column are meaningless and not copied.
            // SAFETY: inside `dx`; these rows and columns belong to one task.
            let dx = unsafe { dx.slice(row * k + columns.start, columns.len()) };
            dx.copy_from_slice(&sums[..columns.len()]);
        }
    }
}
