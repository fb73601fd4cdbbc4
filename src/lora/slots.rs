//! Slots: the adapters that a forward pass can use, addressed by index.

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

/// One adapter laid out for the CPU's ops: the pairs of each site of each layer, and of the head.
#[derive(Debug, Clone, Default)]
pub struct SlotWeights {
    /// `[layer][site]`, sites in [`Site`] order up to `Down`.
    pub layers: Vec<[Vec<LoraPair>; 4]>,
    /// Pairs of the output head.
    pub head: Vec<LoraPair>,
}

impl SlotWeights {
    /// Widens an adapter's matrices to f32, transposes B, and places each module in the fused row of its site. The
    /// weights must have been read for this model.
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

/// The bytes that an adapter takes in a slot on this device. Errors: it cannot be there.
pub fn slot_bytes(weights: &AdapterWeights, model: &ModelConfig, device: &Device) -> Result<usize> {
    Ok(slots::image_bytes(device, weights, model)?.unwrap_or_else(|| weights.slot_bytes()))
}

/// How adapters are laid out for a pool's slots; loader threads have a clone.
#[derive(Clone)]
pub enum SlotStager {
    /// As [`SlotWeights`].
    Host,
    /// In pinned memory, as they will be on a GPU.
    Gpu(Arc<PinnedStaging>),
}

/// An adapter laid out for a slot.
pub enum StagedWeights {
    Host(SlotWeights),
    Gpu(AdapterImage),
}

impl SlotStager {
    /// Lays an adapter out. Errors: no memory.
    pub fn stage(&self, weights: &AdapterWeights, model: &ModelConfig) -> Result<StagedWeights> {
        match self {
            Self::Host => Ok(StagedWeights::Host(SlotWeights::from_adapter(weights, model))),
            Self::Gpu(staging) => staging.image(weights, model).map(StagedWeights::Gpu),
        }
    }
}

/// The resident adapters. A slot index is what batches carry, so that a captured graph serves any mix of adapters.
/// Whom to keep is decided in [`crate::adapter::tiers`].
#[derive(Default)]
pub struct SlotPool {
    slots: Vec<Option<ReservedSlot>>,
    gpu: Option<GpuSlots>,
}

/// An index that is taken.
#[derive(Default)]
struct ReservedSlot {
    /// Empty until they come, and on a GPU.
    weights: SlotWeights,
    /// Where they are in a GPU's arena, in bytes.
    place: Range<usize>,
}

/// What a pool on a GPU has beside its indices.
struct GpuSlots {
    allocator: RangeAllocator,
    slots: DeviceSlots,
}

impl SlotPool {
    /// Slots on this device; on a GPU in an arena of `budget` bytes, allocated now. Errors: no memory.
    pub fn on(device: &Device, model: &ModelConfig, budget: usize) -> Result<Self> {
        let gpu =
            slots::open(device, model, budget)?.map(|slots| GpuSlots { allocator: RangeAllocator::new(budget), slots });
        Ok(Self { slots: Vec::new(), gpu })
    }

    /// How its adapters are laid out.
    pub fn stager(&self) -> SlotStager {
        self.gpu.as_ref().map_or(SlotStager::Host, |gpu| SlotStager::Gpu(gpu.slots.staging().clone()))
    }

    /// The memory on a GPU.
    pub fn gpu(&self) -> Option<&DeviceSlots> {
        self.gpu.as_ref().map(|gpu| &gpu.slots)
    }

    /// How many of `victims`, in their order, must go until an adapter of `bytes` fits in one piece; `None` if all are
    /// too few. The CPU's memory needs no piece.
    pub fn evictions(&self, bytes: usize, victims: impl IntoIterator<Item = u32>) -> Option<usize> {
        let Some(gpu) = &self.gpu else { return Some(0) };
        let (mut allocator, mut victims) = (gpu.allocator.clone(), victims.into_iter());
        let mut taken = self.slots.iter().flatten().count();
        let mut gone = 0;
        while taken == SLOTS || !allocator.fits(bytes) {
            let slot = self.slots.get(victims.next()? as usize)?.as_ref()?;
            allocator.free(slot.place.clone());
            (taken, gone) = (taken - 1, gone + 1);
        }
        Some(gone)
    }

    /// Takes a free index, and on a GPU its memory, for an adapter of `bytes`; `None` if there is no room in one piece.
    pub fn reserve(&mut self, bytes: usize) -> Option<u32> {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        let place = match &mut self.gpu {
            Some(_) if free == SLOTS => return None,
            Some(gpu) => gpu.allocator.allocate(bytes)?,
            None => 0..0,
        };
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(ReservedSlot { place, ..ReservedSlot::default() });
        Some(free as u32)
    }

    /// Gives a reserved slot its weights, which on a GPU start to be copied: [`SlotPool::arrived`] tells when the slot
    /// can be used.
    pub fn put(&mut self, slot: u32, staged: StagedWeights) -> Result<()> {
        let held = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        match (held, staged, &mut self.gpu) {
            (Some(held), StagedWeights::Host(weights), None) => {
                held.weights = weights;
                Ok(())
            }
            (Some(held), StagedWeights::Gpu(image), Some(gpu)) => gpu.slots.put(slot, held.place.clone(), image),
            _ => Err(Error::internal(format!("slot {slot} is not reserved for these staged weights"))),
        }
    }

    /// Whether the weights that were put into a slot are there. Never waits. Errors: their copy failed.
    pub fn arrived(&mut self, slot: u32) -> Result<bool> {
        match &mut self.gpu {
            Some(gpu) => gpu.slots.arrived(slot),
            None => Ok(true),
        }
    }

    /// Prepares what a slot on a GPU, which has arrived, needs of the base before a step names it: DoRA's gains. Later calls
    /// do nothing. Errors: no memory.
    pub fn prepare(&mut self, slot: u32, base: &dyn BaseMatrices) -> Result<()> {
        match &mut self.gpu {
            Some(gpu) => gpu.slots.prepare_gains(slot, base),
            None => Ok(()),
        }
    }

    /// Puts an adapter into a free slot, and waits until it is there. Errors: no room.
    pub fn load(&mut self, weights: &AdapterWeights, model: &ModelConfig) -> Result<u32> {
        let staged = self.stager().stage(weights, model)?;
        let device_bytes = match &staged {
            StagedWeights::Host(_) => 0,
            StagedWeights::Gpu(image) => image.bytes(),
        };
        let full = || Error::new(ErrorKind::Unavailable, format!("no slot has room for {device_bytes} bytes"));
        let slot = self.reserve(device_bytes).ok_or_else(full)?;
        self.put(slot, staged)?;
        while !self.arrived(slot)? {
            std::thread::yield_now();
        }
        Ok(slot)
    }

    /// Puts weights into a free slot of the CPU's and returns its index.
    pub fn insert(&mut self, weights: SlotWeights) -> u32 {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[free] = Some(ReservedSlot { weights, ..ReservedSlot::default() });
        free as u32
    }

    /// Frees a slot and its memory; a free one stays free.
    pub fn remove(&mut self, slot: u32) {
        let held = self.slots.get_mut(slot as usize).and_then(Option::take);
        if let (Some(held), Some(gpu)) = (held, &mut self.gpu) {
            gpu.slots.remove(slot);
            gpu.allocator.free(held.place);
        }
    }

    /// Pairs of `slot` at a site; empty where the adapter does not touch it, the slot is free or on a GPU.
    pub fn pairs(&self, slot: u32, layer: usize, site: Site) -> &[LoraPair] {
        let Some(Some(ReservedSlot { weights, .. })) = self.slots.get(slot as usize) else { return &[] };
        match site {
            Site::Head => &weights.head,
            _ => weights.layers.get(layer).map_or(&[], |sites| &sites[site as usize]),
        }
    }
}
