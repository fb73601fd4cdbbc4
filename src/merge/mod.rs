//! Merges an adapter into its base, for programs that cannot serve adapters: `W' = W + s·B·A`, under DoRA with each row scaled
//! to its magnitude. Sums are in f32 and then rounded to the format of the file.
//!
//! Rounding to the grid of a 4-bit base would lose most of what the adapter learned, because small changes round back to the
//! old code. Rounding to 16 bits loses next to nothing. Tensors are computed one at a time from the resident base.

mod compare;
mod gguf;
mod safetensors;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::arch::{Module, Site};
use crate::hub::{ModelFiles, ModelFormat};
use crate::lora::BaseMatrices;
use crate::lora::weights::{AdapterWeights, ModuleWeights};
use crate::model::weights::Weights;
use crate::ops::quant::{self, QMatrix};
use crate::{Error, Result, files};
pub(crate) use compare::{MergeLosses, compare};

/// The format that a merged model is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MergeFormat {
    /// A Hugging Face directory in bf16.
    #[value(help = "a Hugging Face directory, bf16")]
    Safetensors,
    /// A GGUF file in f16. Norms and biases are f32 in all GGUF formats.
    #[value(name = "gguf-f16", help = "a GGUF file, f16")]
    GgufF16,
    /// Blocks of 32 values, 8.5 bits per weight.
    #[value(name = "gguf-q8_0", help = "a GGUF file, Q8_0")]
    GgufQ8_0,
    /// Blocks of 32 values, 5 bits per weight. Embedding and head are Q8_0.
    #[value(name = "gguf-q4_1", help = "a GGUF file, Q4_1 (embedding and head Q8_0)")]
    GgufQ4_1,
}

/// Writes the base `weights`, which were loaded from `base`, with the adapter merged in.
///
/// # Errors
/// `Invalid`: `out` exists; an adapter with LoRA biases; a base with dummy weights; a RoPE scaling that config.json cannot
/// express; a tokenizer that GGUF cannot express. After an error, nothing is left at `out`.
pub fn write(
    base: &ModelFiles,
    weights: &Weights,
    adapter: &AdapterWeights,
    format: MergeFormat,
    out: &Path,
) -> Result<()> {
    if out.exists() {
        return Err(Error::invalid(format!("--out {} exists already", out.display())));
    }
    let merged = MergedModel::new(weights, adapter)?;
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent)?;
    }
    files::replace(out, |made| match (&base.format, format) {
        (ModelFormat::Shape(_), _) => Err(Error::invalid("dummy weights cannot be merged")),
        (_, MergeFormat::Safetensors) => safetensors::write(base, &merged, made),
        (_, format) => gguf::write(base, &merged, format, made),
    })
}

/// A base and the adapter that changes it.
struct MergedModel<'a> {
    weights: &'a Weights,
    /// The adapter by layer (for the head, the number of layers) and module.
    changes: HashMap<(usize, Module), &'a ModuleWeights>,
}

/// A tensor of a merged model, whose values are not computed yet.
struct MergedTensor<'a> {
    /// Name in Hugging Face.
    name: String,
    /// `[n, k]` or `[n]`.
    shape: Vec<usize>,
    origin: TensorOrigin<'a>,
}

enum TensorOrigin<'a> {
    /// A norm or a bias, which no adapter changes.
    Vector(Tensor),
    /// The rows of `matrix` from `first` on.
    Rows { matrix: &'a QMatrix, first: usize, change: Option<&'a ModuleWeights> },
}

impl<'a> MergedModel<'a> {
    fn new(weights: &'a Weights, adapter: &'a AdapterWeights) -> Result<Self> {
        if let Some(module) = adapter.modules.iter().find(|m| m.bias.is_some()) {
            return Err(Error::invalid(format!(
                "the adapter has a bias (lora_bias) on {}, which cannot be merged: serve the adapter instead",
                module.module.path(module.layer)
            )));
        }
        Ok(Self { weights, changes: adapter.modules.iter().map(|m| ((m.layer, m.module), m)).collect() })
    }

    /// Whether the head is still the embedding.
    fn tied(&self) -> bool {
        Arc::ptr_eq(&self.weights.embedding, &self.weights.head)
            && !self.changes.contains_key(&(self.weights.config.num_layers, Module::LmHead))
    }

    /// All tensors, in the order of the model.
    fn tensors(&self) -> Result<Vec<MergedTensor<'a>>> {
        let weights = self.weights;
        let config = &weights.config;
        let vector = |name: String, values: &Tensor| MergedTensor {
            name,
            shape: values.dims().to_vec(),
            origin: TensorOrigin::Vector(values.clone()),
        };
        let linear = |layer: usize, module: Module| {
            let (n, k) = module.shape(config);
            let change = self.changes.get(&(layer, module)).copied();
            let matrix = weights.matrix(layer, module.site());
            let origin = TensorOrigin::Rows { matrix, first: module.offset(config), change };
            MergedTensor { name: format!("{}.weight", module.path(layer)), shape: vec![n, k], origin }
        };
        let embedding = &*weights.embedding;
        let mut tensors = vec![MergedTensor {
            name: "model.embed_tokens.weight".into(),
            shape: vec![embedding.n(), embedding.k()],
            origin: TensorOrigin::Rows { matrix: embedding, first: 0, change: None },
        }];
        for (i, layer) in weights.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}.weight");
            tensors.push(vector(name("input_layernorm"), &layer.attn_norm));
            tensors.push(vector(name("post_attention_layernorm"), &layer.ffn_norm));
            if let Some((q, k)) = &layer.qk_norm {
                tensors.push(vector(name("self_attn.q_norm"), q));
                tensors.push(vector(name("self_attn.k_norm"), k));
            }
            tensors.extend(Module::BLOCK.map(|module| linear(i, module)));
            if let Some(biases) = &layer.qkv_bias {
                for module in Site::Qkv.modules() {
                    let own = biases.narrow(0, module.offset(config), module.shape(config).0)?;
                    tensors.push(vector(format!("{}.bias", module.path(i)), &own));
                }
            }
        }
        tensors.push(vector("model.norm.weight".into(), &weights.norm));
        if !self.tied() {
            tensors.push(linear(config.num_layers, Module::LmHead));
        }
        Ok(tensors)
    }
}

impl MergedTensor<'_> {
    /// The values after the merge, f32 on the CPU.
    fn values(&self) -> Result<Tensor> {
        let (matrix, first, change) = match &self.origin {
            // Copied, because candle quantises the whole storage of a view: for the biases of q, also those of k and v.
            TensorOrigin::Vector(values) => return Ok(values.to_device(&Device::Cpu)?.force_contiguous()?),
            TensorOrigin::Rows { matrix, first, change } => (matrix, *first, *change),
        };
        let (n, k) = (self.shape[0], self.shape[1]);
        let ids: Vec<u32> = (first as u32..(first + n) as u32).collect();
        let base = quant::gather_rows(matrix, &ids, None)?.to_device(&Device::Cpu)?;
        let Some(change) = change else { return Ok(base) };
        let a = Tensor::from_vec(change.a.to_f32(), (change.rank, k), &Device::Cpu)?;
        let b = Tensor::from_vec(change.b.to_f32(), (n, change.rank), &Device::Cpu)?;
        let merged = (base + (b.matmul(&a)? * f64::from(change.scale))?)?;
        let Some(magnitude) = &change.magnitude else { return Ok(merged) };
        let norms = merged.sqr()?.sum_keepdim(1)?.sqrt()?;
        let magnitude = Tensor::from_vec(magnitude.to_f32(), (n, 1), &Device::Cpu)?;
        Ok(merged.broadcast_mul(&(magnitude / norms)?)?)
    }
}
