//! Resident weight matrices and their matrix product.
//!
//! [`QMatrix::pack`] turns the rows of a file into panels ([`affine`] for block formats, [`float`] for dense and codebook
//! ones); [`matmul`] multiplies them with activations, which become integers first where the weights are ([`activations`]).

mod activations;
mod affine;
mod blocks;
mod float;
mod kernel;

pub mod nf4;

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use crate::ops::pool::{SharedMut, parallel_for, threads};
use crate::{Error, Result};
use activations::Activations;
use affine::Affine;
use float::Float;

pub use kernel::name as kernel_name;

/// How the bytes of a [`Source`] encode values. GGUF block formats: ggml's `block_*` structs, little-endian.
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

/// Rows of a weight matrix in the format of the file they come from.
pub enum Source<'a> {
    /// `[n, k]` row-major; each row is whole blocks of `codec`.
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
    /// NF4 or FP4 as bitsandbytes: value = `codebook[code] * scale`, blocks of `block` consecutive values of the
    /// flattened `[n, k]` matrix (blocks run across rows when `k % block != 0`).
    Codebook {
        /// Output features.
        n: usize,
        /// Input features.
        k: usize,
        /// Values per scale.
        block: usize,
        /// Two codes a byte, the even value in the high nibble.
        codes: Cow<'a, [u8]>,
        /// One f32 a block, double quantisation already undone.
        scales: Vec<f32>,
        /// The 16 values.
        codebook: [f32; 16],
    },
}

/// A resident weight matrix `[n, k]`: rows of one or several sources, stacked, each part in the internal form with
/// exactly its source's values.
pub struct QMatrix {
    n: usize,
    k: usize,
    parts: Vec<Part>,
}

/// Rows of one source, repacked.
enum Part {
    Affine(Affine),
    Float(Float),
}

impl Part {
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

    fn row(&self, row: usize) -> Vec<f32> {
        match self {
            Self::Affine(p) => p.row(row),
            Self::Float(p) => p.row(row),
        }
    }
}

impl QMatrix {
    /// Repacks sources with the same `k` into one matrix, their rows stacked in order.
    ///
    /// Errors: no source, sources that differ in `k`, a `k` that is not whole blocks, bytes that do not fit the shape.
    pub fn pack(sources: &[Source]) -> Result<Self> {
        let mut parts = Vec::with_capacity(sources.len());
        let mut width = None;
        for source in sources {
            let (k, part) = match source {
                Source::Blocks { codec, n, k, bytes } => (*k, pack_blocks(*codec, *n, *k, bytes)?),
                Source::Codebook { n, k, block, codes, scales, codebook } => {
                    (*k, Part::Float(Float::codebook(*n, *k, *block, codes, scales, *codebook)?))
                }
            };
            if *width.get_or_insert(k) != k {
                return Err(Error::invalid(format!("stacked matrices have {} and {k} columns", width.unwrap_or(k))));
            }
            parts.push(part);
        }
        let k = width
            .filter(|k| *k > 0)
            .ok_or_else(|| Error::invalid("a matrix needs at least one row source and column"))?;
        Ok(Self { n: parts.iter().map(Part::n).sum(), k, parts })
    }

    /// A dense f32 matrix, `rows` being `[n, k]` row-major.
    pub fn dense(n: usize, k: usize, rows: Vec<f32>) -> Result<Self> {
        if rows.len() != n * k || k == 0 {
            return Err(Error::invalid(format!("{} values for a [{n}, {k}] matrix", rows.len())));
        }
        Ok(Self { n, k, parts: vec![Part::Float(Float::f32(n, k, &rows))] })
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
        self.parts.iter().map(Part::bytes).sum()
    }

    /// Exact values of one row, `[k]`.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut first = 0;
        for part in &self.parts {
            if row < first + part.n() {
                return part.row(row - first);
            }
            first += part.n();
        }
        panic!("row {row} of a matrix with {} rows", self.n)
    }

    /// `y [m, n] = x [m, k] · Wᵀ`.
    fn multiply(&self, x: &[f32], y: &mut [f32]) {
        let integers = self.parts.iter().any(|p| matches!(p, Part::Affine(_)));
        let integers = integers.then(|| Activations::quantise(x, self.k));
        // Tasks of whole panels over all parts: enough of them that threads end together, each big enough to be worth claiming.
        let panels: usize = self.parts.iter().map(Part::panels).sum();
        let per_task = panels.div_ceil(8 * threads()).max((64 << 10) / (self.bytes() / panels + 1)).max(1);
        let y = SharedMut::new(y);
        // Activation rows a pass: what a pass reads of them stays in the second-level cache while panels go by.
        let rows = ((256 << 10) / (2 * self.k)).next_multiple_of(8).max(8);
        parallel_for(panels.div_ceil(per_task), |task| {
            let (mut first, mut column) = (0, 0);
            let range = task * per_task..panels.min((task + 1) * per_task);
            for part in &self.parts {
                let own = range.start.max(first)..range.end.min(first + part.panels());
                match (part, &integers) {
                    (Part::Affine(p), Some(a)) => {
                        for row in (0..a.rows()).step_by(rows) {
                            let rows = row..a.rows().min(row + rows);
                            own.clone().for_each(|i| p.multiply_panel(i - first, a, rows.clone(), y, self.n, column));
                        }
                    }
                    (Part::Float(p), _) => own.for_each(|i| p.multiply_panel(i - first, x, y, self.n, column)),
                    (Part::Affine(_), None) => unreachable!("integers exist where a part is affine"),
                }
                first += part.panels();
                column += part.n();
            }
        });
    }
}

fn pack_blocks(codec: Codec, n: usize, k: usize, bytes: &[u8]) -> Result<Part> {
    let width = match codec {
        Codec::F32 => 4,
        Codec::F16 | Codec::BF16 => 2,
        _ => return Ok(Part::Affine(Affine::pack(codec, n, k, bytes)?)),
    };
    if bytes.len() != n * k * width {
        return Err(Error::invalid(format!("{codec:?} [{n}, {k}] takes {} bytes, got {}", n * k * width, bytes.len())));
    }
    Ok(Part::Float(match codec {
        Codec::F16 => Float::f16_bytes(n, k, bytes),
        Codec::BF16 => Float::bf16_bytes(n, k, bytes),
        _ => Float::f32_bytes(n, k, bytes),
    }))
}

/// The op: the frozen matrix is a field, never an operand, so that autograd keeps no gradient for it.
struct MatMul(Arc<QMatrix>);

impl CustomOp1 for MatMul {
    fn name(&self) -> &'static str {
        "quant-matmul"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (m, k) = l.shape().dims2()?;
        if k != self.0.k {
            candle_core::bail!("product of [{m}, {k}] with a [{}, {}] matrix", self.0.n, self.0.k);
        }
        let (start, end) = l.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op: self.name() })?;
        let mut y = vec![0f32; m * self.0.n];
        self.0.multiply(&s.as_slice::<f32>()?[start..end], &mut y);
        Ok((CpuStorage::F32(y), (m, self.0.n).into()))
    }
}

/// `x [m, k] f32 -> [m, n] f32`: `y = x · Wᵀ`. A row of `y` depends on its row of `x` alone, bit for bit.
pub fn matmul(w: &Arc<QMatrix>, x: &Tensor) -> Result<Tensor> {
    Ok(x.apply_op1_no_bwd(&MatMul(w.clone()))?)
}

/// Rows `ids` of the matrix: `[ids.len(), k] f32`. For the token embedding.
pub fn gather_rows(w: &QMatrix, ids: &[u32]) -> Result<Tensor> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= w.n) {
        return Err(Error::invalid(format!("token id {id} is outside the vocabulary of {} ids", w.n)));
    }
    let rows: Vec<f32> = ids.iter().flat_map(|&i| w.row(i as usize)).collect();
    Ok(Tensor::from_vec(rows, (ids.len(), w.k), &Device::Cpu)?)
}

#[cfg(test)]
mod tests;
