//! The decoder block: one description, which serving and training both run.
//!
//! ```text
//! x ─ qkv ─ bias, QK norm ─ attention ─ o ─ + residual, norm ─ gate_up ─ SwiGLU ─ down ─ + residual, next norm
//! ```
//!
//! Each norm is computed together with the residual sum before it, so a block starts from a normed input and ends with the
//! normed input of what follows. A [`BlockHook`] supplies the operations that differ between serving and training.

use std::sync::Arc;

use candle_core::Tensor;

use super::weights::{LayerWeights, Weights};
use crate::Result;
use crate::arch::{Heads, Site};
use crate::ops::heads::{self, QkNorm};
use crate::ops::norm::add_rms_norm;
use crate::ops::quant::QMatrix;
use crate::ops::swiglu::swiglu;

/// The operations of a decoder block that differ between serving and training. A hook may keep the tensors that it is given for a
/// backward pass.
pub trait BlockHook {
    /// `x [T, k] -> [T, n]`: `x·Wᵀ` plus the deltas of the rows' adapters, times DoRA's gains.
    fn linear(&mut self, weight: &Arc<QMatrix>, x: &Tensor, site: Site) -> Result<Tensor>;

    /// Adds the biases to `qkv` and normalises its query and key heads, in place. Both are absent in most models.
    fn bias_and_qk_norm(
        &mut self,
        qkv: &Tensor,
        bias: Option<&Tensor>,
        norm: Option<QkNorm>,
        heads: Heads,
    ) -> Result<()> {
        heads::bias_and_qk_norm(qkv, bias, norm, heads)
    }

    /// Applies RoPE to the queries and keys of `qkv [T, (heads + 2·kv_heads)·head_dim]` and attends. Returns attention's
    /// output `[R, heads·head_dim]` and the residual stream `[R, hidden]` of the `R` rows that continue, or `None` if no row does.
    fn attention(&mut self, qkv: &Tensor, residual: Tensor) -> Result<Option<(Tensor, Tensor)>>;
}

/// One block of a decoder.
pub struct DecoderBlock<'a> {
    weights: &'a LayerWeights,
    /// Norm after the block `[hidden]` f32: the first of the next block, or the final one.
    next_norm: &'a Tensor,
    heads: Heads,
    eps: f32,
}

/// The activations of a block before its last product.
pub struct BlockActivations {
    /// Residual stream between attention and MLP `[T, hidden]` f32.
    pub residual: Tensor,
    /// Input of SwiGLU `[T, 2·intermediate]`.
    pub gate_up: Tensor,
    /// Input of the last product `[T, intermediate]`.
    pub mlp_activation: Tensor,
}

impl<'a> DecoderBlock<'a> {
    /// The block with index `layer`.
    pub(super) fn new(weights: &'a Weights, layer: usize) -> Self {
        let Weights { config, layers, norm, .. } = weights;
        let next_norm = layers.get(layer + 1).map_or(norm, |next| &next.attn_norm);
        Self { weights: &layers[layer], next_norm, heads: config.heads(), eps: config.rms_norm_eps }
    }

    /// Runs the block on the residual stream and its norm, each `[T, hidden]`. Returns both for what follows the block, or
    /// `None` if no row continues.
    pub fn forward(&self, hook: &mut impl BlockHook, residual: Tensor, x: Tensor) -> Result<Option<(Tensor, Tensor)>> {
        let Some(BlockActivations { residual, mlp_activation, .. }) = self.forward_before_down(hook, residual, x)?
        else {
            return Ok(None);
        };
        self.forward_down(hook, &residual, &mlp_activation).map(Some)
    }

    /// [`Self::forward`] up to the last product.
    pub fn forward_before_down(
        &self,
        hook: &mut impl BlockHook,
        residual: Tensor,
        x: Tensor,
    ) -> Result<Option<BlockActivations>> {
        let LayerWeights { qkv, qkv_bias, qk_norm, o, ffn_norm, gate_up, .. } = self.weights;
        let qkv = hook.linear(qkv, &x, Site::Qkv)?;
        let qk_norm = qk_norm.as_ref().map(|(query, key)| QkNorm { query, key, eps: self.eps });
        hook.bias_and_qk_norm(&qkv, qkv_bias.as_ref(), qk_norm, self.heads)?;
        let Some((attended, residual)) = hook.attention(&qkv, residual)? else { return Ok(None) };
        let o = hook.linear(o, &attended, Site::O)?;
        let (residual, normed) = add_rms_norm(&residual, &o, ffn_norm, self.eps)?;
        let gate_up = hook.linear(gate_up, &normed, Site::GateUp)?;
        let mlp_activation = swiglu(&gate_up)?;
        Ok(Some(BlockActivations { residual, gate_up, mlp_activation }))
    }

    /// The rest of [`Self::forward`], from the `residual` and `mlp_activation` of [`BlockActivations`].
    pub fn forward_down(
        &self,
        hook: &mut impl BlockHook,
        residual: &Tensor,
        mlp_activation: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let down = hook.linear(&self.weights.down, mlp_activation, Site::Down)?;
        add_rms_norm(residual, &down, self.next_norm, self.eps)
    }
}
