//! A step's metadata in device memory, at addresses that never change, so that a captured graph reads each step's own.
//!
//! Everything is 32-bit words in one buffer, filled on the host and copied at once. Regions have fixed starts; the block
//! tables, the only long ones, come last, so that the copy ends where they end.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, PinnedHostSlice};

use crate::gpu::address;
use crate::lora::delta;
use crate::lora::slots::SlotPool;
use crate::ops::attention;
use crate::ops::batch::{Batch, Capacity, DeviceStep, Worklist};
use crate::{Error, Result};

/// What a recorded step is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Rows; a batch with fewer is filled up.
    pub rows: usize,
    /// Whether rows may have adapters.
    pub adapters: bool,
    /// Whether rows' adapters may have DoRA's gains.
    pub gains: bool,
}

/// The buffer and where its regions start, in words.
pub struct StepBuffers {
    device: CudaDevice,
    words: CudaSlice<u32>,
    staging: PinnedHostSlice<u32>,
    capacity: Capacity,
    starts: [usize; REGIONS],
}

/// tokens, positions, slot mapping, spans, decode work, prefill work, adapter work, the same of logit rows, block tables.
const REGIONS: usize = 9;

impl StepBuffers {
    /// Buffers for steps of up to `capacity`.
    pub fn new(device: &CudaDevice, capacity: Capacity) -> Result<Self> {
        let Capacity { rows, spans, table } = capacity;
        let sizes = [
            rows,
            rows,
            rows,
            4 * spans,
            attention::decode_words(capacity),
            attention::prefill_words(capacity),
            delta::work_words(capacity),
            delta::work_words(capacity),
            table,
        ];
        let mut starts = [0; REGIONS];
        let mut end = 0usize;
        for (start, size) in starts.iter_mut().zip(sizes) {
            *start = end;
            // 16-byte loads are allowed from every region's start.
            end += size.next_multiple_of(4);
        }
        let words = device.alloc_zeros::<u32>(end)?;
        // SAFETY: every word is written below before the device reads it, or is never read.
        let staging = unsafe { device.cuda_stream().context().alloc_pinned_with_flags::<u32>(end, 0) }
            .map_err(|e| Error::internal(format!("pinned memory: {e}")))?;
        Ok(Self { device: device.clone(), words, staging, capacity, starts })
    }

    /// Copies a batch's metadata to the device; a bucket makes it a fixed step, filled up to the bucket's rows. The step
    /// before must have been read back, or this would change what it still reads. Errors: the batch is larger than the
    /// capacity or the bucket.
    pub fn upload(&mut self, batch: &Batch, slots: &SlotPool, bucket: Option<Bucket>) -> Result<DeviceStep> {
        let fixed = bucket.is_some();
        let adapters_too = bucket.is_none_or(|b| b.adapters);
        let gained = delta::gained(&batch.segments, slots)?;
        let gains = bucket.map_or(gained, |b| b.gains);
        let rows = bucket.map_or(batch.tokens.len(), |b| b.rows);
        if rows < batch.tokens.len() || !adapters_too && !batch.segments.is_empty() || gained && !gains {
            return Err(Error::internal(format!(
                "{} rows, {} of them with adapters, in {bucket:?}",
                batch.tokens.len(),
                batch.segments.len()
            )));
        }
        let Capacity { rows: most_rows, spans: most_spans, table } = self.capacity;
        if rows > most_rows || batch.spans.len() > most_spans || batch.block_tables.len() > table {
            return Err(Error::internal(format!(
                "a step of {rows} rows, {} sequences and {} block ids; there is room for {:?}",
                batch.spans.len(),
                batch.block_tables.len(),
                self.capacity
            )));
        }
        let spans = batch
            .spans
            .iter()
            .flat_map(|s| [s.rows.start as u32, s.rows.len() as u32, s.context_len as u32, s.table.start as u32]);
        let decode = attention::decode_work(batch, bucket.map(|b| b.rows));
        let prefill = attention::prefill_work(batch);
        let adapters = delta::work(&batch.segments, slots)?;
        let logit_adapters = delta::work(&batch.logit_segments(), slots)?;
        let lens = [decode.len(), prefill.len(), adapters.len(), logit_adapters.len()];

        let to = self.staging.as_mut_slice().map_err(|e| Error::internal(format!("pinned memory: {e}")))?;
        let starts = self.starts;
        let mut fill = |region: usize, values: &mut dyn Iterator<Item = u32>| -> Result<()> {
            let end = starts.get(region + 1).copied().unwrap_or(to.len());
            for (to, value) in to[starts[region]..end].iter_mut().zip(&mut *values) {
                *to = value;
            }
            match values.next() {
                None => Ok(()),
                Some(_) => Err(Error::internal(format!("region {region} of a step's metadata is full"))),
            }
        };
        let padding = rows - batch.tokens.len();
        let pad = |value: u32| std::iter::repeat_n(value, padding);
        fill(0, &mut batch.tokens.iter().copied().chain(pad(0)))?;
        fill(1, &mut batch.positions.iter().copied().chain(pad(0)))?;
        fill(2, &mut batch.slot_mapping.iter().copied().chain(pad(u32::MAX)))?;
        fill(3, &mut spans.into_iter())?;
        fill(4, &mut decode.into_iter())?;
        fill(5, &mut prefill.into_iter())?;
        fill(6, &mut adapters.into_iter())?;
        fill(7, &mut logit_adapters.into_iter())?;
        fill(8, &mut batch.block_tables.iter().copied())?;

        let used = starts[8] + batch.block_tables.len();
        self.device.memcpy_htod(&to[..used], &mut self.words.slice_mut(..used))?;
        let at = |region: usize| address(&self.words) + 4 * starts[region] as u64;
        let work = |region: usize, len: usize| Worklist {
            words: at(region),
            len: if fixed { starts[region + 1] - starts[region] } else { len },
        };
        let none = |list: Worklist| Worklist { len: 0, ..list };
        Ok(DeviceStep {
            rows,
            fixed,
            tokens: at(0),
            positions: at(1),
            slot_mapping: at(2),
            spans: at(3),
            decode: work(4, lens[0]),
            // A fixed step has decode rows only.
            prefill: if fixed { none(work(5, 0)) } else { work(5, lens[1]) },
            gains,
            lora: if adapters_too { work(6, lens[2]) } else { none(work(6, 0)) },
            lora_logits: if adapters_too { work(7, lens[3]) } else { none(work(7, 0)) },
            block_tables: at(8),
        })
    }
}
