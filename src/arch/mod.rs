//! The architecture of a decoder: its shape, its attention heads, and the linear layers that adapters can target. No tensors.

mod architecture;
mod module;
mod rope;

pub use architecture::Architecture;
pub use module::{Module, Site};
pub use rope::RopeScaling;

/// Shape of a Llama-family decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head (not always `hidden_size / num_heads`).
    pub head_dim: usize,
    /// Size of the vocabulary: rows of the embedding.
    pub vocab_size: usize,
    /// Epsilon of RMSNorm, added to the mean square.
    pub rms_norm_eps: f32,
    /// Rotary base frequency.
    pub rope_theta: f32,
    /// Scaling of the rotary frequencies for long contexts.
    pub rope_scaling: RopeScaling,
    /// Whether q, k and v have biases (Qwen2).
    pub qkv_bias: bool,
    /// Whether each query and key head is normalised before RoPE (Qwen3).
    pub qk_norm: bool,
    /// Longest sequence. With sliding-window attention this is the window, within which attention is full.
    pub max_position_embeddings: usize,
}

impl ModelConfig {
    /// The attention heads of each decoder block.
    pub fn heads(&self) -> Heads {
        Heads { query: self.num_heads, kv: self.num_kv_heads, dim: self.head_dim }
    }
}

/// The attention heads of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; divides `query`.
    pub kv: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a fused qkv row.
    pub fn qkv_width(&self) -> usize {
        (self.query + 2 * self.kv) * self.dim
    }
}
