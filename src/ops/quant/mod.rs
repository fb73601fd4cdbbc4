//! Resident weight matrices and their matrix product.

pub mod nf4;

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::{Error, Result};

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
    /// Stand-in: dense rows.
    dense: Vec<f32>,
}

impl QMatrix {
    /// Repacks sources with the same `k` into one matrix, their rows stacked in order.
    pub fn pack(_sources: &[Source]) -> Result<Self> {
        Err(Error::internal("not written yet"))
    }

    /// A dense f32 matrix, `rows` being `[n, k]` row-major.
    pub fn dense(n: usize, k: usize, rows: Vec<f32>) -> Result<Self> {
        if rows.len() != n * k {
            return Err(Error::invalid(format!("{} values for a [{n}, {k}] matrix", rows.len())));
        }
        Ok(Self { n, k, dense: rows })
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
        self.dense.len() * 4
    }

    /// Exact values of one row.
    pub fn row(&self, row: usize) -> Vec<f32> {
        self.dense[row * self.k..(row + 1) * self.k].to_vec()
    }
}

struct MatMul(Arc<QMatrix>);

impl CustomOp1 for MatMul {
    fn name(&self) -> &'static str {
        "quant-matmul"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (m, k) = l.shape().dims2()?;
        let (start, end) =
            l.contiguous_offsets().ok_or(candle_core::Error::RequiresContiguous { op: "quant-matmul" })?;
        let x = &s.as_slice::<f32>()?[start..end];
        let w = &self.0;
        let mut y = vec![0f32; m * w.n];
        for i in 0..m {
            for j in 0..w.n {
                y[i * w.n + j] = (0..k).map(|c| x[i * k + c] * w.dense[j * k + c]).sum();
            }
        }
        Ok((CpuStorage::F32(y), (m, w.n).into()))
    }
}

/// `x [m, k] f32 -> [m, n] f32`: `y = x · Wᵀ`.
pub fn matmul(w: &Arc<QMatrix>, x: &Tensor) -> Result<Tensor> {
    if x.dim(candle_core::D::Minus1)? != w.k {
        return Err(Error::internal(format!("matmul of {:?} with [{}, {}]", x.shape(), w.n, w.k)));
    }
    Ok(x.apply_op1_no_bwd(&MatMul(w.clone()))?)
}

/// Rows `ids` of the matrix: `[ids.len(), k] f32`. For the token embedding.
pub fn gather_rows(w: &QMatrix, ids: &[u32]) -> Result<Tensor> {
    let rows: Vec<f32> = ids.iter().flat_map(|&i| w.row(i as usize)).collect();
    Ok(Tensor::from_vec(rows, (ids.len(), w.k), &candle_core::Device::Cpu)?)
}
