//! An adapter as it lies in a GPU's memory: 16-bit values, in one block for each site that the adapter changes.
//!
//! A block holds A `[Σ rank, k]` with the site's modules stacked, B `[n, rank]` of each module, the biases as f32, and under
//! DoRA the gains of all outputs of the site `[Σ n]` f32. Ranks are rounded up to a multiple of 8 by zeros, which add nothing
//! and keep every row at a 16-byte address; beyond that each module keeps its own rank. Kernels find a block by its
//! [`SlotEntry`]. The host does not know the gains: it writes magnitudes, and 1 for modules without them (see
//! `cuda/gains.rs`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;

use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::arch::{ModelConfig, Module, Site};
use crate::gpu::constants::SLOT_ENTRY_BYTES;
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use crate::{Error, Result};

/// Ranks are multiples of this.
const RANK_STEP: usize = 8;

/// Blocks start at multiples of this many values, so that no cache line holds parts of two.
const BLOCK_STEP: usize = 64;

/// Threads that write an image.
const WRITERS: usize = 4;

/// Image sizes are multiples of this many bytes.
const IMAGE_STEP: usize = 256;

/// An entry of the slot table: where a slot's weights for one site of one layer are. Kernels read it as `SlotEntry` of
/// `kernels/lora.cuh`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SlotEntry {
    /// Address of the site's block; 0 if the adapter does not change the site.
    pub address: u64,
    /// Ranks of the modules, rounded up.
    pub ranks: [u16; 3],
    /// Which modules have a bias.
    pub biases: [bool; 3],
    /// Factors of the modules' deltas.
    pub scales: [f32; 3],
    /// Where the gains start in the block, in units of 16 bytes; 0 if it has none.
    pub gains: u32,
}

impl SlotEntry {
    /// 16-bit words of an encoded entry.
    pub const WORDS: usize = SLOT_ENTRY_BYTES / 2;

    /// Entries of a slot: four sites of each layer, then the head.
    pub fn count(num_layers: usize) -> usize {
        4 * num_layers + 1
    }

    /// The index of a site among a slot's entries. The head belongs to no layer.
    pub fn index(layer: usize, site: Site, num_layers: usize) -> usize {
        if site == Site::Head { 4 * num_layers } else { 4 * layer + site as usize }
    }

    /// The layer and site of an index; the head's layer is the number of layers.
    pub fn place(index: usize, num_layers: usize) -> (usize, Site) {
        let layer = index / 4;
        (layer, if layer == num_layers { Site::Head } else { Site::ALL[index % 4] })
    }

    /// The words that kernels read, in the order of a little-endian machine.
    pub fn encode(self) -> [u16; Self::WORDS] {
        let mut words = [0; Self::WORDS];
        (0..4).for_each(|i| words[i] = (self.address >> (16 * i)) as u16);
        words[4..7].copy_from_slice(&self.ranks);
        words[7] = (0..3).map(|i| u16::from(self.biases[i]) << i).sum();
        (0..3).for_each(|i| words[8 + 2 * i..10 + 2 * i].copy_from_slice(&halves(self.scales[i].to_bits())));
        words[14..].copy_from_slice(&halves(self.gains));
        words
    }

    /// The entry of these words.
    #[cfg(test)]
    fn decode(words: [u16; Self::WORDS]) -> Self {
        let whole = |i: usize| u32::from(words[i]) | u32::from(words[i + 1]) << 16;
        Self {
            address: u64::from(whole(0)) | u64::from(whole(2)) << 32,
            ranks: [words[4], words[5], words[6]],
            biases: std::array::from_fn(|i| words[7] >> i & 1 == 1),
            scales: std::array::from_fn(|i| f32::from_bits(whole(8 + 2 * i))),
            gains: whole(14),
        }
    }
}

/// Where everything of one adapter is in its image.
#[derive(Debug)]
pub struct ImageLayout {
    /// By [`SlotEntry::index`].
    blocks: BTreeMap<usize, SiteBlock>,
    /// Bytes of the image.
    pub bytes: usize,
    /// Largest total rank of a site's modules in any layer, by site.
    pub ranks: [usize; 5],
}

/// The weights of one site. Positions are in 16-bit values from the block's start.
#[derive(Debug)]
pub struct SiteBlock {
    /// First value in the image.
    pub start: usize,
    /// Input features.
    pub k: usize,
    /// Output features of each module; 0 for modules that the site does not have.
    pub n: [usize; 3],
    /// Ranks, rounded up; 0 for modules that the adapter does not change.
    pub ranks: [usize; 3],
    /// Which modules have a bias.
    biases: [bool; 3],
    /// Factors of the modules' deltas.
    pub scales: [f32; 3],
    /// Which modules have DoRA's magnitudes.
    pub magnitudes: [bool; 3],
}

/// The entry of a module, and the module's position in its site.
fn locate(m: &ModuleWeights, model: &ModelConfig) -> (usize, usize) {
    let site = m.module.site();
    let position = site.modules().iter().position(|module| *module == m.module).unwrap_or_default();
    (SlotEntry::index(m.layer, site, model.num_layers), position)
}

impl ImageLayout {
    /// The layout of an adapter that was read for this model. Errors: a rank beyond 16 bits.
    pub fn new(weights: &AdapterWeights, model: &ModelConfig) -> Result<Self> {
        let mut blocks = BTreeMap::new();
        for m in &weights.modules {
            let (entry, i) = locate(m, model);
            let block = blocks.entry(entry).or_insert_with(|| SiteBlock::empty(m.module.site(), model));
            let rank = m.rank.next_multiple_of(RANK_STEP);
            if rank > usize::from(u16::MAX) {
                return Err(Error::invalid(format!("rank {} is too large for a GPU", m.rank)));
            }
            (block.ranks[i], block.biases[i], block.scales[i]) = (rank, m.bias.is_some(), m.scale);
            block.magnitudes[i] = m.magnitude.is_some();
        }
        let (mut end, mut ranks) = (0usize, [0; 5]);
        for (&entry, block) in &mut blocks {
            block.start = end.next_multiple_of(BLOCK_STEP);
            end = block.start + block.len();
            let (_, site) = SlotEntry::place(entry, model.num_layers);
            ranks[site as usize] = ranks[site as usize].max(block.rank());
        }
        Ok(Self { blocks, bytes: (2 * end).next_multiple_of(IMAGE_STEP), ranks })
    }

    /// Writes the values, rounded to bf16; gaps between blocks are left as they are. Several threads write, since a request
    /// waits for the image and one thread cannot fill the bus.
    pub fn write(&self, weights: &AdapterWeights, model: &ModelConfig, image: &mut [u16]) {
        let mut modules: BTreeMap<usize, Vec<(usize, &ModuleWeights)>> = BTreeMap::new();
        for m in &weights.modules {
            let (entry, i) = locate(m, model);
            modules.entry(entry).or_default().push((i, m));
        }
        let (mut rest, mut end) = (image, 0);
        let mut blocks = Vec::new();
        for (entry, block) in &self.blocks {
            let (image, after) = rest[block.start - end..].split_at_mut(block.len());
            (rest, end) = (after, block.start + block.len());
            blocks.push((block, &modules[entry], image));
        }
        thread::scope(|scope| {
            for share in blocks.chunks_mut(self.blocks.len().div_ceil(WRITERS).max(1)) {
                scope.spawn(|| {
                    for (block, modules, image) in share {
                        image[block.gain(0)..].as_chunks_mut().0.fill(halves(1f32.to_bits()));
                        modules.iter().for_each(|(i, m)| block.write(*i, m, image));
                    }
                });
            }
        });
    }

    /// The slot's row of the table, for an image at address `base`: its encoded entries.
    pub fn table_row(&self, base: u64, model: &ModelConfig) -> Vec<u16> {
        let mut row = vec![0; SlotEntry::count(model.num_layers) * SlotEntry::WORDS];
        let (entries, _) = row.as_chunks_mut::<{ SlotEntry::WORDS }>();
        for (entry, block) in &self.blocks {
            entries[*entry] = block.entry(base).encode();
        }
        row
    }

    /// The block of an entry.
    pub fn block(&self, entry: usize) -> Option<&SiteBlock> {
        self.blocks.get(&entry)
    }

    /// Entries whose blocks have gains.
    pub fn entries_with_gains(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().filter(|(_, block)| block.has_gains()).map(|(entry, _)| *entry)
    }
}

impl SiteBlock {
    /// A block of a site without any module.
    fn empty(site: Site, model: &ModelConfig) -> Self {
        let modules = site.modules();
        Self {
            start: 0,
            k: modules[0].shape(model).1,
            n: std::array::from_fn(|i| modules.get(i).map_or(0, |module: &Module| module.shape(model).0)),
            ranks: [0; 3],
            biases: [false; 3],
            scales: [0.0; 3],
            magnitudes: [false; 3],
        }
    }

    /// The block's entry, for an image at address `base`.
    fn entry(&self, base: u64) -> SlotEntry {
        SlotEntry {
            address: base + 2 * self.start as u64,
            ranks: self.ranks.map(|rank| rank as u16),
            biases: self.biases,
            scales: self.scales,
            gains: if self.has_gains() { (2 * self.gain(0) / 16) as u32 } else { 0 },
        }
    }

    /// Writes module `i` to the block's image.
    fn write(&self, i: usize, m: &ModuleWeights, image: &mut [u16]) {
        let (k, n, padded) = (self.k, self.n[i], self.ranks[i]);
        let (a, rest) = image[self.a(i)..].split_at_mut(m.rank * k);
        round(&m.a, 0..m.rank * k, a);
        rest[..(padded - m.rank) * k].fill(0);

        let b = &mut image[self.b(i)..][..n * padded];
        if padded == m.rank {
            // All at once: row by row is several times slower.
            round(&m.b, 0..n * padded, b);
        } else {
            for (j, row) in b.chunks_exact_mut(padded).enumerate() {
                let (row, padding) = row.split_at_mut(m.rank);
                round(&m.b, j * m.rank..(j + 1) * m.rank, row);
                padding.fill(0);
            }
        }
        for (at, values) in [(self.bias(i), &m.bias), (self.gain(i), &m.magnitude)] {
            let Some(values) = values else { continue };
            let to = image[at..].as_chunks_mut::<2>().0;
            to.iter_mut().zip(values.to_f32()).for_each(|(to, v)| *to = halves(v.to_bits()));
        }
    }

    fn has_gains(&self) -> bool {
        self.magnitudes.contains(&true)
    }

    /// Total rank of all modules.
    pub fn rank(&self) -> usize {
        self.ranks.iter().sum()
    }

    /// Where A of module `i` starts.
    fn a(&self, i: usize) -> usize {
        self.k * self.ranks[..i].iter().sum::<usize>()
    }

    /// Where B of module `i` starts; for 3, where all B end.
    pub fn b(&self, i: usize) -> usize {
        self.k * self.rank() + (0..i).map(|j| self.n[j] * self.ranks[j]).sum::<usize>()
    }

    /// Where the bias of module `i` starts; for 3, where all biases end. Each takes a multiple of 16 bytes.
    fn bias(&self, i: usize) -> usize {
        self.b(3) + (0..i).filter(|j| self.biases[*j]).map(|j| 2 * self.n[j].next_multiple_of(4)).sum::<usize>()
    }

    /// Where the gains of module `i` start, those of all modules following one another; for 3, where the block ends.
    pub fn gain(&self, i: usize) -> usize {
        self.bias(3) + if self.has_gains() { 2 * self.n[..i].iter().sum::<usize>() } else { 0 }
    }

    fn len(&self) -> usize {
        self.gain(3)
    }
}

/// A 32-bit value as two words, in the order of a little-endian machine.
fn halves(bits: u32) -> [u16; 2] {
    [bits as u16, (bits >> 16) as u16]
}

/// Some values as bf16.
fn round(values: &FloatVec, range: Range<usize>, to: &mut [u16]) {
    let to = to.reinterpret_cast_mut::<bf16>();
    match values {
        FloatVec::F32(v) => to.convert_from_f32_slice(&v[range]),
        FloatVec::F16(v) => to.iter_mut().zip(&v[range]).for_each(|(to, v)| *to = bf16::from_f32(v.to_f32())),
        FloatVec::BF16(v) => to.copy_from_slice(&v[range]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::RopeScaling;

    fn model() -> ModelConfig {
        ModelConfig {
            hidden_size: 24,
            intermediate_size: 40,
            num_layers: 2,
            num_heads: 3,
            num_kv_heads: 1,
            head_dim: 10,
            vocab_size: 7,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            qkv_bias: false,
            qk_norm: false,
            max_position_embeddings: 16,
        }
    }

    /// A module whose values are exact in bf16, stored in one of the three precisions.
    fn module(layer: usize, module: Module, rank: usize, bias: bool) -> ModuleWeights {
        let (n, k) = module.shape(&model());
        let seed = (layer * 10 + module as usize) as u64;
        let values = |seed: u64, len: usize| {
            let v: Vec<f32> = (0..len).map(|i| ((i * 37 + seed as usize * 101) % 127) as f32 / 64.0 - 1.0).collect();
            match seed % 3 {
                0 => FloatVec::F32(v.into()),
                1 => FloatVec::F16(v.into_iter().map(half::f16::from_f32).collect()),
                _ => FloatVec::BF16(v.into_iter().map(bf16::from_f32).collect()),
            }
        };
        ModuleWeights {
            layer,
            module,
            rank,
            scale: 0.5 + seed as f32,
            a: values(seed, rank * k),
            b: values(seed + 100, rank * n),
            bias: bias.then(|| values(seed + 200, n)),
            magnitude: None,
        }
    }

    /// By the entries and the formulas of `kernels/lora.cuh`, everything is found again, with magnitudes in the place of gains, over
    /// memory that was not zero.
    #[test]
    fn kernels_find_every_value() {
        let model = model();
        let scaled = |m: ModuleWeights| {
            let n = m.module.shape(&model).0;
            ModuleWeights { magnitude: Some(FloatVec::F32((0..n).map(|i| i as f32 + 0.5).collect())), ..m }
        };
        let weights = AdapterWeights {
            modules: vec![
                module(0, Module::Q, 5, true),
                module(0, Module::V, 16, true),
                scaled(module(0, Module::Down, 1, false)),
                module(1, Module::K, 8, false),
                scaled(module(1, Module::Gate, 3, false)),
                module(1, Module::Up, 9, true),
                module(2, Module::LmHead, 2, true),
            ],
        };
        let layout = ImageLayout::new(&weights, &model).unwrap();
        assert_eq!(layout.ranks, [24, 0, 24, 8, 8]);
        assert_eq!(layout.bytes % IMAGE_STEP, 0);
        assert_eq!(layout.entries_with_gains().collect::<Vec<_>>(), [3, 6]);
        let mut image = vec![0x7fff; layout.bytes / 2];
        layout.write(&weights, &model, &mut image);
        let base = 0x7f12_3456_7800u64;
        let row = layout.table_row(base, &model);
        let mut seen = 0;
        for (e, entry) in row.chunks_exact(SlotEntry::WORDS).enumerate() {
            let site = Site::ALL[if e == 8 { 4 } else { e % 4 }];
            let ranks: Vec<usize> = entry[4..7].iter().map(|r| usize::from(*r)).collect();
            let address = (0..4).map(|i| u64::from(entry[i]) << (16 * i)).sum::<u64>();
            if address == 0 {
                assert_eq!(entry, [0; SlotEntry::WORDS]);
                continue;
            }
            assert_eq!(address % 128, 0);
            let block = &image[(address - base) as usize / 2..];
            let value = |i: usize| bf16::from_bits(block[i]).to_f32();
            let k = site.modules()[0].shape(&model).1;
            let rank: usize = ranks.iter().sum();
            let n: Vec<usize> = site.modules().iter().map(|m| m.shape(&model).0).collect();
            let float = |i: usize| f32::from_bits(u32::from(block[i]) | u32::from(block[i + 1]) << 16);
            let gains = 8 * (usize::from(entry[14]) | usize::from(entry[15]) << 16);
            let found = layout.block(e).unwrap();
            assert_eq!(gains, if [3, 6].contains(&e) { found.gain(0) } else { 0 });
            let (mut a, mut b, mut first) = (0, rank * k, 0);
            let mut bias = b + n.iter().zip(&ranks).map(|(n, r)| n * r).sum::<usize>();
            for (i, module) in site.modules().iter().enumerate() {
                let found = weights.modules.iter().find(|m| m.module == *module && entry_of(m, &model) == e);
                let magnitude = found.and_then(|m| m.magnitude.as_ref()).map(FloatVec::to_f32);
                for j in (0..n[i]).filter(|_| gains > 0) {
                    assert_eq!(float(gains + 2 * (first + j)), magnitude.as_ref().map_or(1.0, |m| m[j]));
                }
                first += n[i];
                let Some(m) = found else {
                    assert_eq!((ranks[i], entry[7] >> i & 1), (0, 0));
                    continue;
                };
                seen += 1;
                assert_eq!(ranks[i], m.rank.next_multiple_of(8));
                assert_eq!(u32::from(entry[8 + 2 * i]) | u32::from(entry[9 + 2 * i]) << 16, m.scale.to_bits());
                let (want_a, want_b) = (m.a.to_f32(), m.b.to_f32());
                for r in 0..ranks[i] {
                    for j in 0..k {
                        assert_eq!(value(a + r * k + j), if r < m.rank { want_a[r * k + j] } else { 0.0 });
                    }
                    for j in 0..n[i] {
                        assert_eq!(value(b + j * ranks[i] + r), if r < m.rank { want_b[j * m.rank + r] } else { 0.0 });
                    }
                }
                (a, b) = (a + ranks[i] * k, b + n[i] * ranks[i]);
                assert_eq!(entry[7] >> i & 1 == 1, m.bias.is_some());
                if let Some(want) = &m.bias {
                    for (j, want) in want.to_f32().iter().enumerate() {
                        assert_eq!(float(bias + 2 * j).to_bits(), want.to_bits());
                    }
                    bias += n[i].div_ceil(4) * 8;
                }
            }
        }
        assert_eq!(seen, weights.modules.len());
    }

    fn entry_of(m: &ModuleWeights, model: &ModelConfig) -> usize {
        locate(m, model).0
    }

    #[test]
    fn entries_survive_encoding_and_have_one_index_each() {
        let entry = SlotEntry {
            address: 0x7f12_3456_7800,
            ranks: [8, 0, 65_528],
            biases: [true, false, true],
            scales: [0.5, 0.0, -3.25],
            gains: 0x1_2345,
        };
        assert_eq!(SlotEntry::decode(entry.encode()), entry);
        assert_eq!(SlotEntry::default().encode(), [0; SlotEntry::WORDS]);
        for index in 0..SlotEntry::count(3) {
            let (layer, site) = SlotEntry::place(index, 3);
            assert_eq!(SlotEntry::index(layer, site, 3), index);
        }
    }
}
