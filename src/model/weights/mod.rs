//! Model files to resident weights: GGUF, Hugging Face directories, and shapes without weights.
//!
//! [`gguf`] and [`hf`] read the description of a model and list its tensors in a [`checkpoint`], both under Hugging
//! Face's names ([`bnb`] joins those that are quantised already); [`dummy`] makes them up. What follows here is the same
//! for all. Tensors are read one matrix at a time and packed, so that the peak is the packed model and one matrix beside it.

mod bnb;
mod check;
mod checkpoint;
pub(crate) mod dummy;
pub(crate) mod gguf;
mod hf;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

use self::checkpoint::Checkpoint;
use self::dummy::Dummy;
use crate::arch::{ModelConfig, Site};
use crate::hub::{ModelFiles, ModelFormat, hex};
use crate::lora::BaseMatrices;
use crate::ops::quant::nf4::Nf4;
use crate::ops::quant::{QMatrix, Source};
use crate::{Error, Result};

/// What to make of linears that are stored as floats, or made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Quantize {
    /// NF4, blocks of 64, double quantisation (see [`crate::ops::quant::nf4`]). Embedding and head stay as they are.
    #[value(help = "4-bit NormalFloat, blocks of 64, double quantisation: what QLoRA adapters are trained on")]
    Nf4,
    /// GGUF's Q4_0.
    #[value(name = "q4_0", help = "GGUF's Q4_0, only for --load-format dummy")]
    Q4_0,
    /// GGUF's Q4_1.
    #[value(name = "q4_1", help = "GGUF's Q4_1, only for --load-format dummy")]
    Q4_1,
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
    /// Added to them `[(heads + 2·kv_heads)·head_dim]` f32, where the model has biases.
    pub qkv_bias: Option<Tensor>,
    /// Norms of a query and of a key head, each `[head_dim]` f32, where the model has them.
    pub qk_norm: Option<(Tensor, Tensor)>,
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

/// Where a decoder's tensors come from, by Hugging Face's names.
trait Tensors {
    /// Rows `[n, k]` of a linear, quantised if that was asked for.
    fn linear(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>>;

    /// Rows `[n, k]` of the embedding or the head.
    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>>;

    /// A norm or a bias.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// Feeds what tells them from other tensors.
    fn sample(&self, feed: &mut dyn FnMut(&[u8])) -> Result<()>;

    /// Fails if one was not asked for.
    fn finish(&self) -> Result<()>;
}

/// Tensors of a file.
struct Stored {
    checkpoint: Checkpoint,
    quantize: Option<Quantize>,
}

impl Tensors for Stored {
    fn linear(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        let rows = self.checkpoint.rows(name, n, k)?;
        match self.quantize {
            None => Ok(rows.source),
            Some(Quantize::Nf4) => Ok(Nf4::quantize(&rows.floats()?).into_source(n, k)),
            Some(Quantize::Q4_0 | Quantize::Q4_1) => {
                Err(Error::invalid("weights can be quantised to nf4; q4_0 and q4_1 are for --load-format dummy"))
            }
        }
    }

    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        Ok(self.checkpoint.rows(name, n, k)?.source)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.checkpoint.vector(name, len)
    }

    fn sample(&self, feed: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.checkpoint.sample(feed)
    }

    fn finish(&self) -> Result<()> {
        self.checkpoint.finish()
    }
}

/// The shape of a model, without its weights. Errors as [`Weights::load`], as far as the description goes.
pub fn shape(files: &ModelFiles) -> Result<ModelConfig> {
    match &files.format {
        ModelFormat::Gguf(path) => Ok(gguf::open(path)?.config),
        ModelFormat::HuggingFace(dir) => Ok(hf::shape(&dir.join("config.json"))?.0),
        ModelFormat::Shape(path) => Ok(hf::shape(path)?.0),
    }
}

impl BaseMatrices for Weights {
    fn num_layers(&self) -> usize {
        self.layers.len()
    }

    fn matrix(&self, layer: usize, site: Site) -> &Arc<QMatrix> {
        match site {
            Site::Qkv => &self.layers[layer].qkv,
            Site::O => &self.layers[layer].o,
            Site::GateUp => &self.layers[layer].gate_up,
            Site::Down => &self.layers[layer].down,
            Site::Head => &self.head,
        }
    }
}

impl Weights {
    /// Resident bytes of all matrices.
    pub fn bytes(&self) -> usize {
        let tied = Arc::ptr_eq(&self.head, &self.embedding);
        self.step_bytes() + if tied { 0 } else { self.embedding.bytes() }
    }

    /// Bytes of the matrices that a forward pass reads whole: all but an embedding that is not the head too.
    pub fn step_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        self.head.bytes() + layers.map(|m| m.bytes()).sum::<usize>()
    }

    /// Loads a model onto a device; `progress` gets the share done, in [0, 1]. To a shape alone it makes up weights, the
    /// same ones every time, linears in the form of `quantize` (NF4 if that is `None`).
    ///
    /// # Errors
    /// `Invalid`, naming the file and the tensor or setting: another architecture, a missing, surplus or misshapen
    /// tensor, a tensor type or a variation of the architecture (other biases, experts, RoPE scaling) that is not
    /// supported, a truncated file, or `quantize` on weights that are quantised already.
    pub fn load(
        files: &ModelFiles,
        quantize: Option<Quantize>,
        device: &Device,
        progress: impl Fn(f32),
    ) -> Result<Self> {
        let stored = |Opened { config, checkpoint, tied }| -> (_, _, Box<dyn Tensors>) {
            (config, tied, Box::new(Stored { checkpoint, quantize }))
        };
        let (config, tied, mut tensors): (_, _, Box<dyn Tensors>) = match &files.format {
            ModelFormat::Gguf(path) => stored(gguf::open(path)?),
            ModelFormat::HuggingFace(dir) => stored(hf::open(dir)?),
            ModelFormat::Shape(path) => {
                let (config, tied) = hf::shape(path)?;
                (config, tied, Box::new(Dummy::new(quantize.unwrap_or(Quantize::Nf4))))
            }
        };
        let fingerprint = fingerprint(&config, quantize, &*tensors)?;
        let (hidden, inter, vocab) = (config.hidden_size, config.intermediate_size, config.vocab_size);
        let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let layer = (2 * q + 2 * kv + 3 * inter) as f64 * hidden as f64;
        let tables = vocab as f64 * hidden as f64 * if tied { 1.0 } else { 2.0 };
        let mut reader = Reader {
            tensors: &mut *tensors,
            device,
            total: config.num_layers as f64 * layer + tables,
            done: 0.0,
            progress: &progress,
        };
        let embedding = reader.table("model.embed_tokens.weight", vocab, hidden)?;
        let head = if tied { embedding.clone() } else { reader.table("lm_head.weight", vocab, hidden)? };
        let mut layers = Vec::new();
        for i in 0..config.num_layers {
            let part = |name: &str| format!("model.layers.{i}.{name}");
            let heads = [(part("self_attn.q_proj"), q), (part("self_attn.k_proj"), kv), (part("self_attn.v_proj"), kv)];
            layers.push(LayerWeights {
                attn_norm: reader.vector(&part("input_layernorm.weight"), hidden)?,
                qkv: reader.linear(&heads, hidden)?,
                qkv_bias: match config.qkv_bias {
                    true => Some(reader.biases(&heads)?),
                    false => None,
                },
                qk_norm: match config.qk_norm {
                    true => Some((
                        reader.vector(&part("self_attn.q_norm.weight"), config.head_dim)?,
                        reader.vector(&part("self_attn.k_norm.weight"), config.head_dim)?,
                    )),
                    false => None,
                },
                o: reader.linear(&[(part("self_attn.o_proj"), hidden)], q)?,
                ffn_norm: reader.vector(&part("post_attention_layernorm.weight"), hidden)?,
                gate_up: reader.linear(&[(part("mlp.gate_proj"), inter), (part("mlp.up_proj"), inter)], hidden)?,
                down: reader.linear(&[(part("mlp.down_proj"), hidden)], inter)?,
            });
        }
        let norm = reader.vector("model.norm.weight", hidden)?;
        tensors.finish()?;
        progress(1.0);
        Ok(Self { config, embedding, layers, norm, head, fingerprint })
    }
}

/// Brings tensors to the device, one matrix at a time.
struct Reader<'a> {
    tensors: &'a mut dyn Tensors,
    device: &'a Device,
    /// Values of all matrices.
    total: f64,
    /// Values of those that are there.
    done: f64,
    progress: &'a dyn Fn(f32),
}

impl Reader<'_> {
    /// Stacked rows of several linears with the same input, by module and output features.
    fn linear(&mut self, parts: &[(String, usize)], k: usize) -> Result<Arc<QMatrix>> {
        let rows = parts.iter().map(|(name, n)| self.tensors.linear(&format!("{name}.weight"), *n, k));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        self.pack(&rows)
    }

    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Arc<QMatrix>> {
        let rows = self.tensors.table(name, n, k)?;
        self.pack(&[rows])
    }

    fn pack(&mut self, sources: &[Source]) -> Result<Arc<QMatrix>> {
        let packed = QMatrix::pack(sources, self.device)?;
        self.done += packed.n() as f64 * packed.k() as f64;
        (self.progress)((self.done / self.total).min(1.0) as f32);
        Ok(Arc::new(packed))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.tensors.vector(name, len)?, len, self.device)?)
    }

    /// The biases of stacked linears.
    fn biases(&mut self, parts: &[(String, usize)]) -> Result<Tensor> {
        let mut all = Vec::new();
        for (name, n) in parts {
            all.extend(self.tensors.vector(&format!("{name}.bias"), *n)?);
        }
        let len = all.len();
        Ok(Tensor::from_vec(all, len, self.device)?)
    }
}

/// See [`Weights::fingerprint`].
fn fingerprint(config: &ModelConfig, quantize: Option<Quantize>, tensors: &dyn Tensors) -> Result<String> {
    let mut hash = Sha256::new();
    let c = config;
    hash.update(format!(
        "{} {} {} {} {} {} {} {} {} {:?} {} {} {quantize:?}\n",
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
        c.qkv_bias,
        c.qk_norm,
    ));
    tensors.sample(&mut |bytes| hash.update(bytes))?;
    Ok(hex(&hash.finalize()))
}
