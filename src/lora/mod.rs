//! LoRA (Hu et al., 2021): an adapter's weights, the slots that hold the resident adapters, and the op that adds their deltas.
//!
//! ```text
//! weights ──stage──> slots ──pairs, image──> delta: shrink, expand ──> gains
//! ```
//!
//! - **Weights**: [`weights::AdapterWeights`] is an adapter in host memory, in the precision of its file. Each module that it changes
//!   has a pair, `A [rank, k]` and `B [n, rank]`, at its own rank. `adapter::peft` reads it.
//! - **Slots**: [`slots::SlotPool`] holds the resident adapters under small indices, at their exact ranks. A [`slots::SlotStager`] prepares
//!   an adapter's weights for the pool's device, on a loader thread. On the CPU a slot holds one [`delta::LoraPair`] per module; on a
//!   GPU it holds an image, one block of 16-bit values per site, in one arena (`image.rs`, `cuda/slots.rs`). Which adapters stay
//!   resident is decided above, in `adapter::tiers`.
//! - **Delta**: [`delta::add_delta`] is where an adapter is applied. After the base product `y = x·Wᵀ` of each site, it adds
//!   `weight · scale · B(A·x)` to each row for the slots of the row's segment (`ops::batch::Segment`). Shrink computes
//!   `h = weight · scale · x·Aᵀ` of all segments, expand adds `h·Bᵀ`. In a decode step, one launch of each serves any mix of adapters
//!   (Punica, Chen et al., 2023).
//! - **Gains**: under DoRA (Liu et al., 2024), an adapter also scales each output row by its gain, `magnitude / ‖W + s·B·A‖`. Gains depend
//!   on the base, so they are computed once per slot, before a step first uses it: [`magnitude`] on the CPU, `cuda/gains.rs` on a GPU.
//!
//! Serving calls the op from the hook of `model::decoder`. Training has pairs of its own, in `train`, because these change at every step.

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

/// The frozen matrices of the base, from which DoRA's gains are computed.
pub trait BaseMatrices {
    /// The number of decoder blocks.
    fn num_layers(&self) -> usize;

    /// The matrix at a site; the head belongs to no layer.
    fn matrix(&self, layer: usize, site: Site) -> &Arc<QMatrix>;
}
