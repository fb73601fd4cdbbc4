//! Slots: the adapters that a forward pass can use, addressed by index.

use super::peft::AdapterWeights;
use super::{Module, Site};
use crate::model::ModelConfig;
use crate::ops::lora::LoraPair;

/// One adapter laid out for the ops: the pairs of each site of each layer, and of the head.
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
            };
            match m.module {
                Module::LmHead => slot.head.push(pair),
                module => slot.layers[m.layer][module.site() as usize].push(pair),
            }
        }
        slot
    }

    /// Bytes of all matrices and biases.
    pub fn bytes(&self) -> usize {
        let pairs = self.layers.iter().flatten().flatten().chain(&self.head);
        pairs.map(|p| 4 * (p.a.len() + p.b.len() + p.bias.as_ref().map_or(0, Vec::len))).sum()
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

/// The resident adapters. A slot index is what batches carry, so that a captured graph serves any mix of adapters.
/// Whom to keep is decided in [`super::tiers`].
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

    /// Frees a slot and its memory; a free one stays free.
    pub fn remove(&mut self, slot: u32) {
        if let Some(weights) = self.slots.get_mut(slot as usize) {
            *weights = None;
        }
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
