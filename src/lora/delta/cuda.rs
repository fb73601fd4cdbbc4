//! The CUDA half: see `kernels/lora.cuh`.
//!
//! A step's worklist says which rows carry which slots; a launch takes shapes from its site and everything else from the
//! worklist and the slot table. Segments are worked on in pieces of few rows or of many: decode steps have only the first
//! kind, and so need one launch each of shrink and expand.

use candle_core::{DType, Tensor};
use half::bf16;

use super::Adapters;
use crate::arch::Site;
use crate::gpu::kernels::{Arg, ByDtype, KernelHandle, KernelSet, Kernels, LaunchGrid};
use crate::gpu::{Context, input};
use crate::lora::cuda::slots::DeviceSlots;
use crate::lora::slots::SlotPool;
use crate::ops::batch::Capacity;
use crate::ops::batch::Segment;
use crate::{Error, Result};

/// Steps of up to this many rows have no large pieces: one adapter's weights come from L2 when its rows are read in
/// several pieces, and a second pair of launches costs more.
const SMALL_STEP: usize = 256;

/// Terms that a segment may have; requests have at most as many.
const TERMS: usize = 8;

/// Columns of an item of the kernel of gains.
const GAIN_COLUMNS: usize = 512;

/// Words of the two lists' headers and the address behind them.
const HEADER: usize = 36;
/// Words of a list's header, a term, a chunk.
const LIST: usize = 16;
const TERM: usize = 8;
const CHUNK: usize = 4;

/// SegmentPieces of few rows, or of many.
struct SegmentPieces {
    /// Rows of a shrinking item.
    shrink_rows: usize,
    /// Rows of an expanding item: a chunk.
    expand_rows: usize,
    /// Most blocks on a multiprocessor that a launch asks for; those of Hopper hold as many of the usual kernels.
    blocks: usize,
}

impl SegmentPieces {
    /// How many pieces of up to `each` rows there may be: in steps of few rows, each may have an adapter of its own.
    fn most(&self, rows: usize, each: usize) -> usize {
        if self.shrink_rows == PIECES[0].shrink_rows { rows } else { rows.div_ceil(each) }
    }
}

/// In the order of the lists in the worklist.
const PIECES: [SegmentPieces; 2] = [
    SegmentPieces { shrink_rows: 8, expand_rows: 8, blocks: 5 },
    SegmentPieces { shrink_rows: 64, expand_rows: 32, blocks: 4 },
];

/// The kernels, shrink and expand in the order of [`PIECES`].
struct LoraKernels {
    pieces: [PieceKernels; 2],
    gain: ByDtype,
}

struct PieceKernels {
    shrink: KernelHandle,
    expand: ByDtype,
}

impl KernelSet for LoraKernels {
    fn resolve(kernels: &Kernels) -> Result<Self> {
        let by_dtype = |name: &str| -> Result<ByDtype> {
            Ok(ByDtype { bf16: kernels.get(name)?, f32: kernels.get(&format!("{name}_f32"))? })
        };
        let pieces = |shrink: &str, expand: &str| -> Result<PieceKernels> {
            Ok(PieceKernels { shrink: kernels.get(shrink)?, expand: by_dtype(expand)? })
        };
        Ok(Self {
            pieces: [
                pieces("lora_shrink_small", "lora_expand_small")?,
                pieces("lora_shrink_large", "lora_expand_large")?,
            ],
            gain: by_dtype("lora_gain")?,
        })
    }
}

/// Up to this many rows in large pieces, each split of `k` is an item of its own, so that there are enough.
const APART_ROWS: usize = 512;

/// Which list takes a segment, in a step whose last row with an adapter is before `end`.
fn list(segment: &Segment, end: usize) -> usize {
    usize::from(end > SMALL_STEP && segment.rows.len() > PIECES[0].expand_rows)
}

/// `k` in splits: how many, and how wide. At most 16, each a multiple of 512.
fn splits(k: usize) -> (usize, usize) {
    let width = 512 * k.div_ceil(16 * 512);
    (k.div_ceil(width), width)
}

/// Words that the worklist of a step may take.
pub fn work_words(capacity: Capacity) -> usize {
    let terms = TERMS * capacity.spans;
    let chunks = capacity.spans + (SMALL_STEP / PIECES[0].expand_rows).max(capacity.rows / PIECES[1].expand_rows);
    HEADER + TERM * terms + CHUNK * chunks + Site::ALL.len() * (terms + 2) + 3
}

/// What the kernels need to know of a step's segments; the layout is at the top of `kernels/lora.cuh`. Errors: segments
/// out of order, or a slot without an adapter.
pub fn work(segments: &[Segment], slots: &SlotPool) -> Result<Vec<u32>> {
    let mut words = vec![0; HEADER];
    if segments.is_empty() {
        return Ok(words);
    }
    let slots = gpu(slots)?;
    let end = segments.last().map_or(0, |segment| segment.rows.end);
    let mut hidden = 0;
    let mut row = 0;
    for segment in segments {
        if segment.rows.start < row || segment.rows.is_empty() {
            return Err(Error::internal(format!("adapters of rows {:?} after row {row}", segment.rows)));
        }
        row = segment.rows.end;
    }
    for (i, pieces) in PIECES.iter().enumerate() {
        let segments = || segments.iter().filter(|segment| list(segment, end) == i);
        let rows: usize = segments().map(|segment| segment.rows.len()).sum();
        let apart = i == 0 || rows <= APART_ROWS;
        let first_hidden = hidden;

        // Terms and chunks are read 16 bytes at a time.
        words.resize(words.len().next_multiple_of(4), 0);
        let term_at = words.len();
        let mut units = [const { Vec::new() }; Site::ALL.len()];
        let mut ends = [0; Site::ALL.len()];
        for segment in segments() {
            for &(slot, weight) in &segment.terms {
                let ranks =
                    slots.ranks(slot).ok_or_else(|| Error::internal(format!("slot {slot} holds no adapter")))?;
                let stride = ranks.iter().copied().max().unwrap_or(0);
                let (start, rows) = (segment.rows.start as u32, segment.rows.len());
                words.extend([start, rows as u32, slot, weight.to_bits(), hidden as u32, stride as u32, 0, 0]);
                hidden += rows * stride;
                for ((units, end), ranks) in units.iter_mut().zip(&mut ends).zip(ranks) {
                    units.push(*end);
                    *end += (rows.div_ceil(pieces.shrink_rows) * ranks.div_ceil(16)) as u32;
                }
            }
        }
        let terms = (words.len() - term_at) / TERM;

        let chunk_at = words.len();
        let mut term = 0;
        for segment in segments() {
            for start in segment.rows.clone().step_by(pieces.expand_rows) {
                let rows = (segment.rows.end - start).min(pieces.expand_rows);
                words.extend([start as u32, rows as u32, term, segment.terms.len() as u32]);
            }
            term += segment.terms.len() as u32;
        }
        let chunks = (words.len() - chunk_at) / CHUNK;

        let starts_at = words.len();
        for (units, end) in units.into_iter().zip(ends) {
            words.extend(units);
            words.push(end);
        }
        let plane = hidden - first_hidden;
        if apart {
            hidden += plane * (slots.most_splits(|k| splits(k).0) - 1);
        }
        let header = [terms, chunks, usize::from(apart), plane, term_at, chunk_at, starts_at, 0];
        let header = header.into_iter().map(|word| word as u32).chain(ends);
        words[LIST * i..].iter_mut().zip(header).for_each(|(to, word)| *to = word);
    }
    let hidden = slots.hidden(hidden)?;
    (words[2 * LIST], words[2 * LIST + 1]) = (hidden as u32, (hidden >> 32) as u32);
    Ok(words)
}

/// Whether any rows have DoRA's gains. Errors: they share their rows, have another weight than 1, or were not prepared.
pub fn gained(segments: &[Segment], slots: &SlotPool) -> Result<bool> {
    let mut any = false;
    for segment in segments {
        for &(slot, weight) in &segment.terms {
            let gained = gpu(slots)?.gained(slot)?;
            if gained && (segment.terms.len() > 1 || weight != 1.0) {
                return Err(Error::internal("DoRA adapters have no weights and share no rows"));
            }
            any |= gained;
        }
    }
    Ok(any)
}

/// As [`super::add_delta`], `x` bf16, `y` bf16 or f32. In a fixed step the launches depend on shapes alone.
pub fn add_delta(y: &Tensor, x: &Tensor, adapters: &Adapters, layer: usize, site: Site) -> Result<()> {
    let ((rows, n), (x_rows, k)) = (y.dims2()?, x.dims2()?);
    let step = adapters.step.ok_or_else(|| Error::internal("a step without its metadata on the GPU"))?;
    let work = if adapters.logits { &step.lora_logits } else { &step.lora };
    if work.len == 0 || rows == 0 || !step.fixed && adapters.segments.is_empty() {
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
        // A graph is recorded for other segments than this step's.
        if step.fixed { i == 0 || rows > SMALL_STEP } else { adapters.segments.iter().any(|s| list(s, end) == i) }
    };
    let gpu = Context::of_tensor(y)?;
    let kernels = gpu.kernels::<LoraKernels>()?;
    let table = slots.table();
    let (splits, width) = splits(k);
    let x = input::<bf16>(x)?;
    let to = if y.dtype() == DType::F32 { input::<f32>(y)? } else { input::<bf16>(y)? };
    let lists = || {
        let lists = PIECES.iter().zip(&kernels.pieces).enumerate();
        lists.filter(|(i, _)| there(*i)).map(|(_, list)| list)
    };
    let entry: [Arg; 4] = [table.entries.into(), slots.entry(layer, site).into(), k.into(), splits.into()];
    // Enough blocks for all items of a few adapters, at least one on each multiprocessor; any number does any work.
    let grid = |pieces: &SegmentPieces, items: usize| {
        let (least, most) = (gpu.multiprocessors, pieces.blocks * gpu.multiprocessors);
        LaunchGrid::new(items.clamp(least, most), 128)
    };
    for (pieces, kernels) in lists() {
        let args =
            [&[work.words.into(), table.address.into(), x.into()], &entry[..], &[width.into(), (site as usize).into()]];
        let grid = grid(pieces, pieces.most(rows, pieces.shrink_rows) * splits * 4);
        // SAFETY: the worklist is of segments in these rows and of slots that are ready, whose blocks have the model's
        // shapes, as `x` was checked to have; what shrinking leaves has room in the worklist's workspace.
        unsafe { gpu.launch(&kernels.shrink, grid, &args.concat())? };
    }
    for (pieces, kernels) in lists() {
        let args = [&[work.words.into(), table.address.into(), to.into()], &entry[..], &shape.n.map(Arg::from)];
        let grid = grid(pieces, pieces.most(rows, pieces.expand_rows) * n.div_ceil(4 * 64));
        // SAFETY: as above, and `y` has the shape of the site; nothing else uses it meanwhile.
        unsafe { gpu.launch(kernels.expand.get(y.dtype()), grid, &args.concat())? };
    }
    if step.gains {
        let args: [Arg; 6] = [work.words.into(), table.address.into(), to.into(), entry[0], entry[1], n.into()];
        let grid = LaunchGrid::new((rows * n.div_ceil(GAIN_COLUMNS)).min(8 * gpu.multiprocessors), 128);
        // SAFETY: as above.
        unsafe { gpu.launch(kernels.gain.get(y.dtype()), grid, &args)? };
    }
    Ok(())
}

fn gpu(slots: &SlotPool) -> Result<&DeviceSlots> {
    slots.gpu().ok_or_else(|| Error::internal("adapters on the CPU in a step on the GPU"))
}
