//! Hugging Face directories: config.json and safetensors, in one file or sharded.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::{Checkpoint, Entry};
use super::{Opened, check};
use crate::model::{ModelConfig, RopeScaling};
use crate::ops::quant::Codec;
use crate::{Error, Result};

/// The settings of config.json that a Llama decoder depends on; transformers' defaults where it has some.
#[derive(Deserialize)]
struct Config {
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
    rope_scaling: Option<Rope>,
    /// From transformers 5, with the base in it.
    rope_parameters: Option<Rope>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct Rope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; some files have both.
    r#type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<usize>,
}

/// Reads the description and lists the tensors.
pub fn open(dir: &Path) -> Result<Opened> {
    let path = dir.join("config.json");
    let bad = |why: String| Error::invalid(format!("{}: {why}", path.display()));
    let config: Value = read_json(&path)?;
    // Before the fields, which another architecture may lack.
    match config["architectures"][0].as_str() {
        Some("LlamaForCausalLM" | "MistralForCausalLM") => {}
        other => {
            let found = other.unwrap_or("(none)");
            return Err(bad(format!(
                "architecture {found:?} is not supported, only LlamaForCausalLM and MistralForCausalLM"
            )));
        }
    }
    let config: Config = serde_json::from_value(config).map_err(|e| bad(e.to_string()))?;
    let tied = config.tie_word_embeddings;
    let config = describe(config).map_err(|e| bad(e.message))?;

    let mut checkpoint = Checkpoint::new(str::to_string);
    for file in shards(dir)? {
        list(&mut checkpoint, &dir.join(file))?;
    }
    // Buffers that old versions of transformers saved; they follow from the configuration.
    for layer in 0..config.num_layers {
        checkpoint.ignore(&format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"));
    }
    if tied {
        checkpoint.ignore("lm_head.weight");
    }
    Ok(Opened { config, checkpoint, tied })
}

fn describe(c: Config) -> Result<ModelConfig> {
    let refuse = |what: String| Err(Error::invalid(format!("{what} is not supported")));
    if c.attention_bias || c.mlp_bias {
        return refuse(format!("{}: true", if c.attention_bias { "attention_bias" } else { "mlp_bias" }));
    }
    if let Some(act) = c.hidden_act.filter(|a| a != "silu" && a != "swish") {
        return refuse(format!("hidden_act {act:?} (only silu)"));
    }
    if let Some(window) = c.sliding_window.filter(|&w| w < c.max_position_embeddings) {
        return refuse(format!("sliding_window {window}"));
    }
    if let Some(part) = c.partial_rotary_factor.filter(|&p| p != 1.0) {
        return refuse(format!("partial_rotary_factor {part}"));
    }
    if let Some(q) = c.quantization_config {
        let method = q["quant_method"].as_str().unwrap_or("unknown").to_string();
        return refuse(format!(
            "a checkpoint quantised with {method:?} (load the original, with --quantize nf4 if wanted)"
        ));
    }
    let rope_theta = c.rope_parameters.as_ref().and_then(|r| r.rope_theta).or(c.rope_theta).unwrap_or(10_000.0);
    let rope = c.rope_parameters.or(c.rope_scaling);
    let head_dim = match c.head_dim {
        Some(d) => d,
        None if c.num_attention_heads > 0 => c.hidden_size / c.num_attention_heads,
        None => 0,
    };
    check(ModelConfig {
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
        max_position_embeddings: c.max_position_embeddings,
    })
}

fn rope_scaling(rope: Rope) -> Result<RopeScaling> {
    let kind = rope.rope_type.as_deref().or(rope.r#type.as_deref()).unwrap_or("default");
    let need = |name: &str, value: Option<f32>| {
        value.ok_or_else(|| Error::invalid(format!("RoPE scaling {kind:?} without {name}")))
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
                .ok_or_else(|| Error::invalid("RoPE scaling \"llama3\" without original_max_position_embeddings"))?,
        }),
        other => Err(Error::invalid(format!("RoPE scaling {other:?} is not supported: default, linear or llama3"))),
    }
}

/// File names of the shards, or of the one file.
fn shards(dir: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let index = dir.join("model.safetensors.index.json");
    if !index.is_file() {
        return Ok(BTreeSet::from(["model.safetensors".to_string()]));
    }
    let files: BTreeSet<String> = read_json::<Index>(&index)?.weight_map.into_values().collect();
    match files.iter().find(|f| Path::new(f).components().count() != 1 || f.starts_with("..")) {
        Some(outside) => Err(Error::invalid(format!("{}: {outside:?} is no file name", index.display()))),
        None => Ok(files),
    }
}

/// Adds the tensors of one safetensors file: u64 length, JSON header, data.
fn list(checkpoint: &mut Checkpoint, path: &Path) -> Result<()> {
    let bad = |why: String| Error::invalid(format!("{}: {why}", path.display()));
    let mut file = File::open(path).map_err(|e| bad(e.to_string()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(|e| bad(e.to_string()))?;
    let length = u64::from_le_bytes(length);
    let size = file.metadata()?.len();
    if length > size.saturating_sub(8) {
        return Err(bad(format!("no safetensors file, or truncated: a header of {length} bytes in a file of {size}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(|e| bad(e.to_string()))?;
    let header: Metadata = serde_json::from_slice(&header).map_err(|e| bad(format!("safetensors header: {e}")))?;
    let index = checkpoint.add_file(path, file);
    for (name, info) in header.tensors() {
        let codec = match info.dtype {
            Dtype::F32 => Codec::F32,
            Dtype::F16 => Codec::F16,
            Dtype::BF16 => Codec::BF16,
            other => return Err(bad(format!("tensor {name} is {other:?}; supported are F32, F16 and BF16"))),
        };
        let (start, end) = info.data_offsets;
        let entry = Entry {
            label: name.clone(),
            codec,
            shape: info.shape.clone(),
            file: index,
            offset: 8 + length + start as u64,
            bytes: (end - start) as u64,
            interleaved_heads: None,
        };
        checkpoint.add(name, entry)?;
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let bytes = fs::read(path).map_err(|e| Error::invalid(format!("{}: {e}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", path.display())))
}
