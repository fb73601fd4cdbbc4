//! The CUDA half: see `kernels/attention.cu` for the kernels' contracts and the layout of work.

use std::cmp::Reverse;
use std::f32::consts::LOG2_E;
use std::sync::{Mutex, PoisonError};

use candle_core::Tensor;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;
use half::bf16;

use super::{BLOCK, Heads};
use crate::gpu::constants::{
    ATTENTION_TILE_ROWS, ATTENTION_WARPS, DECODE_BLOCKS_PER_SM, DECODE_HEADS, MAX_HEAD_DIM, MAX_SPLITS, ROPE_THREADS,
};
use crate::gpu::kernels::{Arg, LaunchGrid, kernel_set};
use crate::gpu::{Context, address, input};
use crate::ops::batch::{Batch, Capacity, DeviceStep, Span};
use crate::ops::rope::RopeTable;
use crate::{Error, Result};

mod causal;
pub use causal::{causal, causal_backward};

/// Threads of a thread block.
const THREADS: usize = 32 * ATTENTION_WARPS;
/// Words of a worklist's header, and of each of its entries and items.
const HEADER: usize = 4;
const ITEM: usize = 4;
/// Keys of a KV split; more where a decode row would have more splits than [`MAX_SPLITS`].
const SPLIT_KEYS: usize = 64;

kernel_set!(AttentionKernels {
    rope_append_1,
    rope_append_8,
    attn_decode_64,
    attn_decode_128,
    attn_decode_any,
    attn_merge_64,
    attn_merge_128,
    attn_prefill_64,
    attn_prefill_128,
    attn_prefill_any,
});

/// Most words of [`decode_work`].
pub fn decode_words(capacity: Capacity) -> usize {
    let spans = capacity.spans.min(capacity.rows);
    // An entry for each row of a captured step; and a row of n KV blocks has at most 1 + n / 4 splits.
    HEADER
        + ITEM * (capacity.rows + spans + ((MAX_SPLITS - 1) * spans).min(capacity.block_table_len * BLOCK / SPLIT_KEYS))
}

/// Most words of [`prefill_work`].
pub fn prefill_words(capacity: Capacity) -> usize {
    HEADER + ITEM * capacity.spans.min(capacity.rows)
}

/// Whether the decode kernels run a sequence. On a device opened as deterministic the prefill kernels run all.
fn decodes(span: &Span, deterministic: bool) -> bool {
    span.rows.len() == 1 && !deterministic
}

/// The worklist of the decode kernels: an entry for each decode row (its first item, its row, its number of splits), then one
/// item per KV split of each decode row. Long rows come first, so that no thread block ends up alone with long splits. In a
/// fixed step there is room for `captured_rows` entries. `deterministic` is the device's.
pub fn decode_work(batch: &Batch, captured_rows: Option<usize>, deterministic: bool) -> Vec<u32> {
    let mut spans: Vec<_> = batch.spans.iter().filter(|s| decodes(s, deterministic)).collect();
    spans.sort_by_key(|s| Reverse(s.context_len));
    let rows = captured_rows.unwrap_or(spans.len());
    let mut words = vec![0; HEADER + ITEM * rows];
    let mut items = 0;
    for (i, span) in spans.into_iter().enumerate() {
        let keys = SPLIT_KEYS * span.context_len.div_ceil(SPLIT_KEYS * MAX_SPLITS);
        let splits = span.context_len.div_ceil(keys);
        words[HEADER + ITEM * i..][..3].copy_from_slice(&[items, span.rows.start, splits].map(|word| word as u32));
        items += splits;
        for split in 0..splits {
            let item = [span.rows.start, span.table.start, span.context_len, split | keys << 8];
            words.extend(item.map(|word| word as u32));
        }
    }
    words[0] = items as u32;
    words[1] = batch.spans.last().map_or(0, |s| s.rows.end) as u32;
    words
}

/// The worklist of the prefill kernels: the other sequences, longest first.
pub fn prefill_work(batch: &Batch, deterministic: bool) -> Vec<u32> {
    let mut spans: Vec<_> = batch.spans.iter().filter(|s| !decodes(s, deterministic)).collect();
    spans.sort_by_key(|s| Reverse(s.context_len));
    let mut words = vec![spans.len() as u32, 0, 0, 0];
    for span in spans {
        let position = span.context_len - span.rows.len();
        words.extend([span.rows.start, span.rows.len(), position, span.table.start].map(|word| word as u32));
    }
    words
}

/// As [`super::append`], which has checked the shapes, in one launch.
pub fn append(cache: &Tensor, qkv: &Tensor, batch: &Batch, table: &RopeTable, heads: Heads) -> Result<()> {
    let (step, rows) = (uploaded(batch)?, batch.rows());
    table.check(&batch.positions)?;
    if table.head_dim() != heads.dim {
        return Err(Error::internal(format!("a rotary table of width {} for {heads:?}", table.head_dim())));
    }
    let gpu = Context::of_tensor(qkv)?;
    let kernels = gpu.kernels::<AttentionKernels>()?;
    // A thread takes 16 bytes of each half of a head where these are aligned.
    let vectors = heads.dim.is_multiple_of(16);
    let (kernel, pairs) = if vectors { (&kernels.rope_append_8, 8) } else { (&kernels.rope_append_1, 1) };
    let pieces = (heads.query + 2 * heads.kv) * (heads.dim / 2 / pairs);
    let grid = LaunchGrid::new_2d(rows, pieces.div_ceil(ROPE_THREADS), ROPE_THREADS);
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
    // SAFETY: shapes as in the contract; the cache has the slots and the table the positions.
    unsafe { gpu.launch(kernel, grid, &args) }
}

/// As [`super::attention`], which has checked shapes and spans. Errors: rows between spans that belong to none, a span of several
/// rows in a captured step, a head that is too wide.
pub fn attention(qkv: &Tensor, cache: &Tensor, batch: &Batch, heads: Heads) -> Result<Tensor> {
    let (step, rows) = (uploaded(batch)?, batch.rows());
    let covered: usize = batch.spans.iter().map(|s| s.rows.len()).sum();
    let gaps = batch.spans.last().is_some_and(|s| s.rows.end != covered);
    if heads.dim > MAX_HEAD_DIM || gaps || step.captured && covered != batch.spans.len() {
        return Err(Error::internal(format!("{heads:?}, captured: {}, {:?}", step.captured, batch.spans)));
    }
    let gpu = Context::of_tensor(qkv)?;
    let (out, to) = gpu.output::<bf16>((rows, heads.query * heads.dim))?;
    let call = PagedAttention {
        kernels: &*gpu.kernels::<AttentionKernels>()?,
        gpu: &gpu,
        heads,
        group: heads.query / heads.kv,
        fast: matches!(heads.dim, 64 | 128),
        qkv: input::<bf16>(qkv)?,
        cache: input::<bf16>(cache)?,
        scale: LOG2_E / (heads.dim as f32).sqrt(),
        to,
    };
    call.prefill(batch, step)?;
    let entries = if step.captured { rows } else { batch.spans.iter().filter(|s| call.decodes(s)).count() };
    call.decode(step, rows, entries, rows - covered)?;
    Ok(out)
}

fn uploaded(batch: &Batch) -> Result<&DeviceStep> {
    batch.step.as_ref().ok_or_else(|| Error::internal("the batch was not copied to the GPU"))
}

/// One call of [`attention`]: the arguments common to the launches for decode rows and for prefill.
struct PagedAttention<'a> {
    gpu: &'a Context,
    kernels: &'a AttentionKernels,
    heads: Heads,
    /// Query heads of a key-value head.
    group: usize,
    /// Whether the width has kernels on tensor cores.
    fast: bool,
    /// Address of the rows.
    qkv: u64,
    /// Address of the layer's KV cache.
    cache: u64,
    /// Scale of the scores, for exponentials with base 2.
    scale: f32,
    /// Address of the output.
    to: u64,
}

impl PagedAttention<'_> {
    fn decodes(&self, span: &Span) -> bool {
        decodes(span, self.gpu.deterministic)
    }

    /// Runs the decode rows, of which the worklist has `entries`, and writes zeros to the `left` rows after all sequences.
    fn decode(&self, step: &DeviceStep, rows: usize, entries: usize, left: usize) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        // In a captured step, room for items; else their number.
        let room = (step.decode.len.saturating_sub(HEADER) / ITEM).saturating_sub(entries);
        let at = step.decode.words + 4 * HEADER as u64;
        let items = at + (4 * ITEM * entries) as u64;
        let kernel = match dim {
            64 => &self.kernels.attn_decode_64,
            128 => &self.kernels.attn_decode_128,
            _ => &self.kernels.attn_decode_any,
        };
        let most = if step.captured { rows * MAX_SPLITS } else { room + left };
        let units =
            most * if self.fast { kv * self.group.div_ceil(DECODE_HEADS) } else { query.div_ceil(ATTENTION_WARPS) };
        if units == 0 {
            return Ok(());
        }
        let blocks = if step.captured { units.min(DECODE_BLOCKS_PER_SM * self.gpu.sm_count) } else { units };
        let partial = if self.fast {
            let workspace = self.gpu.get_or_init(|_| Ok(Workspace::default()))?;
            workspace.reserve(self.gpu, (room + entries) * query, dim)?
        } else {
            0
        };
        let args: [Arg; 13] = [
            self.qkv.into(),
            self.cache.into(),
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
        // SAFETY: shapes as in the contract; items are `decode_work`'s, and KV blocks the caller's; the workspace is as large as
        // `room` needs, and the kernels that use it follow one another.
        unsafe { self.gpu.launch(kernel, LaunchGrid::new(blocks, THREADS), args)? };
        if self.fast && entries > 0 {
            let kernel = if dim == 64 { &self.kernels.attn_merge_64 } else { &self.kernels.attn_merge_128 };
            let args = [at.into(), entries.into(), room.into(), query.into(), partial.into(), self.to.into()];
            // SAFETY: as above.
            unsafe {
                self.gpu.launch(kernel, LaunchGrid::new((entries * query).div_ceil(ATTENTION_WARPS), THREADS), &args)?
            };
        }
        Ok(())
    }

    /// Runs the other sequences; a captured step has none.
    fn prefill(&self, batch: &Batch, step: &DeviceStep) -> Result<()> {
        let Heads { query, kv, dim } = self.heads;
        if step.prefill.len <= HEADER {
            return Ok(());
        }
        let spans = || batch.spans.iter().filter(|s| !self.decodes(s)).map(|s| s.rows.len());
        let fast = self.fast && self.group <= ATTENTION_TILE_ROWS;
        let tiles = || spans().map(|rows| rows.div_ceil(ATTENTION_TILE_ROWS / self.group)).sum::<usize>();
        let (kernel, blocks) = match dim {
            64 if fast => (&self.kernels.attn_prefill_64, tiles() * kv),
            128 if fast => (&self.kernels.attn_prefill_128, tiles() * kv),
            _ => (&self.kernels.attn_prefill_any, (spans().sum::<usize>() * query).div_ceil(ATTENTION_WARPS)),
        };
        let shared = if fast { 768 * dim as u32 } else { 0 };
        let args: [Arg; 9] = [
            self.qkv.into(),
            self.cache.into(),
            step.prefill.words.into(),
            step.block_tables.into(),
            kv.into(),
            self.group.into(),
            self.scale.into(),
            self.to.into(),
            dim.into(),
        ];
        let args = &args[..args.len() - usize::from(fast)];
        // SAFETY: shapes as in the contract; spans are `prefill_work`'s, and KV blocks the caller's.
        unsafe { self.gpu.launch(kernel, LaunchGrid { shared, ..LaunchGrid::new(blocks, THREADS) }, args) }
    }
}

/// Where KV splits leave their sums for the merge, `[items·heads][dim]`, with their maxima and sums `[items·heads][2]`. One
/// buffer serves all launches, since they follow one another.
///
/// A buffer that a larger one replaces stays, since captured graphs contain its address; captured steps always need the same
/// size, so that all their graphs use one.
#[derive(Default)]
struct Workspace(Mutex<Vec<CudaSlice<f32>>>);

impl Workspace {
    /// The address of a buffer for this many rows.
    fn reserve(&self, gpu: &Context, rows: usize, dim: usize) -> Result<u64> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (len, had) = (rows * (dim + 2), buffers.last().map_or(0, CudaSlice::len));
        if had < len {
            // At least twice as much, so that all of them together are not more than twice the last.
            // SAFETY: kernels read only what they have written.
            buffers.push(unsafe { gpu.device().alloc::<f32>(len.max(2 * had))? });
        }
        Ok(address(&buffers[buffers.len() - 1]))
    }
}
