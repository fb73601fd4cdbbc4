//! Adapters of MLX-LM: `adapters.safetensors`, and an `adapter_config.json` that holds the arguments of its trainer.
//!
//! Format: `mlx_lm/tuner/utils.py` and `mlx_lm/tuner/lora.py`. `lora_a` is `[in, rank]` and `lora_b` is `[rank, out]`, so both
//! are transposed here. The delta's factor is `scale`. Versions before 2025 also had `alpha`, and multiplied by `alpha / rank`.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::base_check::BaseClaim;
use super::peft_config::{PeftConfig, invalid, unsupported};
use super::reader::AdapterFiles;
use super::tensor_file::{TensorFile, ValueOrder};
use crate::Result;
use crate::arch::{ModelConfig, Module};

/// Opens the adapter in `dir`. Errors: options that are not supported; a file without some of the layers or modules that the
/// config asks for.
pub(super) fn open(dir: &Path, config: &Map<String, Value>, model: &ModelConfig) -> Result<AdapterFiles> {
    let options = MlxOptions::parse(config)?;
    let mut tensors = TensorFile::safetensors(dir, "adapters.safetensors")?;
    let modules = options.modules(&tensors, model)?;
    for (name, tensor) in &mut tensors.tensors {
        if let Some((_, "A" | "B")) = split(name) {
            tensor.order = ValueOrder::Transposed;
            tensor.shape.reverse();
        }
    }
    tensors.rename(|name| {
        let (path, half) = split(name)?;
        Some(match half {
            "magnitude" => format!("base_model.model.{path}.lora_magnitude_vector"),
            half => format!("base_model.model.{path}.lora_{half}.weight"),
        })
    })?;
    let peft = json!({
        "peft_type": "LORA", "r": options.rank, "lora_alpha": options.scale * options.rank as f64, "use_dora": options.dora,
        "target_modules": modules,
    });
    Ok(AdapterFiles {
        config: PeftConfig::of(peft)?,
        base: BaseClaim { name: options.base, fingerprint: None },
        tensors,
    })
}

/// The options of MLX-LM that decide what an adapter computes.
struct MlxOptions {
    rank: usize,
    scale: f64,
    dora: bool,
    /// Number of adapted blocks, counted from the last one; `None` for all.
    layers: Option<usize>,
    /// Names of modules within a block, such as `self_attn.q_proj`; `None` for MLX-LM's default, which depends on its version.
    keys: Option<Vec<String>>,
    base: Option<String>,
}

impl MlxOptions {
    fn parse(config: &Map<String, Value>) -> Result<Self> {
        let must = |key: &str, what: &str| invalid(format!("adapter_config.json of MLX-LM: {key} must {what}"));
        let get = |map: &Map<String, Value>, key: &str| map.get(key).filter(|v| !v.is_null()).cloned();
        let dora = match get(config, "fine_tune_type").as_ref().map(|v| v.as_str().unwrap_or("")) {
            None => get(config, "use_dora").is_some_and(|v| v == true),
            Some("lora") => false,
            Some("dora") => true,
            Some("full") => {
                return Err(unsupported(
                    "fine_tune_type \"full\": all weights were trained; fuse it and serve it with --model",
                ));
            }
            Some(_) => return Err(must("fine_tune_type", "be \"lora\" or \"dora\"")),
        };
        let Some(Value::Object(lora)) = config.get("lora_parameters") else {
            return Err(must("lora_parameters", "be an object with rank and scale"));
        };
        const KNOWN: [&str; 5] = ["rank", "scale", "alpha", "dropout", "keys"];
        if let Some(key) = lora.keys().find(|key| !KNOWN.contains(&key.as_str())) {
            return Err(unsupported(format!("lora_parameters.{key}: unknown option of MLX-LM")));
        }
        let number = |key: &str| match get(lora, key) {
            None => Ok(None),
            Some(v) => v.as_f64().map(Some).ok_or_else(|| must(&format!("lora_parameters.{key}"), "be a number")),
        };
        let rank = get(lora, "rank").and_then(|v| v.as_u64()).filter(|rank| *rank > 0);
        let rank = rank.ok_or_else(|| must("lora_parameters.rank", "be a positive integer"))? as usize;
        let scale = number("scale")?
            .ok_or_else(|| must("lora_parameters.scale", "be a number: it is the factor of the adapter's deltas"))?;
        let factor = number("alpha")?.map_or(1.0, |alpha| alpha / rank as f64);
        let layers = get(config, "num_layers").or_else(|| get(config, "lora_layers"));
        let layers = match layers.as_ref().map(Value::as_i64) {
            None | Some(Some(..0)) => None,
            Some(Some(layers)) => Some(layers as usize),
            Some(None) => return Err(must("num_layers", "be an integer")),
        };
        let names = |v: &Value| -> Option<Vec<String>> {
            v.as_array()?.iter().map(|name| name.as_str().map(str::to_owned)).collect()
        };
        let keys = match get(lora, "keys") {
            None => None,
            Some(v) => Some(names(&v).ok_or_else(|| must("lora_parameters.keys", "be a list of module names"))?),
        };
        let base = get(config, "model").and_then(|v| v.as_str().map(str::to_owned));
        Ok(Self { rank, scale: scale * factor, dora, layers, keys, base })
    }

    /// The paths of the adapted modules. Every adapted block has the same ones: those of `keys`, or those that any block of the
    /// file has. `num_layers` says which blocks are adapted; without it, those of the file.
    fn modules(&self, file: &TensorFile, model: &ModelConfig) -> Result<BTreeSet<String>> {
        let paths: BTreeSet<&str> = file.tensors.keys().filter_map(|name| split(name)).map(|(path, _)| path).collect();
        let in_block = |path: &&str| {
            let (layer, name) = path.strip_prefix("model.layers.")?.split_once('.')?;
            Some((layer.parse::<usize>().ok()?, name.to_owned()))
        };
        let found: BTreeSet<(usize, String)> = paths.iter().filter_map(in_block).collect();
        let names: BTreeSet<String> = match &self.keys {
            Some(keys) => keys.iter().filter(|key| Module::BLOCK.iter().any(|m| in_module(*m, key))).cloned().collect(),
            None => found.iter().map(|(_, name)| name.clone()).collect(),
        };
        let first = match self.layers {
            Some(layers) => model.num_layers.saturating_sub(layers),
            None => found.first().map_or(0, |(layer, _)| *layer),
        };
        let blocks =
            (first..model.num_layers).flat_map(|layer| names.iter().map(move |n| format!("model.layers.{layer}.{n}")));
        Ok(blocks.chain(paths.contains("lm_head").then(|| "lm_head".into())).collect())
    }
}

/// Whether `key` names the module within a block.
fn in_module(module: Module, key: &str) -> bool {
    module.path(0).strip_prefix("model.layers.0.") == Some(key)
}

/// Splits `<path>.lora_a` into the path and what it holds: A, B or DoRA's magnitude.
fn split(name: &str) -> Option<(&str, &'static str)> {
    let (path, last) = name.rsplit_once('.')?;
    match last {
        "lora_a" => Some((path, "A")),
        "lora_b" => Some((path, "B")),
        "m" => Some((path, "magnitude")),
        _ => None,
    }
}
