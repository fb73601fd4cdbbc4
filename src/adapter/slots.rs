//! Slots: the adapters that a forward pass can use, addressed by index.

use super::Site;
use crate::ops::lora::LoraPair;

/// One adapter laid out for the ops: the pairs of each site of each layer, and of the head.
#[derive(Debug, Clone, Default)]
pub struct SlotWeights {
    /// `[layer][site]`, sites in [`Site`] order up to `Down`.
    pub layers: Vec<[Vec<LoraPair>; 4]>,
    /// Pairs of the output head.
    pub head: Vec<LoraPair>,
}

/// The resident adapters. A slot index is what batches carry, so that a captured graph serves any mix of adapters.
#[derive(Default)]
pub struct SlotPool {
    slots: Vec<Option<SlotWeights>>,
}

impl SlotPool {
    /// Puts weights into a free slot and returns its index.
    pub fn insert(&mut self, weights: SlotWeights) -> u32 {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[free] = Some(weights);
        free as u32
    }

    /// Pairs of `slot` at a site; empty where the adapter does not touch it or the slot is free.
    pub fn pairs(&self, slot: u32, layer: usize, site: Site) -> &[LoraPair] {
        let Some(Some(weights)) = self.slots.get(slot as usize) else { return &[] };
        match site {
            Site::Head => &weights.head,
            _ => weights.layers.get(layer).map_or(&[], |sites| &sites[site as usize]),
        }
    }
}
