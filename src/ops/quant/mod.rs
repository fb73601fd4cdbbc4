//! Resident weight matrices and their products.
//!
//! [`QMatrix::pack`] repacks rows in a file's format. On the CPU they become panels of 16 rows: [`affine`] for block formats, [`float`]
//! for dense and codebook formats. On a GPU they become tiles in the order of the tensor cores. [`matmul`] multiplies activations
//! with the matrix, [`matmul_transposed`] gradients with its transpose, and [`gather_rows`] reads rows of the embedding. On the
//! CPU, activations are quantised to integers before they meet integer weights: see [`activations`].

mod activations;
mod affine;
mod blocks;
#[cfg(feature = "cuda")]
mod cuda;
mod float;
mod kernel;
mod resident;
#[cfg(feature = "cuda")]
mod tiles;
mod transposed;

pub mod nf4;

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor};

use crate::ops::batch::DeviceStep;
use crate::ops::pool::{SharedMut, parallel_for, threads};
use crate::ops::simd::Lanes;
use crate::{Error, Result};
use activations::{ActivationForms, ActivationTile, ROWS};
use affine::{AffinePanels, PANEL};
#[cfg(feature = "cuda")]
pub use cuda::workspace_bytes;
use float::FloatPanels;
use kernel::{Isa, Products};
use transposed::COLUMNS;
pub use transposed::matmul_transposed;

/// The name of the instruction set that the CPU's products use on this machine, for `doctor`.
pub(crate) fn kernel_name() -> &'static str {
    Isa::best().name()
}

/// How the bytes of a [`Source`] encode values, little-endian. Block formats are ggml's `block_*` structs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4K,
    Q5K,
    Q6K,
}

/// Rows of a weight matrix in a file's format.
pub enum Source<'a> {
    /// `[n, k]` row-major. Each row consists of whole blocks of `codec`.
    Blocks {
        /// Format of `bytes`.
        codec: Codec,
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// `n` rows, back to back.
        bytes: Cow<'a, [u8]>,
    },
    /// NF4 or FP4 as in bitsandbytes: values are `codebook[code] · scale`. A block is `block` consecutive values of the flattened
    /// `[n, k]` matrix. Blocks cross rows if `k % block != 0`.
    Codebook {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Values that share a scale.
        block: usize,
        /// Two codes in each byte, that of the even value in the high nibble.
        codes: Cow<'a, [u8]>,
        /// The scale of each block, without double quantisation.
        scales: Vec<f32>,
        /// The 16 values.
        codebook: [f32; 16],
    },
}

/// A resident weight matrix `[n, k]`: the stacked rows of one or several sources. On the CPU its values are exactly those of the
/// sources. On a GPU, dense f32 and f16 values become bf16.
pub struct QMatrix {
    n: usize,
    k: usize,
    storage: MatrixStorage,
}

/// A matrix on its device.
enum MatrixStorage {
    /// In host memory.
    Panels(PanelMatrix),
    /// In a GPU's memory.
    #[cfg(feature = "cuda")]
    Tiles(Vec<cuda::TilePart>),
}

/// A matrix `[n, k]` in panels: the stacked rows of one or several sources.
struct PanelMatrix {
    n: usize,
    k: usize,
    parts: Vec<PanelPart>,
}

/// The rows of one source, in panels.
enum PanelPart {
    Affine(AffinePanels),
    Float(FloatPanels),
}

impl PanelPart {
    fn pack(source: &Source) -> Result<Self> {
        Ok(match source {
            Source::Blocks { codec: codec @ (Codec::F32 | Codec::F16 | Codec::BF16), n, k, bytes } => {
                Self::Float(FloatPanels::dense(*codec, *n, *k, bytes)?)
            }
            Source::Blocks { codec, n, k, bytes } => Self::Affine(AffinePanels::pack(*codec, *n, *k, bytes)?),
            Source::Codebook { n, k, block, codes, scales, codebook } => {
                Self::Float(FloatPanels::codebook(*n, *k, *block, codes, scales, *codebook)?)
            }
        })
    }

    fn n(&self) -> usize {
        match self {
            Self::Affine(p) => p.n(),
            Self::Float(p) => p.n(),
        }
    }

    fn panels(&self) -> usize {
        match self {
            Self::Affine(p) => p.panels(),
            Self::Float(p) => p.panels(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Affine(p) => p.bytes(),
            Self::Float(p) => p.bytes(),
        }
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Affine(p) => p.row(row, out),
            Self::Float(p) => p.row(row, out),
        }
    }

    /// The values of `columns`, which start at a multiple of [`affine::GROUP`], of all rows of a panel.
    #[inline(always)]
    fn columns<L: Lanes>(&self, panel: usize, columns: Range<usize>, out: &mut [[f32; COLUMNS]; PANEL]) {
        match self {
            Self::Affine(p) => p.columns::<L>(panel, columns, out),
            Self::Float(p) => p.columns(panel, columns, out),
        }
    }

    /// The products of one panel with the rows of a tile.
    fn multiply(&self, isa: Isa, panel: usize, tile: &ActivationTile, out: &mut Products) {
        match self {
            Self::Affine(p) => p.multiply(isa, panel, tile, out),
            Self::Float(p) => p.multiply(isa, panel, tile, out),
        }
    }
}

impl QMatrix {
    /// Repacks sources with the same `k` into one matrix on `device`, and stacks their rows in order. Errors: no source, sources of
    /// different `k`, a `k` that is not whole blocks, bytes that do not fit the shape, no memory.
    pub fn pack(sources: &[Source], device: &Device) -> Result<Self> {
        let width = |s: &Source| match s {
            Source::Blocks { k, .. } | Source::Codebook { k, .. } => *k,
        };
        let k = sources.first().map(width).filter(|k| *k > 0);
        let k = k.ok_or_else(|| Error::invalid("a matrix needs at least one source and one column"))?;
        if let Some(other) = sources.iter().map(width).find(|other| *other != k) {
            return Err(Error::invalid(format!("stacked matrices have {k} and {other} columns")));
        }
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let parts = cuda::TilePart::pack(sources, device)?;
                let n = parts.iter().map(cuda::TilePart::n).sum();
                Ok(Self { n, k, storage: MatrixStorage::Tiles(parts) })
            }
            _ => {
                let parts = sources.iter().map(PanelPart::pack).collect::<Result<Vec<_>>>()?;
                let n = parts.iter().map(PanelPart::n).sum();
                Ok(Self { n, k, storage: MatrixStorage::Panels(PanelMatrix { n, k, parts }) })
            }
        }
    }

    /// A dense f32 matrix on the CPU from `rows [n, k]`, row-major. Errors: a number of values that does not fit the shape.
    pub fn dense(n: usize, k: usize, rows: Vec<f32>) -> Result<Self> {
        if rows.len() != n * k || k == 0 {
            return Err(Error::invalid(format!("{} values for a [{n}, {k}] matrix", rows.len())));
        }
        let parts = vec![PanelPart::Float(FloatPanels::f32(n, k, &rows)?)];
        Ok(Self { n, k, storage: MatrixStorage::Panels(PanelMatrix { n, k, parts }) })
    }

    /// Output features.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Input features.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Resident bytes.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            MatrixStorage::Panels(panels) => panels.parts.iter().map(PanelPart::bytes).sum(),
            #[cfg(feature = "cuda")]
            MatrixStorage::Tiles(parts) => parts.iter().map(cuda::TilePart::bytes).sum(),
        }
    }

    /// The values of one row `[k]`. Errors: no such row, a failure of the GPU.
    pub fn row(&self, row: u32) -> Result<Vec<f32>> {
        Ok(gather_rows(self, &[row], None)?.flatten_all()?.to_vec1()?)
    }
}

impl PanelMatrix {
    fn row_into(&self, row: usize, out: &mut [f32]) {
        let (part, row) = self.locate_row(row);
        part.row(row, out);
    }

    /// The part that holds a row, and the row's index in it.
    fn locate_row(&self, row: usize) -> (&PanelPart, usize) {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.n() {
                return (part, row - first);
            }
            first += part.n();
        }
        panic!("row {row} of a matrix with {} rows", self.n)
    }

    /// `y [m, n] = x [m, k] · Wᵀ`.
    ///
    /// A task is some panels times a chunk of tiles. While panels pass, the chunk stays in the second-level cache; while tiles
    /// pass, the panel stays in the first-level cache.
    fn multiply(&self, isa: Isa, x: &[f32]) -> Vec<f32> {
        let m = x.len() / self.k;
        // Activation tiles, in the forms that the parts multiply.
        let forms = ActivationForms {
            integer: self.parts.iter().any(|p| matches!(p, PanelPart::Affine(_))),
            float: self.parts.iter().any(|p| matches!(p, PanelPart::Float(_))),
        };
        let tiles = activations::tiles(x, self.k, forms);

        // Tasks large enough to be worth claiming, and many enough for threads to finish together.
        let panels: usize = self.parts.iter().map(PanelPart::panels).sum();
        let chunk = ((256 << 10) / (2 * ROWS * self.k)).max(1);
        let worth = (64 << 10) / (PANEL * self.k * m.min(chunk * ROWS)).max(1);
        let per_task = worth.clamp(1, panels.div_ceil(4 * threads()).max(1));
        let tasks = panels.div_ceil(per_task);

        // The products, written to uninitialised memory.
        let mut y = Vec::with_capacity(m * self.n);
        let shared = SharedMut::new(&mut y.spare_capacity_mut()[..m * self.n]);
        parallel_for(tasks * tiles.len().div_ceil(chunk), |task| {
            let (chunk, range) = (task / tasks * chunk..tiles.len().min((task / tasks + 1) * chunk), task % tasks);
            let mut products = [[0.0; PANEL]; ROWS];
            for panel in range * per_task..panels.min((range + 1) * per_task) {
                let (part, panel, column) = self.locate_panel(panel);
                let columns = PANEL.min(part.n() - panel * PANEL);
                for i in chunk.clone() {
                    part.multiply(isa, panel, &tiles[i], &mut products);
                    for (t, products) in products[..tiles[i].rows].iter().enumerate() {
                        let at = (i * ROWS + t) * self.n + column;
                        // SAFETY: inside `y`; a panel's columns of a chunk's rows belong to one task.
                        let y = unsafe { shared.slice(at, columns) };
                        for (y, product) in y.iter_mut().zip(products) {
                            y.write(*product);
                        }
                    }
                }
            }
        });
        // SAFETY: tasks cover all panels times all tiles, so every element was written.
        unsafe { y.set_len(m * self.n) };
        y
    }

    /// For a panel counted over all parts: its part, its index in the part, and its first column of the result.
    fn locate_panel(&self, mut panel: usize) -> (&PanelPart, usize, usize) {
        let mut column = 0;
        for part in &self.parts {
            if panel < part.panels() {
                return (part, panel, column + panel * PANEL);
            }
            panel -= part.panels();
            column += part.n();
        }
        unreachable!("callers count the panels")
    }
}

/// The op. The frozen matrix is a field, not an operand, so it gets no gradient.
struct MatMul<'a>(&'a PanelMatrix);

impl CustomOp1 for MatMul<'_> {
    fn name(&self) -> &'static str {
        "quant-matmul"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (m, k) = l.shape().dims2()?;
        if k != self.0.k {
            candle_core::bail!("product of [{m}, {k}] with a [{}, {}] matrix", self.0.n, self.0.k);
        }
        let (start, end) = l.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op: self.name() })?;
        let y = self.0.multiply(Isa::best(), &s.as_slice::<f32>()?[start..end]);
        Ok((CpuStorage::F32(y), (m, self.0.n).into()))
    }
}

/// `y [m, n] = x [m, k] · Wᵀ`. On the CPU all is f32. On a GPU `x` is bf16 and `y` is of `dtype`, bf16 or f32. Bit for bit, a row of `y`
/// depends on its row of `x` alone; on a GPU this holds for f32 `y`, and on Hopper among products of up to 192 rows. Errors: shapes
/// that do not fit, a dtype that the device does not have.
pub fn matmul(w: &QMatrix, x: &Tensor, dtype: DType) -> Result<Tensor> {
    match &w.storage {
        MatrixStorage::Panels(panels) if dtype == DType::F32 => Ok(x.apply_op1_no_bwd(&MatMul(panels))?),
        MatrixStorage::Panels(_) => {
            Err(Error::internal(format!("a product in {dtype:?} on the CPU: only f32 is supported")))
        }
        #[cfg(feature = "cuda")]
        MatrixStorage::Tiles(parts) => w.multiply_cuda(parts, x, dtype),
    }
}

/// Rows `ids` of the matrix `[ids.len(), k]`, f32: the token embedding. On a GPU, a given `step` holds the ids already, and the result
/// has one row for each of its rows. Errors: an id past the matrix's rows.
pub fn gather_rows(w: &QMatrix, ids: &[u32], step: Option<&DeviceStep>) -> Result<Tensor> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= w.n) {
        return Err(Error::invalid(format!("token id {id} is outside the vocabulary of {} ids", w.n)));
    }
    match &w.storage {
        MatrixStorage::Panels(_) if step.is_some() => {
            Err(Error::internal("the step is on a GPU and the weights are on the CPU"))
        }
        MatrixStorage::Panels(panels) => {
            let mut rows = vec![0.0; ids.len() * w.k];
            let shared = SharedMut::new(&mut rows);
            parallel_for(ids.len(), |i| {
                // SAFETY: each id has a row of its own, written by one task.
                panels.row_into(ids[i] as usize, unsafe { shared.slice(i * w.k, w.k) });
            });
            Ok(Tensor::from_vec(rows, (ids.len(), w.k), &Device::Cpu)?)
        }
        #[cfg(feature = "cuda")]
        MatrixStorage::Tiles(parts) => w.gather_cuda(parts, ids, step),
    }
}

#[cfg(test)]
mod tests;
