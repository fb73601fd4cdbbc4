//! Hugging Face directories: config.json and safetensors, in one file or sharded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde_json::Value;

use super::check::check_config;
use super::tensors::{ModelTensors, TensorEncoding, TensorEntry};
use super::{OpenModel, bnb};
use crate::arch::{Architecture, ModelConfig, RopeScaling};
use crate::ops::quant::Codec;
use crate::{Error, Result};

/// The settings of config.json that a decoder depends on, with transformers' defaults.
#[derive(Deserialize)]
struct HfConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    rms_norm_eps: f32,
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    hidden_act: Option<String>,
    rope_theta: Option<f32>,
    /// Up to transformers 4.
    rope_scaling: Option<HfRope>,
    /// From transformers 5 on; contains `rope_theta`.
    rope_parameters: Option<HfRope>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    /// Whether a Qwen model uses `sliding_window`.
    use_sliding_window: Option<bool>,
    /// Kind of attention of each decoder block.
    layer_types: Option<Vec<String>>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files have both.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

/// A model's shape from its config.json, and whether the embedding is also the head.
pub fn shape(path: &Path) -> Result<(ModelConfig, bool)> {
    let (config, tied, _) = read_config(path)?;
    Ok((config, tied))
}

/// The shape, whether the embedding is also the head, and the settings of the quantisation.
fn read_config(path: &Path) -> Result<(ModelConfig, bool, Option<Value>)> {
    let config: Value = read_json(path)?;
    // Read before the other fields, which another architecture may lack.
    let (class, model_type) = (config["architectures"][0].as_str(), config["model_type"].as_str());
    let architecture = Architecture::from_hf(class.or(model_type)).map_err(|e| e.in_file(path))?;
    let mut config: HfConfig = serde_json::from_value(config).map_err(|e| unreadable(path, e))?;
    let (tied, quantised) = (config.tie_word_embeddings, config.quantization_config.take());
    let config = describe(architecture, config).map_err(|e| e.in_file(path))?;
    Ok((config, tied, quantised))
}

/// Reads the description and lists the tensors.
pub fn open(dir: &Path) -> Result<OpenModel> {
    let path = dir.join("config.json");
    let (config, tied, quantised) = read_config(&path)?;
    if let Some(q) = quantised.as_ref().filter(|q| !bnb::is_config(q)) {
        return Err(Error::invalid(format!(
            "a model quantised with {:?} is not supported, only 4-bit bitsandbytes (load the original, with --quantize nf4 if \
             you want 4 bits)",
            q["quant_method"].as_str().unwrap_or("unknown")
        ))
        .in_file(path));
    }

    let mut tensors = ModelTensors::new(str::to_string);
    for file in shards(dir)? {
        list(&mut tensors, &dir.join(file))?;
    }
    // Old versions of transformers saved these buffers, which follow from the configuration.
    for layer in 0..config.num_layers {
        tensors.ignore(&format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"));
    }
    if tied {
        tensors.ignore("lm_head.weight");
    }
    if quantised.is_some() {
        bnb::join(&mut tensors).map_err(|e| e.in_file(dir))?;
    }
    Ok(OpenModel { config, tensors, tied })
}

fn describe(architecture: &Architecture, c: HfConfig) -> Result<ModelConfig> {
    let refuse = |what: String| Err(Error::invalid(format!("{what} is not supported")));
    // Architectures that always have biases of q, k and v ignore this setting.
    let attention_bias = c.attention_bias && !architecture.qkv_bias;
    if attention_bias || c.mlp_bias {
        return refuse(format!("{}: true", if attention_bias { "attention_bias" } else { "mlp_bias" }));
    }
    if let Some(act) = c.hidden_act.filter(|a| a != "silu" && a != "swish") {
        return refuse(format!("hidden_act {act:?} (only silu)"));
    }
    let kinds = ["full_attention", "sliding_attention"];
    if let Some(other) = c.layer_types.iter().flatten().find(|t| !kinds.contains(&t.as_str())) {
        return refuse(format!("layer type {other:?}"));
    }
    // Up to its length, a sliding window is full attention, and sequences end there.
    let has_window = c.use_sliding_window.unwrap_or(architecture.sliding_window);
    let window = c.sliding_window.filter(|_| has_window).unwrap_or(usize::MAX);
    if let Some(part) = c.partial_rotary_factor.filter(|&p| p != 1.0) {
        return refuse(format!("partial_rotary_factor {part}"));
    }
    let rope_theta = c.rope_parameters.as_ref().and_then(|r| r.rope_theta).or(c.rope_theta).unwrap_or(10_000.0);
    let rope = c.rope_parameters.or(c.rope_scaling);
    let head_dim = match c.head_dim.or(architecture.head_dim) {
        Some(width) => width,
        None if c.num_attention_heads > 0 => c.hidden_size / c.num_attention_heads,
        None => 0,
    };
    let config = ModelConfig {
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        num_layers: c.num_hidden_layers,
        num_heads: c.num_attention_heads,
        num_kv_heads: c.num_key_value_heads.unwrap_or(c.num_attention_heads),
        head_dim,
        vocab_size: c.vocab_size,
        rms_norm_eps: c.rms_norm_eps,
        rope_theta,
        rope_scaling: rope.map_or(Ok(RopeScaling::None), rope_scaling)?,
        qkv_bias: architecture.qkv_bias,
        qk_norm: architecture.qk_norm,
        max_position_embeddings: c.max_position_embeddings.min(window),
    };
    check_config(&config)?;
    Ok(config)
}

fn rope_scaling(rope: HfRope) -> Result<RopeScaling> {
    let kind = rope.rope_type.as_deref().or(rope.r#type.as_deref()).unwrap_or("default");
    let need = |name: &str, value: Option<f32>| {
        value.ok_or_else(|| Error::invalid(format!("RoPE scaling {kind:?} needs {name}")))
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: need("factor", rope.factor)? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need("factor", rope.factor)?,
            low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
            high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
            original_max_position_embeddings: rope
                .original_max_position_embeddings
                .ok_or_else(|| Error::invalid("RoPE scaling \"llama3\" needs original_max_position_embeddings"))?,
        }),
        other => {
            Err(Error::invalid(format!("RoPE scaling {other:?} is not supported, only default, linear and llama3")))
        }
    }
}

/// File names of the shards, or of the one file.
fn shards(dir: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct ShardIndex {
        weight_map: BTreeMap<String, String>,
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        return Ok(BTreeSet::from(["model.safetensors".to_string()]));
    }
    let files: BTreeSet<String> = read_json::<ShardIndex>(&index)?.weight_map.into_values().collect();
    match files.iter().find(|f| Path::new(f).components().count() != 1 || f.starts_with("..")) {
        Some(outside) => Err(Error::invalid(format!("{outside:?} is not a file name")).in_file(index)),
        None => Ok(files),
    }
}

/// Adds the tensors of one safetensors file: u64 length, JSON header, data.
pub fn list(tensors: &mut ModelTensors, path: &Path) -> Result<()> {
    let mut file = File::open(path).map_err(|e| unreadable(path, e))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|e| unreadable(path, e))?;
    let length = u64::from_le_bytes(length);
    let size = file.metadata()?.len();
    if length > size.saturating_sub(8) {
        let why = format!("not a safetensors file, or truncated: a header of {length} bytes in a file of {size}");
        return Err(Error::invalid(why).in_file(path));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| unreadable(path, e))?;
    let header: Metadata = serde_json::from_slice(&header)
        .map_err(|e| Error::invalid(format!("safetensors header: {e}")).in_file(path).caused_by(e))?;
    let index = tensors.add_file(path, file);
    for (name, info) in header.tensors() {
        let encoding = match info.dtype {
            Dtype::F32 => TensorEncoding::Values(Codec::F32),
            Dtype::F16 => TensorEncoding::Values(Codec::F16),
            Dtype::BF16 => TensorEncoding::Values(Codec::BF16),
            Dtype::U8 => TensorEncoding::Bytes,
            other => {
                let why = format!("tensor {name} is {other:?}; supported are F32, F16 and BF16");
                return Err(Error::invalid(why).in_file(path));
            }
        };
        let (start, end) = info.data_offsets;
        let entry = TensorEntry {
            label: name.clone(),
            encoding,
            shape: info.shape.clone(),
            file: index,
            offset: 8 + length + start as u64,
            bytes: (end - start) as u64,
            interleaved_heads: None,
        };
        tensors.add(name, entry)?;
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|e| unreadable(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| unreadable(path, e))
}

fn unreadable(path: &Path, e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::invalid(e.to_string()).in_file(path).caused_by(e)
}
