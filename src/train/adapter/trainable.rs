//! A job's adapter as a pass uses it: the matrices in the dtype of the activations, and where their gradients go.

use candle_core::{DType, Device, Tensor};

use super::dora::DoraNorms;
use super::params::TrainableParams;
use crate::Result;
use crate::arch::{ModelConfig, Site};

/// An adapter at one optimiser step.
pub struct TrainableAdapter {
    /// By layer, then [`Site`]; `None` where nothing is trained.
    sites: Vec<[Option<TrainableSite>; 4]>,
    /// Rank of every pair.
    pub rank: usize,
    /// Scale of every delta.
    pub scale: f32,
}

/// The pairs of one site. They share an input.
pub struct TrainableSite {
    /// `A [modules · rank, k]`: the A of each module, stacked.
    pub a: Tensor,
    /// Gradient of `a`, f32.
    pub da: Tensor,
    /// In the order of their columns in the site's output.
    pub modules: Vec<TrainableModule>,
    /// DoRA's gains of the site's output row `[1, n]` f32; 1 in the columns of modules without one.
    pub gain: Option<Tensor>,
}

/// B of one module.
pub struct TrainableModule {
    /// First column in the site's output.
    pub offset: usize,
    /// Output features.
    pub n: usize,
    /// `B [n, rank]`.
    pub b: Tensor,
    /// Gradient of `b`, f32.
    pub db: Tensor,
    /// With DoRA.
    pub magnitude: Option<TrainableMagnitude>,
}

/// A magnitude of DoRA in training: its gradient, and the norms from which the gradient is computed.
pub struct TrainableMagnitude {
    /// `1 / ‖W + s·B·A‖` for each output row, `[1, n]` f32.
    pub inverse_norm: Tensor,
    /// Gradient of the magnitude `[n, 1]` f32.
    pub grad: Tensor,
}

impl TrainableAdapter {
    /// The pairs of a site.
    pub fn site(&self, layer: usize, site: Site) -> Option<&TrainableSite> {
        self.sites[layer][site as usize].as_ref()
    }

    /// The adapter with the current values of `params`, for activations of `dtype`; `norms` with DoRA. Tensors that need no
    /// conversion are views of the parameters.
    pub fn new(params: &TrainableParams, norms: Option<&DoraNorms>, model: &ModelConfig, dtype: DType) -> Result<Self> {
        let mut sites: Vec<[Option<TrainableSite>; 4]> = (0..model.num_layers).map(|_| Default::default()).collect();
        for (i, site) in params.sites.iter().enumerate() {
            let norms = norms.map(|norms| norms.of(params, i)).transpose()?;
            let mut a = params.value(&site.a)?;
            if let Some(e) = &site.e {
                a = a.broadcast_mul(&params.value(e)?)?;
            }
            let (mut modules, mut gains) = (Vec::new(), Vec::new());
            for (i, module) in site.modules.iter().enumerate() {
                let mut magnitude = None;
                if let (Some(location), Some(norms)) = (&module.magnitude, &norms) {
                    let norm = &norms[i];
                    gains.push((module.offset, params.value(location)?.t()?.div(norm)?));
                    magnitude = Some(TrainableMagnitude { inverse_norm: norm.recip()?, grad: params.grad(location)? });
                }
                let (b, db) = (params.value(&module.b)?.to_dtype(dtype)?, params.grad(&module.b)?);
                modules.push(TrainableModule { offset: module.offset, n: module.n, b, db, magnitude });
            }
            let width = site.site.shape(model).0;
            let gain = if gains.is_empty() { None } else { Some(row_of_gains(gains, width, a.device())?) };
            let (a, da) = (a.to_dtype(dtype)?, params.grad(&site.a)?);
            sites[site.layer][site.site as usize] = Some(TrainableSite { a, da, modules, gain });
        }
        Ok(Self { sites, rank: params.rank, scale: params.scale })
    }
}

/// A row `[1, width]` with the gains `[1, n]` at their columns, and ones between them.
fn row_of_gains(gains: Vec<(usize, Tensor)>, width: usize, device: &Device) -> Result<Tensor> {
    let ones = |n: usize| Tensor::ones((1, n), DType::F32, device);
    let mut row = Vec::new();
    let mut end = 0;
    for (offset, gain) in gains {
        if offset > end {
            row.push(ones(offset - end)?);
        }
        end = offset + gain.dims2()?.1;
        row.push(gain);
    }
    if width > end {
        row.push(ones(width - end)?);
    }
    Ok(Tensor::cat(&row, 1)?)
}
