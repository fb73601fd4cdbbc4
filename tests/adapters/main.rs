//! Adapters: their files, the registry and the tiers.

mod files;
mod layouts;
mod reference;
mod registry;
mod tiers;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quiver::adapter::registry::{Registry, RegistryConfig};
use quiver::arch::{ModelConfig, RopeScaling};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// The shape of `fixtures/peft-tiny/base`.
fn tiny_model() -> ModelConfig {
    ModelConfig {
        hidden_size: 64,
        intermediate_size: 160,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        vocab_size: 97,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: RopeScaling::None,
        qkv_bias: false,
        qk_norm: false,
        max_position_embeddings: 128,
    }
}

/// The shape of SmolLM2-135M.
fn smol_model() -> ModelConfig {
    ModelConfig {
        hidden_size: 576,
        intermediate_size: 1536,
        num_layers: 30,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        vocab_size: 49152,
        ..tiny_model()
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny").join(name)
}

/// An adapter to write: based on a fixture or on nothing, and changed by the test.
#[derive(Clone)]
struct Draft {
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    fn open(dir: &Path) -> Self {
        let config = std::fs::read_to_string(dir.join("adapter_config.json")).unwrap();
        let data = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        let own = |t: TensorView| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
        Self {
            config: serde_json::from_str(&config).unwrap(),
            tensors: file.tensors().into_iter().map(|(name, t)| (name, own(t))).collect(),
        }
    }

    /// A rank-8 adapter that targets q_proj of every layer, with values determined by `seed`.
    fn small(model: &ModelConfig, seed: u32) -> Self {
        let mut draft = Self {
            config: json!({"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}),
            tensors: BTreeMap::new(),
        };
        for layer in 0..model.num_layers {
            let path = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
            let n = model.num_heads * model.head_dim;
            draft.set(&format!("{path}.lora_A.weight"), &[8, model.hidden_size], |i| small_number(seed, layer, i));
            draft.set(&format!("{path}.lora_B.weight"), &[n, 8], |i| small_number(seed + 1, layer, i));
        }
        draft
    }

    fn set(&mut self, name: &str, shape: &[usize], value: impl Fn(usize) -> f32) {
        let bytes = (0..shape.iter().product()).flat_map(|i| value(i).to_le_bytes()).collect();
        self.tensors.insert(name.into(), (Dtype::F32, shape.to_vec(), bytes));
    }

    fn rename(&mut self, rename: impl Fn(&str) -> String) {
        self.tensors = std::mem::take(&mut self.tensors).into_iter().map(|(n, t)| (rename(&n), t)).collect();
    }

    fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("adapter_config.json"), self.config.to_string()).unwrap();
        let views = self
            .tensors
            .iter()
            .map(|(n, (dtype, shape, bytes))| (n, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        // Renamed into place, as a trainer should do it: readers see either the old file or the new one.
        let data = safetensors::serialize(views, None).unwrap();
        std::fs::write(dir.join("new"), data).unwrap();
        std::fs::rename(dir.join("new"), dir.join("adapter_model.safetensors")).unwrap();
    }
}

/// A small number that differs between seeds, layers and positions.
fn small_number(seed: u32, layer: usize, i: usize) -> f32 {
    let mixed = (seed as u64 * 7919 + layer as u64 * 104_729 + i as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * 0.1
}

/// Bytes of [`Draft::small`] in a slot.
fn small_bytes(model: &ModelConfig) -> usize {
    model.num_layers * 8 * (model.hidden_size + model.num_heads * model.head_dim) * 4
}

fn registry(model: ModelConfig, slot_budget: usize, host_budget: usize) -> Registry {
    Registry::new(Arc::new(model), RegistryConfig { slot_budget, host_budget, ..Default::default() }).unwrap()
}
