//! Model files to resident weights: GGUF, Hugging Face directories.

use std::sync::Arc;

use candle_core::Tensor;

use super::ModelConfig;
use crate::ops::quant::QMatrix;

/// Everything the decoder needs, in Hugging Face's row order (GGUF's q and k rows un-permuted).
pub struct Weights {
    /// Shape of the decoder.
    pub config: ModelConfig,
    /// Token embedding `[vocab, hidden]`.
    pub embedding: Arc<QMatrix>,
    /// Decoder blocks in order.
    pub layers: Vec<LayerWeights>,
    /// Final norm `[hidden]` f32.
    pub norm: Tensor,
    /// Output head `[vocab, hidden]`; the embedding itself when tied.
    pub head: Arc<QMatrix>,
}

/// One decoder block.
pub struct LayerWeights {
    /// Norm before attention `[hidden]` f32.
    pub attn_norm: Tensor,
    /// q, k, v stacked: `[(heads + 2·kv_heads)·head_dim, hidden]`.
    pub qkv: Arc<QMatrix>,
    /// `[hidden, heads·head_dim]`.
    pub o: Arc<QMatrix>,
    /// Norm before the feed-forward layer `[hidden]` f32.
    pub ffn_norm: Tensor,
    /// gate, up stacked: `[2·intermediate, hidden]`.
    pub gate_up: Arc<QMatrix>,
    /// `[hidden, intermediate]`.
    pub down: Arc<QMatrix>,
}
