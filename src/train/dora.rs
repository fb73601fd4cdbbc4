//! DoRA (Liu et al., 2024): a weight's rows keep their direction `W + s·B·A` and get a magnitude of their own,
//! `y = m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x)`. As in the paper's section 4.3, norms are taken anew at each step and held fixed in
//! the gradient.
//!
//! Norms need no dequantised weights: `‖w + s·b·A‖² = ‖w‖² + 2s·(w·Aᵀ)·b + s²·b·(A·Aᵀ)·b`, where `W·Aᵀ` is the base product of
//! rank rows and `‖w‖²` never changes.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::params::Params;
use crate::Result;
use crate::adapter::Site;
use crate::model::llama::Llama;
use crate::ops::quant::{self, QMatrix};

/// Rows that are made dense at a time.
const ROWS: usize = 1024;

/// What norms are made of.
pub struct Norms {
    /// By site of the job's parameters.
    sites: Vec<SiteNorms>,
}

struct SiteNorms {
    /// The fused base weight.
    weight: Arc<QMatrix>,
    /// Squared norms of its rows `[1, n]` f32.
    squares: Tensor,
}

impl Norms {
    /// Of the base rows of the modules in `params`.
    pub fn new(params: &Params, model: &Llama) -> Result<Self> {
        let sites = params.sites.iter().map(|site| {
            let layer = &model.weights().layers[site.layer];
            let weight = match site.site {
                Site::Qkv => &layer.qkv,
                Site::O => &layer.o,
                Site::GateUp => &layer.gate_up,
                Site::Down | Site::Head => &layer.down,
            };
            Ok(SiteNorms { weight: weight.clone(), squares: squares(weight)? })
        });
        Ok(Self { sites: sites.collect::<Result<_>>()? })
    }

    /// Norms of the changed rows of each module at a site of `params` (by index), `[1, n]` f32.
    pub fn of(&self, params: &Params, site: usize) -> Result<Vec<Tensor>> {
        let (SiteNorms { weight, squares }, site) = (&self.sites[site], &params.sites[site]);
        let a = params.value(&site.a)?;
        let dtype = if a.device().is_cuda() { DType::BF16 } else { DType::F32 };
        // `[modules · rank, n]`.
        let crossed = quant::matmul(weight, &a.to_dtype(dtype)?, DType::F32)?;
        let (rank, scale) = (params.rank, f64::from(params.scale));
        let norms = site.parts.iter().enumerate().map(|(i, part)| {
            let (a, b) = (a.narrow(0, i * rank, rank)?, params.value(&part.b)?);
            let crossed = crossed.narrow(0, i * rank, rank)?.narrow(1, part.offset, part.n)?.t()?;
            let inner = ((crossed * (2.0 * scale))? + (b.matmul(&a.matmul(&a.t()?)?)? * (scale * scale))?)?;
            let delta = (inner * &b)?.sum_keepdim(1)?.t()?;
            Ok((squares.narrow(1, part.offset, part.n)? + delta)?.sqrt()?)
        });
        norms.collect()
    }

    /// Sets the magnitudes that are zero, which none is that was trained, to the norms as they are: they change nothing then.
    pub fn start(&self, params: &Params) -> Result<()> {
        for (i, site) in params.sites.iter().enumerate() {
            for (part, norm) in site.parts.iter().zip(self.of(params, i)?) {
                let Some(place) = &part.magnitude else { continue };
                if params.value(place)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0 {
                    params.set_value(place, &norm)?;
                }
            }
        }
        Ok(())
    }
}

/// Squared norms of a matrix's rows, `[1, n]` f32.
fn squares(weight: &QMatrix) -> Result<Tensor> {
    let ids: Vec<u32> = (0..weight.n() as u32).collect();
    let squares = ids.chunks(ROWS).map(|ids| Ok(quant::gather_rows(weight, ids, None)?.sqr()?.sum(1)?));
    Ok(Tensor::cat(&squares.collect::<Result<Vec<_>>>()?, 0)?.reshape((1, weight.n()))?)
}
