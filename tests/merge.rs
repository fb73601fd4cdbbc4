//! A merged model, read back by the loader, against the logits that PEFT gives with the adapter beside the base.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use quiver::adapter::peft::AdapterWeights;
use quiver::adapter::slots::SlotPool;
use quiver::engine::batch::Batch;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::merge::{self, Format};
use quiver::model::kv::KvCache;
use quiver::model::llama::Llama;
use quiver::model::weights::Weights;

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

fn merge(base: &ModelFiles, adapter: &str, format: Format, out: &Path) -> quiver::Result<()> {
    let weights = load(base);
    let (adapter, _) = AdapterWeights::read(&fixture(adapter), &weights.config).unwrap();
    merge::write(base, &weights, &adapter, format, out)
}

/// Relative L2 distance of a model's logits to those that a fixture expects.
fn distance(files: &ModelFiles, expected: &str) -> f64 {
    let llama = Llama::new(load(files)).unwrap();
    let ids = tensors(&fixture("base/expected.safetensors"))["input_ids"].flatten_all().unwrap();
    let ids: Vec<u32> = ids.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect();
    let want = tensors(&fixture(expected).join("expected.safetensors"))["logits"].flatten_all().unwrap();
    let mut batch = Batch::default();
    batch.push(&ids, 0, &[0, 1, 2, 3, 4, 5, 6, 7], KvCache::BLOCK_SIZE, &[]);
    batch.logit_rows = (0..ids.len() as u32).collect();
    let mut kv = KvCache::new(llama.config(), 8, &Device::Cpu).unwrap();
    let have = llama.forward(&batch, &mut kv, &SlotPool::default()).unwrap().flatten_all().unwrap();
    let norm = |t: &Tensor| f64::from(t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
    norm(&(have - &want).unwrap()) / norm(&want)
}

/// The fixtures' base as llama.cpp's converter would write it: f32, rows of q and k interleaved, and a small tokenizer.
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
                // Where each stored row comes from: 16 rows a head, the two halves in turns.
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
fn a_merged_directory_answers_as_the_adapter_beside_its_base() {
    let base = directory(fixture("base"));
    for adapter in ["all-linear-r8", "rslora-patterns", "dora", "lm-head", "adalora"] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("merged");
        merge(&base, adapter, Format::Safetensors, &out).unwrap();
        let (before, after) = (distance(&base, adapter), distance(&directory(out), adapter));
        println!("{adapter}: base {before:.4}, merged {after:.4}");
        assert!(after < 0.01 && after < before / 10.0, "{adapter}: base {before}, merged {after}");
    }
}

#[test]
fn a_merged_gguf_file_is_as_good_as_its_format_and_keeps_its_row_order_and_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("tiny.gguf");
    tiny_gguf(&source);
    let base = gguf(source);
    assert!(distance(&base, "base") < 1e-4, "the test's own file");
    let mut last = 0.0;
    for (format, allowed) in [(Format::GgufF16, 1e-3), (Format::GgufQ8_0, 0.02), (Format::GgufQ4_1, 0.3)] {
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
    merge(&base, "dora", Format::Safetensors, &out).unwrap();
    assert!(distance(&directory(out.clone()), "dora") < 0.01);
    let tokenizer = |files: &ModelFiles| {
        let codec = quiver::server::prompt::TextCodec::load(files).unwrap();
        (codec.encode("a!!b", true).unwrap(), codec.bos_token_id(), codec.eos_token_ids().to_vec())
    };
    assert_eq!(tokenizer(&directory(out)), tokenizer(&base));
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = directory(fixture("base"));
    let out = dir.path().join("merged");
    let refused = |adapter: &str, format, out: &Path| merge(&base, adapter, format, out).unwrap_err().to_string();
    assert!(refused("lora-bias", Format::Safetensors, &out).contains("lora_bias"));
    assert!(refused("qv-r4", Format::GgufF16, &out).contains("convert_hf_to_gguf"));
    assert!(!out.exists());
    assert!(refused("qv-r4", Format::Safetensors, dir.path()).contains("is there already"));
}
