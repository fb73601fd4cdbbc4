//! A decoder block in training: the values that the forward pass saves, and the backward pass.
//!
//! The forward is [`crate::model::block`]'s, as in serving. Its input is always kept (gradient checkpointing, Chen et al.,
//! 2016), and its activations where there is memory for them. Otherwise the backward pass recomputes them, except the
//! down projection, whose output only DoRA's gradient needs.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::adapter::TrainableAdapter;
use crate::arch::{Heads, Site};
use crate::model::block::{BlockActivations, BlockHook};
use crate::model::decoder::Decoder;
use crate::model::weights::LayerWeights;
use crate::ops::attention::{causal, causal_backward};
use crate::ops::dropout::dropout;
use crate::ops::gemm::gemm;
use crate::ops::heads::{self, QkNorm};
use crate::ops::norm::{rms_norm, rms_norm_backward};
use crate::ops::quant::{self, QMatrix};
use crate::ops::rope::{apply_rope, apply_rope_backward};
use crate::ops::swiglu::swiglu_backward;
use crate::{Error, Result};

/// The rows of a pass: sequences of several jobs, back to back.
#[derive(Default)]
pub struct PassRows {
    /// Rows of each sequence; together they are all rows, in order.
    pub sequences: Vec<Range<usize>>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Rows of each job; together they are all rows, in order.
    pub segments: Vec<TrainSegment>,
}

/// Rows of one job.
pub struct TrainSegment {
    pub rows: Range<usize>,
    pub adapter: Arc<TrainableAdapter>,
    /// Dropout's probability and a seed that is unique to the pass; `None` when measuring.
    pub dropout: Option<(f32, u64)>,
}

/// One block of a model on the rows of a pass.
pub struct TrainBlock<'a> {
    pub model: &'a Decoder,
    pub layer: usize,
    pub rows: &'a PassRows,
}

/// The activations of a block that its backward pass needs.
pub struct SavedActivations {
    /// In the order of [`Site`].
    linears: Vec<SavedLinear>,
    attention: SavedAttention,
    /// Residual stream between attention and MLP.
    residual: Tensor,
    /// Input of SwiGLU.
    gate_up: Tensor,
}

/// The values that the backward of a linear layer with adapters reads.
struct SavedLinear {
    /// The input.
    x: Tensor,
    /// `x · Aᵀ` of each segment, where it has pairs.
    shrunk: Vec<Option<Tensor>>,
    /// The output before DoRA's gains, where there are any.
    before_gain: Option<Tensor>,
}

/// The values that the backward of attention reads, except the output of attention.
struct SavedAttention {
    /// After RoPE.
    qkv: Tensor,
    /// `qkv` before the QK norms, where the model has them.
    before_qk_norm: Option<Tensor>,
    /// Log-sum-exp of each query's scores.
    lse: Tensor,
}

impl SavedActivations {
    /// Bytes of what grows with the rows, without `x · Aᵀ`.
    pub fn bytes(&self) -> usize {
        let Self { linears, attention: SavedAttention { qkv, before_qk_norm, lse }, residual, gate_up } = self;
        let linears = linears.iter().flat_map(|linear| [&linear.x].into_iter().chain(&linear.before_gain));
        let all = [qkv, lse, residual, gate_up].into_iter().chain(before_qk_norm).chain(linears);
        all.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

/// The decoder block in training: trainable pairs, causal attention within each sequence, and activations for the backward.
struct TrainingHook<'a> {
    block: &'a TrainBlock<'a>,
    /// Of the sites so far.
    linears: Vec<SavedLinear>,
    before_qk_norm: Option<Tensor>,
    attention: Option<SavedAttention>,
}

impl BlockHook for TrainingHook<'_> {
    fn linear(&mut self, weight: &Arc<QMatrix>, x: &Tensor, site: Site) -> Result<Tensor> {
        let (y, saved) = self.block.linear(weight, x, site)?;
        self.linears.push(saved);
        Ok(y)
    }

    fn bias_and_qk_norm(
        &mut self,
        qkv: &Tensor,
        bias: Option<&Tensor>,
        norm: Option<QkNorm>,
        heads: Heads,
    ) -> Result<()> {
        heads::bias_and_qk_norm(qkv, bias, None, heads)?;
        self.before_qk_norm = norm.map(|_| qkv.copy()).transpose()?;
        heads::bias_and_qk_norm(qkv, None, norm, heads)
    }

    fn attention(&mut self, qkv: &Tensor, residual: Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let TrainBlock { model, rows, .. } = self.block;
        let heads = model.config().heads();
        apply_rope(qkv, heads.query + heads.kv, &rows.positions, model.rope())?;
        let (attended, lse) = causal(qkv, &rows.sequences, heads)?;
        self.attention = Some(SavedAttention { qkv: qkv.clone(), before_qk_norm: self.before_qk_norm.take(), lse });
        Ok(Some((attended, residual)))
    }
}

impl<'a> TrainingHook<'a> {
    fn new(block: &'a TrainBlock<'a>) -> Self {
        Self { block, linears: Vec::new(), before_qk_norm: None, attention: None }
    }

    fn forward_before_down(&mut self, residual: &Tensor, x: Tensor) -> Result<BlockActivations> {
        let block = self.block.model.block(self.block.layer);
        let activations = block.forward_before_down(self, residual.clone(), x)?;
        activations.ok_or_else(|| Error::internal("a training block without rows"))
    }

    fn saved(self, activations: BlockActivations) -> Result<SavedActivations> {
        let BlockActivations { residual, gate_up, .. } = activations;
        let attention = self.attention.ok_or_else(|| Error::internal("a training block without attention"))?;
        Ok(SavedActivations { linears: self.linears, attention, residual, gate_up })
    }
}

impl TrainBlock<'_> {
    fn weights(&self) -> &LayerWeights {
        &self.model.weights().layers[self.layer]
    }

    /// Runs the block on the residual stream and its norm. Returns the activations for the backward, and the residual stream
    /// and its norm after the block.
    pub fn forward(&self, residual: &Tensor, x: Tensor) -> Result<(SavedActivations, Tensor, Tensor)> {
        let mut hook = TrainingHook::new(self);
        let activations = hook.forward_before_down(residual, x)?;
        let block = self.model.block(self.layer);
        let (residual, x) = block.forward_down(&mut hook, &activations.residual, &activations.mlp_activation)?;
        Ok((hook.saved(activations)?, residual, x))
    }

    /// The activations of [`Self::forward`] again, without the last product unless the backward needs its result.
    fn recompute(&self, residual: &Tensor) -> Result<SavedActivations> {
        let weights = self.weights();
        let x = rms_norm(residual, &weights.attn_norm, self.model.config().rms_norm_eps)?;
        let mut hook = TrainingHook::new(self);
        let activations = hook.forward_before_down(residual, x)?;
        let mlp_activation = &activations.mlp_activation;
        if self.has_gain(Site::Down) {
            hook.linear(&weights.down, mlp_activation, Site::Down)?;
        } else {
            let shrunk = self.shrink(mlp_activation, Site::Down)?;
            hook.linears.push(SavedLinear { x: mlp_activation.clone(), shrunk, before_gain: None });
        }
        hook.saved(activations)
    }

    /// From the residual stream before the block and the gradient of the one after it, the gradient of the one before it. Adds
    /// to the gradients of the pairs. Without `saved`, the activations are computed again.
    pub fn backward(&self, residual: &Tensor, saved: Option<SavedActivations>, gradient: &Tensor) -> Result<Tensor> {
        let (weights, config) = (self.weights(), self.model.config());
        let (heads, eps) = (config.heads(), config.rms_norm_eps);
        let saved = saved.map_or_else(|| self.recompute(residual), Ok)?;
        let SavedAttention { qkv, before_qk_norm, lse } = &saved.attention;
        let dtype = qkv.dtype();
        let linear = |weight, dy, site: Site| self.linear_backward(weight, &saved.linears[site as usize], dy, site);

        let dhidden = linear(&weights.down, gradient.to_dtype(dtype)?, Site::Down)?;
        let dgate_up = swiglu_backward(&saved.gate_up, &dhidden)?;
        let dnormed = linear(&weights.gate_up, dgate_up, Site::GateUp)?;
        let gradient = rms_norm_backward(&saved.residual, &weights.ffn_norm, &dnormed, Some(gradient), eps)?;

        let dattended = linear(&weights.o, gradient.to_dtype(dtype)?, Site::O)?;
        let attended = &saved.linears[Site::O as usize].x;
        let dqkv = causal_backward(qkv, attended, lse, &dattended, &self.rows.sequences, heads)?;
        apply_rope_backward(&dqkv, heads.query + heads.kv, &self.rows.positions, self.model.rope())?;
        if let (Some(before_qk_norm), Some((query, key))) = (before_qk_norm, &weights.qk_norm) {
            heads::qk_norm_backward(&dqkv, before_qk_norm, QkNorm { query, key, eps }, heads)?;
        }
        let dx = linear(&weights.qkv, dqkv, Site::Qkv)?;
        rms_norm_backward(residual, &weights.attn_norm, &dx, Some(&gradient), eps)
    }

    /// `x · Wᵀ` plus the pairs' deltas, times DoRA's gains.
    fn linear(&self, weight: &QMatrix, x: &Tensor, site: Site) -> Result<(Tensor, SavedLinear)> {
        let y = quant::matmul(weight, x, x.dtype())?;
        let shrunk = self.shrink(x, site)?;
        for (segment, shrunk) in self.rows.segments.iter().zip(&shrunk) {
            let (Some(shrunk), Some(pairs)) = (shrunk, segment.adapter.site(self.layer, site)) else { continue };
            let (y, scale) = (segment.rows_of(&y)?, segment.adapter.scale);
            for (i, module) in pairs.modules.iter().enumerate() {
                let y = y.narrow(1, module.offset, module.n)?;
                gemm(&y, 1.0, &segment.columns_of(shrunk, i)?, &module.b.t()?, scale)?;
            }
        }
        let x = x.clone();
        match self.has_gain(site) {
            true => Ok((self.apply_gains(&y, site)?, SavedLinear { x, shrunk, before_gain: Some(y) })),
            false => Ok((y, SavedLinear { x, shrunk, before_gain: None })),
        }
    }

    /// `x · Aᵀ` of every segment with pairs.
    fn shrink(&self, x: &Tensor, site: Site) -> Result<Vec<Option<Tensor>>> {
        let shrink = |segment: &TrainSegment| {
            let Some(pairs) = segment.adapter.site(self.layer, site) else { return Ok(None) };
            let shrunk = Tensor::zeros((segment.rows.len(), pairs.a.dims()[0]), x.dtype(), x.device())?;
            gemm(&shrunk, 0.0, &self.dropped(segment.rows_of(x)?, segment, site)?, &pairs.a.t()?, 1.0)?;
            Ok(Some(shrunk))
        };
        self.rows.segments.iter().map(shrink).collect()
    }

    /// A segment's input of the pairs, or the gradient that comes through them, after dropout.
    fn dropped(&self, x: Tensor, segment: &TrainSegment, site: Site) -> Result<Tensor> {
        let Some((p, seed)) = segment.dropout else { return Ok(x) };
        dropout(&x, p, seed.wrapping_add((Site::ALL.len() * self.layer + site as usize) as u64))
    }

    /// The gradient of a linear's input, given that of its output. Adds to the gradients of the pairs.
    fn linear_backward(&self, weight: &QMatrix, saved: &SavedLinear, dy: Tensor, site: Site) -> Result<Tensor> {
        let dy = match &saved.before_gain {
            Some(before_gain) => {
                self.magnitudes_backward(before_gain, &dy, site)?;
                self.apply_gains(&dy, site)?
            }
            None => dy,
        };
        let dx = quant::matmul_transposed(weight, &dy, dy.dtype())?;
        for (segment, shrunk) in self.rows.segments.iter().zip(&saved.shrunk) {
            let (Some(shrunk), Some(pairs)) = (shrunk, segment.adapter.site(self.layer, site)) else { continue };
            let (dy, scale) = (segment.rows_of(&dy)?, segment.adapter.scale);
            let dshrunk = shrunk.zeros_like()?;
            for (i, module) in pairs.modules.iter().enumerate() {
                let dy = dy.narrow(1, module.offset, module.n)?;
                gemm(&segment.columns_of(&dshrunk, i)?, 0.0, &dy, &module.b, scale)?;
                gemm(&module.db, 1.0, &dy.t()?, &segment.columns_of(shrunk, i)?, scale)?;
            }
            let x = segment.rows_of(&saved.x)?;
            let dx = segment.rows_of(&dx)?;
            if segment.dropout.is_none() {
                gemm(&pairs.da, 1.0, &dshrunk.t()?, &x, 1.0)?;
                gemm(&dx, 1.0, &dshrunk, &pairs.a, 1.0)?;
            } else {
                let through = x.zeros_like()?;
                gemm(&through, 0.0, &dshrunk, &pairs.a, 1.0)?;
                gemm(&pairs.da, 1.0, &dshrunk.t()?, &self.dropped(x, segment, site)?, 1.0)?;
                dx.slice_set(&(&dx + self.dropped(through, segment, site)?)?, 0, 0)?;
            }
        }
        Ok(dx)
    }

    /// Whether DoRA's gains change a site's output.
    fn has_gain(&self, site: Site) -> bool {
        self.rows.segments.iter().any(|s| s.adapter.site(self.layer, site).is_some_and(|pairs| pairs.gain.is_some()))
    }

    /// `y`, or its gradient, times DoRA's gains.
    fn apply_gains(&self, y: &Tensor, site: Site) -> Result<Tensor> {
        let apply = |segment: &TrainSegment| {
            let y = segment.rows_of(y)?;
            match segment.adapter.site(self.layer, site).and_then(|pairs| pairs.gain.as_ref()) {
                // A gain is close to 1, where bf16 has 8 bits.
                Some(gain) => Ok(y.to_dtype(DType::F32)?.broadcast_mul(gain)?.to_dtype(y.dtype())?),
                None => Ok(y),
            }
        };
        let pieces = self.rows.segments.iter().map(apply).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// Adds to the gradients of DoRA's magnitudes: `Σ dy · y / norm` over the rows, where `y` is the output before its gain.
    fn magnitudes_backward(&self, y: &Tensor, dy: &Tensor, site: Site) -> Result<()> {
        for segment in &self.rows.segments {
            let Some(pairs) = segment.adapter.site(self.layer, site) else { continue };
            let products = (segment.rows_of(y)?.to_dtype(DType::F32)? * segment.rows_of(dy)?.to_dtype(DType::F32)?)?;
            let sums = products.sum_keepdim(0)?;
            for module in &pairs.modules {
                let Some(magnitude) = &module.magnitude else { continue };
                let sums = (sums.narrow(1, module.offset, module.n)? * &magnitude.inverse_norm)?;
                magnitude.grad.slice_set(&(&magnitude.grad + sums.t()?)?, 0, 0)?;
            }
        }
        Ok(())
    }
}

impl TrainSegment {
    /// The segment's rows of a tensor of all rows: a view.
    fn rows_of(&self, all: &Tensor) -> Result<Tensor> {
        Ok(all.narrow(0, self.rows.start, self.rows.len())?)
    }

    /// The columns of a site's `i`-th module in `x · Aᵀ`: a view.
    fn columns_of(&self, shrunk: &Tensor, i: usize) -> Result<Tensor> {
        let rank = self.adapter.rank;
        Ok(shrunk.narrow(1, i * rank, rank)?)
    }
}
