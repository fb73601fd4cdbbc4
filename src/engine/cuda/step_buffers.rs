//! A step's metadata in device memory, at addresses that never change, so that a captured graph reads the current step's metadata.
//!
//! Everything is 32-bit words in one buffer, filled on the host and copied at once. The block tables, the only long region, come
//! last, so that the copy ends where they end.

use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use crate::gpu::pinned::PinnedBuffer;
use crate::gpu::{Context, address};
use crate::lora::delta;
use crate::lora::slots::SlotPool;
use crate::ops::attention;
use crate::ops::batch::{Batch, Capacity, DeviceStep, Span, Worklist};
use crate::{Error, Result};

/// The decode steps that one captured graph runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Rows; a batch with fewer is padded.
    pub rows: usize,
    /// Whether rows may have adapters.
    pub adapters: bool,
    /// Whether rows' adapters may have DoRA's gains.
    pub gains: bool,
}

/// The regions of the buffer, in order.
#[derive(Debug, Clone, Copy)]
enum StepRegion {
    Tokens,
    Positions,
    SlotMapping,
    Spans,
    DecodeWork,
    PrefillWork,
    AdapterWork,
    /// As [`StepRegion::AdapterWork`], for the last layer, where only the rows with requested logits are left.
    LogitAdapterWork,
    BlockTables,
}

impl StepRegion {
    const ALL: [Self; 9] = [
        Self::Tokens,
        Self::Positions,
        Self::SlotMapping,
        Self::Spans,
        Self::DecodeWork,
        Self::PrefillWork,
        Self::AdapterWork,
        Self::LogitAdapterWork,
        Self::BlockTables,
    ];

    /// Words of the region in steps of up to `capacity`.
    fn words(self, capacity: Capacity) -> usize {
        match self {
            Self::Tokens | Self::Positions | Self::SlotMapping => capacity.rows,
            Self::Spans => 4 * capacity.spans,
            Self::DecodeWork => attention::decode_words(capacity),
            Self::PrefillWork => attention::prefill_words(capacity),
            Self::AdapterWork | Self::LogitAdapterWork => delta::work_words(capacity),
            Self::BlockTables => capacity.block_table_len,
        }
    }
}

/// The buffer on both sides.
pub struct StepBuffers {
    gpu: Arc<Context>,
    words: CudaSlice<u32>,
    staging: PinnedBuffer<u32>,
    capacity: Capacity,
    regions: Regions,
}

/// Where regions start, in words, and where the last one ends.
struct Regions([usize; StepRegion::ALL.len() + 1]);

/// The properties of a step on which its launches depend, in addition to the worklists.
struct StepShape {
    /// Rows, padding included.
    rows: usize,
    /// Whether the step is captured or replayed as a graph.
    captured: bool,
    adapters: bool,
    gains: bool,
}

/// The worklists of a step.
struct StepWork {
    decode: Vec<u32>,
    prefill: Vec<u32>,
    adapters: Vec<u32>,
    logit_adapters: Vec<u32>,
}

impl StepWork {
    fn new(batch: &Batch, slots: &SlotPool, bucket: Option<Bucket>, deterministic: bool) -> Result<Self> {
        Ok(Self {
            decode: attention::decode_work(batch, bucket.map(|b| b.rows), deterministic),
            prefill: attention::prefill_work(batch, deterministic),
            adapters: delta::work(&batch.segments, slots)?,
            logit_adapters: delta::work(&batch.logit_segments(), slots)?,
        })
    }
}

impl Regions {
    fn new(capacity: Capacity) -> Self {
        let mut starts = [0; StepRegion::ALL.len() + 1];
        for (i, region) in StepRegion::ALL.into_iter().enumerate() {
            // 16-byte loads are allowed from every region's start.
            starts[i + 1] = starts[i] + region.words(capacity).next_multiple_of(4);
        }
        Self(starts)
    }

    /// The words of a region.
    fn range(&self, region: StepRegion) -> Range<usize> {
        self.0[region as usize]..self.0[region as usize + 1]
    }

    /// Words of all regions.
    fn len(&self) -> usize {
        self.0[StepRegion::ALL.len()]
    }

    /// Writes a step's metadata into `to`, its rows padded to `rows`. Errors: a region is too small.
    fn fill(&self, to: &mut [u32], batch: &Batch, work: &StepWork, rows: usize) -> Result<()> {
        let mut write = |region: StepRegion, words: &mut dyn Iterator<Item = u32>| {
            for (to, word) in to[self.range(region)].iter_mut().zip(&mut *words) {
                *to = word;
            }
            match words.next() {
                None => Ok(()),
                Some(_) => Err(Error::internal(format!("the region {region:?} of a step's metadata is full"))),
            }
        };
        let padding = |value: u32| repeat_n(value, rows - batch.tokens.len());
        write(StepRegion::Tokens, &mut batch.tokens.iter().copied().chain(padding(0)))?;
        write(StepRegion::Positions, &mut batch.positions.iter().copied().chain(padding(0)))?;
        write(StepRegion::SlotMapping, &mut batch.slot_mapping.iter().copied().chain(padding(u32::MAX)))?;
        let span = |s: &Span| [s.rows.start, s.rows.len(), s.context_len, s.table.start].map(|word| word as u32);
        write(StepRegion::Spans, &mut batch.spans.iter().flat_map(span))?;
        write(StepRegion::DecodeWork, &mut work.decode.iter().copied())?;
        write(StepRegion::PrefillWork, &mut work.prefill.iter().copied())?;
        write(StepRegion::AdapterWork, &mut work.adapters.iter().copied())?;
        write(StepRegion::LogitAdapterWork, &mut work.logit_adapters.iter().copied())?;
        write(StepRegion::BlockTables, &mut batch.block_tables.iter().copied())
    }
}

impl StepBuffers {
    /// Buffers for steps of up to `capacity`. Errors: no memory.
    pub fn new(device: &CudaDevice, capacity: Capacity) -> Result<Self> {
        let gpu = Context::of(device)?;
        let regions = Regions::new(capacity);
        let words = device.alloc_zeros::<u32>(regions.len())?;
        let staging = PinnedBuffer::new(&gpu, regions.len())?;
        Ok(Self { gpu, words, staging, capacity, regions })
    }

    /// Copies a batch's metadata to the device, in the order of its stream. A bucket makes it a captured step, padded to the
    /// bucket's rows. Waits until the copy before has been made, which may be queued behind an earlier step: steps without
    /// logits follow one another without being read back. Errors: the batch is larger than the capacity or the bucket.
    pub fn upload(&mut self, batch: &Batch, slots: &SlotPool, bucket: Option<Bucket>) -> Result<DeviceStep> {
        let shape = self.check(batch, slots, bucket)?;
        let work = StepWork::new(batch, slots, bucket, self.gpu.deterministic)?;
        let host = self.staging.as_mut_slice()?;
        self.regions.fill(host, batch, &work, shape.rows)?;
        let used = self.regions.range(StepRegion::BlockTables).start + batch.block_tables.len();
        self.staging.upload(&self.gpu, used, &mut self.words)?;
        Ok(self.describe(&shape, &work))
    }

    /// Determines the shape of a batch's step. Errors: the batch is larger than the capacity or the bucket.
    fn check(&self, batch: &Batch, slots: &SlotPool, bucket: Option<Bucket>) -> Result<StepShape> {
        let gains = delta::has_dora_gains(&batch.segments, slots)?;
        let shape = StepShape {
            rows: bucket.map_or(batch.tokens.len(), |b| b.rows),
            captured: bucket.is_some(),
            adapters: bucket.is_none_or(|b| b.adapters),
            gains: bucket.map_or(gains, |b| b.gains),
        };
        let adapters_fit = (shape.adapters || batch.segments.is_empty()) && (shape.gains || !gains);
        if shape.rows < batch.tokens.len() || !adapters_fit {
            return Err(Error::internal(format!(
                "{} rows, with {} adapter segments, in {bucket:?}",
                batch.tokens.len(),
                batch.segments.len()
            )));
        }
        let Capacity { rows, spans, block_table_len } = self.capacity;
        if shape.rows > rows || batch.spans.len() > spans || batch.block_tables.len() > block_table_len {
            return Err(Error::internal(format!(
                "a step of {} rows, {} sequences and {} block ids exceeds {:?}",
                shape.rows,
                batch.spans.len(),
                batch.block_tables.len(),
                self.capacity
            )));
        }
        Ok(shape)
    }

    /// The addresses of the step's metadata on the device.
    fn describe(&self, shape: &StepShape, work: &StepWork) -> DeviceStep {
        let at = |region: StepRegion| address(&self.words) + 4 * self.regions.range(region).start as u64;
        // A captured step's launches depend on the room for work instead.
        let list = |region: StepRegion, words: &[u32]| {
            let room = self.regions.range(region).len();
            Worklist { words: at(region), len: if shape.captured { room } else { words.len() } }
        };
        let list_if = |present: bool, region: StepRegion, words: &[u32]| match present {
            true => list(region, words),
            false => Worklist { words: at(region), len: 0 },
        };
        DeviceStep {
            rows: shape.rows,
            captured: shape.captured,
            tokens: at(StepRegion::Tokens),
            positions: at(StepRegion::Positions),
            slot_mapping: at(StepRegion::SlotMapping),
            spans: at(StepRegion::Spans),
            decode: list(StepRegion::DecodeWork, &work.decode),
            // A captured step has decode rows only.
            prefill: list_if(!shape.captured, StepRegion::PrefillWork, &work.prefill),
            gains: shape.gains,
            lora: list_if(shape.adapters, StepRegion::AdapterWork, &work.adapters),
            lora_logits: list_if(shape.adapters, StepRegion::LogitAdapterWork, &work.logit_adapters),
            block_tables: at(StepRegion::BlockTables),
        }
    }
}
