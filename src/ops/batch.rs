//! The flat batch: the input of one step, which all ops take. The same arrays run on a CPU and on a GPU.
//!
//! A **row** is one token position. All rows of a step lie back to back, whatever their sequence, and every array of `[T]`
//! values has one entry per row. Two lists of row ranges lie over them:
//!
//! - A **span** is one sequence's rows: its prompt, a chunk of the prompt (prefill), or the one new row of a sequence whose
//!   prompt is already in the KV cache (decode). Attention works span by span.
//! - A **segment** is consecutive rows with the same weighted adapters, from one or several sequences. Deltas are added segment
//!   by segment. Rows outside all segments run on the base alone.
//!
//! Keys and values lie in KV blocks of 16 tokens, in any order. A sequence's **block table** lists its blocks: position `p` is in
//! block `table[p / 16]` at offset `p % 16`. The tables of all sequences lie back to back in `block_tables`.
//!
//! For example, sequence `s` prefills 3 tokens under the adapter of slot 4 (KV block 7), and sequences `t` (position 17, blocks 2
//! and 5) and `u` (position 0, block 9) decode, `t` under the same adapter and `u` on the base:
//!
//! ```text
//! row               0     1     2     3     4
//! tokens           s0    s1    s2   t17    u0
//! positions         0     1     2    17     0
//! slot_mapping    112   113   114    81   144      block · 16 + offset
//! spans          [────── s ──────] [─ t ] [─ u ]   rows 0..3, 3..4, 4..5; context_len 3, 18, 1
//! block_tables   [7] [2 5] [9]                     table 0..1, 1..3, 3..4
//! segments       [─ slot 4, weight 1.0 ─]          rows 0..4
//! logit_rows        2 3 4                          the rows that predict a new token
//! hidden_rows      none                            the rows that are pooled to embeddings
//! ```

use std::ops::Range;

/// The input of one step: `T` rows of many sequences, and the spans and segments over them. Filled by [`Batch::push`], one
/// sequence at a time. See the module's description.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids `[T]`.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence `[T]`.
    pub positions: Vec<u32>,
    /// Where each row's key and value are written: `block · 16 + offset` `[T]`. This slot is a place in the KV cache, not an
    /// adapter's slot.
    pub slot_mapping: Vec<u32>,
    /// The sequences, in row order.
    pub spans: Vec<Span>,
    /// Block tables of all sequences, back to back; [`Span::table`] is a sequence's part.
    pub block_tables: Vec<u32>,
    /// Rows with adapters, in row order and without overlap.
    pub segments: Vec<Segment>,
    /// Rows whose logits are computed, ascending.
    pub logit_rows: Vec<u32>,
    /// Rows whose hidden states are returned, ascending. A hidden state is the output of the final norm.
    pub hidden_rows: Vec<u32>,
    /// Device addresses of the same metadata, once it was uploaded to the GPU that runs the step. `None` on a CPU.
    pub step: Option<DeviceStep>,
}

/// One sequence's rows in a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its rows. Their positions are consecutive and end at `context_len`.
    pub rows: Range<usize>,
    /// Keys of the sequence in the cache, this step's included: the last row attends to positions `0..context_len`.
    pub context_len: usize,
    /// Its block table: a range of [`Batch::block_tables`].
    pub table: Range<usize>,
}

/// Consecutive rows of a batch with the same weighted adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Its rows.
    pub rows: Range<usize>,
    /// Slot and weight of each adapter. The rows' delta is the weighted sum of the adapters' deltas, added in this order.
    pub terms: Vec<(u32, f32)>,
}

impl Batch {
    /// Appends a span: the rows of `tokens`, the first at position `start`, of the sequence whose KV blocks of `block_size`
    /// tokens are `blocks`. `terms` are the sequence's adapters, as in [`Segment::terms`]; empty for the base.
    pub fn push(&mut self, tokens: &[u32], start: usize, blocks: &[u32], block_size: usize, terms: &[(u32, f32)]) {
        let first = self.tokens.len();
        let rows = first..first + tokens.len();
        self.tokens.extend_from_slice(tokens);
        for position in start..start + tokens.len() {
            self.positions.push(position as u32);
            self.slot_mapping.push(blocks[position / block_size] * block_size as u32 + (position % block_size) as u32);
        }
        let context_len = start + tokens.len();
        let table = self.block_tables.len();
        self.block_tables.extend_from_slice(&blocks[..context_len.div_ceil(block_size)]);
        self.spans.push(Span { rows: rows.clone(), context_len, table: table..self.block_tables.len() });
        if terms.is_empty() {
            return;
        }
        // Neighbours under the same adapters share one segment, and so one pass over the weights.
        match self.segments.last_mut().filter(|s| s.rows.end == first && s.terms == terms) {
            Some(segment) => segment.rows.end = rows.end,
            None => self.segments.push(Segment { rows, terms: terms.to_vec() }),
        }
    }

    /// Rows that run. On a GPU these include the padding rows of a captured step.
    pub fn rows(&self) -> usize {
        self.step.as_ref().map_or(self.tokens.len(), |step| step.rows)
    }

    /// Whether logits of some rows only are computed. Captured steps compute those of all rows.
    pub(crate) fn selects_logits(&self) -> bool {
        !self.step.as_ref().is_some_and(|step| step.captured) && self.logit_rows.len() < self.tokens.len()
    }

    /// The segments over the `logit_rows` alone, numbered among these.
    pub fn logit_segments(&self) -> Vec<Segment> {
        let before = |row: usize| self.logit_rows.partition_point(|&r| (r as usize) < row);
        let kept = self.segments.iter().map(|s| (before(s.rows.start)..before(s.rows.end), &s.terms));
        kept.filter(|(rows, _)| !rows.is_empty()).map(|(rows, terms)| Segment { rows, terms: terms.clone() }).collect()
    }
}

/// A step on a GPU: the device addresses of a [`Batch`]'s metadata, and the worklists that the host derives from it for each
/// kernel. The CUDA halves of the ops read these instead of the host's arrays, so that a captured CUDA graph finds the next
/// step's values at the same addresses. Every address is of device memory; 0 is none.
#[derive(Debug, Clone)]
pub struct DeviceStep {
    /// Rows, the padding rows of a captured step's bucket included.
    pub rows: usize,
    /// Whether the step is captured, or replayed, as a CUDA graph. The launches of such a step depend on `rows` alone.
    pub captured: bool,
    /// `u32 [rows]` token ids.
    pub tokens: u64,
    /// `u32 [rows]` positions.
    pub positions: u64,
    /// `u32 [rows]`: `block · 16 + offset`; `u32::MAX` for padding rows.
    pub slot_mapping: u64,
    /// `u32 [spans][4]`: first row, number of rows, context length, start in `block_tables`.
    pub spans: u64,
    /// `u32` block ids of all sequences.
    pub block_tables: u64,
    /// Spans of one row, split by keys: see [`super::attention`].
    pub decode: Worklist,
    /// Spans of several rows: see [`super::attention`].
    pub prefill: Worklist,
    /// Whether some rows may have DoRA gains.
    pub gains: bool,
    /// The segments: see `lora::delta`.
    pub lora: Worklist,
    /// [`Batch::logit_segments`]: see `lora::delta`.
    pub lora_logits: Worklist,
}

/// A kernel's work items in device memory, built on the host for each step.
#[derive(Debug, Clone, Copy)]
pub struct Worklist {
    /// Device address of its 32-bit words, whose layout is the kernel's.
    pub words: u64,
    /// Words of this step; in a captured step, the most that a step of its bucket may have. 0: nothing to launch.
    pub len: usize,
}

/// The largest step that buffers on a GPU have room for.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub spans: usize,
    /// Block ids of all sequences together.
    pub block_table_len: usize,
}
