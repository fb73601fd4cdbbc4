//! Products with the matrix as it stands, not transposed: how gradients go back through a linear.
//!
//! The sum runs over a matrix's rows, whose scales differ, so these products are in f32: a task turns 64 columns of the matrix
//! into floats, some rows at a time, and multiplies its rows of gradients with them.

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
/// Rows of the matrix that are floats at a time, of 64 columns: as many as fit in the first-level cache beside the gradients.
const DEPTH: usize = 96;
/// Rows of gradients of a task: with the first, making floats takes a fifth of the time; the sums of the second stay in the
/// second-level cache.
const ROWS: Range<usize> = 64..512;

/// `dy [m, n] -> [m, k]`: `dx = dy · W`, the gradient of [`super::matmul`] with respect to `x`. On the CPU all is f32, and a row
/// depends on its row of `dy` alone, bit for bit; on a GPU `dy` is bf16 and `dx` is `dtype`, bf16 or f32.
pub fn matmul_transposed(w: &QMatrix, dy: &Tensor, dtype: DType) -> Result<Tensor> {
    let (m, n) = dy.dims2()?;
    if n != w.n {
        return Err(Error::internal(format!("product of [{m}, {n}] with a [{}, {}] matrix, transposed", w.n, w.k)));
    }
    match &w.storage {
        MatrixStorage::Panels(panels) if dtype == DType::F32 => Ok(dy.apply_op1_no_bwd(&MatMulTransposed(panels))?),
        MatrixStorage::Panels(_) => {
            Err(Error::internal(format!("a product in {dtype:?} on the CPU, where all is f32")))
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
        // Enough tasks to end together.
        let pieces = (8 * threads()).div_ceil(wide);
        let rows = m.div_ceil(pieces).clamp(ROWS.start, ROWS.end);
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
            // Sums past the last column are of whatever was there.
            // SAFETY: inside `dx`, and a task's rows and columns are its own.
            let dx = unsafe { dx.slice(row * k + columns.start, columns.len()) };
            dx.copy_from_slice(&sums[..columns.len()]);
        }
    }
}
