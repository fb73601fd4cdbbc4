//! LoRA adapters in GGUF, as llama.cpp's `convert_lora_to_gguf.py` writes them: `general.type` is `adapter`, `adapter.type` is
//! `lora`, and tensors are `blk.0.attn_q.weight.lora_a` and `.lora_b`.
//!
//! As in a base's file, the rows of q and k are interleaved for Llama. Only B has these rows. The delta's factor is
//! `adapter.lora.alpha` over the rank, or 1 if alpha is 0 (`llama_adapter_lora_weight::get_scale`).

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use safetensors::Dtype;
use serde_json::{Map, json};

use super::base_check::BaseClaim;
use super::foreign::{file_name, unsupported};
use super::peft_config::{PeftConfig, invalid};
use super::reader::AdapterFiles;
use super::tensor_file::{StoredTensor, TensorFile, ValueOrder};
use crate::Result;
use crate::arch::{Architecture, ModelConfig};
use crate::model::weights::gguf::{GgufMetadata, header, hf_name};

/// Opens an adapter's file. Errors: a base model's file, an adapter of another kind or architecture, a type of tensor that
/// cannot be read.
pub(super) fn open(path: &Path, model: &ModelConfig) -> Result<AdapterFiles> {
    let (content, file) = header(path)?;
    let name = file_name(path);
    let meta = GgufMetadata(&content.metadata);
    if meta.text("general.type")? != Some("adapter") {
        return Err(unsupported(format!(
            "{name} is the GGUF file of a base model, not of an adapter: serve it with --model"
        )));
    }
    if meta.text("adapter.type")? != Some("lora") {
        return Err(unsupported(format!("{name}: adapter.type is not \"lora\", the only one that is served")));
    }
    if content.metadata.contains_key("adapter.alora.invocation_tokens") {
        return Err(unsupported(format!("{name}: activated LoRA (adapter.alora.invocation_tokens) is not served")));
    }
    let architecture = Architecture::from_gguf(meta.text("general.architecture")?)?;
    if (architecture.qkv_bias, architecture.qk_norm) != (model.qkv_bias, model.qk_norm) {
        return Err(invalid(format!(
            "{name} belongs to a base of the architecture {:?}, and the served base is {:?}",
            architecture.gguf,
            Architecture::of(model).gguf
        )));
    }
    let alpha =
        meta.float("adapter.lora.alpha")?.ok_or_else(|| invalid(format!("{name} has no adapter.lora.alpha")))?;
    let length = file.metadata().map_err(|e| invalid(format!("{name}: {e}")))?.len();
    let mut tensors = BTreeMap::new();
    for (label, info) in &content.tensor_infos {
        let tensor = stored(label, info, &content, architecture, model, length)?;
        tensors.insert(peft_name(label).unwrap_or_else(|| label.clone()), tensor);
    }
    let config = PeftConfig::of(options(&tensors, f64::from(alpha)))?;
    let base = meta.text("general.base_model.0.repo_url")?.or(meta.text("general.base_model.0.name")?);
    let base = BaseClaim { name: base.map(str::to_owned), fingerprint: None };
    Ok(AdapterFiles { config, base, tensors: TensorFile::new(name, file, tensors) })
}

/// `blk.3.attn_q.weight.lora_a` to PEFT's name.
fn peft_name(label: &str) -> Option<String> {
    let (weight, half) = label.rsplit_once('.')?;
    let half = match half {
        "lora_a" => "A",
        "lora_b" => "B",
        _ => return None,
    };
    let path = hf_name(weight)?;
    Some(format!("base_model.model.{}.lora_{half}.weight", path.strip_suffix(".weight")?))
}

/// PEFT's options: the modules of the file, each with the rank that its tensors have.
fn options(tensors: &BTreeMap<String, StoredTensor>, alpha: f64) -> serde_json::Value {
    let rank_of = |name: &str, tensor: &StoredTensor| {
        let path = name.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")?;
        Some((path.to_owned(), tensor.shape.first().copied().unwrap_or(0).max(1)))
    };
    let ranks: Vec<(String, usize)> = tensors.iter().filter_map(|(name, tensor)| rank_of(name, tensor)).collect();
    let most = ranks.first().map_or(1, |(_, rank)| *rank);
    let alpha_of = |rank: usize| if alpha == 0.0 { rank as f64 } else { alpha };
    let others = || ranks.iter().filter(|(_, rank)| *rank != most);
    json!({
        "peft_type": "LORA", "r": most, "lora_alpha": alpha_of(most),
        "rank_pattern": others().map(|(path, rank)| (path.clone(), json!(rank))).collect::<Map<_, _>>(),
        "alpha_pattern": others().map(|(path, rank)| (path.clone(), json!(alpha_of(*rank)))).collect::<Map<_, _>>(),
        "target_modules": ranks.iter().map(|(path, _)| path).collect::<Vec<_>>(),
    })
}

/// Where a tensor lies. Errors: a type that cannot be read, a tensor beyond the end of the file.
fn stored(
    label: &str,
    info: &TensorInfo,
    content: &Content,
    architecture: &Architecture,
    model: &ModelConfig,
    length: u64,
) -> Result<StoredTensor> {
    let dtype = match info.ggml_dtype {
        GgmlDType::F32 => Dtype::F32,
        GgmlDType::F16 => Dtype::F16,
        GgmlDType::BF16 => Dtype::BF16,
        other => {
            return Err(unsupported(format!("{label} is {other:?}: convert the adapter again with --outtype f16")));
        }
    };
    let shape = info.shape.dims().to_vec();
    let bytes = shape.iter().try_fold(dtype.bitsize() / 8, |n, d| n.checked_mul(*d));
    let offset = content.tensor_data_offset.checked_add(info.offset);
    let fits = |(offset, bytes): &(u64, usize)| offset.checked_add(*bytes as u64).is_some_and(|end| end <= length);
    let (offset, bytes) = offset
        .zip(bytes)
        .filter(fits)
        .ok_or_else(|| invalid(format!("{label} lies beyond the end of the file: is it truncated?")))?;
    let order = match label {
        _ if !architecture.interleaved => ValueOrder::Same,
        _ if label.ends_with("attn_q.weight.lora_b") => ValueOrder::Interleaved(model.num_heads),
        _ if label.ends_with("attn_k.weight.lora_b") => ValueOrder::Interleaved(model.num_kv_heads),
        _ => ValueOrder::Same,
    };
    Ok(StoredTensor { label: label.into(), dtype, shape, offset, bytes, order })
}
