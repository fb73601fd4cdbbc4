//! Decoders other than Llama and weights quantised by bitsandbytes, compared with the logits of transformers, PEFT and
//! bitsandbytes (`fixtures/architectures/make.py`).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use quiver::adapter::reader;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::lora::slots::{SlotPool, SlotWeights};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::{Quantize, Weights};
use quiver::ops::batch::Batch;
use serde_json::json;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures").join(name)
}

fn load(format: ModelFormat, quantize: Option<Quantize>) -> quiver::Result<Weights> {
    Weights::load(&ModelFiles { name: "test".into(), format }, quantize, &Device::Cpu, |_| {})
}

fn directory(dir: &Path) -> quiver::Result<Weights> {
    load(ModelFormat::HuggingFace(dir.to_path_buf()), None)
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// The logits of all of the fixtures' `input_ids`, with an adapter.
fn logits(weights: Weights, adapter: Option<&str>) -> Vec<f32> {
    let decoder = Decoder::new(weights).unwrap();
    let mut kv = KvCache::new(decoder.config(), 8, &Device::Cpu).unwrap();
    let mut slots = SlotPool::default();
    let terms = adapter.map(|name| {
        let adapter = reader::read(&fixture(name), decoder.config()).unwrap().weights;
        (slots.insert(SlotWeights::from_adapter(&adapter, decoder.config())), 1.0)
    });
    let ids = tensors(&fixture("qwen2/expected.safetensors"))["input_ids"].to_vec1::<i64>().unwrap();
    let ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    let mut batch = Batch::default();
    batch.push(&ids, 0, &[3, 1], KvCache::BLOCK_SIZE, terms.as_slice());
    batch.logit_rows = (0..ids.len() as u32).collect();
    decoder.forward(&batch, &mut kv, &slots).unwrap().logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// Relative L2 distance to the logits of a fixture.
fn distance(have: &[f32], name: &str) -> f64 {
    let want = &tensors(&fixture(name).join("expected.safetensors"))["logits"];
    let want: Vec<f32> = want.flatten_all().unwrap().to_vec1().unwrap();
    assert_eq!(have.len(), want.len());
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut have.iter().zip(&want).map(|(h, w)| f64::from(h - w))) / norm(&mut want.iter().map(|w| f64::from(*w)))
}

#[test]
fn logits_equal_those_of_transformers_and_peft() {
    for name in ["mistral", "qwen2", "qwen3", "bnb-nf4", "bnb-fp4"] {
        let distance = distance(&logits(directory(&fixture(name)).unwrap(), None), name);
        assert!(distance < 1e-5, "{name}: {distance}");
    }
    let have = logits(directory(&fixture("qwen2")).unwrap(), Some("qwen2-lora"));
    assert!(distance(&have, "qwen2-lora") < 1e-5, "{}", distance(&have, "qwen2-lora"));
    assert!(distance(&have, "qwen2") > 0.1, "the adapter must have an effect");
}

/// Writes a fixture as GGUF, as llama.cpp's converter would.
fn gguf(name: &str, architecture: &str, path: &Path) {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.layers", "blk"),
    ];
    let head_dim = if name == "qwen3" { 12 } else { 8 };
    let tensors: Vec<(String, QTensor)> = tensors(&fixture(name).join("model.safetensors"))
        .into_iter()
        .map(|(name, t)| {
            let mut t = t.to_dtype(DType::F32).unwrap();
            let interleaved = name.contains("q_proj") || name.contains("k_proj");
            if interleaved && architecture == "llama" && t.rank() == 2 {
                let (n, k) = t.dims2().unwrap();
                let heads = t.reshape((n / head_dim, 2, head_dim / 2, k)).unwrap();
                t = heads.transpose(1, 2).unwrap().reshape((n, k)).unwrap();
            }
            let name = names.iter().fold(name, |name, (hf, own)| name.replace(hf, own));
            (name, QTensor::quantize(&t, GgmlDType::F32).unwrap())
        })
        .collect();
    let number = |key: &str, v: u32| (format!("{architecture}.{key}"), Value::U32(v));
    let metadata = [
        ("general.architecture".to_string(), Value::String(architecture.to_string())),
        number("embedding_length", 32),
        number("feed_forward_length", 48),
        number("block_count", 2),
        number("attention.head_count", 4),
        number("attention.head_count_kv", 2),
        number("attention.key_length", head_dim as u32),
        number("context_length", 64),
        number("attention.sliding_window", 40),
        (format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(1e-6)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn gguf_files_give_the_same_logits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    for (name, architecture) in [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")] {
        gguf(name, architecture, &path);
        let weights = load(ModelFormat::Gguf(path.clone()), None).unwrap();
        assert_eq!(weights.config.max_position_embeddings, 40, "the window limits the length of sequences");
        let distance = distance(&logits(weights, None), name);
        assert!(distance < 1e-5, "{name}: {distance}");
    }
    // The biases of one architecture are surplus in the other, and missing the other way round.
    gguf("qwen2", "llama", &path);
    let error = load(ModelFormat::Gguf(path.clone()), None).err().unwrap().message;
    assert!(error.contains("blk.0.attn_k.bias"), "{error}");
    gguf("qwen3", "qwen2", &path);
    let error = load(ModelFormat::Gguf(path), None).err().unwrap().message;
    assert!(error.contains("no tensor blk.0.attn_q.bias"), "{error}");
}

/// Loads a copy of a fixture's directory with edited settings and tensors.
fn edited(
    name: &str,
    config: serde_json::Value,
    edit: impl Fn(&mut HashMap<String, Tensor>),
) -> quiver::Result<Weights> {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read(fixture(name).join("config.json")).unwrap();
    let mut form: serde_json::Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in config.as_object().unwrap() {
        form[key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), form.to_string()).unwrap();
    let mut tensors = tensors(&fixture(name).join("model.safetensors"));
    edit(&mut tensors);
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    directory(dir.path())
}

#[test]
fn sliding_windows_limit_the_length_of_sequences() {
    let length = |name: &str, config| edited(name, config, |_| {}).unwrap().config.max_position_embeddings;
    assert_eq!(length("mistral", json!({})), 64);
    assert_eq!(length("mistral", json!({"sliding_window": 64})), 64);
    assert_eq!(length("mistral", json!({"sliding_window": 48})), 48);
    assert_eq!(length("qwen2", json!({"sliding_window": 48})), 64, "the window is used only with use_sliding_window");
    assert_eq!(length("qwen2", json!({"sliding_window": 48, "use_sliding_window": true})), 48);
    let none = |_: &mut HashMap<String, Tensor>| {};
    for (name, config, word) in [
        ("qwen3", json!({"layer_types": ["chunked_attention", "full_attention"]}), "chunked_attention"),
        ("qwen3", json!({"attention_bias": true}), "attention_bias"),
        ("qwen3", json!({"head_dim": 8}), "q_proj"),
        ("qwen3", json!({"architectures": ["Qwen3MoeForCausalLM"]}), "Qwen3MoeForCausalLM"),
        ("qwen2", json!({"architectures": null, "model_type": "qwen3", "head_dim": 8}), "q_norm"),
    ] {
        let error = edited(name, config.clone(), none).err().unwrap().message;
        assert!(error.contains(word), "{config}: {error}");
    }
    assert!(edited("qwen2", json!({"architectures": null}), none).is_ok(), "model_type names the architecture too");
}

#[test]
fn bitsandbytes_values_are_exact() {
    for name in ["bnb-nf4", "bnb-fp4"] {
        let weights = directory(&fixture(name)).unwrap();
        let expected = tensors(&fixture(name).join("dequantised.safetensors"));
        let bits = |rows: Vec<f32>| rows.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        for (tensor, matrix, first) in [
            ("self_attn.k_proj", &weights.layers[1].qkv, weights.config.num_heads * weights.config.head_dim),
            ("mlp.down_proj", &weights.layers[1].down, 0),
        ] {
            let expected = &expected[&format!("model.layers.1.{tensor}.weight")];
            let rows = first..first + expected.dim(0).unwrap();
            let have = rows.flat_map(|row| matrix.row(row as u32).unwrap()).collect();
            assert!(bits(have) == bits(expected.flatten_all().unwrap().to_vec1().unwrap()), "{name} {tensor}");
        }
    }
    let weights = load(ModelFormat::HuggingFace(fixture("bnb-nf4")), Some(Quantize::Nf4));
    assert!(weights.err().unwrap().message.contains("quantised already"));
}

#[test]
fn bitsandbytes_states_that_are_not_understood_are_refused_by_name() {
    const WEIGHT: &str = "model.layers.0.self_attn.q_proj.weight";
    let state = format!("{WEIGHT}.quant_state.bitsandbytes__nf4");
    let refused =
        |edit: &dyn Fn(&mut HashMap<String, Tensor>)| edited("bnb-nf4", json!({}), edit).err().unwrap().message;
    let removed = |part: &str| refused(&|t| drop(t.remove(&format!("{WEIGHT}{part}")).unwrap()));
    for (part, word) in [
        ("", "there is no tensor"),
        (".absmax", "no absmax"),
        (".quant_map", "no quant_map"),
        (".nested_absmax", "no nested_absmax"),
        (".nested_quant_map", "no nested_quant_map"),
        (".quant_state.bitsandbytes__nf4", "q_proj.weight"),
    ] {
        let error = removed(part);
        assert!(error.contains(word) && error.contains(WEIGHT), "{part}: {error}");
    }
    let with = |old: &str, new: &str| {
        let change = |tensors: &mut HashMap<String, Tensor>| {
            let text = String::from_utf8(tensors[&state].to_vec1::<u8>().unwrap()).unwrap();
            assert!(text.contains(old), "{text}");
            let bytes = text.replace(old, new).into_bytes();
            tensors.insert(state.clone(), Tensor::from_slice(&bytes, bytes.len(), &Device::Cpu).unwrap());
        };
        refused(&change)
    };
    for (old, new, word) in [
        ("\"nf4\"", "\"fp4\"", "quant_type"),
        ("\"blocksize\": 64", "\"blocksize\": 48", "blocksize 48"),
        ("\"blocksize\": 64", "\"blocksize\": 128", "absmax"),
        ("[64, 64]", "[64, 60]", "absmax"),
        ("[64, 64]", "[32, 128]", "expected [64, 64]"),
        ("\"float32\", \"shape\"", "\"int8\", \"shape\"", "int8"),
        ("\"nested_blocksize\": 256", "\"nested_blocksize\": 128", "nested"),
        ("{", "{\"rotated\": true, ", "rotated"),
    ] {
        let error = with(old, new);
        assert!(error.contains(word) && error.contains(WEIGHT), "{new}: {error}");
    }
    let error = refused(&|t| {
        let other = t.remove(&state).unwrap();
        t.insert(format!("{WEIGHT}.quant_state.bitsandbytes__af4"), other);
    });
    assert!(error.contains("af4"), "{error}");
    let error = refused(&|t| {
        let more = t[&format!("{WEIGHT}.quant_map")].clone();
        t.insert(format!("{WEIGHT}.outliers"), more);
    });
    assert!(error.contains("outliers"), "{error}");
    for settings in [json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), json!({"quant_method": "awq"})] {
        let error = edited("bnb-nf4", json!({"quantization_config": settings}), |_| {}).err().unwrap().message;
        assert!(error.contains("only 4-bit bitsandbytes"), "{error}");
    }
}

/// Root mean square.
fn size(values: &[f32]) -> f64 {
    (values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64).sqrt()
}

#[test]
fn dummy_weights_keep_activations_and_are_the_same_every_time() {
    for name in ["mistral", "qwen2", "qwen3"] {
        // Wide enough for statistics.
        let dir = tempfile::tempdir().unwrap();
        let mut form: serde_json::Value =
            serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
        for (key, value) in [("hidden_size", 256), ("intermediate_size", 320), ("head_dim", 64)] {
            form[key] = value.into();
        }
        let path = dir.path().join("config.json");
        fs::write(&path, form.to_string()).unwrap();
        let mut fingerprints = Vec::new();
        for quantize in [None, Some(Quantize::Q4_0), Some(Quantize::Q4_1)] {
            let load = || load(ModelFormat::Shape(path.clone()), quantize).unwrap();
            let weights = load();
            fingerprints.push(weights.fingerprint.clone());
            let down: Vec<f32> = (0..256).flat_map(|row| weights.layers[1].down.row(row).unwrap()).collect();
            assert!((size(&down) * 320f64.sqrt() - 1.0).abs() < 0.02, "{name} {quantize:?}: {}", size(&down));
            let mean = down.iter().map(|v| f64::from(*v)).sum::<f64>() / down.len() as f64;
            assert!(mean.abs() < 0.02 * size(&down), "{name} {quantize:?}: {mean}");
            let logits = [logits(weights, None), logits(load(), None)];
            assert!((0.3..3.0).contains(&size(&logits[0])), "{name} {quantize:?}: {}", size(&logits[0]));
            assert_eq!(logits[0], logits[1]);
        }
        fingerprints.dedup();
        assert_eq!(fingerprints.len(), 3);
    }
    let error = load(ModelFormat::HuggingFace(fixture("qwen2")), Some(Quantize::Q4_0)).err().unwrap().message;
    assert!(error.contains("--load-format dummy"), "{error}");
}

#[test]
fn shapes_in_the_repository_are_models() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/shapes");
    // Parameters in millions, embedding and head included.
    for (name, millions) in [("llama-3.1-8b", 8029), ("llama-2-7b", 6738), ("qwen3-8b", 8190)] {
        let files = quiver::hub::shape(root.join(name).to_str().unwrap()).unwrap();
        assert_eq!(files.name, name);
        let c = quiver::model::weights::shape(&files).unwrap();
        let heads = (c.num_heads * 2 + c.num_kv_heads * 2) * c.head_dim;
        let parameters =
            c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size) + 2 * c.vocab_size * c.hidden_size;
        assert_eq!(parameters / 1_000_000, millions, "{name}");
    }
    assert!(quiver::hub::shape("no/such").unwrap_err().message.contains("config.json"));
}
