//! An adapter as it lies in a GPU's memory: 16-bit values, one block of them for each site that it changes.
//!
//! A block holds A `[Σ rank, k]` with the site's modules stacked, B `[n, rank]` of each, the biases as f32, and under DoRA
//! the gains of all outputs of the site `[Σ n]` f32. Ranks are rounded up to a multiple of 8 by zeros, which add nothing and
//! keep every row at a 16-byte address; beyond that each module keeps its own. What `kernels/lora.cuh` reads of it beside the
//! values is the entry of each site. The host knows no gains: it writes magnitudes, and 1 for modules without them (see
//! `gains.rs`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::thread;

use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use crate::arch::ModelConfig;
use crate::arch::{Module, Site};
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use crate::{Error, Result};

/// 16-bit values of an entry of the slot table: the block's address, the ranks of its modules and which have a bias (one
/// value each), the scales (f32), where the block's gains start, in 16 bytes (u32; 0: it has none).
pub const ENTRY: usize = 16;

/// Ranks are multiples of this.
const RANK_STEP: usize = 8;

/// Blocks start at multiples of this many values, so that no cache line holds parts of two.
const BLOCK_STEP: usize = 64;

/// Threads that write an image.
const WRITERS: usize = 4;

/// A multiple of this many bytes is what an image takes.
const STEP: usize = 256;

/// Where everything of one adapter is in its image.
#[derive(Debug)]
pub struct ImageLayout {
    /// By entry: four of each decoder block, then the head's.
    blocks: BTreeMap<usize, SiteBlock>,
    /// Bytes of the image.
    pub bytes: usize,
    /// Most ranks of all modules together, in any decoder block, by site.
    pub ranks: [usize; 5],
}

/// The weights of one site.
#[derive(Debug)]
pub struct SiteBlock {
    /// First value.
    pub at: usize,
    /// Input features.
    pub k: usize,
    /// Output features of each module; 0 for those that the site does not have.
    pub n: [usize; 3],
    /// Rounded up; 0 for a module that is not there.
    pub ranks: [usize; 3],
    /// Which modules have a bias.
    biases: [bool; 3],
    /// Factors of the deltas.
    pub scales: [f32; 3],
    /// Which modules have DoRA's magnitudes.
    pub magnitudes: [bool; 3],
}

/// Entries of a slot.
pub fn entries(model: &ModelConfig) -> usize {
    4 * model.num_layers + 1
}

/// The entry of a site, and the place of a module in it.
fn entry(layer: usize, module: Module, model: &ModelConfig) -> (usize, usize) {
    let site = module.site();
    let entry = if site == Site::Head { 4 * model.num_layers } else { 4 * layer + site as usize };
    (entry, site.modules().iter().position(|m| *m == module).unwrap_or_default())
}

impl ImageLayout {
    /// The layout of an adapter that was read for this model. Errors: a rank beyond 16 bits.
    pub fn new(weights: &AdapterWeights, model: &ModelConfig) -> Result<Self> {
        let mut blocks = BTreeMap::new();
        for m in &weights.modules {
            let (entry, i) = entry(m.layer, m.module, model);
            let block = blocks.entry(entry).or_insert_with(|| {
                let (_, k) = m.module.shape(model);
                let mut n = [0; 3];
                n.iter_mut().zip(m.module.site().modules()).for_each(|(n, module)| *n = module.shape(model).0);
                let (biases, magnitudes) = ([false; 3], [false; 3]);
                SiteBlock { at: 0, k, n, ranks: [0; 3], biases, scales: [0.0; 3], magnitudes }
            });
            let rank = m.rank.next_multiple_of(RANK_STEP);
            if rank > usize::from(u16::MAX) {
                return Err(Error::invalid(format!("a rank of {} is not served on a GPU", m.rank)));
            }
            (block.ranks[i], block.biases[i], block.scales[i]) = (rank, m.bias.is_some(), m.scale);
            block.magnitudes[i] = m.magnitude.is_some();
        }
        let (mut end, mut ranks) = (0usize, [0; 5]);
        for (entry, block) in &mut blocks {
            block.at = end.next_multiple_of(BLOCK_STEP);
            end = block.at + block.len();
            let site = if *entry == 4 * model.num_layers { Site::Head as usize } else { entry % 4 };
            ranks[site] = ranks[site].max(block.rank());
        }
        Ok(Self { blocks, bytes: (2 * end).next_multiple_of(STEP), ranks })
    }

    /// Writes the values, rounded to bf16; what the image has beside them is left as it is. By a few threads, since a request
    /// waits for it and one cannot fill the bus.
    pub fn write(&self, weights: &AdapterWeights, model: &ModelConfig, image: &mut [u16]) {
        let mut modules: BTreeMap<usize, Vec<(usize, &ModuleWeights)>> = BTreeMap::new();
        for m in &weights.modules {
            let (entry, i) = entry(m.layer, m.module, model);
            modules.entry(entry).or_default().push((i, m));
        }
        let (mut rest, mut end) = (image, 0);
        let mut blocks = Vec::new();
        for (entry, block) in &self.blocks {
            let (image, after) = rest[block.at - end..].split_at_mut(block.len());
            (rest, end) = (after, block.at + block.len());
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

    /// The slot's row of the table, for an image at address `base`: `[entries][ENTRY]`.
    pub fn row(&self, base: u64, model: &ModelConfig) -> Vec<u16> {
        let mut row = vec![0; entries(model) * ENTRY];
        for (entry, block) in &self.blocks {
            let entry = &mut row[entry * ENTRY..(entry + 1) * ENTRY];
            let address = base + 2 * block.at as u64;
            (0..4).for_each(|i| entry[i] = (address >> (16 * i)) as u16);
            (0..3).for_each(|i| entry[4 + i] = block.ranks[i] as u16);
            entry[7] = (0..3).map(|i| u16::from(block.biases[i]) << i).sum();
            (0..3).for_each(|i| entry[8 + 2 * i..10 + 2 * i].copy_from_slice(&halves(block.scales[i].to_bits())));
            let gains = if block.gained() { 2 * block.gain(0) / 16 } else { 0 };
            entry[14..].copy_from_slice(&halves(gains as u32));
        }
        row
    }

    /// The block of an entry.
    pub fn block(&self, entry: usize) -> Option<&SiteBlock> {
        self.blocks.get(&entry)
    }

    /// Entries whose blocks have gains.
    pub fn gained(&self) -> impl Iterator<Item = usize> {
        self.blocks.iter().filter(|(_, block)| block.gained()).map(|(entry, _)| *entry)
    }
}

impl SiteBlock {
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

    /// Whether it has gains.
    fn gained(&self) -> bool {
        self.magnitudes.contains(&true)
    }

    /// Ranks of all modules.
    pub fn rank(&self) -> usize {
        self.ranks.iter().sum()
    }

    /// Where A of module `i` starts.
    fn a(&self, i: usize) -> usize {
        self.k * self.ranks[..i].iter().sum::<usize>()
    }

    /// Where B of module `i` starts; of the fourth, where all B end.
    pub fn b(&self, i: usize) -> usize {
        self.k * self.rank() + (0..i).map(|j| self.n[j] * self.ranks[j]).sum::<usize>()
    }

    /// Where the bias of module `i` starts; of the fourth, where all biases end. Each takes a multiple of 16 bytes.
    fn bias(&self, i: usize) -> usize {
        self.b(3) + (0..i).filter(|j| self.biases[*j]).map(|j| 2 * self.n[j].next_multiple_of(4)).sum::<usize>()
    }

    /// Where the gains of module `i` start, those of all modules following one another; of the fourth, where the block ends.
    pub fn gain(&self, i: usize) -> usize {
        self.bias(3) + if self.gained() { 2 * self.n[..i].iter().sum::<usize>() } else { 0 }
    }

    fn len(&self) -> usize {
        self.gain(3)
    }
}

/// A 32-bit value as two, in the order of a little-endian machine.
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

    /// A module whose values are exact in bf16, in each of the three precisions by turns.
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

    /// Everything, magnitudes in the place of gains, is found again by the entries and the formulas of `kernels/lora.cuh`, over memory that was not zero.
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
        assert_eq!(layout.bytes % STEP, 0);
        assert_eq!(layout.gained().collect::<Vec<_>>(), [3, 6]);
        let mut image = vec![0x7fff; layout.bytes / 2];
        layout.write(&weights, &model, &mut image);
        let base = 0x7f12_3456_7800u64;
        let row = layout.row(base, &model);
        let mut seen = 0;
        for (e, entry) in row.chunks_exact(ENTRY).enumerate() {
            let site = Site::ALL[if e == 8 { 4 } else { e % 4 }];
            let ranks: Vec<usize> = entry[4..7].iter().map(|r| usize::from(*r)).collect();
            let address = (0..4).map(|i| u64::from(entry[i]) << (16 * i)).sum::<u64>();
            if address == 0 {
                assert_eq!(entry, [0; ENTRY]);
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
        entry(m.layer, m.module, model).0
    }
}
