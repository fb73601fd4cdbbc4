//! Merged models, read back by the loader and compared with PEFT's logits of the base with the adapter.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use quiver::adapter::reader;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::lora::slots::SlotPool;
use quiver::lora::weights::AdapterWeights;
use quiver::merge::{self, MergeFormat};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::Weights;
use quiver::ops::batch::Batch;
use quiver::text::codec::TextCodec;
use quiver::text::messages::ChatPrompt;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny").join(name)
}

fn tensors(path: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn directory(path: PathBuf) -> ModelFiles {
    ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(path) }
}

fn gguf(path: PathBuf) -> ModelFiles {
    ModelFiles { name: "tiny".into(), format: ModelFormat::Gguf(path) }
}

fn load(files: &ModelFiles) -> Weights {
    Weights::load(files, None, &Device::Cpu, |_| {}).unwrap()
}

fn merge(base: &ModelFiles, adapter: &str, format: MergeFormat, out: &Path) -> quiver::Result<()> {
    let weights = load(base);
    let adapter = reader::read(&fixture(adapter), &weights.config).unwrap().weights;
    merge::write(base, &weights, &adapter, format, out)
}

/// Relative L2 distance of a model's logits from the expected ones of a fixture.
fn distance(files: &ModelFiles, expected: &str) -> f64 {
    let decoder = Decoder::new(load(files)).unwrap();
    let ids = tensors(&fixture("base/expected.safetensors"))["input_ids"].flatten_all().unwrap();
    let ids: Vec<u32> = ids.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect();
    let want = tensors(&fixture(expected).join("expected.safetensors"))["logits"].flatten_all().unwrap();
    let mut batch = Batch::default();
    batch.push(&ids, 0, &[0, 1, 2, 3, 4, 5, 6, 7], KvCache::BLOCK_SIZE, &[]);
    batch.logit_rows = (0..ids.len() as u32).collect();
    let mut kv = KvCache::new(decoder.config(), 8, &Device::Cpu).unwrap();
    let have = decoder.forward(&batch, &mut kv, &SlotPool::default()).unwrap().logits.flatten_all().unwrap();
    let norm = |t: &Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(have - &want).unwrap()) / norm(&want)
}

/// Writes the fixtures' base as llama.cpp's converter would: f32, interleaved rows of q and k, and a small tokenizer.
fn tiny_gguf(path: &Path) {
    let names = [
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
    ];
    let mut stored = Vec::new();
    for (name, tensor) in tensors(&fixture("base/model.safetensors")) {
        let heads = [("q_proj", 4), ("k_proj", 2)].into_iter().find(|(part, _)| name.contains(part));
        let tensor = match heads {
            None => tensor,
            Some((_, heads)) => {
                // The source of each stored row: a head has 16 rows, and its halves alternate.
                let row = |i: u32| i / 16 * 16 + i % 2 * 8 + i % 16 / 2;
                let rows: Vec<u32> = (0..heads * 16).map(row).collect();
                tensor.index_select(&Tensor::new(rows, &Device::Cpu).unwrap(), 0).unwrap()
            }
        };
        let label = names.iter().fold(name, |name, (hf, own)| name.replace(hf, own));
        stored.push((label, QTensor::quantize(&tensor, GgmlDType::F32).unwrap()));
    }
    let text = |s: &str| Value::String(s.into());
    let tokens = (0..97u8).map(|i| text(&char::from(b'!' + i % 94).to_string().repeat(1 + usize::from(i / 94))));
    let metadata = [
        ("general.architecture", text("llama")),
        ("general.file_type", Value::U32(0)),
        ("llama.attention.head_count", Value::U32(4)),
        ("llama.attention.head_count_kv", Value::U32(2)),
        ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("llama.block_count", Value::U32(2)),
        ("llama.context_length", Value::U32(128)),
        ("llama.embedding_length", Value::U32(64)),
        ("llama.feed_forward_length", Value::U32(160)),
        ("llama.rope.freq_base", Value::F32(10_000.0)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.tokens", Value::Array(tokens.collect())),
        ("tokenizer.ggml.merges", Value::Array(vec![text("! !")])),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(2)),
    ];
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (*key, value)).collect();
    let stored: Vec<_> = stored.iter().map(|(label, tensor)| (label.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &stored).unwrap();
}

#[test]
fn a_merged_directory_answers_as_the_base_with_the_adapter() {
    let base = directory(fixture("base"));
    for adapter in ["all-linear-r8", "rslora-patterns", "dora", "lm-head", "adalora"] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        merge(&base, adapter, MergeFormat::Safetensors, &out).unwrap();
        let (before, after) = (distance(&base, adapter), distance(&directory(out), adapter));
        println!("{adapter}: base {before:.4}, merged {after:.4}");
        assert!(after < 0.01 && after < before / 10.0, "{adapter}: base {before}, merged {after}");
    }
}

#[test]
fn a_merged_gguf_file_is_as_exact_as_its_format_and_keeps_row_order_and_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("tiny.gguf");
    tiny_gguf(&source);
    let base = gguf(source);
    assert!(distance(&base, "base") < 1e-4, "the test's own file");
    let mut last = 0.0;
    for (format, allowed) in [(MergeFormat::GgufF16, 1e-3), (MergeFormat::GgufQ8_0, 0.02), (MergeFormat::GgufQ4_1, 0.3)]
    {
        let out = dir.path().join(format!("{format:?}.gguf"));
        merge(&base, "all-linear-r8", format, &out).unwrap();
        let metadata = gguf_file::Content::read(&mut File::open(&out).unwrap()).unwrap().metadata;
        assert_eq!(metadata["tokenizer.ggml.tokens"].to_vec().unwrap().len(), 97);
        let after = distance(&gguf(out), "all-linear-r8");
        println!("{format:?}: {after:.5}");
        assert!(last < after && after < allowed, "{format:?}: {after}");
        last = after;
    }

    let out = dir.path().join("directory");
    merge(&base, "dora", MergeFormat::Safetensors, &out).unwrap();
    assert!(distance(&directory(out.clone()), "dora") < 0.01);
    let tokenizer = |files: &ModelFiles| {
        let codec = TextCodec::load(files).unwrap();
        (codec.encode("a!!b", true).unwrap(), codec.bos_token_id(), codec.eos_token_ids().to_vec())
    };
    assert_eq!(tokenizer(&directory(out)), tokenizer(&base));
}

/// A fixture's model as a directory with a tokenizer. The rows of its vocabulary are repeated, so that each id has one.
fn with_tokenizer(source: &str, rope: Option<Json>) -> TempDir {
    let (fixtures, dir) = (PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"), TempDir::new().unwrap());
    let config = fs::read(fixtures.join(source).join("config.json")).unwrap();
    let mut config: Json = serde_json::from_slice(&config).unwrap();
    let mut weights = tensors(&fixtures.join(source).join("model.safetensors"));
    for (name, tensor) in &mut weights {
        if name.contains("embed_tokens") || name.contains("lm_head") {
            *tensor = Tensor::cat(&[&*tensor; 10], 0).unwrap();
            config["vocab_size"] = tensor.dims()[0].into();
        }
    }
    if let Some(rope) = rope {
        config["rope_parameters"] = rope;
    }
    candle_core::safetensors::save(&weights, dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(fixtures.join("tokenizer/hf").join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn logits(files: &ModelFiles) -> Vec<f32> {
    let decoder = Decoder::new(load(files)).unwrap();
    let ids: Vec<u32> = (0..48).map(|i| i * 7 % 61).collect();
    let mut batch = Batch::default();
    batch.push(&ids, 0, &[0, 1, 2, 3, 4, 5, 6, 7], KvCache::BLOCK_SIZE, &[]);
    batch.logit_rows = (0..ids.len() as u32).collect();
    let mut kv = KvCache::new(decoder.config(), 8, &Device::Cpu).unwrap();
    decoder.forward(&batch, &mut kv, &SlotPool::default()).unwrap().logits.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn a_gguf_file_of_a_hugging_face_base_is_the_same_model() {
    let llama3 = json!({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 32});
    let linear = json!({"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0});
    for (source, rope, adapter) in [
        ("peft-tiny/base", None, Some("peft-tiny/all-linear-r8")),
        ("peft-tiny/base", Some(llama3), Some("peft-tiny/dora")),
        ("peft-tiny/base", Some(linear), None),
        ("architectures/mistral", None, None),
        ("architectures/qwen2", None, Some("architectures/qwen2-lora")),
        ("architectures/qwen3", None, None),
    ] {
        let dir = with_tokenizer(source, rope);
        let base = directory(dir.path().to_path_buf());
        let weights = load(&base);
        let adapter = adapter.map(|adapter| fixture("..").join(adapter));
        let read = |dir: PathBuf| reader::read(&dir, &weights.config).unwrap().weights;
        let adapter = adapter.map(read).unwrap_or_default();
        let merged = |format, name: &str| {
            let out = dir.path().join(name);
            merge::write(&base, &weights, &adapter, format, &out).unwrap();
            out
        };
        let want = logits(&directory(merged(MergeFormat::Safetensors, "merged")));
        let length = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
        // The bounds allow for rounding, also that of the reference to bf16, and for the sharp attention of the fixtures. A wrong
        // row order gives a distance of about 1.
        for (format, allowed) in [(MergeFormat::GgufF16, 0.03), (MergeFormat::GgufQ8_0, 0.1)] {
            let files = gguf(merged(format, &format!("{format:?}.gguf")));
            let have = logits(&files);
            assert_eq!(have.len(), want.len());
            let off = length(&mut have.iter().zip(&want).map(|(a, b)| a - b)) / length(&mut want.iter().copied());
            println!("{source} {format:?}: {off:.5}");
            assert!(off < allowed, "{source} {format:?}: {off}");
            let (shape, given) = (load(&files).config, &weights.config);
            assert_eq!(shape.max_position_embeddings, given.max_position_embeddings);
            assert_eq!((shape.qkv_bias, shape.qk_norm), (given.qkv_bias, given.qk_norm));
        }
    }
}

#[test]
fn a_gguf_file_of_a_hugging_face_base_has_its_tokenizer() {
    let dir = with_tokenizer("peft-tiny/base", None);
    let (base, out) = (directory(dir.path().to_path_buf()), dir.path().join("merged.gguf"));
    merge::write(&base, &load(&base), &AdapterWeights::default(), MergeFormat::GgufF16, &out).unwrap();
    let metadata = gguf_file::Content::read(&mut File::open(&out).unwrap()).unwrap().metadata;
    let text = |key: &str| metadata[key].to_string().unwrap().as_str();
    assert_eq!((text("tokenizer.ggml.model"), text("tokenizer.ggml.pre")), ("gpt2", "llama-bpe"));
    let (tokens, types) = (&metadata["tokenizer.ggml.tokens"], &metadata["tokenizer.ggml.token_type"]);
    let (tokens, types) = (tokens.to_vec().unwrap(), types.to_vec().unwrap());
    let at = |id: usize| (tokens[id].to_string().unwrap().as_str(), types[id].to_i32().unwrap());
    assert_eq!((tokens.len(), at(600), at(900)), (970, ("<|begin|>", 3), ("[PAD900]", 5)));
    assert_eq!(at(0).1, 1);

    let codec = |files: &ModelFiles| TextCodec::load(files).unwrap();
    let (own, written) = (codec(&base), codec(&gguf(out)));
    let goldens = fixture("..").join("tokenizer/ids.json");
    let goldens: Json = serde_json::from_slice(&fs::read(goldens).unwrap()).unwrap();
    for row in goldens["llama3"].as_array().unwrap() {
        let text = row["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        assert_eq!(written.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(written.decode(&ids, true).unwrap(), own.decode(&ids, true).unwrap(), "{text:?}");
    }
    assert_eq!((written.bos_token_id(), written.eos_token_ids()), (own.bos_token_id(), own.eos_token_ids()));
    let hi = ChatPrompt::from_body(&json!({"messages": [{"role": "user", "content": "Hi"}]})).unwrap();
    let chat = |codec: &TextCodec| codec.render_chat(&hi);
    assert_eq!(chat(&written).unwrap(), chat(&own).unwrap());
}

#[test]
fn a_tokenizer_that_gguf_cannot_express_is_refused_by_name() {
    for (path, value, why) in [
        ("/model/byte_fallback", json!(true), "SentencePiece"),
        ("/model/end_of_word_suffix", json!("</w>"), "suffix"),
        ("/pre_tokenizer/pretokenizers/0/pattern/Regex", json!("[a-z]+|\\s+"), "pre-tokenizer is none of llama-bpe"),
        ("/added_tokens/1/lstrip", json!(true), "<|im_start|>"),
        ("/post_processor/single/0/SpecialToken/id", json!("<|im_end|>"), "other ids"),
    ] {
        let dir = with_tokenizer("peft-tiny/base", None);
        let file = dir.path().join("tokenizer.json");
        let mut form: Json = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        *form.pointer_mut(path).unwrap() = value;
        if why == "other ids" {
            let special = &mut form["post_processor"]["special_tokens"];
            *special =
                json!({"<|im_end|>": {"id": "<|im_end|>", "ids": [602, 602], "tokens": ["<|im_end|>", "<|im_end|>"]}});
        }
        fs::write(&file, form.to_string()).unwrap();
        let (base, out) = (directory(dir.path().to_path_buf()), dir.path().join("merged.gguf"));
        let error =
            merge::write(&base, &load(&base), &AdapterWeights::default(), MergeFormat::GgufF16, &out).unwrap_err();
        assert!(error.message.contains(why) && error.message.contains("convert_hf_to_gguf"), "{error}");
        assert!(!out.exists());
    }
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = directory(fixture("base"));
    let out = dir.path().join("merged");
    let refused = |adapter: &str, format, out: &Path| merge(&base, adapter, format, out).unwrap_err().to_string();
    assert!(refused("lora-bias", MergeFormat::Safetensors, &out).contains("lora_bias"));
    assert!(refused("qv-r4", MergeFormat::GgufF16, &out).contains("tokenizer.json"));
    assert!(!out.exists());
    assert!(refused("qv-r4", MergeFormat::Safetensors, dir.path()).contains("exists already"));
}
