//! A step's input as flat arrays, the same on every device.

use std::ops::Range;

/// One step's rows: chunks of prompts and single decode rows of many sequences, back to back.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids `[T]`.
    pub tokens: Vec<u32>,
    /// Position of each row in its sequence `[T]`.
    pub positions: Vec<u32>,
    /// Where each row's key and value go: `block * block_size + offset` `[T]`.
    pub slot_mapping: Vec<u32>,
    /// The sequences, in row order.
    pub spans: Vec<Span>,
    /// Block ids of all sequences, one after another; `Span::table` cuts it.
    pub block_tables: Vec<u32>,
    /// Rows that carry an adapter, in row order and not overlapping; rows outside have none.
    pub segments: Vec<Segment>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
    /// The same on the GPU that runs it, once it was copied there.
    pub step: Option<DeviceStep>,
}

/// One sequence's part of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Its rows in the flat arrays; their positions are consecutive and end at `context_len`.
    pub rows: Range<usize>,
    /// Keys in the cache once this step's are written: the last row attends to positions `0..context_len`.
    pub context_len: usize,
    /// Its block ids in `Batch::block_tables`.
    pub table: Range<usize>,
}

/// Consecutive rows under the same weighted adapters.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Rows in the flat arrays.
    pub rows: Range<usize>,
    /// Adapter slots and their weights: the delta is the weighted sum, in this order.
    pub terms: Vec<(u32, f32)>,
}

impl Batch {
    /// Appends a sequence's next rows: `tokens` at positions from `start`, in `blocks` of `block_size` keys, under `terms`.
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

    /// Rows that run: the sequences', and on a GPU those that fill up a recorded step.
    pub fn rows(&self) -> usize {
        self.step.as_ref().map_or(self.tokens.len(), |step| step.rows)
    }

    /// Whether the logits of only some of the rows are wanted. Recorded steps give them all.
    pub fn selects_logits(&self) -> bool {
        !self.step.as_ref().is_some_and(|step| step.fixed) && self.logit_rows.len() < self.tokens.len()
    }

    /// The segments once only the logit rows are left.
    pub fn logit_segments(&self) -> Vec<Segment> {
        let before = |row: usize| self.logit_rows.partition_point(|&r| (r as usize) < row);
        let kept = self.segments.iter().map(|s| (before(s.rows.start)..before(s.rows.end), &s.terms));
        kept.filter(|(rows, _)| !rows.is_empty()).map(|(rows, terms)| Segment { rows, terms: terms.clone() }).collect()
    }
}

/// Where a step's metadata lies on the device: what the CUDA halves of the ops read beside their tensors.
#[derive(Debug, Clone)]
pub struct DeviceStep {
    /// Rows, those that only fill up a graph's bucket included.
    pub rows: usize,
    /// Whether the step is, or is recorded as, a graph: then no launch may depend on anything but `rows`.
    pub fixed: bool,
    /// `u32 [rows]` token ids.
    pub tokens: u64,
    /// `u32 [rows]` positions.
    pub positions: u64,
    /// `u32 [rows]` `block * 16 + offset`; `u32::MAX` for rows that only fill up.
    pub slot_mapping: u64,
    /// `u32 [spans][4]`: first row, rows, context length, start in `block_tables`.
    pub spans: u64,
    /// `u32` block ids of all sequences.
    pub block_tables: u64,
    /// Sequences with one row, in pieces of keys: see `ops::attention`.
    pub decode: Worklist,
    /// Sequences with more rows, in tiles of queries: see `ops::attention`.
    pub prefill: Worklist,
    /// Whether rows may have DoRA's gains.
    pub gains: bool,
    /// Rows with adapters: see `lora::delta`.
    pub lora: Worklist,
    /// The same once only the rows whose logits are wanted are left, numbered among those.
    pub lora_logits: Worklist,
}

/// Work that kernels take from device memory.
#[derive(Debug, Clone, Copy)]
pub struct Worklist {
    /// Device address of its words; their meaning is the op's.
    pub words: u64,
    /// Words of this step; in a fixed step the most that there can be. 0: nothing to launch.
    pub len: usize,
}

/// How large steps may be.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub spans: usize,
    /// Block ids of all sequences of a step.
    pub table: usize,
}
