//! LoRA: the weights of adapters, the slots that hold them at their exact ranks, and the op that applies them.
//!
//! [`weights`] is an adapter as it was read. A [`slots::SlotPool`] holds the resident ones, on the CPU as [`delta::LoraPair`]s,
//! on a GPU as an [`image`] in one arena. [`delta::add_delta`] adds each row's own `B·A` delta, and [`magnitude`] has DoRA's gains.

#[cfg(feature = "cuda")]
mod cuda;
pub mod delta;
// Plain code: its tests run everywhere.
#[cfg(any(feature = "cuda", test))]
mod image;
pub mod magnitude;
pub mod slots;
#[cfg(not(feature = "cuda"))]
mod stub;
pub mod weights;

#[cfg(not(feature = "cuda"))]
use stub as cuda;

use std::sync::Arc;

use crate::arch::Site;
use crate::ops::quant::QMatrix;

/// The frozen matrices that adapters change, which DoRA's gains are made from.
pub trait BaseMatrices {
    /// Decoder blocks.
    fn num_layers(&self) -> usize;

    /// The matrix at a site; the head belongs to no layer.
    fn matrix(&self, layer: usize, site: Site) -> &Arc<QMatrix>;
}
