//! Loading models: values, order of rows, and what is refused.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use quiver::arch::RopeScaling;
use quiver::error::ErrorKind;
use quiver::hub::{self, ModelFiles, ModelFormat, ModelSource};
use quiver::model::weights::{Quantize, Weights};
use quiver::ops::quant::QMatrix;
use quiver::ops::quant::nf4::{self, Nf4};
use serde_json::json;

fn base() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny/base")
}

fn load(format: ModelFormat, quantize: Option<Quantize>) -> quiver::Result<Weights> {
    Weights::load(&ModelFiles { name: "test".to_string(), format }, quantize, &Device::Cpu, |_| ())
}

fn load_dir(dir: &Path) -> quiver::Result<Weights> {
    load(ModelFormat::HuggingFace(dir.to_path_buf()), None)
}

fn load_gguf(path: &Path) -> quiver::Result<Weights> {
    load(ModelFormat::Gguf(path.to_path_buf()), None)
}

/// The message of a load, which must fail.
fn refused(result: quiver::Result<Weights>) -> String {
    result.map(|_| ()).unwrap_err().message
}

fn values(m: &QMatrix) -> Vec<f32> {
    (0..m.n()).flat_map(|row| m.row(row as u32).unwrap()).collect()
}

fn tensors() -> std::collections::HashMap<String, Tensor> {
    candle_core::safetensors::load(base().join("model.safetensors"), &Device::Cpu).unwrap()
}

fn flat(t: &Tensor) -> Vec<f32> {
    t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Every matrix of a two-layer model, with the names of the tensors that it stacks.
fn matrices(w: &Weights) -> Vec<(Vec<String>, Arc<QMatrix>)> {
    let mut all = vec![
        (vec!["model.embed_tokens.weight".to_string()], w.embedding.clone()),
        (vec!["lm_head.weight".to_string()], w.head.clone()),
    ];
    for (i, layer) in w.layers.iter().enumerate() {
        let names = |parts: &[&str]| parts.iter().map(|p| format!("model.layers.{i}.{p}.weight")).collect::<Vec<_>>();
        all.push((names(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]), layer.qkv.clone()));
        all.push((names(&["self_attn.o_proj"]), layer.o.clone()));
        all.push((names(&["mlp.gate_proj", "mlp.up_proj"]), layer.gate_up.clone()));
        all.push((names(&["mlp.down_proj"]), layer.down.clone()));
    }
    all
}

#[test]
fn safetensors_keep_their_values_and_stack_in_order() {
    let steps = Cell::new((0, 0.0f32));
    let files = ModelFiles { name: "test".to_string(), format: ModelFormat::HuggingFace(base()) };
    let w = Weights::load(&files, None, &Device::Cpu, |share| {
        assert!(share >= steps.get().1 && share <= 1.0);
        steps.set((steps.get().0 + 1, share));
    })
    .unwrap();
    assert!(steps.get().0 > 5 && steps.get().1 == 1.0);
    let c = &w.config;
    assert_eq!((c.hidden_size, c.intermediate_size, c.num_layers), (64, 160, 2));
    assert_eq!((c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size), (4, 2, 16, 97));
    assert_eq!((c.rms_norm_eps, c.rope_theta, c.max_position_embeddings), (1e-5, 1e4, 128));
    assert_eq!(c.rope_scaling, RopeScaling::None);

    let source = tensors();
    for (names, matrix) in matrices(&w) {
        let expected: Vec<f32> = names.iter().flat_map(|n| flat(&source[n])).collect();
        assert_eq!(values(&matrix), expected, "{names:?}");
    }
    assert_eq!(flat(&w.norm), flat(&source["model.norm.weight"]));
    assert_eq!(flat(&w.layers[1].ffn_norm), flat(&source["model.layers.1.post_attention_layernorm.weight"]));
    assert!(!Arc::ptr_eq(&w.embedding, &w.head));
    assert_eq!(w.fingerprint, load_dir(&base()).unwrap().fingerprint);
}

#[test]
fn nf4_on_load_is_bitsandbytes_on_the_linears_only() {
    let w = load(ModelFormat::HuggingFace(base()), Some(Quantize::Nf4)).unwrap();
    let source = tensors();
    for (names, matrix) in matrices(&w) {
        let expected: Vec<f32> = names
            .iter()
            .flat_map(|name| {
                let floats = flat(&source[name]);
                if !name.contains("layers") {
                    return floats;
                }
                let q = Nf4::quantize(&floats);
                let scales = q.scales();
                let code = |i: usize| if i.is_multiple_of(2) { q.codes[i / 2] >> 4 } else { q.codes[i / 2] & 15 };
                (0..floats.len()).map(|i| nf4::CODEBOOK[code(i) as usize] * scales[i / nf4::BLOCK]).collect()
            })
            .collect();
        assert_eq!(values(&matrix), expected, "{names:?}");
    }
    assert_ne!(w.fingerprint, load_dir(&base()).unwrap().fingerprint);
}

/// A copy of the base with edited settings and other tensors.
fn edited(config: serde_json::Value, tensors: &std::collections::HashMap<String, Tensor>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut form: serde_json::Value = serde_json::from_slice(&fs::read(base().join("config.json")).unwrap()).unwrap();
    for (key, value) in config.as_object().unwrap() {
        form[key] = value.clone();
    }
    fs::write(dir.path().join("config.json"), form.to_string()).unwrap();
    candle_core::safetensors::save(tensors, dir.path().join("model.safetensors")).unwrap();
    dir
}

#[test]
fn half_floats_shards_and_tied_heads_load() {
    for dtype in [DType::F16, DType::BF16] {
        let mut source = tensors();
        source.values_mut().for_each(|t| *t = t.to_dtype(dtype).unwrap());
        source.remove("lm_head.weight");
        let dir = edited(json!({"tie_word_embeddings": true}), &source);
        // In two shards.
        let shard = |keep: bool| {
            source.iter().filter(|(n, _)| n.contains("layers.0") == keep).map(|(n, t)| (n.clone(), t.clone())).collect()
        };
        let shards: [std::collections::HashMap<String, Tensor>; 2] = [shard(true), shard(false)];
        let mut map = serde_json::Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = format!("model-0000{}-of-00002.safetensors", i + 1);
            candle_core::safetensors::save(shard, dir.path().join(&file)).unwrap();
            map.extend(shard.keys().map(|n| (n.clone(), json!(file))));
        }
        fs::remove_file(dir.path().join("model.safetensors")).unwrap();
        fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();

        let w = load_dir(dir.path()).unwrap();
        assert!(Arc::ptr_eq(&w.embedding, &w.head));
        assert_eq!(values(&w.layers[0].o), flat(&source["model.layers.0.self_attn.o_proj.weight"]));
        assert_eq!(flat(&w.norm), flat(&source["model.norm.weight"]));
        fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
        assert!(refused(load_dir(dir.path())).contains("model-00002-of-00002.safetensors"));
    }
}

#[test]
fn configurations_that_are_not_understood_are_refused_by_name() {
    let source = tensors();
    for (config, word) in [
        (json!({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel"),
        (json!({"attention_bias": true}), "attention_bias"),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
        (json!({"rope_parameters": null, "rope_scaling": {"type": "dynamic", "factor": 2.0}}), "dynamic"),
        (json!({"rope_parameters": {"rope_type": "linear"}}), "factor"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        (json!({"num_key_value_heads": 3}), "3 key-value heads"),
        (json!({"num_key_value_heads": 4}), "k_proj"),
        (json!({"num_hidden_layers": 3}), "model.layers.2"),
        (json!({"num_hidden_layers": 1}), "model.layers.1"),
        (json!({"hidden_size": 0}), "hidden size"),
        (json!({"head_dim": 15}), "odd"),
        (json!({"vocab_size": 100}), "embed_tokens"),
        (json!({"hidden_size": "many"}), "config.json"),
    ] {
        let message = refused(load_dir(edited(config.clone(), &source).path()));
        assert!(message.contains(word), "{config}: {message}");
    }
    let llama3 = json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
    let c = load_dir(edited(llama3, &source).path()).unwrap().config;
    assert_eq!(c.rope_theta, 5e5);
    assert!(matches!(c.rope_scaling, RopeScaling::Llama3 { factor: 8.0, original_max_position_embeddings: 8192, .. }));
    let linear = json!({"rope_parameters": null, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}});
    let c = load_dir(edited(linear, &source).path()).unwrap().config;
    assert_eq!((c.rope_theta, c.rope_scaling), (7.0, RopeScaling::Linear { factor: 2.0 }));
}

#[test]
fn damaged_safetensors_are_refused() {
    let mut source = tensors();
    source.insert(
        "model.layers.0.self_attn.q_proj.bias".to_string(),
        Tensor::zeros(64, DType::F32, &Device::Cpu).unwrap(),
    );
    assert!(refused(load_dir(edited(json!({}), &source).path())).contains("q_proj.bias"));
    source.remove("model.layers.0.self_attn.q_proj.bias");
    source.insert("model.norm.weight".to_string(), Tensor::zeros(64, DType::I64, &Device::Cpu).unwrap());
    assert!(refused(load_dir(edited(json!({}), &source).path())).contains("model.norm.weight"));

    let dir = edited(json!({}), &tensors());
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for (length, word) in
        [(0, "model.safetensors"), (4, "model.safetensors"), (300, "header"), (bytes.len() - 1, "truncated")]
    {
        fs::write(&path, &bytes[..length]).unwrap();
        let message = refused(load_dir(dir.path()));
        assert!(message.contains(word), "{length}: {message}");
    }
    fs::write(&path, [&5u64.to_le_bytes()[..], b"{nope"].concat()).unwrap();
    assert!(refused(load_dir(dir.path())).contains("header"));
    fs::remove_file(&path).unwrap();
    assert!(refused(load_dir(dir.path())).contains("model.safetensors"));
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(refused(load_dir(dir.path())).contains("config.json"));
}

// --- GGUF ---

/// Reorders the rows of q and k as llama.cpp's converter does: (heads, 2, half) to (heads, half, 2).
fn interleaved(t: &Tensor, heads: usize) -> Tensor {
    let (n, k) = t.dims2().unwrap();
    t.reshape((heads, 2, n / heads / 2, k)).unwrap().transpose(1, 2).unwrap().reshape((n, k)).unwrap()
}

/// A small Llama whose widths are multiples of 256, the largest block size.
struct Tiny {
    /// Kind, GGUF name without `.weight`, and values of each tensor.
    source: Vec<(&'static str, String, Tensor)>,
    metadata: Vec<(String, Value)>,
}

const HIDDEN: usize = 256;
const INTER: usize = 512;

impl Tiny {
    fn new() -> Self {
        let mut source = Vec::new();
        let tensor = |shape: &[usize]| Tensor::randn(0f32, 0.05, shape, &Device::Cpu).unwrap();
        source.push(("", "token_embd".to_string(), tensor(&[40, HIDDEN])));
        source.push(("", "output_norm".to_string(), tensor(&[HIDDEN])));
        for i in 0..2 {
            for (part, shape) in [
                ("attn_norm", vec![HIDDEN]),
                ("ffn_norm", vec![HIDDEN]),
                // head_dim is 32, which is not hidden / heads.
                ("attn_q", vec![4 * 32, HIDDEN]),
                ("attn_k", vec![2 * 32, HIDDEN]),
                ("attn_v", vec![2 * 32, HIDDEN]),
                ("ffn_gate", vec![INTER, HIDDEN]),
                ("ffn_up", vec![INTER, HIDDEN]),
                ("ffn_down", vec![HIDDEN, INTER]),
            ] {
                source.push((part, format!("blk.{i}.{part}"), tensor(&shape)));
            }
            // 128 columns are less than a 256-value block, so this tensor is f32 where the format has such blocks.
            source.push(("", format!("blk.{i}.attn_output"), tensor(&[HIDDEN, 4 * 32])));
        }
        let number = |key: &str, v: usize| (format!("llama.{key}"), Value::U32(v as u32));
        let metadata = vec![
            ("general.architecture".to_string(), Value::String("llama".to_string())),
            number("embedding_length", HIDDEN),
            number("feed_forward_length", INTER),
            number("block_count", 2),
            number("attention.head_count", 4),
            number("attention.head_count_kv", 2),
            number("attention.key_length", 32),
            number("attention.value_length", 32),
            number("rope.dimension_count", 32),
            number("context_length", 512),
            ("llama.attention.layer_norm_rms_epsilon".to_string(), Value::F32(1e-5)),
            ("llama.rope.freq_base".to_string(), Value::F32(5e5)),
        ];
        Self { source, metadata }
    }

    fn set(mut self, key: &str, value: Value) -> Self {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.to_string(), value));
        self
    }

    fn tensor(mut self, name: &str, shape: &[usize]) -> Self {
        self.source.retain(|(_, n, _)| n != name);
        let tensor = Tensor::randn(1f32, 0.1, shape, &Device::Cpu).unwrap();
        self.source.push(("", name.to_string(), tensor));
        self
    }

    /// Writes the file as the converter would, with linears in `dtype`. Also returns the exact values of each tensor in Hugging
    /// Face's row order.
    fn write(&self, dtype: GgmlDType) -> (tempfile::TempDir, PathBuf, std::collections::HashMap<String, Vec<f32>>) {
        let mut exact = std::collections::HashMap::new();
        let mut quantised = Vec::new();
        for (part, name, t) in &self.source {
            let kind =
                if t.rank() == 1 || !t.dims()[1].is_multiple_of(dtype.block_size()) { GgmlDType::F32 } else { dtype };
            let q = QTensor::quantize(t, kind).unwrap();
            exact.insert(name.clone(), flat(&q.dequantize(&Device::Cpu).unwrap()));
            let heads = match *part {
                "attn_q" => Some(4),
                "attn_k" => Some(2),
                _ => None,
            };
            let stored = heads.map_or(q, |heads| QTensor::quantize(&interleaved(t, heads), kind).unwrap());
            quantised.push((format!("{name}.weight"), stored));
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tiny.gguf");
        let metadata: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        let tensors: Vec<_> = quantised.iter().map(|(n, t)| (n.as_str(), t)).collect();
        gguf_file::write(&mut fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
        (dir, path, exact)
    }
}

#[test]
fn gguf_blocks_keep_their_values_with_rows_in_hugging_faces_order() {
    use GgmlDType::*;
    let tiny = Tiny::new();
    for dtype in [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
        let (_dir, path, exact) = tiny.write(dtype);
        let w = load_gguf(&path).unwrap();
        assert_eq!((w.config.head_dim, w.config.rope_theta, w.config.vocab_size), (32, 5e5, 40));
        assert!(Arc::ptr_eq(&w.embedding, &w.head));
        let stacked = |parts: &[&str]| parts.iter().flat_map(|p| exact[*p].clone()).collect::<Vec<f32>>();
        assert_eq!(values(&w.embedding), exact["token_embd"], "{dtype:?}");
        for (i, layer) in w.layers.iter().enumerate() {
            let name = |part: &str| format!("blk.{i}.{part}");
            let of = |parts: &[&str]| {
                stacked(
                    &parts.iter().map(|p| name(p)).collect::<Vec<_>>().iter().map(String::as_str).collect::<Vec<_>>(),
                )
            };
            assert_eq!(values(&layer.qkv), of(&["attn_q", "attn_k", "attn_v"]), "{dtype:?}");
            assert_eq!(values(&layer.gate_up), of(&["ffn_gate", "ffn_up"]), "{dtype:?}");
            assert_eq!(values(&layer.down), of(&["ffn_down"]), "{dtype:?}");
            assert_eq!(values(&layer.o), of(&["attn_output"]), "{dtype:?}");
            assert_eq!(flat(&layer.attn_norm), of(&["attn_norm"]));
        }
    }
}

#[test]
fn gguf_variations() {
    let untied = Tiny::new().tensor("output", &[40, HIDDEN]).write(GgmlDType::F16);
    let w = load_gguf(&untied.1).unwrap();
    assert!(!Arc::ptr_eq(&w.embedding, &w.head));
    assert_eq!(values(&w.head), untied.2["output"]);

    let text = |s: &str| Value::String(s.to_string());
    let scaled = Tiny::new().tensor("rope_freqs", &[16]).write(GgmlDType::F16);
    assert_eq!(load_gguf(&scaled.1).unwrap().config.rope_scaling, RopeScaling::Factors(scaled.2["rope_freqs"].clone()));
    let linear =
        Tiny::new().set("llama.rope.scaling.type", text("linear")).set("llama.rope.scaling.factor", Value::F32(4.0));
    assert_eq!(
        load_gguf(&linear.write(GgmlDType::F16).1).unwrap().config.rope_scaling,
        RopeScaling::Linear { factor: 4.0 }
    );

    for (tiny, word) in [
        (Tiny::new().set("general.architecture", text("gemma3")), "gemma3"),
        (Tiny::new().set("llama.rope.scaling.type", text("yarn")), "yarn"),
        (Tiny::new().set("llama.rope.scaling.type", text("linear")), "llama.rope.scaling.factor"),
        (Tiny::new().set("llama.expert_count", Value::U32(8)), "expert_count"),
        (Tiny::new().set("llama.rope.dimension_count", Value::U32(16)), "dimension_count"),
        (Tiny::new().set("llama.block_count", Value::U32(3)), "blk.2."),
        (Tiny::new().set("llama.block_count", Value::U32(1)), "blk.1."),
        (Tiny::new().set("llama.block_count", text("two")), "llama.block_count"),
        (Tiny::new().set("llama.attention.head_count", Value::U32(0)), "heads"),
        (Tiny::new().set("split.count", Value::U16(3)), "llama-gguf-split"),
        (Tiny::new().tensor("blk.0.attn_v", &[32, HIDDEN]), "blk.0.attn_v"),
        (Tiny::new().tensor("blk.0.attn_q_norm", &[32]), "attn_q_norm"),
    ] {
        let (_dir, path, _) = tiny.write(GgmlDType::Q8_0);
        let message = refused(load_gguf(&path));
        assert!(message.contains(word) && message.contains("tiny.gguf"), "{word}: {message}");
    }
    let (_dir, path, _) = Tiny::new().write(GgmlDType::Q2K);
    assert!(refused(load_gguf(&path)).contains("Q2K"));
    let (_dir, path, _) = Tiny::new().write(GgmlDType::Q8_0);
    let again = refused(load(ModelFormat::Gguf(path.clone()), Some(Quantize::Nf4)));
    assert!(again.contains("quantised already"), "{again}");

    let bytes = fs::read(&path).unwrap();
    for length in [0, 3, 10, 200, 1000, bytes.len() / 2, bytes.len() - 40] {
        fs::write(&path, &bytes[..length]).unwrap();
        let message = refused(load_gguf(&path));
        assert!(message.contains("tiny.gguf"), "{length}: {message}");
    }
}

static SMOLLM2: LazyLock<ModelFiles> =
    LazyLock::new(|| hub::resolve(hub::DEFAULT_MODEL, &hub::default_cache(), true).unwrap());

#[test]
fn smollm2_has_the_values_of_its_file() {
    let ModelFormat::Gguf(path) = &SMOLLM2.format else { panic!("the default model is a GGUF file") };
    let w = Weights::load(&SMOLLM2, None, &Device::Cpu, |_| ()).unwrap();
    let mut file = fs::File::open(path).unwrap();
    let content = Content::read(&mut file).unwrap();
    let mut exact = |name: &str| {
        let t = content.tensor(&mut file, name, &Device::Cpu).unwrap();
        t.dequantize(&Device::Cpu).unwrap()
    };
    assert!(Arc::ptr_eq(&w.embedding, &w.head));
    for i in [0, 29] {
        let q = exact(&format!("blk.{i}.attn_q.weight")).reshape((9, 32, 2, 576)).unwrap().transpose(1, 2).unwrap();
        let k = exact(&format!("blk.{i}.attn_k.weight")).reshape((3, 32, 2, 576)).unwrap().transpose(1, 2).unwrap();
        let v = exact(&format!("blk.{i}.attn_v.weight"));
        let expected = [flat(&q.contiguous().unwrap()), flat(&k.contiguous().unwrap()), flat(&v)].concat();
        assert_eq!(values(&w.layers[i].qkv), expected);
        assert_eq!(values(&w.layers[i].down), flat(&exact(&format!("blk.{i}.ffn_down.weight"))));
    }
    assert_eq!(w.embedding.row(49151).unwrap(), flat(&exact("token_embd.weight").get(49151).unwrap()));
    assert_eq!(w.config.rope_theta, 1e5);
}

#[test]
fn model_names_are_understood() {
    assert_eq!(ModelSource::parse(hub::DEFAULT_MODEL).unwrap(), ModelSource::Default);
    let hub = |repo: &str, revision: &str, file: Option<&str>| ModelSource::Hub {
        repo: repo.to_string(),
        revision: revision.to_string(),
        file: file.map(str::to_string),
    };
    assert_eq!(ModelSource::parse("hf:a/b-1.5_c").unwrap(), hub("a/b-1.5_c", "main", None));
    assert_eq!(ModelSource::parse("hf:a/b@v1/x/y.gguf").unwrap(), hub("a/b", "v1", Some("x/y.gguf")));
    for bad in ["hf:", "hf:a", "hf:a/", "hf:a/b/c.bin", "hf:../b", "hf:a/b@", "hf:a b/c"] {
        let message = ModelSource::parse(bad).unwrap_err().message;
        assert!(message.contains("hf:org/name"), "{bad}: {message}");
    }
    let missing = ModelSource::parse("/no/such/file.gguf").unwrap_err();
    assert!(missing.kind == ErrorKind::NotFound && missing.message.contains(hub::DEFAULT_MODEL), "{missing}");
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path();
    let error = hub::resolve(dir.path().to_str().unwrap(), cache, false).unwrap_err();
    assert!(error.message.contains("config.json"), "{error}");
    let files = hub::resolve(base().to_str().unwrap(), cache, false).unwrap();
    assert_eq!(files.name, "base");
    assert!(matches!(files.format, ModelFormat::HuggingFace(_)));
    let gguf = dir.path().join("some.Q4_0.gguf");
    fs::write(&gguf, b"GGUF").unwrap();
    let files = hub::resolve(gguf.to_str().unwrap(), cache, false).unwrap();
    assert_eq!(files.name, "some.Q4_0");
    assert!(matches!(files.format, ModelFormat::Gguf(_)));
}
