//! Checks of a model's shape, and of its weights against the shape, so that a forward pass cannot run into a wrong one.

use candle_core::{DType, Tensor};

use super::{LayerWeights, Weights};
use crate::arch::{ModelConfig, RopeScaling, Site};
use crate::ops::quant::QMatrix;
use crate::{Error, Result};

/// Refuses shapes that no decoder has, before anything is computed from them.
pub(super) fn check_config(config: &ModelConfig) -> Result<()> {
    for (name, value) in [
        ("hidden size", config.hidden_size),
        ("intermediate size", config.intermediate_size),
        ("number of layers", config.num_layers),
        ("number of heads", config.num_heads),
        ("number of key-value heads", config.num_kv_heads),
        ("head dimension", config.head_dim),
        ("vocabulary size", config.vocab_size),
        ("context length", config.max_position_embeddings),
    ] {
        if value == 0 || value > 1 << 28 {
            return Err(Error::invalid(format!("{name} is {value}")));
        }
    }
    if !config.num_heads.is_multiple_of(config.num_kv_heads) {
        return Err(Error::invalid(format!(
            "{} heads cannot share {} key-value heads evenly",
            config.num_heads, config.num_kv_heads
        )));
    }
    if !config.head_dim.is_multiple_of(2) {
        return Err(Error::invalid(format!("head dimension {} is odd: rotary embedding needs pairs", config.head_dim)));
    }
    check_rope(config)
}

fn check_rope(config: &ModelConfig) -> Result<()> {
    let positive = |v: f32| v.is_finite() && v > 0.0;
    let scaling = match &config.rope_scaling {
        RopeScaling::None => true,
        RopeScaling::Linear { factor } => positive(*factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            positive(*factor)
                && positive(*low_freq_factor)
                && positive(*high_freq_factor)
                && low_freq_factor < high_freq_factor
                && *original_max_position_embeddings > 0
        }
        RopeScaling::Factors(factors) => factors.iter().all(|&f| positive(f)),
    };
    if !(positive(config.rms_norm_eps) && positive(config.rope_theta) && scaling) {
        return Err(Error::invalid(format!(
            "RMSNorm epsilon {}, RoPE base {} and RoPE scaling {:?} must be positive numbers",
            config.rms_norm_eps, config.rope_theta, config.rope_scaling
        )));
    }
    if let RopeScaling::Factors(factors) = &config.rope_scaling
        && factors.len() != config.head_dim / 2
    {
        return Err(Error::invalid(format!("{} rotary factors for heads of width {}", factors.len(), config.head_dim)));
    }
    Ok(())
}

impl Weights {
    /// Checks all shapes. Errors: a matrix, norm or bias whose shape is not the one that the config gives.
    pub(in crate::model) fn check_shapes(&self) -> Result<()> {
        let c = &self.config;
        check_config(c)?;
        if self.layers.len() != c.num_layers {
            return Err(Error::invalid(format!(
                "{} decoder blocks, the config says {}",
                self.layers.len(),
                c.num_layers
            )));
        }
        check_matrix("embedding", &self.embedding, (c.vocab_size, c.hidden_size))?;
        check_matrix("head", &self.head, (c.vocab_size, c.hidden_size))?;
        check_vector("final norm", &self.norm, c.hidden_size)?;
        self.layers.iter().enumerate().try_for_each(|(i, layer)| check_layer(i, layer, c))
    }
}

fn check_layer(i: usize, layer: &LayerWeights, c: &ModelConfig) -> Result<()> {
    let LayerWeights { attn_norm, qkv, qkv_bias, qk_norm, o, ffn_norm, gate_up, down } = layer;
    let name = |part: &str| format!("block {i} {part}");
    if (qkv_bias.is_some(), qk_norm.is_some()) != (c.qkv_bias, c.qk_norm) {
        return Err(Error::invalid(format!("block {i} has other biases or QK norms than the config says")));
    }
    if let Some(bias) = qkv_bias {
        check_vector(&name("qkv_bias"), bias, c.heads().qkv_width())?;
    }
    for norm in qk_norm.iter().flat_map(|(q, k)| [q, k]) {
        check_vector(&name("qk_norm"), norm, c.head_dim)?;
    }
    check_vector(&name("attn_norm"), attn_norm, c.hidden_size)?;
    check_vector(&name("ffn_norm"), ffn_norm, c.hidden_size)?;
    let sites =
        [("qkv", qkv, Site::Qkv), ("o", o, Site::O), ("gate_up", gate_up, Site::GateUp), ("down", down, Site::Down)];
    sites.into_iter().try_for_each(|(part, matrix, site)| check_matrix(&name(part), matrix, site.shape(c)))
}

fn check_matrix(name: &str, m: &QMatrix, (n, k): (usize, usize)) -> Result<()> {
    if (m.n(), m.k()) == (n, k) {
        return Ok(());
    }
    Err(Error::invalid(format!("{name} is [{}, {}], the config says [{n}, {k}]", m.n(), m.k())))
}

fn check_vector(name: &str, t: &Tensor, len: usize) -> Result<()> {
    if t.dims() == [len] && t.dtype() == DType::F32 {
        return Ok(());
    }
    Err(Error::invalid(format!("{name} is {:?} {:?}, the config says [{len}] f32", t.dims(), t.dtype())))
}
