//! A job's adapter as a pass uses it: effective matrices in the activations' dtype, and where their gradients go.

use candle_core::{DType, Device, Tensor};

use super::dora::DoraNorms;
use super::params::TrainableParams;
use crate::Result;
use crate::arch::ModelConfig;
use crate::arch::Site;

/// An adapter at one optimiser step.
pub struct TrainableAdapter {
    /// By layer, then [`Site`]; `None` where nothing is trained.
    sites: Vec<[Option<TrainableSite>; 4]>,
    /// Rank of every pair.
    pub rank: usize,
    /// Factor of every delta.
    pub scale: f32,
}

/// Pairs that share an input.
pub struct TrainableSite {
    /// `A [modules · rank, k]`.
    pub a: Tensor,
    /// Its gradient, f32.
    pub da: Tensor,
    /// In the order of the fused output row.
    pub modules: Vec<TrainableModule>,
    /// DoRA's gains of the fused output row `[1, n]` f32, 1 where a module has none.
    pub gain: Option<Tensor>,
}

/// One module's B.
pub struct TrainableModule {
    /// First column of the fused output row.
    pub offset: usize,
    /// Output features.
    pub n: usize,
    /// `B [n, rank]`.
    pub b: Tensor,
    /// Its gradient, f32.
    pub db: Tensor,
    /// Of DoRA.
    pub magnitude: Option<TrainableMagnitude>,
}

/// What the gradient of DoRA's magnitude needs.
pub struct TrainableMagnitude {
    /// One over the norms of the changed weight's rows `[1, n]` f32.
    pub inverse_norm: Tensor,
    /// The gradient `[n, 1]` f32.
    pub grad: Tensor,
}

impl TrainableAdapter {
    /// The pairs at a layer and site.
    pub fn site(&self, layer: usize, site: Site) -> Option<&TrainableSite> {
        self.sites[layer][site as usize].as_ref()
    }

    /// What the values of `params` are now, for activations of `dtype`, under DoRA with the `norms` that they make. Views
    /// where no other values are needed: they see later steps.
    pub fn new(params: &TrainableParams, norms: Option<&DoraNorms>, model: &ModelConfig, dtype: DType) -> Result<Self> {
        let mut sites: Vec<[Option<TrainableSite>; 4]> = (0..model.num_layers).map(|_| Default::default()).collect();
        for (i, site) in params.sites.iter().enumerate() {
            let norms = norms.map(|norms| norms.of(params, i)).transpose()?;
            let mut a = params.value(&site.a)?;
            if let Some(e) = &site.e {
                a = a.broadcast_mul(&params.value(e)?)?;
            }
            let mut modules = Vec::new();
            let mut gains = Vec::new();
            for (i, part) in site.modules.iter().enumerate() {
                let mut magnitude = None;
                if let (Some(place), Some(norms)) = (&part.magnitude, &norms) {
                    let norm = &norms[i];
                    gains.push((part.offset, params.value(place)?.t()?.div(norm)?));
                    magnitude = Some(TrainableMagnitude { inverse_norm: norm.recip()?, grad: params.grad(place)? });
                }
                let (b, db) = (params.value(&part.b)?.to_dtype(dtype)?, params.grad(&part.b)?);
                modules.push(TrainableModule { offset: part.offset, n: part.n, b, db, magnitude });
            }
            let width = site.site.modules().iter().map(|module| module.shape(model).0).sum();
            let gain = if gains.is_empty() { None } else { Some(row(gains, width, a.device())?) };
            let pairs = TrainableSite { a: a.to_dtype(dtype)?, da: params.grad(&site.a)?, modules, gain };
            sites[site.layer][site.site as usize] = Some(pairs);
        }
        Ok(Self { sites, rank: params.rank, scale: params.scale })
    }
}

/// Pieces `[1, n]` at their columns of a row `[1, width]` of ones.
fn row(pieces: Vec<(usize, Tensor)>, width: usize, device: &Device) -> Result<Tensor> {
    let ones = |n: usize| Tensor::ones((1, n), DType::F32, device);
    let mut row = Vec::new();
    let mut end = 0;
    for (offset, piece) in pieces {
        if offset > end {
            row.push(ones(offset - end)?);
        }
        end = offset + piece.dims2()?.1;
        row.push(piece);
    }
    if width > end {
        row.push(ones(width - end)?);
    }
    Ok(Tensor::cat(&row, 1)?)
}
