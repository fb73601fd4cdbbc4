//! DoRA (Liu et al., 2024) as a gain of each output row: `y = m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x)`.
//!
//! The norms can be computed without dense weights: `‖w + s·b·A‖² = ‖w‖² + 2s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b`. Here `‖w‖²` is computed
//! once per base ([`row_squares`]), and `W·Aᵀ` is a base product of `rank` rows. Training and the GPU's slots use
//! [`changed_norms`]. The CPU's slots dequantise `W` instead, once per adapter ([`LoraPair::prepare_gains`]).

use std::sync::OnceLock;

use candle_core::{Device, Tensor};

use super::delta::LoraPair;
use crate::ops::quant::{self, QMatrix};
use crate::{Error, Result};

/// Rows of the base that are dequantised at a time.
const ROWS: usize = 1024;

/// The squared norms of a matrix's rows `[1, n]`, f32. Errors: a failure of the device.
pub(crate) fn row_squares(weight: &QMatrix) -> Result<Tensor> {
    let ids: Vec<u32> = (0..weight.n() as u32).collect();
    let squares = ids.chunks(ROWS).map(|ids| Ok(quant::gather_rows(weight, ids, None)?.sqr()?.sum(1)?));
    Ok(Tensor::cat(&squares.collect::<Result<Vec<_>>>()?, 0)?.reshape((1, weight.n()))?)
}

/// The norms of the rows of `W + scale·B·A`, `[1, n]`: from `squares [1, n]`, the squared norms of the rows of W, `A [rank, k]`,
/// `B [n, rank]`, and `crossed [rank, n] = A·Wᵀ`. All f32. Errors: shapes that do not fit.
pub(crate) fn changed_norms(squares: &Tensor, a: &Tensor, b: &Tensor, crossed: &Tensor, scale: f32) -> Result<Tensor> {
    let scale = f64::from(scale);
    let inner = ((crossed.t()? * (2.0 * scale))? + (b.matmul(&a.matmul(&a.t()?)?)? * (scale * scale))?)?;
    Ok((squares + (inner * b)?.sum_keepdim(1)?.t()?)?.sqrt()?)
}

/// The magnitudes of a pair's output rows, and their gains once these were computed from the base.
#[derive(Debug, Clone, PartialEq)]
pub struct Magnitude {
    /// `m [n]`.
    values: Vec<f32>,
    /// `m / ‖W + s·B·A‖ [n]`, empty at first.
    gains: OnceLock<Vec<f32>>,
}

impl Magnitude {
    /// The magnitudes of a module's `n` output rows.
    pub(super) fn new(values: Vec<f32>) -> Self {
        Self { values, gains: OnceLock::new() }
    }

    /// The number of output rows.
    pub(super) fn rows(&self) -> usize {
        self.values.len()
    }
}

impl LoraPair {
    /// Computes the pair's gains from the base `weight` of its site, if the pair has magnitudes. The first call dequantises the pair's
    /// rows of `weight`; later calls do nothing. Errors: shapes that do not fit.
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

    /// The gains `[n]`, if the pair has magnitudes. Errors: [`LoraPair::prepare_gains`] was not called.
    pub(super) fn gains(&self) -> Result<Option<&[f32]>> {
        let Some(magnitude) = &self.magnitude else { return Ok(None) };
        let gains = magnitude.gains.get().ok_or_else(|| Error::internal("DoRA's gains were not prepared"))?;
        Ok(Some(gains))
    }
}
