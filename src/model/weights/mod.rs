//! Model files to resident weights: GGUF, Hugging Face directories.
//!
//! [`gguf`] and [`hf`] read the description of a model and list its tensors in a [`checkpoint`], both under Hugging
//! Face's names; what follows here is the same for both. Tensors are read one matrix at a time and packed, so that the
//! peak is the packed model and one matrix beside it.

mod checkpoint;
pub(crate) mod gguf;
mod hf;

use std::cell::Cell;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

use self::checkpoint::{Checkpoint, Rows};
use super::{ModelConfig, RopeScaling};
use crate::hub::{ModelFiles, ModelFormat, hex};
use crate::ops::quant::QMatrix;
use crate::ops::quant::nf4::Nf4;
use crate::{Error, Result};

/// What to make of linears that are stored as floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantize {
    /// NF4, blocks of 64, double quantisation (see [`crate::ops::quant::nf4`]). Embedding and head stay as they are.
    #[value(help = "4-bit NormalFloat, blocks of 64, double quantisation: what QLoRA adapters are trained on")]
    Nf4,
}

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
    /// Says whether two loads gave the same base: SHA-256 (hex) over the shape of the decoder, the quantisation asked
    /// for, and the name, type, shape and up to three sampled 4 KiB pages of every tensor. Cheap, and wherever the file
    /// lies; it tells models and their quantisations apart, not a deliberate forgery.
    pub fingerprint: String,
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

/// A model described and listed, nothing read yet.
pub(crate) struct Opened {
    /// Shape of the decoder.
    config: ModelConfig,
    /// Its tensors.
    checkpoint: Checkpoint,
    /// Whether the embedding is also the head.
    tied: bool,
}

impl Weights {
    /// Resident bytes of all matrices.
    pub fn bytes(&self) -> usize {
        let head = if Arc::ptr_eq(&self.head, &self.embedding) { 0 } else { self.head.bytes() };
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        self.embedding.bytes() + head + layers.map(|m| m.bytes()).sum::<usize>()
    }

    /// Loads a model; `progress` gets the share done, in [0, 1].
    ///
    /// # Errors
    /// `Invalid`, naming the file and the tensor or setting: another architecture, a missing, surplus or misshapen
    /// tensor, a tensor type or a variation of the architecture (biases, experts, RoPE scaling) that is not supported,
    /// a truncated file, or `quantize` on weights that are quantised already.
    pub fn load(files: &ModelFiles, quantize: Option<Quantize>, progress: impl Fn(f32)) -> Result<Self> {
        let Opened { config, mut checkpoint, tied } = match &files.format {
            ModelFormat::Gguf(path) => gguf::open(path)?,
            ModelFormat::HuggingFace(dir) => hf::open(dir)?,
        };
        let fingerprint = fingerprint(&config, quantize, &checkpoint)?;
        let total = checkpoint.bytes().max(1) as f32;
        let done = Cell::new(0u64);
        let report = |rows: &[Rows]| {
            done.set(done.get() + rows.iter().map(|r| r.bytes.len() as u64).sum::<u64>());
            progress((done.get() as f32 / total).min(1.0));
        };
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);

        // Stacked rows of several tensors with the same input.
        let linear = |checkpoint: &mut Checkpoint, parts: &[(String, usize)], k: usize| -> Result<Arc<QMatrix>> {
            let rows = parts.iter().map(|(name, n)| checkpoint.rows(name, *n, k)).collect::<Result<Vec<_>>>()?;
            let sources = rows
                .iter()
                .map(|r| match quantize {
                    None => Ok(r.source()),
                    Some(Quantize::Nf4) => Ok(Nf4::quantize(&r.floats()?).into_source(r.n, r.k)),
                })
                .collect::<Result<Vec<_>>>()?;
            let packed = QMatrix::pack(&sources)?;
            report(&rows);
            Ok(Arc::new(packed))
        };
        let table = |checkpoint: &mut Checkpoint, name: &str| -> Result<Arc<QMatrix>> {
            let rows = checkpoint.rows(name, config.vocab_size, hidden)?;
            let packed = QMatrix::pack(&[rows.source()])?;
            report(&[rows]);
            Ok(Arc::new(packed))
        };
        let norm = |checkpoint: &mut Checkpoint, name: &str| -> Result<Tensor> {
            Ok(Tensor::from_vec(checkpoint.vector(name, hidden)?, hidden, &Device::Cpu)?)
        };

        let embedding = table(&mut checkpoint, "model.embed_tokens.weight")?;
        let head = if tied { embedding.clone() } else { table(&mut checkpoint, "lm_head.weight")? };
        let mut layers = Vec::new();
        for i in 0..config.num_layers {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            let c = &mut checkpoint;
            layers.push(LayerWeights {
                attn_norm: norm(c, &name("input_layernorm"))?,
                qkv: linear(
                    c,
                    &[(name("self_attn.q_proj"), q), (name("self_attn.k_proj"), kv), (name("self_attn.v_proj"), kv)],
                    hidden,
                )?,
                o: linear(c, &[(name("self_attn.o_proj"), hidden)], q)?,
                ffn_norm: norm(c, &name("post_attention_layernorm"))?,
                gate_up: linear(c, &[(name("mlp.gate_proj"), inter), (name("mlp.up_proj"), inter)], hidden)?,
                down: linear(c, &[(name("mlp.down_proj"), hidden)], inter)?,
            });
        }
        let norm = norm(&mut checkpoint, "model.norm.weight")?;
        checkpoint.finish()?;
        progress(1.0);
        Ok(Self { config, embedding, layers, norm, head, fingerprint })
    }
}

/// See [`Weights::fingerprint`].
fn fingerprint(config: &ModelConfig, quantize: Option<Quantize>, checkpoint: &Checkpoint) -> Result<String> {
    let mut hash = Sha256::new();
    let c = config;
    hash.update(format!(
        "{} {} {} {} {} {} {} {} {} {:?} {quantize:?}\n",
        c.hidden_size,
        c.intermediate_size,
        c.num_layers,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        c.vocab_size,
        c.rms_norm_eps,
        c.rope_theta,
        c.rope_scaling,
    ));
    checkpoint.sample(|bytes| hash.update(bytes))?;
    Ok(hex(&hash.finalize()))
}

/// Refuses shapes that no decoder has, before anything is computed from them.
fn check(config: ModelConfig) -> Result<ModelConfig> {
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
    Ok(config)
}
