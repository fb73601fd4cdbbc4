//! The decoder: resident weights, and the forward pass over a flat batch that mixes prompt chunks and decode rows of many
//! sequences.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::block::{BlockHook, DecoderBlock};
use super::kv::KvCache;
use super::weights::Weights;
use crate::arch::{Heads, ModelConfig, Site};
use crate::lora::delta::{self, Adapters};
use crate::lora::slots::SlotPool;
use crate::ops::attention::attention;
use crate::ops::batch::{Batch, DeviceStep, Segment};
use crate::ops::norm::rms_norm;
use crate::ops::quant::{self, QMatrix};
use crate::ops::rope::RopeTable;
use crate::{Error, Result, gpu};

/// The output of a step.
pub struct StepOutput {
    /// Logits `[logit_rows, vocab]` f32, in the order of [`Batch::logit_rows`].
    pub logits: Tensor,
    /// Hidden states `[hidden_rows, hidden]` f32, in the order of [`Batch::hidden_rows`], if the batch has any. On a GPU their
    /// values are bf16's, as the final norm writes them.
    pub hidden: Option<Tensor>,
}

/// A decoder ready to run: resident weights and rotary tables.
pub struct Decoder {
    weights: Weights,
    rope: RopeTable,
}

impl Decoder {
    /// Builds the rotary table. Errors: a weight whose shape differs from the config.
    pub fn new(weights: Weights) -> Result<Self> {
        weights.check_shapes()?;
        let config = &weights.config;
        let frequencies = config.inverse_frequencies();
        let rope = RopeTable::new(&frequencies, config.max_position_embeddings, weights.norm.device())?;
        Ok(Self { weights, rope })
    }

    /// Shape of the decoder.
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// The resident weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Rotary tables of all positions.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// The decoder block with index `layer`.
    pub fn block(&self, layer: usize) -> DecoderBlock<'_> {
        DecoderBlock::new(&self.weights, layer)
    }

    /// The input of the first block: the residual stream of `tokens` `[T, hidden]` f32, and its norm. `step` is the batch's
    /// metadata on a GPU, if it was uploaded.
    pub fn embed(&self, tokens: &[u32], step: Option<&DeviceStep>) -> Result<(Tensor, Tensor)> {
        let Weights { config, embedding, layers, .. } = &self.weights;
        let residual = quant::gather_rows(embedding, tokens, step)?;
        let x = rms_norm(&residual, &layers[0].attn_norm, config.rms_norm_eps)?;
        Ok((residual, x))
    }

    /// Runs a step: writes the rows' keys and values to the cache and returns the logits and hidden states that the batch asks
    /// for. A row's output depends, bit for bit, on its own sequence and adapters only, as far as the ops keep a row's bits
    /// independent of the batch (see [`crate::ops`]). Errors: a batch that contradicts itself, the cache or the model. After an
    /// error, the cache may hold some of the step's keys.
    pub fn forward(&self, batch: &Batch, kv: &mut KvCache, slots: &SlotPool) -> Result<StepOutput> {
        self.check(batch)?;
        let Weights { config, layers, norm, head, .. } = &self.weights;
        let without_logits = |hidden| {
            let logits = Tensor::zeros((0, head.n()), DType::F32, norm.device())?;
            Ok(StepOutput { logits, hidden })
        };
        if batch.rows() == 0 {
            return without_logits(None);
        }
        let logit_segments = batch.logit_segments();
        let adapters = Adapters { segments: &batch.segments, slots, step: batch.step.as_ref(), logit_rows_only: false };
        let (rope, heads, last) = (&self.rope, config.heads(), layers.len() - 1);
        let mut hook =
            ServingHook { batch, logit_segments: &logit_segments, adapters, kv, rope, heads, layer: 0, last };

        let (mut residual, mut x) = self.embed(&batch.tokens, batch.step.as_ref())?;
        for layer in 0..layers.len() {
            gpu::next_block(norm.device())?;
            hook.layer = layer;
            match self.block(layer).forward(&mut hook, residual, x)? {
                Some(next) => (residual, x) = next,
                None => return without_logits(None),
            }
        }
        let mut hidden = None;
        if !batch.hidden_rows.is_empty() {
            hidden = Some(select_rows(&x, &batch.hidden_rows)?.to_dtype(DType::F32)?);
            if batch.logit_rows.is_empty() {
                return without_logits(hidden);
            }
            if batch.selects_logits() {
                x = select_rows(&x, &batch.logit_rows)?;
                hook.leave_logit_rows();
            }
        }
        // Pairs of the head belong to no block: their layer is the number of layers.
        hook.layer = layers.len();
        Ok(StepOutput { logits: hook.linear(head, &x, Site::Head)?, hidden })
    }

    /// Checks the properties that the ops do not check themselves. Errors: arrays of different lengths, an unknown token id,
    /// a logit row or hidden row outside the batch.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let rows = batch.tokens.len();
        if batch.positions.len() != rows || batch.slot_mapping.len() != rows {
            return Err(Error::internal(format!(
                "{rows} tokens with {} positions and {} cache slots",
                batch.positions.len(),
                batch.slot_mapping.len()
            )));
        }
        let vocab = self.weights.embedding.n();
        if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::invalid(format!("token id {token} is outside the vocabulary of {vocab}")));
        }
        for (kind, selected) in [("logit", &batch.logit_rows), ("hidden", &batch.hidden_rows)] {
            let ascending = selected.is_sorted_by(|a, b| a < b);
            if !ascending || selected.last().is_some_and(|&row| row as usize >= rows) {
                return Err(Error::internal(format!(
                    "{kind} rows {selected:?} are not ascending rows of a batch of {rows}"
                )));
            }
        }
        Ok(())
    }
}

/// The rows of `x [T, n]` with these indices.
fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

/// The decoder block in serving: adapters in slots, and attention over the paged KV cache. It keeps no activations.
struct ServingHook<'a> {
    batch: &'a Batch,
    /// The batch's segments once only the rows whose logits are wanted are left.
    logit_segments: &'a [Segment],
    adapters: Adapters<'a>,
    kv: &'a mut KvCache,
    rope: &'a RopeTable,
    heads: Heads,
    /// The current block.
    layer: usize,
    /// The last block.
    last: usize,
}

impl ServingHook<'_> {
    /// From here on, the rows are those with requested logits.
    fn leave_logit_rows(&mut self) {
        (self.adapters.segments, self.adapters.logit_rows_only) = (self.logit_segments, true);
    }
}

impl BlockHook for ServingHook<'_> {
    fn linear(&mut self, weight: &Arc<QMatrix>, x: &Tensor, site: Site) -> Result<Tensor> {
        // Logits keep f32.
        let dtype = if site == Site::Head { DType::F32 } else { x.dtype() };
        let y = quant::matmul(weight, x, dtype)?;
        self.adapters.pairs(self.layer, site).try_for_each(|pair| pair.prepare_gains(weight))?;
        delta::add_delta(&y, x, &self.adapters, self.layer, site)?;
        Ok(y)
    }

    /// Appends the rows' keys and values to the cache. After the attention of the last block, only the rows with requested
    /// logits continue, unless hidden states are requested: then all rows do.
    fn attention(&mut self, qkv: &Tensor, residual: Tensor) -> Result<Option<(Tensor, Tensor)>> {
        self.kv.append(self.layer, qkv, self.batch, self.rope)?;
        let selects = self.layer == self.last && self.batch.hidden_rows.is_empty() && self.batch.selects_logits();
        if selects && self.batch.logit_rows.is_empty() {
            return Ok(None);
        }
        let attended = attention(qkv, self.kv.layer(self.layer), self.batch, self.heads)?;
        if !selects {
            return Ok(Some((attended, residual)));
        }
        self.leave_logit_rows();
        let rows = &self.batch.logit_rows;
        Ok(Some((select_rows(&attended, rows)?, select_rows(&residual, rows)?)))
    }
}
