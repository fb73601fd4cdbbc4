//! DoRA (Liu et al., 2024): a weight's rows keep their direction `W + s·B·A` and get a magnitude of their own,
//! `y = m / ‖W + s·B·A‖ ⊙ (W·x + s·B·A·x)`. As in the paper's section 4.3, norms are taken anew at each step and held fixed in
//! the gradient. How they are taken without dense weights: [`changed_norms`].

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::params::TrainableParams;
use crate::Result;
use crate::lora::BaseMatrices;
use crate::lora::magnitude::{changed_norms, row_squares};
use crate::model::decoder::Decoder;
use crate::ops::quant::{self, QMatrix};

/// What norms are made of.
pub struct DoraNorms {
    /// By site of the job's parameters.
    sites: Vec<SiteNorms>,
}

struct SiteNorms {
    /// The fused base weight.
    weight: Arc<QMatrix>,
    /// Squared norms of its rows `[1, n]` f32.
    squares: Tensor,
}

impl DoraNorms {
    /// Of the base rows of the modules in `params`.
    pub fn new(params: &TrainableParams, model: &Decoder) -> Result<Self> {
        let sites = params.sites.iter().map(|site| {
            let weight = model.weights().matrix(site.layer, site.site);
            Ok(SiteNorms { weight: weight.clone(), squares: row_squares(weight)? })
        });
        Ok(Self { sites: sites.collect::<Result<_>>()? })
    }

    /// DoraNorms of the changed rows of each module at a site of `params` (by index), `[1, n]` f32.
    pub fn of(&self, params: &TrainableParams, site: usize) -> Result<Vec<Tensor>> {
        let (SiteNorms { weight, squares }, site) = (&self.sites[site], &params.sites[site]);
        let a = params.value(&site.a)?;
        let dtype = if a.device().is_cuda() { DType::BF16 } else { DType::F32 };
        // `[modules · rank, n]`.
        let crossed = quant::matmul(weight, &a.to_dtype(dtype)?, DType::F32)?;
        let rank = params.rank;
        let norms = site.modules.iter().enumerate().map(|(i, part)| {
            let (a, b) = (a.narrow(0, i * rank, rank)?, params.value(&part.b)?);
            let crossed = crossed.narrow(0, i * rank, rank)?.narrow(1, part.offset, part.n)?;
            changed_norms(&squares.narrow(1, part.offset, part.n)?, &a, &b, &crossed, params.scale)
        });
        norms.collect()
    }

    /// Sets the magnitudes that are zero, which none is that was trained, to the norms as they are: they change nothing then.
    pub fn start(&self, params: &TrainableParams) -> Result<()> {
        for (i, site) in params.sites.iter().enumerate() {
            for (part, norm) in site.modules.iter().zip(self.of(params, i)?) {
                let Some(place) = &part.magnitude else { continue };
                if params.value(place)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0 {
                    params.set_value(place, &norm)?;
                }
            }
        }
        Ok(())
    }
}
