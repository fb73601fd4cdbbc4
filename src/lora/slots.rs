//! Slots: the resident adapters, which batches name by index.
//!
//! ```text
//! SlotPool ─┬─ ReservedSlot, one for each slot in use: SlotWeights on the CPU, a range of SlotMemory on a GPU
//!           └─ GpuSlots, on a GPU ─┬─ RangeAllocator: the free ranges of SlotMemory
//!                                  └─ DeviceSlots ─┬─ SlotMemory: one allocation with the AdapterImages of all slots
//!                                                  ├─ table: a row of SlotEntry for each slot; SlotTable describes it to kernels
//!                                                  ├─ SlotUpload, one for each copy under way: owns the AdapterImage
//!                                                  ├─ SlotGains: the slots with DoRA's gains or magnitudes
//!                                                  └─ PinnedStaging: pinned buffers, shared with SlotStager
//!
//! SlotStager::stage ──> StagedWeights: SlotWeights or AdapterImage ──SlotPool::upload──> slot
//! ```
//!
//! `cuda/slots.rs` has the types below `DeviceSlots`.

mod allocator;

use std::ops::Range;
use std::sync::Arc;

use candle_core::Device;

use self::allocator::RangeAllocator;
use super::BaseMatrices;
use super::cuda::slots::{self, AdapterImage, DeviceSlots, PinnedStaging, SLOTS};
use super::delta::LoraPair;
use super::magnitude::Magnitude;
use super::weights::AdapterWeights;
use crate::arch::{ModelConfig, Module, Site};
use crate::error::ErrorKind;
use crate::{Error, Result};

/// One adapter as the CPU's op takes it: the pairs of each site of each layer, and of the head.
#[derive(Debug, Clone, Default)]
pub struct SlotWeights {
    /// `[layer][site]`, with sites in the order of [`Site`] up to `Down`.
    pub layers: Vec<[Vec<LoraPair>; 4]>,
    /// The pairs of the output head: none or one.
    pub head: Vec<LoraPair>,
}

impl SlotWeights {
    /// Widens an adapter's matrices to f32, transposes B, and assigns each module its columns in the fused output of its site. The
    /// weights must fit the model.
    pub fn from_adapter(weights: &AdapterWeights, model: &ModelConfig) -> Self {
        let mut slot = Self { layers: vec![Default::default(); model.num_layers], head: Vec::new() };
        for m in &weights.modules {
            let (n, k) = m.module.shape(model);
            let pair = LoraPair {
                offset: m.module.offset(model),
                n,
                k,
                rank: m.rank,
                scale: m.scale,
                a: m.a.to_f32(),
                b: transpose(&m.b.to_f32(), m.rank),
                bias: m.bias.as_ref().map(|bias| bias.to_f32()),
                magnitude: m.magnitude.as_ref().map(|magnitude| Magnitude::new(magnitude.to_f32())),
            };
            match m.module {
                Module::LmHead => slot.head.push(pair),
                module => slot.layers[m.layer][module.site() as usize].push(pair),
            }
        }
        slot
    }

    /// Bytes of all matrices, biases and magnitudes.
    pub fn bytes(&self) -> usize {
        let pairs = self.layers.iter().flatten().flatten().chain(&self.head);
        let rest = |p: &LoraPair| p.bias.as_ref().map_or(0, Vec::len) + p.magnitude.as_ref().map_or(0, Magnitude::rows);
        pairs.map(|p| 4 * (p.a.len() + p.b.len() + rest(p))).sum()
    }
}

/// `[n, rank]` -> `[rank, n]`.
fn transpose(b: &[f32], rank: usize) -> Vec<f32> {
    let n = b.len() / rank;
    let mut transposed = vec![0.0; b.len()];
    for (i, row) in b.chunks_exact(rank).enumerate() {
        for (j, value) in row.iter().enumerate() {
            transposed[j * n + i] = *value;
        }
    }
    transposed
}

/// The bytes that an adapter takes in a slot on a device. Errors: an adapter that the device cannot hold.
pub fn slot_bytes(weights: &AdapterWeights, model: &ModelConfig, device: &Device) -> Result<usize> {
    Ok(slots::image_bytes(device, weights, model)?.unwrap_or_else(|| weights.slot_bytes()))
}

/// Stages adapters for a pool's slots: converts their weights to the form in which the pool's device takes them. Loader threads have
/// clones.
#[derive(Clone)]
pub(crate) enum SlotStager {
    /// For the CPU, as [`SlotWeights`].
    Host,
    /// For a GPU, as an image in pinned memory.
    Gpu(Arc<PinnedStaging>),
}

/// An adapter's weights, ready for a slot.
pub(crate) enum StagedWeights {
    Host(SlotWeights),
    Gpu(AdapterImage),
}

impl SlotStager {
    /// Stages an adapter. On a GPU, waits for a staging buffer. Errors: no memory.
    pub(crate) fn stage(&self, weights: &AdapterWeights, model: &ModelConfig) -> Result<StagedWeights> {
        match self {
            Self::Host => Ok(StagedWeights::Host(SlotWeights::from_adapter(weights, model))),
            Self::Gpu(staging) => staging.image(weights, model).map(StagedWeights::Gpu),
        }
    }
}

/// The slots of one device. Batches name adapters by slot index, so a captured CUDA graph serves any mix of adapters. The tiers in
/// `adapter` decide which adapters are resident.
#[derive(Default)]
pub struct SlotPool {
    slots: Vec<Option<ReservedSlot>>,
    gpu: Option<GpuSlots>,
}

/// A slot in use: reserved, or with weights.
#[derive(Default)]
struct ReservedSlot {
    /// On the CPU, the weights, once they were put into the slot. Empty on a GPU.
    weights: SlotWeights,
    /// On a GPU, the slot's range of the arena, in bytes.
    range: Range<usize>,
}

/// The memory of a pool on a GPU.
struct GpuSlots {
    allocator: RangeAllocator,
    slots: DeviceSlots,
}

impl SlotPool {
    /// A pool on a device. On a GPU, allocates an arena of `budget` bytes. Errors: no memory.
    pub fn new(device: &Device, model: &ModelConfig, budget: usize) -> Result<Self> {
        let gpu =
            slots::open(device, model, budget)?.map(|slots| GpuSlots { allocator: RangeAllocator::new(budget), slots });
        Ok(Self { slots: Vec::new(), gpu })
    }

    /// The stager of its adapters.
    pub(crate) fn stager(&self) -> SlotStager {
        self.gpu.as_ref().map_or(SlotStager::Host, |gpu| SlotStager::Gpu(gpu.slots.staging().clone()))
    }

    /// The slots' memory on a GPU; `None` on the CPU.
    #[cfg(feature = "cuda")]
    pub(super) fn device_slots(&self) -> Option<&DeviceSlots> {
        self.gpu.as_ref().map(|gpu| &gpu.slots)
    }

    /// How many of `victims`, in their order, must be removed before an adapter of `bytes` fits. `None` if it would not fit even then.
    /// On a GPU it needs one contiguous range; on the CPU it always fits.
    pub fn evictions(&self, bytes: usize, victims: impl IntoIterator<Item = u32>) -> Option<usize> {
        let Some(gpu) = &self.gpu else { return Some(0) };
        let (mut allocator, mut victims) = (gpu.allocator.clone(), victims.into_iter());
        let mut used = self.slots.iter().flatten().count();
        let mut removed = 0;
        while used == SLOTS || !allocator.fits(bytes) {
            let slot = self.slots.get(victims.next()? as usize)?.as_ref()?;
            allocator.free(slot.range.clone());
            (used, removed) = (used - 1, removed + 1);
        }
        Some(removed)
    }

    /// Reserves a free slot, and on a GPU a range of the arena, for an adapter of `bytes`. `None` if there is no room.
    pub(crate) fn reserve(&mut self, bytes: usize) -> Option<u32> {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let range = match &mut self.gpu {
            Some(_) if free == SLOTS => return None,
            Some(gpu) => gpu.allocator.allocate(bytes)?,
            None => 0..0,
        };
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(ReservedSlot { range, ..ReservedSlot::default() });
        Some(free as u32)
    }

    /// Puts weights into a reserved slot. On a GPU this starts the upload; the slot is usable once [`SlotPool::is_ready`]. Errors: a
    /// slot that is not reserved, a failure of the GPU.
    pub(crate) fn upload(&mut self, slot: u32, staged: StagedWeights) -> Result<()> {
        let held = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        match (held, staged, &mut self.gpu) {
            (Some(held), StagedWeights::Host(weights), None) => {
                held.weights = weights;
                Ok(())
            }
            (Some(held), StagedWeights::Gpu(image), Some(gpu)) => gpu.slots.put(slot, held.range.clone(), image),
            _ => Err(Error::internal(format!("slot {slot} is not reserved for these staged weights"))),
        }
    }

    /// Whether a slot's upload is complete. Does not wait. Errors: the upload failed.
    pub(crate) fn is_ready(&mut self, slot: u32) -> Result<bool> {
        match &mut self.gpu {
            Some(gpu) => gpu.slots.arrived(slot),
            None => Ok(true),
        }
    }

    /// Computes DoRA's gains of a ready slot on a GPU from the base, before a step uses it. Later calls do nothing. On the CPU, the
    /// hook of `model::decoder` computes them. Errors: no memory.
    pub fn prepare_gains(&mut self, slot: u32, base: &dyn BaseMatrices) -> Result<()> {
        match &mut self.gpu {
            Some(gpu) => gpu.slots.prepare_gains(slot, base),
            None => Ok(()),
        }
    }

    /// Loads an adapter into a free slot and waits until it is ready. Errors: no room.
    pub fn load(&mut self, weights: &AdapterWeights, model: &ModelConfig) -> Result<u32> {
        let staged = self.stager().stage(weights, model)?;
        let device_bytes = match &staged {
            StagedWeights::Host(_) => 0,
            StagedWeights::Gpu(image) => image.bytes(),
        };
        let full = || Error::new(ErrorKind::Unavailable, format!("no slot has room for {device_bytes} bytes"));
        let slot = self.reserve(device_bytes).ok_or_else(full)?;
        self.upload(slot, staged)?;
        while !self.is_ready(slot)? {
            std::thread::yield_now();
        }
        Ok(slot)
    }

    /// Puts weights into a free slot of a pool on the CPU, and returns its index.
    pub fn insert(&mut self, weights: SlotWeights) -> u32 {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[free] = Some(ReservedSlot { weights, ..ReservedSlot::default() });
        free as u32
    }

    /// Frees a slot and its memory. Does nothing to a free slot.
    pub fn remove(&mut self, slot: u32) {
        let held = self.slots.get_mut(slot as usize).and_then(Option::take);
        if let (Some(held), Some(gpu)) = (held, &mut self.gpu) {
            gpu.slots.remove(slot);
            gpu.allocator.free(held.range);
        }
    }

    /// The pairs of a slot at a site, on the CPU. Empty if the adapter does not change the site, or if the slot is free.
    pub fn pairs(&self, slot: u32, layer: usize, site: Site) -> &[LoraPair] {
        let Some(Some(ReservedSlot { weights, .. })) = self.slots.get(slot as usize) else { return &[] };
        match site {
            Site::Head => &weights.head,
            _ => weights.layers.get(layer).map_or(&[], |sites| &sites[site as usize]),
        }
    }
}
