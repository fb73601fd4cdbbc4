//! DoRA's gains of adapters in slots. An upload contains magnitudes. Before the slot's first step they are turned into gains, which
//! need the base's weights, on the engine's stream; the gains stay with the slot.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use candle_core::{DType, Tensor};
use half::bf16;

use super::memory::SlotMemory;
use crate::lora::BaseMatrices;
use crate::lora::image::{ImageLayout, SiteBlock, SlotEntry};
use crate::lora::magnitude::{changed_norms, row_squares};
use crate::ops::quant;
use crate::{Error, Result};

/// The slots with gains or magnitudes, and the base's norms from which gains are computed.
#[derive(Default)]
pub struct SlotGains {
    /// DoRA adapters in slots.
    slots: HashMap<u32, DoraSlot>,
    /// Squared norms of the base's rows `[1, n]` by entry, computed once: they never change.
    squares: HashMap<usize, Tensor>,
}

/// An adapter with magnitudes.
struct DoraSlot {
    /// Where its image starts in the slots' memory, in values.
    start: usize,
    layout: ImageLayout,
    /// Entries whose magnitudes are not gains yet.
    pending: Vec<usize>,
}

/// The terms from which the norms of a site's changed rows are computed, all f32.
struct NormTerms<'a> {
    /// A of all modules, `[Σ rank, k]`.
    a: Tensor,
    /// `A·Wᵀ [Σ rank, Σ n]`.
    crossed: Tensor,
    /// Squared norms of the base's rows, `[1, Σ n]`.
    squares: &'a Tensor,
}

impl SlotGains {
    /// Registers an adapter that has arrived in its slot, at `start` of the memory.
    pub fn arrived(&mut self, slot: u32, start: usize, layout: ImageLayout) {
        let pending: Vec<usize> = layout.entries_with_gains().collect();
        if !pending.is_empty() {
            self.slots.insert(slot, DoraSlot { start, layout, pending });
        }
    }

    /// Forgets a slot.
    pub fn remove(&mut self, slot: u32) {
        self.slots.remove(&slot);
    }

    /// Whether a slot has gains. Errors: its magnitudes have not become gains yet.
    pub fn of(&self, slot: u32) -> Result<bool> {
        match self.slots.get(&slot) {
            None => Ok(false),
            Some(dora) if dora.pending.is_empty() => Ok(true),
            Some(_) => Err(Error::internal("DoRA's gains were not prepared")),
        }
    }

    /// Turns a slot's pending magnitudes into gains.
    pub fn prepare(&mut self, slot: u32, memory: &mut SlotMemory, base: &dyn BaseMatrices) -> Result<()> {
        let Some(DoraSlot { start, layout, pending }) = self.slots.get_mut(&slot) else { return Ok(()) };
        // An entry is removed only once it is done, so that a call after an error continues with the rest and repeats none.
        while let Some(&entry) = pending.last() {
            let block = layout.block(entry).ok_or_else(|| Error::internal(format!("no block at entry {entry}")))?;
            let (layer, site) = SlotEntry::place(entry, base.num_layers());
            let weight = base.matrix(layer, site);
            let squares: &Tensor = match self.squares.entry(entry) {
                Entry::Occupied(squares) => squares.into_mut(),
                Entry::Vacant(place) => place.insert(row_squares(weight)?),
            };
            let at = *start + block.start;
            let a = memory.read::<bf16>(at, (block.rank(), block.k))?;
            let crossed = quant::matmul(weight, &a, DType::F32)?;
            let terms = NormTerms { a: a.to_dtype(DType::F32)?, crossed, squares };
            for (i, gains) in terms.gains(block, memory, at)? {
                memory.write(at + block.gain(i), &gains)?;
            }
            pending.pop();
        }
        Ok(())
    }
}

impl NormTerms<'_> {
    /// Gains `[1, n]` of each module with magnitudes of a block at `at` of the memory.
    fn gains(&self, block: &SiteBlock, memory: &SlotMemory, at: usize) -> Result<Vec<(usize, Tensor)>> {
        let (mut first_rank, mut offset) = (0, 0);
        let mut gains = Vec::new();
        for i in 0..3 {
            let (rank, n) = (block.ranks[i], block.n[i]);
            if block.magnitudes[i] {
                let b = memory.read::<bf16>(at + block.b(i), (n, rank))?.to_dtype(DType::F32)?;
                let magnitudes = memory.read::<f32>(at + block.gain(i), (1, n))?;
                let crossed = self.crossed.narrow(0, first_rank, rank)?.narrow(1, offset, n)?;
                let (a, squares) = (self.a.narrow(0, first_rank, rank)?, self.squares.narrow(1, offset, n)?);
                gains.push((i, (magnitudes / changed_norms(&squares, &a, &b, &crossed, block.scales[i])?)?));
            }
            (first_rank, offset) = (first_rank + rank, offset + n);
        }
        Ok(gains)
    }
}
