//! The adapter in PEFT 0.21's format: `adapter_config.json` with all keys of `LoraConfig`, and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use super::params::TrainableParams;
use crate::train::spec::{JobSpec, LoraInit};
use crate::{Error, Result, files};

/// A copy of an adapter in host memory, ready to be written.
pub struct AdapterExport {
    /// `adapter_config.json`, with sorted keys as in PEFT.
    config: BTreeMap<String, Value>,
    /// f32, under PEFT's names.
    tensors: BTreeMap<String, Tensor>,
}

impl AdapterExport {
    /// Copies the values. `kept` says which of AdaLoRA's ranks are left, site by site. AdaLoRA becomes plain LoRA with the same
    /// delta: A contains E and the scale, and each module has its own rank. Errors: out of memory.
    pub fn new(
        spec: &JobSpec,
        params: &TrainableParams,
        kept: Option<&[Vec<bool>]>,
        provenance: &Map<String, Value>,
    ) -> Result<Self> {
        let (tensors, ranks) = tensors(params, kept)?;
        Ok(Self { config: config(spec, &ranks, provenance), tensors })
    }

    /// Writes the PEFT directory `dir`, atomically. An existing one is replaced. Errors: the directory cannot be written.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let write = |temporary: &Path| {
            fs::create_dir(temporary)?;
            let text = serde_json::to_string_pretty(&self.config).map_err(io::Error::other)?;
            fs::write(temporary.join("adapter_config.json"), text)?;
            let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
            // `serialize_to_file` would make a file that only its owner can read.
            let bytes = safetensors::serialize(&self.tensors, metadata).map_err(io::Error::other)?;
            fs::write(temporary.join("adapter_model.safetensors"), bytes)
        };
        files::replace(dir, write).map_err(|e| {
            Error::internal(format!("the adapter cannot be written to {}: {e}", dir.display())).path(dir).caused_by(e)
        })
    }
}

/// Ranks of modules, by path.
type Ranks = BTreeMap<String, usize>;

/// Copies of the tensors under PEFT's names in host memory, and AdaLoRA's ranks.
fn tensors(params: &TrainableParams, kept: Option<&[Vec<bool>]>) -> Result<(BTreeMap<String, Tensor>, Ranks)> {
    let (mut tensors, mut ranks) = (BTreeMap::new(), Ranks::new());
    let rank = params.rank;
    for (index, site) in params.sites.iter().enumerate() {
        let host = |t: Tensor| t.to_device(&Device::Cpu);
        let mut a = host(params.value(&site.a)?)?;
        if let Some(e) = &site.e {
            a = (a.broadcast_mul(&host(params.value(e)?)?)? * f64::from(params.scale))?;
        }
        for (i, module) in site.modules.iter().enumerate() {
            let path = module.module.path(site.layer);
            let (mut a, mut b) = (a.narrow(0, i * rank, rank)?, host(params.value(&module.b)?)?);
            if site.e.is_some() {
                let kept = |j: &u32| kept.is_none_or(|kept| kept[index][i * rank + *j as usize]);
                let mut ids: Vec<u32> = (0..rank as u32).filter(kept).collect();
                // A module that has lost all ranks keeps one whose E is zero: PEFT requires every target module.
                if ids.is_empty() {
                    ids.push(0);
                }
                ranks.insert(path.clone(), ids.len());
                let ids = Tensor::new(ids, &Device::Cpu)?;
                (a, b) = (a.index_select(&ids, 0)?, b.index_select(&ids, 1)?);
            }
            let name = |tensor: &str| format!("base_model.model.{path}.{tensor}");
            // Copied even where a view would do: the next step changes the values in place.
            tensors.insert(name("lora_A.weight"), a.force_contiguous()?);
            tensors.insert(name("lora_B.weight"), b.force_contiguous()?);
            if let Some(magnitude) = &module.magnitude {
                let magnitude = host(params.value(magnitude)?)?.force_contiguous()?;
                tensors.insert(name("lora_magnitude_vector"), magnitude.flatten_all()?);
            }
        }
    }
    Ok((tensors, ranks))
}

/// `adapter_config.json`. `provenance` is added to PEFT's keys.
fn config(spec: &JobSpec, ranks: &Ranks, provenance: &Map<String, Value>) -> BTreeMap<String, Value> {
    let lora = &spec.lora;
    // With AdaLoRA, A contains the scale: an alpha equal to r makes it 1.
    let (r, alpha) = match &lora.adalora {
        Some(ada) => (ada.target_r, ada.target_r as f32),
        None => (lora.r, lora.alpha),
    };
    let init = match lora.init {
        LoraInit::Default => json!(true),
        LoraInit::Gaussian => json!("gaussian"),
        LoraInit::Orthogonal => json!("orthogonal"),
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
