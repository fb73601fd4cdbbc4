//! A linear layer: the resident base product, and what each row's adapters add to it.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use crate::Result;
use crate::arch::Site;
use crate::lora::delta::{self, Adapters};
use crate::ops::quant::{self, QMatrix};

/// `x [T, k] -> [T, n]`: `x·Wᵀ` plus the deltas of the rows' adapters at this layer and site, times DoRA's gains.
pub fn linear(weight: &Arc<QMatrix>, x: &Tensor, adapters: &Adapters, layer: usize, site: Site) -> Result<Tensor> {
    // Logits keep their precision.
    let dtype = if site == Site::Head { DType::F32 } else { x.dtype() };
    let y = quant::matmul(weight, x, dtype)?;
    adapters.pairs(layer, site).try_for_each(|pair| pair.prepare_gains(weight))?;
    delta::add_delta(&y, x, adapters, layer, site)?;
    Ok(y)
}
