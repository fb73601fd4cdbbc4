//! Model files to resident weights: GGUF, Hugging Face directories, and shapes without weights.
//!
//! [`gguf`] and [`hf`] read the description of a model and list its tensors under Hugging Face's names in
//! [`tensors::ModelTensors`], where [`bnb`] joins those that bitsandbytes quantised. [`dummy`] generates the tensors of a shape.
//! The rest is the same for all: matrices are read and packed one at a time, so the peak memory is the packed model plus one
//! matrix.

mod bnb;
mod check;
pub(crate) mod dummy;
pub(crate) mod gguf;
mod hf;
mod tensors;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use sha2::{Digest, Sha256};

use self::dummy::DummyTensors;
use self::tensors::ModelTensors;
pub(crate) use self::tensors::separate_halves;
use crate::arch::{ModelConfig, Module, Site};
use crate::hub::{ModelFiles, ModelFormat, hex};
use crate::lora::BaseMatrices;
use crate::ops::quant::nf4::Nf4;
use crate::ops::quant::{QMatrix, Source};
use crate::{Error, Result};

/// The format to quantise linears to that are stored as floats or are dummies.
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

/// The resident weights of a decoder, with rows in Hugging Face's order (those of q and k in GGUF are permuted back).
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
    /// Equal for two loads of the same base: SHA-256 (hex) of the shape of the decoder, the requested quantisation, and the
    /// name, type, shape and up to three sampled 4 KiB pages of every tensor. It is cheap and independent of the file's path.
    /// It tells models and their quantisations apart, but does not detect a deliberate forgery.
    pub fingerprint: String,
}

/// One decoder block.
pub struct LayerWeights {
    /// Norm before attention `[hidden]` f32.
    pub attn_norm: Tensor,
    /// q, k and v stacked: `[(heads + 2·kv_heads)·head_dim, hidden]`.
    pub qkv: Arc<QMatrix>,
    /// Biases of q, k and v `[(heads + 2·kv_heads)·head_dim]` f32, if the model has them.
    pub qkv_bias: Option<Tensor>,
    /// Norms of each query and each key head, each `[head_dim]` f32, if the model has them.
    pub qk_norm: Option<(Tensor, Tensor)>,
    /// `[hidden, heads·head_dim]`.
    pub o: Arc<QMatrix>,
    /// Norm before the MLP `[hidden]` f32.
    pub ffn_norm: Tensor,
    /// gate and up stacked: `[2·intermediate, hidden]`.
    pub gate_up: Arc<QMatrix>,
    /// `[hidden, intermediate]`.
    pub down: Arc<QMatrix>,
}

/// A model whose description was read and whose tensors are listed, but not read.
pub(crate) struct OpenModel {
    config: ModelConfig,
    tensors: ModelTensors,
    /// Whether the embedding is also the head.
    tied: bool,
}

/// The tensors of a decoder by Hugging Face's names: from files, or dummies.
trait TensorSource {
    /// Rows `[n, k]` of a linear, quantised if that was requested.
    fn linear(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>>;

    /// Rows `[n, k]` of the embedding or the head.
    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>>;

    /// A norm or a bias.
    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>>;

    /// Passes bytes to `feed` that distinguish these tensors from others.
    fn sample(&self, feed: &mut dyn FnMut(&[u8])) -> Result<()>;

    /// Checks that all tensors were read. Errors: a tensor that was not.
    fn finish(&self) -> Result<()>;
}

/// Tensors from files.
struct StoredTensors {
    tensors: ModelTensors,
    quantize: Option<Quantize>,
}

impl TensorSource for StoredTensors {
    fn linear(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        let rows = self.tensors.rows(name, n, k)?;
        match self.quantize {
            None => Ok(rows.source),
            Some(Quantize::Nf4) => Ok(Nf4::quantize(&rows.floats()?).into_source(n, k)),
            Some(Quantize::Q4_0 | Quantize::Q4_1) => {
                Err(Error::invalid("weights can be quantised to nf4 only; q4_0 and q4_1 need --load-format dummy"))
            }
        }
    }

    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        Ok(self.tensors.rows(name, n, k)?.source)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.tensors.vector(name, len)
    }

    fn sample(&self, feed: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.tensors.sample(feed)
    }

    fn finish(&self) -> Result<()> {
        self.tensors.finish()
    }
}

/// The shape of a model, without its weights. Errors: those of [`Weights::load`] that concern the description.
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

    /// Bytes of the matrices that a forward pass reads completely: all except an embedding that is not also the head.
    pub fn step_bytes(&self) -> usize {
        let layers = self.layers.iter().flat_map(|l| [&l.qkv, &l.o, &l.gate_up, &l.down]);
        self.head.bytes() + layers.map(|m| m.bytes()).sum::<usize>()
    }

    /// Loads a model onto a device. `progress` gets the fraction done, in [0, 1]. A shape without weights gets dummy weights, the
    /// same each time, with linears in the format of `quantize` (NF4 if that is `None`).
    ///
    /// # Errors
    /// `Invalid`, naming the file and the tensor or setting: another architecture; a missing, surplus or misshapen tensor; a
    /// tensor type or a variation of the architecture (other biases, experts, RoPE scaling) that is not supported; a truncated
    /// file; or `quantize` on weights that are quantised already.
    pub fn load(
        files: &ModelFiles,
        quantize: Option<Quantize>,
        device: &Device,
        progress: impl Fn(f32),
    ) -> Result<Self> {
        let (config, tied, mut source) = open(files, quantize)?;
        let fingerprint = fingerprint(&config, quantize, &*source)?;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let total = matrix_values(&config, tied);
        let mut reader = WeightReader { source: &mut *source, device, total, done: 0.0, progress: &progress };
        let embedding = reader.table("model.embed_tokens.weight", vocab, hidden)?;
        let head = if tied { embedding.clone() } else { reader.table("lm_head.weight", vocab, hidden)? };
        let layers = (0..config.num_layers).map(|layer| reader.layer(&config, layer)).collect::<Result<_>>()?;
        let norm = reader.vector("model.norm.weight", hidden)?;
        source.finish()?;
        progress(1.0);
        Ok(Self { config, embedding, layers, norm, head, fingerprint })
    }
}

/// A model's shape, whether its embedding is also the head, and its tensors.
fn open(files: &ModelFiles, quantize: Option<Quantize>) -> Result<(ModelConfig, bool, Box<dyn TensorSource>)> {
    let OpenModel { config, tensors, tied } = match &files.format {
        ModelFormat::Gguf(path) => gguf::open(path)?,
        ModelFormat::HuggingFace(dir) => hf::open(dir)?,
        ModelFormat::Shape(path) => {
            let (config, tied) = hf::shape(path)?;
            return Ok((config, tied, Box::new(DummyTensors::new(quantize.unwrap_or(Quantize::Nf4)))));
        }
    };
    Ok((config, tied, Box::new(StoredTensors { tensors, quantize })))
}

/// Values of all matrices.
fn matrix_values(config: &ModelConfig, tied: bool) -> f64 {
    let values = |(n, k): (usize, usize)| n as f64 * k as f64;
    let layer = Module::BLOCK.map(|module| values(module.shape(config))).iter().sum::<f64>();
    let table = values((config.vocab_size, config.hidden_size));
    config.num_layers as f64 * layer + if tied { table } else { 2.0 * table }
}

/// Reads tensors to the device, one matrix at a time.
struct WeightReader<'a> {
    source: &'a mut dyn TensorSource,
    device: &'a Device,
    /// Values of all matrices.
    total: f64,
    /// Values of the matrices that were read.
    done: f64,
    progress: &'a dyn Fn(f32),
}

impl WeightReader<'_> {
    /// The weights of the decoder block `layer`.
    fn layer(&mut self, config: &ModelConfig, layer: usize) -> Result<LayerWeights> {
        let hidden = config.hidden_size;
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        Ok(LayerWeights {
            attn_norm: self.vector(&name("input_layernorm"), hidden)?,
            qkv: self.linear(config, layer, Site::Qkv)?,
            qkv_bias: match config.qkv_bias {
                true => Some(self.biases(config, layer, Site::Qkv)?),
                false => None,
            },
            qk_norm: match config.qk_norm {
                true => Some((
                    self.vector(&name("self_attn.q_norm"), config.head_dim)?,
                    self.vector(&name("self_attn.k_norm"), config.head_dim)?,
                )),
                false => None,
            },
            o: self.linear(config, layer, Site::O)?,
            ffn_norm: self.vector(&name("post_attention_layernorm"), hidden)?,
            gate_up: self.linear(config, layer, Site::GateUp)?,
            down: self.linear(config, layer, Site::Down)?,
        })
    }

    /// The stacked rows of a site's modules.
    fn linear(&mut self, config: &ModelConfig, layer: usize, site: Site) -> Result<Arc<QMatrix>> {
        let mut rows = Vec::new();
        for module in site.modules() {
            let (n, k) = module.shape(config);
            rows.push(self.source.linear(&format!("{}.weight", module.path(layer)), n, k)?);
        }
        self.pack(&rows)
    }

    /// The stacked biases of a site's modules.
    fn biases(&mut self, config: &ModelConfig, layer: usize, site: Site) -> Result<Tensor> {
        let mut all = Vec::new();
        for module in site.modules() {
            all.extend(self.source.vector(&format!("{}.bias", module.path(layer)), module.shape(config).0)?);
        }
        let len = all.len();
        Ok(Tensor::from_vec(all, len, self.device)?)
    }

    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Arc<QMatrix>> {
        let rows = self.source.table(name, n, k)?;
        self.pack(&[rows])
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.source.vector(name, len)?, len, self.device)?)
    }

    fn pack(&mut self, sources: &[Source]) -> Result<Arc<QMatrix>> {
        let packed = QMatrix::pack(sources, self.device)?;
        self.done += packed.n() as f64 * packed.k() as f64;
        (self.progress)((self.done / self.total).min(1.0) as f32);
        Ok(Arc::new(packed))
    }
}

/// See [`Weights::fingerprint`].
fn fingerprint(config: &ModelConfig, quantize: Option<Quantize>, source: &dyn TensorSource) -> Result<String> {
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
    source.sample(&mut |bytes| hash.update(bytes))?;
    Ok(hex(&hash.finalize()))
}
