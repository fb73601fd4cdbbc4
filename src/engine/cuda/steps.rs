//! Runs steps on a GPU: replays captured graphs for decode steps, and launches kernel by kernel for steps with prompts. On a device
//! opened as deterministic, all steps are launched kernel by kernel.

use std::sync::Arc;

use candle_core::{CudaDevice, Device, Tensor};

use super::step_buffers::{Bucket, StepBuffers};
use crate::Result;
use crate::arch::ModelConfig;
use crate::gpu::Context;
use crate::gpu::graph::GraphCache;
use crate::lora::delta;
use crate::lora::slots::SlotPool;
use crate::model::decoder::{Decoder, StepOutput};
use crate::model::kv::KvCache;
use crate::ops::batch::{Batch, Capacity};
use crate::ops::quant;

/// Batch sizes captured as CUDA graphs; a decode step is padded to the next one.
const ROWS: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// The device's side of the runner.
pub struct Steps {
    gpu: Arc<Context>,
    /// Metadata of decode steps: small, so that one copy is quick, and at the addresses that graphs contain.
    decode: StepBuffers,
    /// Metadata of the other steps.
    mixed: StepBuffers,
    /// Graphs of decode steps, which read the metadata of the step that they run.
    graphs: GraphCache<Bucket>,
    /// Rows of the largest graph.
    max_rows: usize,
}

impl Steps {
    /// Steps of up to `rows` rows of `spans` sequences with `block_table_len` KV blocks in all. `None` on the CPU, which needs nothing
    /// of this. Errors: no memory.
    pub fn on(
        device: &Device,
        model: &ModelConfig,
        rows: usize,
        spans: usize,
        block_table_len: usize,
    ) -> Result<Option<Self>> {
        match device {
            Device::Cuda(device) => Self::new(device, model, Capacity { rows, spans, block_table_len }).map(Some),
            _ => Ok(None),
        }
    }

    fn new(device: &CudaDevice, model: &ModelConfig, capacity: Capacity) -> Result<Self> {
        let gpu = Context::of(device)?;
        let max_rows = ROWS.into_iter().find(|&rows| rows >= capacity.spans).unwrap_or(ROWS[ROWS.len() - 1]);
        let decode =
            Capacity { rows: max_rows, spans: max_rows.min(capacity.spans), block_table_len: capacity.block_table_len };
        Ok(Self {
            decode: StepBuffers::new(device, decode)?,
            mixed: StepBuffers::new(device, capacity)?,
            graphs: GraphCache::new(gpu.clone(), block_bytes(model, max_rows))?,
            gpu,
            max_rows,
        })
    }

    /// Captures a graph for every bucket, so that no request waits for it. Buckets with DoRA's gains, which few servers need,
    /// are captured with the first step in each. `done` gets the share done, in [0, 1].
    pub fn capture(&mut self, model: &Decoder, kv: &mut KvCache, slots: &SlotPool, done: impl Fn(f32)) -> Result<()> {
        if self.gpu.deterministic {
            return Ok(());
        }
        // The largest first: memory that grows with the rows is then allocated once.
        let all: Vec<usize> = ROWS.into_iter().filter(|&rows| rows <= self.max_rows).rev().collect();
        for (i, &rows) in all.iter().enumerate() {
            for adapters in [true, false] {
                let bucket = Bucket { rows, adapters, gains: false };
                let step = self.decode.upload(&Batch::default(), slots, Some(bucket))?;
                let batch = Batch { step: Some(step), ..Batch::default() };
                model.forward(&batch, kv, slots)?;
                self.graphs.capture(bucket, || Ok(model.forward(&batch, kv, slots)?.logits))?;
            }
            done((i + 1) as f32 / all.len() as f32);
        }
        Ok(())
    }

    /// The output of a batch, on the device; valid until the next call.
    pub fn run(
        &mut self,
        batch: &Batch,
        model: &Decoder,
        kv: &mut KvCache,
        slots: &mut SlotPool,
    ) -> Result<StepOutput> {
        model.check(batch)?;
        for (slot, _) in batch.segments.iter().flat_map(|segment| &segment.terms) {
            slots.prepare_gains(*slot, model.weights())?;
        }
        let rows = batch.tokens.len();
        let decode = batch.spans.len() == rows && batch.logit_rows.len() == rows && rows > 0;
        if decode && batch.hidden_rows.is_empty() && rows <= self.max_rows && !self.gpu.deterministic {
            let logits = self.run_decode(batch, model, kv, slots)?;
            return Ok(StepOutput { logits, hidden: None });
        }
        let step = self.mixed.upload(batch, slots, None)?;
        model.forward(&Batch { step: Some(step), ..batch.clone() }, kv, slots)
    }

    /// Runs a decode step as the graph of its bucket, which is captured first if need be.
    fn run_decode(&mut self, batch: &Batch, model: &Decoder, kv: &mut KvCache, slots: &SlotPool) -> Result<Tensor> {
        let rows = batch.tokens.len();
        let bucket = Bucket {
            rows: ROWS.into_iter().find(|&bucket| bucket >= rows).unwrap_or(self.max_rows),
            adapters: !batch.segments.is_empty(),
            gains: delta::has_dora_gains(&batch.segments, slots)?,
        };
        let step = self.decode.upload(batch, slots, Some(bucket))?;
        let logits = match self.graphs.replay(&bucket)? {
            Some(logits) => logits,
            None => {
                let batch = Batch { step: Some(step), ..batch.clone() };
                let logits = model.forward(&batch, kv, slots)?.logits;
                // Without a graph such steps run launch by launch, as this one did.
                let again = || Ok(model.forward(&batch, kv, slots)?.logits);
                if let Err(error) = self.graphs.capture(bucket, again) {
                    tracing::warn!(error = %format_args!("{error:#}"), "a step could not be captured as a CUDA graph");
                }
                logits
            }
        };
        Ok(logits.narrow(0, 0, rows)?)
    }
}

/// An upper bound of the bytes that the ops of a decoder block, or of the head after the last, output for `rows` rows.
fn block_bytes(model: &ModelConfig, rows: usize) -> usize {
    let (hidden, heads) = (model.hidden_size, model.heads());
    let bf16 = heads.qkv_width() + heads.query * heads.dim + 5 * hidden + 3 * model.intermediate_size;
    let f32 = 3 * hidden + model.vocab_size;
    let (attended, inner) = (heads.query * heads.dim, model.intermediate_size);
    let products = [(heads.qkv_width(), hidden), (hidden, attended), (2 * inner, hidden), (hidden, inner)];
    let work: usize = products.iter().map(|&(n, k)| quant::workspace_bytes(n, k, rows)).sum();
    2 * rows * bf16 + 4 * rows * f32 + work + (4 << 20)
}
