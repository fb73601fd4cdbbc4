//! An adapter into its base, for programs that cannot serve the two side by side: `W' = W + s·B·A`, for DoRA scaled row by
//! row to its magnitudes, in f32 and then rounded to the format of the file.
//!
//! Where the base has 4 bits, rounding to its own grid costs most of what the adapter learned: a small change rounds back
//! to the old code. 16 bits cost next to nothing. Tensors are made one at a time, each from the resident base.

mod gguf;
mod safetensors;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::arch::{Module, Site};
use crate::hub::{ModelFiles, ModelFormat};
use crate::lora::weights::{AdapterWeights, ModuleWeights};
use crate::model::weights::{LayerWeights, Weights};
use crate::ops::quant::{self, QMatrix};
use crate::{Error, Result, files};

/// What a merged model is written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A Hugging Face directory in bf16.
    #[value(help = "a Hugging Face directory, bf16")]
    Safetensors,
    /// One GGUF file; norms and biases are f32 in all of them.
    #[value(name = "gguf-f16", help = "a GGUF file, f16")]
    GgufF16,
    /// Blocks of 32, 8.5 bits a weight.
    #[value(name = "gguf-q8_0", help = "a GGUF file, Q8_0")]
    GgufQ8_0,
    /// Blocks of 32, 5 bits a weight; embedding and head are Q8_0.
    #[value(name = "gguf-q4_1", help = "a GGUF file, Q4_1 (embedding and head Q8_0)")]
    GgufQ4_1,
}

/// Writes the base `weights`, which came from `base`, with the adapter merged into it.
///
/// # Errors
/// `Invalid`: `out` is there already, an adapter with LoRA biases, a base of made-up weights, a RoPE scaling
/// that config.json cannot say, or a tokenizer that GGUF cannot. Then `out` is not there.
pub fn write(base: &ModelFiles, weights: &Weights, adapter: &AdapterWeights, format: Format, out: &Path) -> Result<()> {
    if out.exists() {
        return Err(Error::invalid(format!("--out {} is there already", out.display())));
    }
    let merged = Merged::new(weights, adapter)?;
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent)?;
    }
    files::replace(out, |made| match (&base.format, format) {
        (ModelFormat::Shape(_), _) => Err(Error::invalid("made-up weights are not merged with anything")),
        (_, Format::Safetensors) => safetensors::write(base, &merged, made),
        (_, format) => gguf::write(base, &merged, format, made),
    })
}

/// A base and what changes it.
struct Merged<'a> {
    weights: &'a Weights,
    /// By layer (the number of layers for the head) and module.
    changes: HashMap<(usize, Module), &'a ModuleWeights>,
}

/// A tensor to be made.
struct Entry<'a> {
    /// Hugging Face's.
    name: String,
    /// `[n, k]` or `[n]`.
    shape: Vec<usize>,
    origin: Origin<'a>,
}

enum Origin<'a> {
    Vector(Tensor),
    /// Rows of a matrix from `first` on.
    Rows {
        matrix: &'a QMatrix,
        first: usize,
        change: Option<&'a ModuleWeights>,
    },
}

impl<'a> Merged<'a> {
    fn new(weights: &'a Weights, adapter: &'a AdapterWeights) -> Result<Self> {
        if let Some(module) = adapter.modules.iter().find(|m| m.bias.is_some()) {
            return Err(Error::invalid(format!(
                "the adapter has a bias (lora_bias) on {}, for which the base has no place: serve it beside its base",
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
    fn entries(&self) -> Result<Vec<Entry<'a>>> {
        let weights = self.weights;
        let config = &weights.config;
        let vector = |name: String, values: &Tensor| Entry {
            name,
            shape: values.dims().to_vec(),
            origin: Origin::Vector(values.clone()),
        };
        let linear = |matrix: &'a QMatrix, layer: usize, module: Module| {
            let (n, k) = module.shape(config);
            let change = self.changes.get(&(layer, module)).copied();
            let origin = Origin::Rows { matrix, first: module.offset(config), change };
            Entry { name: format!("{}.weight", module.path(layer)), shape: vec![n, k], origin }
        };
        let embedding = &*weights.embedding;
        let mut entries = vec![Entry {
            name: "model.embed_tokens.weight".into(),
            shape: vec![embedding.n(), embedding.k()],
            origin: Origin::Rows { matrix: embedding, first: 0, change: None },
        }];
        for (i, layer) in weights.layers.iter().enumerate() {
            let part = |name: &str| format!("model.layers.{i}.{name}.weight");
            entries.push(vector(part("input_layernorm"), &layer.attn_norm));
            entries.push(vector(part("post_attention_layernorm"), &layer.ffn_norm));
            if let Some((q, k)) = &layer.qk_norm {
                entries.push(vector(part("self_attn.q_norm"), q));
                entries.push(vector(part("self_attn.k_norm"), k));
            }
            for module in Module::BLOCK {
                entries.push(linear(site(layer, module, &weights.head), i, module));
            }
            if let Some(biases) = &layer.qkv_bias {
                for module in Site::Qkv.modules() {
                    let own = biases.narrow(0, module.offset(config), module.shape(config).0)?;
                    entries.push(vector(format!("{}.bias", module.path(i)), &own));
                }
            }
        }
        entries.push(vector("model.norm.weight".into(), &weights.norm));
        if !self.tied() {
            entries.push(linear(&weights.head, config.num_layers, Module::LmHead));
        }
        Ok(entries)
    }
}

/// The matrix that has the rows of a module.
fn site<'a>(layer: &'a LayerWeights, module: Module, head: &'a QMatrix) -> &'a QMatrix {
    match module.site() {
        Site::Qkv => &layer.qkv,
        Site::O => &layer.o,
        Site::GateUp => &layer.gate_up,
        Site::Down => &layer.down,
        Site::Head => head,
    }
}

impl Entry<'_> {
    /// Its values after the merge, f32 on the CPU.
    fn values(&self) -> Result<Tensor> {
        let (matrix, first, change) = match &self.origin {
            // Copied: candle quantises all of the memory that a view looks into, such as the biases of q beside those of k.
            Origin::Vector(values) => return Ok(values.to_device(&Device::Cpu)?.force_contiguous()?),
            Origin::Rows { matrix, first, change } => (matrix, *first, *change),
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
