//! A linear layer: the resident base product, and what each row's adapters add to it.

use std::sync::Arc;

use candle_core::Tensor;

use crate::Result;
use crate::adapter::Site;
use crate::adapter::slots::SlotPool;
use crate::engine::batch::Segment;
use crate::ops::lora;
use crate::ops::quant::{self, QMatrix};

/// The adapters of a step's rows.
pub struct Adapters<'a> {
    /// Which rows carry which slots.
    pub segments: &'a [Segment],
    /// The slots' weights.
    pub slots: &'a SlotPool,
}

/// `x [T, k] -> [T, n]`: `x·Wᵀ` plus the deltas of the rows' adapters at this layer and site.
pub fn linear(weight: &Arc<QMatrix>, x: &Tensor, adapters: &Adapters, layer: usize, site: Site) -> Result<Tensor> {
    let y = quant::matmul(weight, x)?;
    lora::add_delta(&y, x, adapters.segments, |slot| adapters.slots.pairs(slot, layer, site))?;
    Ok(y)
}
