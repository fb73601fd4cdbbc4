//! How a step runs on a GPU: decode steps as recorded graphs, steps with prompts launch by launch; launch by launch all of them
//! where bits must not depend on the step.

use candle_core::{CudaDevice, Device, Tensor};

use super::graph::{Graphs, ROWS};
use super::step_buffers::{Bucket, StepBuffers};
use crate::Result;
use crate::arch::ModelConfig;
use crate::gpu::deterministic;
use crate::lora::delta;
use crate::lora::slots::SlotPool;
use crate::model::decoder::Decoder;
use crate::model::kv::KvCache;
use crate::ops::batch::Batch;
use crate::ops::batch::Capacity;
use crate::ops::quant;

/// The device's side of the runner.
pub struct Steps {
    /// Metadata of decode steps, small so that one copy is quick, and at the addresses that graphs know.
    decode: StepBuffers,
    /// Metadata of the others.
    mixed: StepBuffers,
    graphs: Graphs,
    /// Rows of the largest graph.
    most_rows: usize,
}

impl Steps {
    /// For steps of up to `rows` rows of `spans` sequences with `table` cache blocks in all. `None` on the CPU, which needs none
    /// of it. Errors: no memory for it.
    pub fn on(device: &Device, model: &ModelConfig, rows: usize, spans: usize, table: usize) -> Result<Option<Self>> {
        match device {
            Device::Cuda(device) => Self::new(device, model, Capacity { rows, spans, table }).map(Some),
            _ => Ok(None),
        }
    }

    fn new(device: &CudaDevice, model: &ModelConfig, capacity: Capacity) -> Result<Self> {
        let most_rows = ROWS.into_iter().find(|&rows| rows >= capacity.spans).unwrap_or(ROWS[ROWS.len() - 1]);
        let decode = Capacity { rows: most_rows, spans: most_rows.min(capacity.spans), table: capacity.table };
        Ok(Self {
            decode: StepBuffers::new(device, decode)?,
            mixed: StepBuffers::new(device, capacity)?,
            graphs: Graphs::new(device.clone(), block_bytes(model, most_rows))?,
            most_rows,
        })
    }

    /// Records a graph for every bucket that will be replayed, so that no request waits for it; those with DoRA's gains, which few
    /// servers need, come with the first step in each. `done` gets the share done, in [0, 1].
    pub fn record(&mut self, model: &Decoder, kv: &mut KvCache, slots: &SlotPool, done: impl Fn(f32)) -> Result<()> {
        if deterministic() {
            return Ok(());
        }
        // The largest first: what grows with the rows is then allocated once.
        let all: Vec<usize> = ROWS.into_iter().filter(|&rows| rows <= self.most_rows).rev().collect();
        for (i, &rows) in all.iter().enumerate() {
            for adapters in [true, false] {
                let bucket = Bucket { rows, adapters, gains: false };
                let step = self.decode.upload(&Batch::default(), slots, Some(bucket))?;
                let batch = Batch { step: Some(step), ..Batch::default() };
                model.forward(&batch, kv, slots)?;
                self.graphs.record(bucket, || model.forward(&batch, kv, slots))?;
            }
            done((i + 1) as f32 / all.len() as f32);
        }
        Ok(())
    }

    /// Logits `[logit rows, vocab]` of a batch, on the device; good until the next call.
    pub fn run(&mut self, batch: &Batch, model: &Decoder, kv: &mut KvCache, slots: &mut SlotPool) -> Result<Tensor> {
        model.check(batch)?;
        for (slot, _) in batch.segments.iter().flat_map(|segment| &segment.terms) {
            slots.prepare(*slot, model.weights())?;
        }
        let rows = batch.tokens.len();
        let decode = batch.spans.len() == rows && batch.logit_rows.len() == rows && rows > 0;
        if decode && rows <= self.most_rows && !deterministic() {
            let fitting = ROWS.into_iter().find(|&bucket| bucket >= rows).unwrap_or(self.most_rows);
            let gains = delta::gained(&batch.segments, slots)?;
            let bucket = Bucket { rows: fitting, adapters: !batch.segments.is_empty(), gains };
            let step = self.decode.upload(batch, slots, Some(bucket))?;
            let logits = match self.graphs.replay(bucket)? {
                Some(logits) => logits,
                None => {
                    let batch = Batch { step: Some(step), ..batch.clone() };
                    let logits = model.forward(&batch, kv, slots)?;
                    // Without a recording such steps run launch by launch, as this one did.
                    if let Err(error) = self.graphs.record(bucket, || model.forward(&batch, kv, slots)) {
                        tracing::warn!(error = %format_args!("{error:#}"), "a step is not recorded");
                    }
                    logits
                }
            };
            return Ok(logits.narrow(0, 0, rows)?);
        }
        let step = self.mixed.upload(batch, slots, None)?;
        model.forward(&Batch { step: Some(step), ..batch.clone() }, kv, slots)
    }
}

/// Bytes that the ops of a decoder block, or of the head after the last, make of `rows` rows, generously.
fn block_bytes(model: &ModelConfig, rows: usize) -> usize {
    let (hidden, heads) = (model.hidden_size, model.heads());
    let bf16 = heads.qkv_width() + heads.query * heads.dim + 5 * hidden + 3 * model.intermediate_size;
    let f32 = 3 * hidden + model.vocab_size;
    let (attended, inner) = (heads.query * heads.dim, model.intermediate_size);
    let products = [(heads.qkv_width(), hidden), (hidden, attended), (2 * inner, hidden), (hidden, inner)];
    let work: usize = products.iter().map(|&(n, k)| quant::workspace_bytes(n, k, rows)).sum();
    2 * rows * bf16 + 4 * rows * f32 + work + (4 << 20)
}
