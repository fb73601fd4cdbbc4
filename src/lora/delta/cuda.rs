//! The CUDA half: see `kernels/lora.cuh`.
//!
//! A step's worklist gives the slots of the rows. It has two lists: the small one for short segments, the large one for long ones.
//! A segment has one term for each of its adapters. Shrink takes units of a term, expand takes chunks of the segment; the rows of
//! both depend on the list. A launch takes its shapes from the site and everything else from the worklist and the slot table.
//! Decode steps use only the small list, and so need one launch each of shrink and expand.

use candle_core::{DType, Tensor};
use half::bf16;

use super::Adapters;
use crate::arch::Site;
use crate::gpu::constants::{
    EXPAND_LARGE_ROWS, EXPAND_SMALL_ROWS, GAIN_COLUMNS, LORA_CHUNK_WORDS, LORA_H_ADDRESS_WORD, LORA_HEADER_WORDS,
    LORA_LARGE_BLOCKS_PER_SM, LORA_LIST_WORDS, LORA_SMALL_BLOCKS_PER_SM, LORA_TERM_WORDS, LORA_WARPS,
    SHRINK_LARGE_ROWS, SHRINK_RANKS, SHRINK_SMALL_ROWS,
};
use crate::gpu::kernels::{Arg, ByDtype, KernelHandle, KernelSet, Kernels, LaunchGrid};
use crate::gpu::{Context, input};
use crate::lora::cuda::slots::DeviceSlots;
use crate::lora::slots::SlotPool;
use crate::ops::batch::{Capacity, Segment};
use crate::{Error, Result};

/// Steps of up to this many rows do not use the large list: when several chunks read an adapter's weights, these come from the L2
/// cache, and a second pair of launches would cost more.
const SMALL_STEP: usize = 256;

/// Most terms of a segment, as many as a request may have.
const TERMS: usize = 8;

/// Threads of a thread block.
const THREADS: usize = 32 * LORA_WARPS;

/// The row counts of a list's units and chunks.
struct ListTiling {
    /// Rows of a unit, which shrink takes.
    shrink_rows: usize,
    /// Rows of a chunk, which expand takes.
    expand_rows: usize,
    /// Most thread blocks per SM that a launch asks for; an SM of Hopper holds as many of the usual kernels.
    blocks: usize,
}

impl ListTiling {
    /// Most units or chunks of up to `each` rows in a step of `rows`. In the small list, each row may have an adapter of its own.
    fn most(&self, rows: usize, each: usize) -> usize {
        if self.shrink_rows == LISTS[0].shrink_rows { rows } else { rows.div_ceil(each) }
    }
}

/// The small list and the large one, in the order of the worklist.
const LISTS: [ListTiling; 2] = [
    ListTiling { shrink_rows: SHRINK_SMALL_ROWS, expand_rows: EXPAND_SMALL_ROWS, blocks: LORA_SMALL_BLOCKS_PER_SM },
    ListTiling { shrink_rows: SHRINK_LARGE_ROWS, expand_rows: EXPAND_LARGE_ROWS, blocks: LORA_LARGE_BLOCKS_PER_SM },
];

/// The kernels, shrink and expand in the order of [`LISTS`].
struct LoraKernels {
    lists: [ListKernels; 2],
    gain: ByDtype,
}

struct ListKernels {
    shrink: KernelHandle,
    expand: ByDtype,
}

impl KernelSet for LoraKernels {
    fn resolve(kernels: &Kernels) -> Result<Self> {
        let by_dtype = |name: &str| -> Result<ByDtype> {
            Ok(ByDtype { bf16: kernels.get(name)?, f32: kernels.get(&format!("{name}_f32"))? })
        };
        let list = |shrink: &str, expand: &str| -> Result<ListKernels> {
            Ok(ListKernels { shrink: kernels.get(shrink)?, expand: by_dtype(expand)? })
        };
        Ok(Self {
            lists: [list("lora_shrink_small", "lora_expand_small")?, list("lora_shrink_large", "lora_expand_large")?],
            gain: by_dtype("lora_gain")?,
        })
    }
}

/// In lists of up to this many rows, each split of `k` is an item of its own with its own plane of h, so that there are enough items.
const PLANE_ROWS: usize = 512;

/// The list that takes a segment, in a step whose rows with adapters end at `end`.
fn list(segment: &Segment, end: usize) -> usize {
    usize::from(end > SMALL_STEP && segment.rows.len() > LISTS[0].expand_rows)
}

/// The number of splits of `k`, at most 16, and their width, a multiple of 512.
fn splits(k: usize) -> (usize, usize) {
    let width = 512 * k.div_ceil(16 * 512);
    (k.div_ceil(width), width)
}

/// Most words of the worklist of a step.
pub fn work_words(capacity: Capacity) -> usize {
    let terms = TERMS * capacity.spans;
    let chunks = capacity.spans + (SMALL_STEP / LISTS[0].expand_rows).max(capacity.rows / LISTS[1].expand_rows);
    LORA_HEADER_WORDS + LORA_TERM_WORDS * terms + LORA_CHUNK_WORDS * chunks + Site::ALL.len() * (terms + 2) + 3
}

/// The worklist of a step's segments; its layout is at the top of `kernels/lora.cuh`. Errors: segments out of order, or a slot
/// without an adapter.
pub fn work(segments: &[Segment], slots: &SlotPool) -> Result<Vec<u32>> {
    let mut work = WorkBuilder { words: vec![0; LORA_HEADER_WORDS], shrunk_len: 0 };
    if segments.is_empty() {
        return Ok(work.words);
    }
    let slots = gpu(slots)?;
    let mut end = 0;
    for segment in segments {
        if segment.rows.start < end || segment.rows.is_empty() {
            return Err(Error::internal(format!("adapters of rows {:?} after row {end}", segment.rows)));
        }
        end = segment.rows.end;
    }
    for (i, tiling) in LISTS.iter().enumerate() {
        let segments: Vec<&Segment> = segments.iter().filter(|segment| list(segment, end) == i).collect();
        work.push_list(i, tiling, &segments, slots)?;
    }
    let shrunk = slots.shrunk(work.shrunk_len)?;
    work.words[LORA_H_ADDRESS_WORD..][..2].copy_from_slice(&[shrunk as u32, (shrunk >> 32) as u32]);
    Ok(work.words)
}

/// A worklist under construction.
struct WorkBuilder {
    words: Vec<u32>,
    /// Values of the workspace for h that are taken.
    shrunk_len: usize,
}

impl WorkBuilder {
    /// Appends the arrays of list `i`, and writes its header.
    fn push_list(&mut self, i: usize, tiling: &ListTiling, segments: &[&Segment], slots: &DeviceSlots) -> Result<()> {
        let rows: usize = segments.iter().map(|segment| segment.rows.len()).sum();
        let split_planes = i == 0 || rows <= PLANE_ROWS;
        let first_shrunk = self.shrunk_len;

        // Terms and chunks are read 16 bytes at a time.
        self.words.resize(self.words.len().next_multiple_of(4), 0);
        let term_at = self.words.len();
        let units = self.push_terms(tiling, segments, slots)?;
        let chunk_at = self.words.len();
        self.push_chunks(tiling, segments);
        let starts_at = self.words.len();
        units.starts.iter().zip(units.ends).for_each(|(starts, end)| {
            self.words.extend(starts);
            self.words.push(end);
        });

        let plane = self.shrunk_len - first_shrunk;
        if split_planes {
            self.shrunk_len += plane * (slots.most_splits(|k| splits(k).0) - 1);
        }
        let terms = (chunk_at - term_at) / LORA_TERM_WORDS;
        let chunks = (starts_at - chunk_at) / LORA_CHUNK_WORDS;
        let header = [terms, chunks, usize::from(split_planes), plane, term_at, chunk_at, starts_at, 0];
        let header = header.into_iter().map(|word| word as u32).chain(units.ends);
        self.words[LORA_LIST_WORDS * i..].iter_mut().zip(header).for_each(|(to, word)| *to = word);
        Ok(())
    }

    /// Appends a term for each adapter of each segment.
    fn push_terms(&mut self, tiling: &ListTiling, segments: &[&Segment], slots: &DeviceSlots) -> Result<ShrinkUnits> {
        let mut units = ShrinkUnits::default();
        for segment in segments {
            for &(slot, weight) in &segment.terms {
                let ranks =
                    slots.ranks(slot).ok_or_else(|| Error::internal(format!("slot {slot} holds no adapter")))?;
                let stride = ranks.iter().copied().max().unwrap_or(0);
                let (start, rows) = (segment.rows.start as u32, segment.rows.len());
                let (h_offset, bits) = (self.shrunk_len as u32, weight.to_bits());
                self.words.extend([start, rows as u32, slot, bits, h_offset, stride as u32, 0, 0]);
                self.shrunk_len += rows * stride;
                units.push(rows.div_ceil(tiling.shrink_rows), ranks);
            }
        }
        Ok(units)
    }

    /// Appends the chunks of each segment.
    fn push_chunks(&mut self, tiling: &ListTiling, segments: &[&Segment]) {
        let mut term = 0;
        for segment in segments {
            for start in segment.rows.clone().step_by(tiling.expand_rows) {
                let rows = (segment.rows.end - start).min(tiling.expand_rows);
                self.words.extend([start as u32, rows as u32, term, segment.terms.len() as u32]);
            }
            term += segment.terms.len() as u32;
        }
    }
}

/// The units of a list by site: before each term, and in all.
#[derive(Default)]
struct ShrinkUnits {
    starts: [Vec<u32>; Site::ALL.len()],
    ends: [u32; Site::ALL.len()],
}

impl ShrinkUnits {
    /// Adds a term whose rows take `row_units` units, given the adapter's ranks by site.
    fn push(&mut self, row_units: usize, ranks: &[usize; Site::ALL.len()]) {
        for ((starts, end), rank) in self.starts.iter_mut().zip(&mut self.ends).zip(ranks) {
            starts.push(*end);
            *end += (row_units * rank.div_ceil(SHRINK_RANKS)) as u32;
        }
    }
}

/// Whether any rows have DoRA's gains. Errors: they share their rows, have another weight than 1, or were not prepared.
pub fn has_dora_gains(segments: &[Segment], slots: &SlotPool) -> Result<bool> {
    let mut any = false;
    for segment in segments {
        for &(slot, weight) in &segment.terms {
            let gains = gpu(slots)?.has_gains(slot)?;
            if gains && (segment.terms.len() > 1 || weight != 1.0) {
                return Err(Error::internal("DoRA adapters have no weights and share no rows"));
            }
            any |= gains;
        }
    }
    Ok(any)
}

/// As [`super::add_delta`], `x` bf16, `y` bf16 or f32. In a captured step the launches depend on shapes alone.
pub fn add_delta(y: &Tensor, x: &Tensor, adapters: &Adapters, layer: usize, site: Site) -> Result<()> {
    let ((rows, n), (x_rows, k)) = (y.dims2()?, x.dims2()?);
    let step = adapters.step.ok_or_else(|| Error::internal("a step without its metadata on the GPU"))?;
    let work = if adapters.logit_rows_only { &step.lora_logits } else { &step.lora };
    if work.len == 0 || rows == 0 || !step.captured && adapters.segments.is_empty() {
        return Ok(());
    }
    let slots = gpu(adapters.slots)?;
    let shape = slots.site(site);
    if rows != x_rows || k != shape.k || n != shape.n.iter().sum::<usize>() {
        return Err(Error::internal(format!("delta of [{x_rows}, {k}] to [{rows}, {n}] where it is {shape:?}")));
    }
    let end = adapters.segments.last().map_or(0, |segment| segment.rows.end);
    if end > rows {
        return Err(Error::internal(format!("an adapter of row {end} in {rows} rows")));
    }
    let there = |i: usize| {
        // A graph is replayed for other segments than those of its capture.
        if step.captured { i == 0 || rows > SMALL_STEP } else { adapters.segments.iter().any(|s| list(s, end) == i) }
    };
    let gpu = Context::of_tensor(y)?;
    let kernels = gpu.kernels::<LoraKernels>()?;
    let table = slots.table();
    let (splits, width) = splits(k);
    let x = input::<bf16>(x)?;
    let to = if y.dtype() == DType::F32 { input::<f32>(y)? } else { input::<bf16>(y)? };
    let lists = || {
        let lists = LISTS.iter().zip(&kernels.lists).enumerate();
        lists.filter(|(i, _)| there(*i)).map(|(_, list)| list)
    };
    let entry: [Arg; 4] = [table.entries.into(), slots.entry(layer, site).into(), k.into(), splits.into()];
    // Enough thread blocks for all items of a few adapters, at least one per SM; any number does all the work.
    let grid = |tiling: &ListTiling, items: usize| {
        let (least, most) = (gpu.sm_count, tiling.blocks * gpu.sm_count);
        LaunchGrid::new(items.clamp(least, most), THREADS)
    };
    for (tiling, kernels) in lists() {
        let args =
            [&[work.words.into(), table.address.into(), x.into()], &entry[..], &[width.into(), (site as usize).into()]];
        let grid = grid(tiling, tiling.most(rows, tiling.shrink_rows) * splits * 4);
        // SAFETY: the worklist is of segments in these rows and of slots that are ready, whose blocks have the model's
        // shapes, as `x` was checked to have; h has room in the worklist's workspace.
        unsafe { gpu.launch(&kernels.shrink, grid, &args.concat())? };
    }
    for (tiling, kernels) in lists() {
        let args = [&[work.words.into(), table.address.into(), to.into()], &entry[..], &shape.n.map(Arg::from)];
        let grid = grid(tiling, tiling.most(rows, tiling.expand_rows) * n.div_ceil(4 * 64));
        // SAFETY: as above, and `y` has the shape of the site; nothing else uses it meanwhile.
        unsafe { gpu.launch(kernels.expand.get(y.dtype()), grid, &args.concat())? };
    }
    if step.gains {
        let args: [Arg; 6] = [work.words.into(), table.address.into(), to.into(), entry[0], entry[1], n.into()];
        let grid = LaunchGrid::new((rows * n.div_ceil(GAIN_COLUMNS)).min(8 * gpu.sm_count), THREADS);
        // SAFETY: as above.
        unsafe { gpu.launch(kernels.gain.get(y.dtype()), grid, &args)? };
    }
    Ok(())
}

fn gpu(slots: &SlotPool) -> Result<&DeviceSlots> {
    slots.device_slots().ok_or_else(|| Error::internal("adapters on the CPU in a step on the GPU"))
}
