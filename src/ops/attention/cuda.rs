//! The CUDA half: see `kernels/attention.cu` for the kernels' contracts and the layout of work.

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;
use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, sys};
use candle_core::{CudaDevice, Tensor};
use half::bf16;

use super::{BLOCK, Heads};
use crate::gpu::kernels::{Arg, Grid, launch};
use crate::gpu::{address, deterministic, input, output};
use crate::ops::batch::{Batch, Span};
use crate::ops::batch::{Capacity, DeviceStep};
use crate::ops::rope::RopeTable;
use crate::{Error, Result};

mod causal;
pub use causal::{causal, causal_backward};

/// Threads a block, and the warps that they are.
const THREADS: u32 = 128;
const WARPS: usize = 4;
/// Words before a worklist's entries and items, and of each of these.
const HEADER: usize = 4;
const ITEM: usize = 4;
/// Keys of a part of a decoded row; more where a row would have more parts than [`PARTS`].
const PART_KEYS: usize = 64;
/// Most parts of a decoded row.
const PARTS: usize = 32;
/// Query heads that one block of a decode kernel takes.
const DECODE_HEADS: usize = 8;
/// Blocks of a decode kernel that a multiprocessor holds.
const DECODE_BLOCKS: usize = 5;
/// Query rows of a block of a prefill kernel: positions times the heads of a group.
const PREFILL_ROWS: usize = 128;
/// Widest head.
const MOST_DIM: usize = 256;

/// Words that [`decode_work`] may take.
pub fn decode_words(capacity: Capacity) -> usize {
    let spans = capacity.spans.min(capacity.rows);
    // An entry for each row of a fixed step; and a row of n blocks has at most 1 + n / 4 parts.
    HEADER + ITEM * (capacity.rows + spans + ((PARTS - 1) * spans).min(capacity.table * BLOCK / PART_KEYS))
}

/// Words that [`prefill_work`] may take.
pub fn prefill_words(capacity: Capacity) -> usize {
    HEADER + ITEM * capacity.spans.min(capacity.rows)
}

/// Whether a sequence with so many rows in a step takes the way of decoded rows.
fn decoded(rows: usize) -> bool {
    rows == 1 && !deterministic()
}

/// Sequences that decode.
fn decoding(batch: &Batch) -> impl Iterator<Item = &Span> {
    batch.spans.iter().filter(|s| decoded(s.rows.len()))
}

/// The sequences that decode, in a fixed step up to `fixed` of them: for each its place among the items, its row and its parts,
/// then the items, parts of keys; longest first, so that no block ends up alone with long parts.
pub fn decode_work(batch: &Batch, fixed: Option<usize>) -> Vec<u32> {
    let mut spans: Vec<_> = decoding(batch).collect();
    spans.sort_by_key(|s| Reverse(s.context_len));
    let rows = fixed.unwrap_or(spans.len());
    let mut words = vec![0; HEADER + ITEM * rows];
    let mut items = 0;
    for (i, span) in spans.into_iter().enumerate() {
        let keys = PART_KEYS * span.context_len.div_ceil(PART_KEYS * PARTS);
        let parts = span.context_len.div_ceil(keys);
        words[HEADER + ITEM * i..][..3].copy_from_slice(&[items, span.rows.start, parts].map(|word| word as u32));
        items += parts;
        for part in 0..parts {
            let item = [span.rows.start, span.table.start, span.context_len, part | keys << 8];
            words.extend(item.map(|word| word as u32));
        }
    }
    words[0] = items as u32;
    words[1] = batch.spans.last().map_or(0, |s| s.rows.end) as u32;
    words
}

/// The other sequences, longest first.
pub fn prefill_work(batch: &Batch) -> Vec<u32> {
    let mut spans: Vec<_> = batch.spans.iter().filter(|s| !decoded(s.rows.len())).collect();
    spans.sort_by_key(|s| Reverse(s.context_len));
    let mut words = vec![spans.len() as u32, 0, 0, 0];
    for span in spans {
        let position = span.context_len - span.rows.len();
        words.extend([span.rows.start, span.rows.len(), position, span.table.start].map(|word| word as u32));
    }
    words
}

/// As [`super::append`], in one launch. The caller has checked the shapes.
pub fn append(cache: &Tensor, qkv: &Tensor, batch: &Batch, table: &RopeTable, heads: Heads) -> Result<()> {
    let (step, rows) = (uploaded(batch)?, batch.rows());
    table.check(&batch.positions)?;
    if table.head_dim() != heads.dim {
        return Err(Error::internal(format!("a rotary table of width {} for {heads:?}", table.head_dim())));
    }
    // 16 bytes of both halves of a head at once, where they are aligned.
    let (name, pairs) = if heads.dim.is_multiple_of(16) { ("rope_append_8", 8) } else { ("rope_append_1", 1) };
    let pieces = (heads.query + 2 * heads.kv) * (heads.dim / 2 / pairs);
    let grid = Grid { blocks: (rows as u32, pieces.div_ceil(THREADS as usize) as u32, 1), ..Grid::new(1, THREADS) };
    let args = [
        input::<bf16>(qkv)?.into(),
        input::<bf16>(cache)?.into(),
        step.positions.into(),
        step.slot_mapping.into(),
        input::<f32>(table.values())?.into(),
        heads.query.into(),
        heads.kv.into(),
        heads.dim.into(),
    ];
    // SAFETY: shapes as the contract; slots are of the cache and positions of the table.
    unsafe { launch(qkv.device().as_cuda_device()?, name, grid, &args)? };
    Ok(())
}

/// As [`super::attention`]. The caller has checked shapes and spans. Errors: rows left out between spans, a span of several rows in
/// a fixed step, a head too wide.
pub fn attention(qkv: &Tensor, cache: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor> {
    let (step, rows) = (uploaded(batch)?, batch.rows());
    let covered: usize = batch.spans.iter().map(|s| s.rows.len()).sum();
    let gaps = batch.spans.last().is_some_and(|s| s.rows.end != covered);
    if heads.dim > MOST_DIM || gaps || step.fixed && covered != batch.spans.len() {
        return Err(Error::internal(format!("{heads:?}, fixed: {}, {:?}", step.fixed, batch.spans)));
    }
    let (out, to) = output::<bf16>(qkv.device().as_cuda_device()?, (rows, heads.query * heads.dim))?;
    let call = Call {
        device: qkv.device().as_cuda_device()?,
        heads,
        group: heads.query / heads.kv,
        fast: matches!(heads.dim, 64 | 128),
        inputs: [input::<bf16>(qkv)?.into(), input::<bf16>(cache)?.into()],
        scale: LOG2_E / (heads.dim as f32).sqrt(),
        to,
    };
    call.prefill(batch, step)?;
    let entries = if step.fixed { rows } else { decoding(batch).count() };
    call.decode(step, rows, entries, rows - covered)?;
    Ok(out)
}

fn uploaded(batch: &Batch) -> Result<&DeviceStep> {
    batch.step.as_ref().ok_or_else(|| Error::internal("a batch that was not copied to the GPU"))
}

/// What both kinds of attention need.
struct Call<'a> {
    device: &'a CudaDevice,
    heads: Heads,
    /// Query heads of a key-value head.
    group: usize,
    /// Whether the width has kernels on tensor cores.
    fast: bool,
    /// qkv and cache.
    inputs: [Arg; 2],
    scale: f32,
    /// Address of the output.
    to: u64,
}

impl Call<'_> {
    /// Sequences that decode, of which the worklist has `entries`, and zeros for the `left` rows after all sequences.
    fn decode(&self, step: &DeviceStep, rows: usize, entries: usize, left: usize) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        // In a fixed step the room for items; else their number.
        let room = (step.decode.len.saturating_sub(HEADER) / ITEM).saturating_sub(entries);
        let at = step.decode.words + 4 * HEADER as u64;
        let items = at + (4 * ITEM * entries) as u64;
        let name = match dim {
            64 => "attn_decode_64",
            128 => "attn_decode_128",
            _ => "attn_decode_any",
        };
        let most = if step.fixed { rows * PARTS } else { room + left };
        let units = most * if self.fast { kv * self.group.div_ceil(DECODE_HEADS) } else { query.div_ceil(WARPS) };
        if units == 0 {
            return Ok(());
        }
        let blocks = if step.fixed { units.min(DECODE_BLOCKS * multiprocessors(self.device)?) } else { units };
        let partial = if self.fast { workspace(self.device, (room + entries) * query, dim)? } else { 0 };
        let [qkv, cache] = self.inputs;
        let args: [Arg; 13] = [
            qkv,
            cache,
            step.decode.words.into(),
            items.into(),
            room.into(),
            step.block_tables.into(),
            rows.into(),
            kv.into(),
            self.group.into(),
            self.scale.into(),
            partial.into(),
            self.to.into(),
            dim.into(),
        ];
        let args = &args[..args.len() - usize::from(self.fast)];
        // SAFETY: shapes as the contract, items and blocks of `decode_work` and the caller; the workspace is as large as `room`
        // needs, and kernels that use it follow one another.
        unsafe { launch(self.device, name, Grid::new(blocks, THREADS), args)? };
        if self.fast && entries > 0 {
            let name = if dim == 64 { "attn_merge_64" } else { "attn_merge_128" };
            let args = [at.into(), entries.into(), room.into(), query.into(), partial.into(), self.to.into()];
            // SAFETY: as above.
            unsafe { launch(self.device, name, Grid::new((entries * query).div_ceil(WARPS), THREADS), &args)? };
        }
        Ok(())
    }

    /// The other sequences; a fixed step has none.
    fn prefill(&self, batch: &Batch, step: &DeviceStep) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        if step.prefill.len <= HEADER {
            return Ok(());
        }
        let spans = || batch.spans.iter().map(|s| s.rows.len()).filter(|rows| !decoded(*rows));
        let fast = self.fast && self.group <= PREFILL_ROWS;
        let (name, blocks) = match dim {
            64 | 128 if fast => {
                let tiles: usize = spans().map(|rows| rows.div_ceil(PREFILL_ROWS / self.group)).sum();
                (if dim == 64 { "attn_prefill_64" } else { "attn_prefill_128" }, tiles * kv)
            }
            _ => ("attn_prefill_any", (spans().sum::<usize>() * query).div_ceil(WARPS)),
        };
        let shared = if fast { 768 * dim as u32 } else { 0 };
        let [qkv, cache] = self.inputs;
        let args: [Arg; 9] = [
            qkv,
            cache,
            step.prefill.words.into(),
            step.block_tables.into(),
            kv.into(),
            self.group.into(),
            self.scale.into(),
            self.to.into(),
            dim.into(),
        ];
        let args = &args[..args.len() - usize::from(fast)];
        // SAFETY: shapes as the contract, spans and blocks of `prefill_work` and the caller.
        unsafe { launch(self.device, name, Grid { shared, ..Grid::new(blocks, THREADS) }, args)? };
        Ok(())
    }
}

fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    let count = device.cuda_stream().context().attribute(attribute);
    Ok(count.map_err(|e| Error::internal(format!("the GPU's multiprocessors: {e}")))? as usize)
}

/// Sums of parts `[items·heads][dim]` with their maxima and sums `[items·heads][2]`: one for all launches, since they follow one
/// another. What a larger one replaces stays, since graphs know its address; fixed steps always need the same.
fn workspace(device: &CudaDevice, rows: usize, dim: usize) -> Result<u64> {
    static KEPT: Mutex<Vec<CudaSlice<f32>>> = Mutex::new(Vec::new());
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let (len, had) = (rows * (dim + 2), kept.last().map_or(0, CudaSlice::len));
    if had < len {
        // At least twice as much, so that all of them together are not more than twice the last.
        // SAFETY: kernels read of it what they have written.
        kept.push(unsafe { device.alloc::<f32>(len.max(2 * had))? });
    }
    Ok(address(&kept[kept.len() - 1]))
}
