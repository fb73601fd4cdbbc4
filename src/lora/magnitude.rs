//! DoRA (Liu et al., 2024) as a gain of each output row: `y = m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x)`.
//!
//! Norms need no dense weights but once a base: `‖w + s·b·A‖² = ‖w‖² + 2s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b`, where `W·Aᵀ` is the base
//! product of rank rows. The CPU's slots take them as they stand instead, once an adapter.

use std::sync::OnceLock;

use candle_core::{Device, Tensor};

use super::delta::LoraPair;
use crate::ops::quant::{self, QMatrix};
use crate::{Error, Result};

/// Rows of the base that are dense at a time.
const ROWS: usize = 1024;

/// Squared norms of a matrix's rows, `[1, n]` f32.
pub fn row_squares(weight: &QMatrix) -> Result<Tensor> {
    let ids: Vec<u32> = (0..weight.n() as u32).collect();
    let squares = ids.chunks(ROWS).map(|ids| Ok(quant::gather_rows(weight, ids, None)?.sqr()?.sum(1)?));
    Ok(Tensor::cat(&squares.collect::<Result<Vec<_>>>()?, 0)?.reshape((1, weight.n()))?)
}

/// Norms of the rows of `W + scale·B·A`, `[1, n]` f32, from the squared norms of those of W, `[1, n]`, `A [rank, k]`,
/// `B [n, rank]`, and `crossed = A·Wᵀ [rank, n]`, all f32.
pub fn changed_norms(squares: &Tensor, a: &Tensor, b: &Tensor, crossed: &Tensor, scale: f32) -> Result<Tensor> {
    let scale = f64::from(scale);
    let inner = ((crossed.t()? * (2.0 * scale))? + (b.matmul(&a.matmul(&a.t()?)?)? * (scale * scale))?)?;
    Ok((squares + (inner * b)?.sum_keepdim(1)?.t()?)?.sqrt()?)
}

/// Magnitudes of a pair's output rows, and the gains that they become once the base is at hand.
#[derive(Debug, Clone, PartialEq)]
pub struct Magnitude {
    /// `m [n]`.
    values: Vec<f32>,
    /// `m / ‖W + s·B·A‖ [n]`.
    gains: OnceLock<Vec<f32>>,
}

impl Magnitude {
    /// Of the `n` output rows of a module.
    pub fn new(values: Vec<f32>) -> Self {
        Self { values, gains: OnceLock::new() }
    }

    /// How many rows have one.
    pub fn rows(&self) -> usize {
        self.values.len()
    }
}

impl LoraPair {
    /// Prepares the pair's gains, if it has magnitudes, over the base `weight` of its site, whose rows they scale. The first
    /// call takes as long as making the pair's rows of `weight` dense; later ones do nothing.
    pub fn prepare_gains(&self, weight: &QMatrix) -> Result<()> {
        let Some(magnitude) = self.magnitude.as_ref().filter(|m| m.gains.get().is_none()) else { return Ok(()) };
        let a = Tensor::from_slice(&self.a, (self.rank, self.k), &Device::Cpu)?;
        let b = Tensor::from_slice(&self.b, (self.rank, self.n), &Device::Cpu)?.t()?;
        let rows: Vec<u32> = (self.offset as u32..(self.offset + self.n) as u32).collect();
        let mut gains = Vec::with_capacity(self.n);
        for (i, ids) in rows.chunks(ROWS).enumerate() {
            let base = quant::gather_rows(weight, ids, None)?;
            let delta = b.narrow(0, i * ROWS, ids.len())?.contiguous()?.matmul(&a)?;
            let norms = (base + (delta * f64::from(self.scale))?)?.sqr()?.sum(1)?.sqrt()?.to_vec1::<f32>()?;
            gains.extend(norms.iter().zip(&magnitude.values[i * ROWS..]).map(|(norm, m)| m / norm));
        }
        magnitude.gains.get_or_init(|| gains);
        Ok(())
    }

    /// The gains, if the pair has any. Errors: they were not prepared.
    pub(super) fn gains(&self) -> Result<Option<&[f32]>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let gains = magnitude.gains.get().ok_or_else(|| Error::internal("DoRA's gains were not prepared"))?;
        Ok(Some(gains))
    }
}
