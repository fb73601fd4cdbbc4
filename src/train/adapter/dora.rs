//! DoRA (Liu et al., 2024): each output row of a module has a trained magnitude m besides its direction `W + s·B·A`,
//! `y = m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x)`.
//!
//! As in section 4.3 of the paper, the norms are computed again at each step and held fixed in the gradient. They need no dense
//! weights: see [`changed_norms`].

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::params::TrainableParams;
use crate::Result;
use crate::lora::BaseMatrices;
use crate::lora::magnitude::{changed_norms, row_squares};
use crate::model::decoder::Decoder;
use crate::ops::quant::{self, QMatrix};

/// Computes `‖W + s·B·A‖` for the modules of a job.
pub struct DoraNorms {
    /// In the order of the job's [`TrainableParams::sites`].
    sites: Vec<SiteNorms>,
}

struct SiteNorms {
    /// The fused base weight.
    weight: Arc<QMatrix>,
    /// Squared norms of its rows `[1, n]` f32.
    squares: Tensor,
}

impl DoraNorms {
    /// Computes the norms of the base at the sites of `params`.
    pub fn new(params: &TrainableParams, model: &Decoder) -> Result<Self> {
        let sites = params.sites.iter().map(|site| {
            let weight = model.weights().matrix(site.layer, site.site);
            Ok(SiteNorms { weight: weight.clone(), squares: row_squares(weight)? })
        });
        Ok(Self { sites: sites.collect::<Result<_>>()? })
    }

    /// The norms `[1, n]` f32 of each module at `params.sites[site]`, under its current A and B.
    pub fn of(&self, params: &TrainableParams, site: usize) -> Result<Vec<Tensor>> {
        let (SiteNorms { weight, squares }, site) = (&self.sites[site], &params.sites[site]);
        let a = params.value(&site.a)?;
        let dtype = if a.device().is_cuda() { DType::BF16 } else { DType::F32 };
        // A · Wᵀ of all modules, `[modules · rank, n]`.
        let crossed = quant::matmul(weight, &a.to_dtype(dtype)?, DType::F32)?;
        let rank = params.rank;
        let norms = site.modules.iter().enumerate().map(|(i, module)| {
            let (a, b) = (a.narrow(0, i * rank, rank)?, params.value(&module.b)?);
            let crossed = crossed.narrow(0, i * rank, rank)?.narrow(1, module.offset, module.n)?;
            changed_norms(&squares.narrow(1, module.offset, module.n)?, &a, &b, &crossed, params.scale)
        });
        norms.collect()
    }

    /// Sets magnitudes that are all zero, which trained ones never are, to the current norms. All gains are then 1.
    pub fn start(&self, params: &TrainableParams) -> Result<()> {
        for (i, site) in params.sites.iter().enumerate() {
            for (module, norm) in site.modules.iter().zip(self.of(params, i)?) {
                let Some(magnitude) = &module.magnitude else { continue };
                if params.value(magnitude)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0 {
                    params.set_value(magnitude, &norm)?;
                }
            }
        }
        Ok(())
    }
}
