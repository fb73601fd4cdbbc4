//! An adapter as PEFT 0.21 writes it: `adapter_config.json` with all of LoraConfig's keys, and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::params::Params;
use super::spec::{Init, Spec};
use crate::{Error, Result};

/// Writes the adapter into `dir`, which appears whole or not at all; one that is there is replaced. `kept` says which of
/// AdaLoRA's ranks are left. AdaLoRA becomes plain LoRA with the same effect: A takes E and the scale, each module has a
/// rank of its own. Errors: the disk is full or may not be written.
pub fn write(
    dir: &Path,
    spec: &Spec,
    params: &Params,
    kept: Option<&[Vec<bool>]>,
    provenance: &Map<String, Value>,
) -> Result<()> {
    let (tensors, ranks) = tensors(params, kept)?;
    let config = config(spec, &ranks, provenance);
    let failed =
        |e: &dyn std::fmt::Display| Error::internal(format!("the adapter cannot be written to {}: {e}", dir.display()));
    let parent = dir.parent().ok_or_else(|| failed(&"it is a root"))?;
    fs::create_dir_all(parent).map_err(|e| failed(&e))?;
    let temporary = tempfile::Builder::new().prefix(".adapter-").tempdir_in(parent).map_err(|e| failed(&e))?;
    let text = serde_json::to_string_pretty(&config).map_err(|e| failed(&e))?;
    fs::write(temporary.path().join("adapter_config.json"), text).map_err(|e| failed(&e))?;
    let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    // Not by `serialize_to_file`, whose files only their owner may read.
    let bytes = safetensors::serialize(&tensors, metadata).map_err(|e| failed(&e))?;
    fs::write(temporary.path().join("adapter_model.safetensors"), bytes).map_err(|e| failed(&e))?;
    // Made by an earlier run that was cut off before its state was written.
    if dir.exists() {
        fs::remove_dir_all(dir).map_err(|e| failed(&e))?;
    }
    fs::rename(temporary.path(), dir).map_err(|e| failed(&e))
}

/// Ranks of modules, by path.
type Ranks = BTreeMap<String, usize>;

/// Tensors under PEFT's names, on the CPU, and AdaLoRA's ranks.
fn tensors(params: &Params, kept: Option<&[Vec<bool>]>) -> Result<(BTreeMap<String, Tensor>, Ranks)> {
    let (mut tensors, mut ranks) = (BTreeMap::new(), Ranks::new());
    let rank = params.rank;
    for (index, site) in params.sites.iter().enumerate() {
        let host = |t: Tensor| t.to_device(&Device::Cpu);
        let mut a = host(params.value(&site.a)?)?;
        if let Some(e) = &site.e {
            a = (a.broadcast_mul(&host(params.value(e)?)?)? * f64::from(params.scale))?;
        }
        for (i, part) in site.parts.iter().enumerate() {
            let path = part.module.path(site.layer);
            let (mut a, mut b) = (a.narrow(0, i * rank, rank)?, host(params.value(&part.b)?)?);
            if site.e.is_some() {
                let kept = |j: &u32| kept.is_none_or(|kept| kept[index][i * rank + *j as usize]);
                let mut ids: Vec<u32> = (0..rank as u32).filter(kept).collect();
                // A module without ranks has one that does nothing, because a targeted module must be there.
                if ids.is_empty() {
                    ids.push(0);
                }
                ranks.insert(path.clone(), ids.len());
                let ids = Tensor::new(ids, &Device::Cpu)?;
                (a, b) = (a.index_select(&ids, 0)?, b.index_select(&ids, 1)?);
            }
            let name = |what: &str| format!("base_model.model.{path}.{what}");
            tensors.insert(name("lora_A.weight"), a.contiguous()?);
            tensors.insert(name("lora_B.weight"), b.contiguous()?);
            if let Some(place) = &part.magnitude {
                tensors.insert(name("lora_magnitude_vector"), host(params.value(place)?)?.flatten_all()?);
            }
        }
    }
    debug_assert!(tensors.values().all(|t| t.dtype() == DType::F32));
    Ok((tensors, ranks))
}

/// `adapter_config.json`, keys sorted as PEFT sorts them.
fn config(spec: &Spec, ranks: &Ranks, provenance: &Map<String, Value>) -> BTreeMap<String, Value> {
    let lora = &spec.lora;
    // AdaLoRA's scale is in A.
    let (r, alpha) = match &lora.adalora {
        Some(ada) => (ada.target_r, ada.target_r as f32),
        None => (lora.r, lora.alpha),
    };
    let init = match lora.init {
        Init::Default => json!(true),
        Init::Gaussian => json!("gaussian"),
        Init::Orthogonal => json!("orthogonal"),
    };
    let Value::Object(config) = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": ranks,
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": null,
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": init,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_bias": false,
        "lora_dropout": lora.dropout,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "r": r,
        "rank_pattern": ranks,
        "revision": null,
        "target_modules": lora.target_modules,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": lora.use_dora,
        "use_qalora": false,
        "use_rslora": lora.use_rslora,
        "velora_config": null,
    }) else {
        return BTreeMap::new();
    };
    config.into_iter().chain(provenance.clone()).collect()
}
