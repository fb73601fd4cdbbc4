//! Layouts of other trainers: the same adapter in each reads as the same generation, and what cannot be read is named.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as GgufValue};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use quiver::adapter::reader::{self, ReadAdapter};
use quiver::arch::ModelConfig;
use serde_json::{Value, json};

use crate::{Draft, fixture, tiny_model};

/// Rank 8 and scale 2 on all modules of both blocks.
const ALL: &str = "all-linear-r8";

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

/// The rows of `values` as columns.
fn transpose(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values.iter().skip(column).step_by(columns).copied()).collect()
}

fn read(source: &Path) -> quiver::Result<ReadAdapter> {
    reader::read(source, &tiny_model())
}

/// Code and message of the error.
fn refusal(source: &Path) -> (&'static str, String) {
    let error = read(source).err().unwrap_or_else(|| panic!("{} was read", source.display()));
    (error.code.expect("a code"), error.message)
}

/// Whether both adapters compute the same.
fn assert_same(have: &ReadAdapter, draft: &Draft) {
    let dir = tempfile::tempdir().unwrap();
    draft.write(dir.path());
    let want = read(dir.path()).unwrap();
    assert_eq!(have.weights, want.weights);
    assert_eq!(have.id, want.id);
}

/// Writes a draft as MLX-LM does: transposed, under MLX's names.
fn write_mlx(draft: &Draft, config: Value, dir: &Path) {
    let mut mlx = Draft { config, tensors: Default::default() };
    for (name, (_, shape, bytes)) in &draft.tensors {
        let path = name.strip_prefix("base_model.model.").unwrap();
        let name = path.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b");
        let name = name.replace(".lora_magnitude_vector", ".m");
        match shape[..] {
            [_, columns] => {
                let values = transpose(&floats(bytes), columns);
                mlx.set(&name, &[columns, shape[0]], |i| values[i]);
            }
            _ => mlx.set(&name, shape, |i| floats(bytes)[i]),
        }
    }
    mlx.write(dir);
    std::fs::rename(dir.join("adapter_model.safetensors"), dir.join("adapters.safetensors")).unwrap();
}

/// Newer versions save `scale`, older ones `scale` and `alpha`, and some name the modules.
#[test]
fn mlx_lm() {
    let draft = Draft::open(&fixture(ALL));
    let keys: Vec<&str> = GGUF_NAMES.iter().map(|(hf, ..)| *hf).collect();
    for config in [
        json!({"fine_tune_type": "lora", "num_layers": 2, "model": "mlx-community/tiny-4bit", "iters": 600,
               "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0}}),
        json!({"fine_tune_type": "lora", "num_layers": -1, "model": "mlx-community/tiny-4bit",
               "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys}}),
        json!({"lora_layers": 16, "model": "mlx-community/tiny-4bit", "use_dora": false,
               "lora_parameters": {"rank": 8, "alpha": 16.0, "scale": 1.0, "dropout": 0.1}}),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_mlx(&draft, config, dir.path());
        let adapter = read(dir.path()).unwrap();
        assert_same(&adapter, &draft);
        assert_eq!(adapter.base.name.as_deref(), Some("mlx-community/tiny-4bit"));
    }
    // DoRA, and only the last block.
    let dora = Draft::open(&fixture("dora"));
    let mut last = Draft::open(&fixture(ALL));
    last.tensors.retain(|name, _| name.contains("layers.1."));
    last.config["target_modules"] = json!(r".*layers\.1\..*_proj");
    let scale = |draft: &Draft| draft.config["lora_alpha"].as_f64().unwrap() / draft.config["r"].as_f64().unwrap();
    for (draft, kind, layers) in [(dora, "dora", 2), (last, "lora", 1)] {
        let dir = tempfile::tempdir().unwrap();
        let parameters = json!({"rank": draft.config["r"], "scale": scale(&draft), "dropout": 0.0});
        write_mlx(
            &draft,
            json!({"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters}),
            dir.path(),
        );
        assert_same(&read(dir.path()).unwrap(), &draft);
    }
}

#[test]
fn mlx_lm_refused() {
    let draft = Draft::open(&fixture(ALL));
    let parameters = json!({"rank": 8, "scale": 2.0, "dropout": 0.0});
    let good = json!({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters});
    let cases: [(&str, Value, &str); 8] = [
        ("/fine_tune_type", json!("full"), "all weights were trained"),
        ("/fine_tune_type", json!("other"), "fine_tune_type"),
        ("/lora_parameters", json!(null), "lora_parameters"),
        ("/lora_parameters", json!({"rank": 8, "alpha": 16.0}), "lora_parameters.scale"),
        ("/lora_parameters", json!({"rank": 0, "scale": 1.0}), "lora_parameters.rank"),
        ("/lora_parameters", json!({"rank": 8, "scale": 1.0, "bias": true}), "lora_parameters.bias"),
        (
            "/lora_parameters",
            json!({"rank": 4, "scale": 1.0}),
            "q_proj.lora_a has the shape [64, 8]; the config and the model require [64, 4]",
        ),
        ("/num_layers", json!(1), "model.layers.0.mlp.down_proj.lora_a: not used"),
    ];
    for (at, value, part) in cases {
        let mut config = good.clone();
        *config.pointer_mut(at).unwrap() = value.clone();
        let dir = tempfile::tempdir().unwrap();
        write_mlx(&draft, config, dir.path());
        let (_, message) = refusal(dir.path());
        assert!(message.contains(part), "{at} {value}: {message}");
    }
    // A file that lacks a module that other blocks have is incomplete.
    let mut short = draft.clone();
    short.tensors.retain(|name, _| !name.contains("layers.1.mlp.up_proj"));
    let dir = tempfile::tempdir().unwrap();
    write_mlx(&short, good, dir.path());
    assert!(refusal(dir.path()).1.contains("model.layers.1.mlp.up_proj: targeted, but lora_A is missing"));
}

const GGUF_NAMES: [(&str, &str, usize); 7] = [
    ("self_attn.q_proj", "attn_q", 4),
    ("self_attn.k_proj", "attn_k", 2),
    ("self_attn.v_proj", "attn_v", 0),
    ("self_attn.o_proj", "attn_output", 0),
    ("mlp.gate_proj", "ffn_gate", 0),
    ("mlp.up_proj", "ffn_up", 0),
    ("mlp.down_proj", "ffn_down", 0),
];

/// The rows of each head interleaved, as llama.cpp's converter does: reshape (heads, 2, half), swap the last two, flatten.
fn interleave(values: &[f32], rows: usize, heads: usize) -> Vec<f32> {
    let (width, half) = (values.len() / rows, rows / heads / 2);
    let row = |head: usize, i: usize, part: usize| (head * 2 + part) * half + i;
    let order = (0..heads).flat_map(|head| (0..half).flat_map(move |i| (0..2).map(move |part| row(head, i, part))));
    order.flat_map(|row| values[row * width..(row + 1) * width].to_vec()).collect()
}

/// Writes a draft in GGUF. `meta` replaces or adds metadata.
fn write_gguf(draft: &Draft, dtype: GgmlDType, meta: &[(&str, GgufValue)], path: &Path) {
    let tensors: Vec<(String, QTensor)> = draft
        .tensors
        .iter()
        .map(|(name, (_, shape, bytes))| {
            let path = name.strip_prefix("base_model.model.model.layers.").unwrap();
            let (layer, path) = path.split_once('.').unwrap();
            let (module, half) = path.split_once(".lora_").unwrap();
            let (_, own, heads) = GGUF_NAMES.iter().find(|(hf, ..)| *hf == module).unwrap();
            let mut values = floats(bytes);
            if half == "B.weight" && *heads > 0 {
                values = interleave(&values, shape[0], *heads);
            }
            let half = if half == "A.weight" { "a" } else { "b" };
            let tensor = Tensor::from_vec(values, &shape[..], &Device::Cpu).unwrap();
            (format!("blk.{layer}.{own}.weight.lora_{half}"), QTensor::quantize(&tensor, dtype).unwrap())
        })
        .collect();
    let text = |text: &str| GgufValue::String(text.into());
    let mut all = vec![
        ("general.type", text("adapter")),
        ("general.architecture", text("llama")),
        ("adapter.type", text("lora")),
        ("adapter.lora.alpha", GgufValue::F32(16.0)),
        ("general.base_model.0.name", text("Tiny")),
    ];
    all.retain(|(key, _)| meta.iter().all(|(other, _)| key != other));
    all.extend(meta.iter().cloned());
    let metadata: Vec<(&str, &GgufValue)> = all.iter().map(|(key, value)| (*key, value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
}

#[test]
fn llama_cpp_gguf() {
    let draft = Draft::open(&fixture(ALL));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my adapter.gguf");
    write_gguf(&draft, GgmlDType::F32, &[], &file);
    for source in [&file, dir.path()] {
        let adapter = read(source).unwrap();
        assert_same(&adapter, &draft);
        assert_eq!(adapter.base.name.as_deref(), Some("Tiny"));
    }
    // With alpha 0, llama.cpp adds B·A as it is.
    write_gguf(&draft, GgmlDType::F32, &[("adapter.lora.alpha", GgufValue::F32(0.0))], &file);
    let adapter = read(&file).unwrap();
    assert!(adapter.weights.modules.iter().all(|m| m.scale == 1.0 && m.rank == 8));
    // Half precision, and ranks that differ.
    let mut mixed = Draft::open(&fixture("qv-r4"));
    for (part, shape) in [("A", [2, 64]), ("B", [32, 2])] {
        mixed
            .set(&format!("base_model.model.model.layers.1.self_attn.v_proj.lora_{part}.weight"), &shape, |i| i as f32);
    }
    write_gguf(&mixed, GgmlDType::F16, &[], &file);
    let ranks = |adapter: &ReadAdapter| adapter.weights.modules.iter().map(|m| (m.rank, m.scale)).collect::<Vec<_>>();
    assert_eq!(ranks(&read(&file).unwrap()), [(4, 4.0), (4, 4.0), (4, 4.0), (2, 8.0)]);
    // Only Llama's rows are interleaved.
    let qwen = ModelConfig { qkv_bias: true, ..tiny_model() };
    write_gguf(&draft, GgmlDType::F32, &[("general.architecture", GgufValue::String("qwen2".into()))], &file);
    let b = |adapter: ReadAdapter| adapter.weights.modules[0].b.to_f32();
    let stored = reader::read(&file, &qwen).map(b).unwrap();
    let q = &draft.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].2;
    assert_eq!(stored, interleave(&floats(q), 64, 4));
}

#[test]
fn llama_cpp_gguf_refused() {
    let draft = Draft::open(&fixture(ALL));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let text = |text: &str| GgufValue::String(text.into());
    for (key, value, part) in [
        ("general.type", text("model"), "base model, not of an adapter: serve it with --model"),
        ("adapter.type", text("control_vector"), "adapter.type"),
        ("general.architecture", text("qwen2"), "\"qwen2\", and the served base is \"llama\""),
        ("general.architecture", text("gemma3"), "gemma3"),
        ("adapter.lora.alpha", text("16"), "adapter.lora.alpha"),
        ("adapter.alora.invocation_tokens", GgufValue::Array(vec![GgufValue::U32(1)]), "activated LoRA"),
    ] {
        write_gguf(&draft, GgmlDType::F32, &[(key, value)], &file);
        let message = read(&file).err().unwrap().message;
        assert!(message.contains(part), "{key}: {message}");
    }
    let mut wide = Draft::small(&tiny_model(), 1);
    wide.set("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", &[8, 32], |_| 1.0);
    write_gguf(&wide, GgmlDType::F32, &[], &file);
    let (_, message) = refusal(&file);
    assert!(message.contains("hidden size is 32") && message.contains("blk.0.attn_q.weight.lora_a"), "{message}");
    let mut wide = Draft::small(&tiny_model(), 1);
    for layer in 0..2 {
        let path = format!("base_model.model.model.layers.{layer}.self_attn.q_proj");
        wide.set(&format!("{path}.lora_A.weight"), &[32, 64], |_| 1.0);
        wide.set(&format!("{path}.lora_B.weight"), &[64, 32], |_| 1.0);
    }
    write_gguf(&wide, GgmlDType::Q8_0, &[], &file);
    let (code, message) = refusal(&file);
    assert!(code == "adapter_unsupported" && message.contains("--outtype f16"), "{message}");
    // Truncated files.
    write_gguf(&draft, GgmlDType::F32, &[], &file);
    let bytes = std::fs::read(&file).unwrap();
    for length in [6, 100, bytes.len() / 2] {
        std::fs::write(&file, &bytes[..length]).unwrap();
        assert!(read(&file).is_err(), "{length}");
    }
    write_gguf(&draft, GgmlDType::F32, &[], &dir.path().join("b.gguf"));
    let (_, message) = refusal(dir.path());
    assert!(message.contains("several GGUF files, \"a.gguf\", \"b.gguf\""), "{message}");
}

/// torchtune's and other keys without PEFT's prefix; the configs of Unsloth, Axolotl, TRL and LLaMA-Factory; Tinker's export.
#[test]
fn variants_of_peft() {
    let draft = Draft::open(&fixture(ALL));
    let dir = tempfile::tempdir().unwrap();
    let mut bare = draft.clone();
    bare.rename(|name| name.replace("base_model.model.", ""));
    bare.config = json!({"r": 8, "lora_alpha": 16, "peft_type": "LORA", "base_model_name_or_path": "org/tiny",
                         "target_modules": draft.config["target_modules"]});
    bare.write(dir.path());
    assert_same(&read(dir.path()).unwrap(), &draft);

    let mut unsloth = draft.clone();
    unsloth.config["auto_mapping"] = json!({"base_model_class": "LlamaForCausalLM", "unsloth_fixed": true});
    unsloth.config["base_model_name_or_path"] = json!("unsloth/tiny-bnb-4bit");
    unsloth.config["target_modules"] = json!(
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|q_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
    );
    let folder = dir.path().join("my run 1/checkpoint 100");
    unsloth.write(&folder);
    for file in [
        "trainer_state.json",
        "tokenizer.json",
        "chat_template.jinja",
        "README.md",
        "training_args.bin",
        "optimizer.pt",
    ] {
        std::fs::write(folder.join(file), "x").unwrap();
    }
    let adapter = read(&folder).unwrap();
    assert_same(&adapter, &draft);
    assert_eq!(adapter.base.name.as_deref(), Some("unsloth/tiny-bnb-4bit"));

    // Tinker calls the head unembed_tokens, and can leave out the MLP.
    let mut tinker = draft.clone();
    tinker.tensors.retain(|name, _| !name.contains(".mlp."));
    tinker.config =
        json!({"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": "all-linear", "bias": "none"});
    let mut same = tinker.clone();
    for (head, draft) in [("model.unembed_tokens", &mut tinker), ("lm_head", &mut same)] {
        draft.set(&format!("base_model.model.{head}.lora_A.weight"), &[8, 64], |i| i as f32);
        draft.set(&format!("base_model.model.{head}.lora_B.weight"), &[97, 8], |i| -(i as f32));
    }
    same.config["target_modules"] = json!(["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]);
    let folder = dir.path().join("tinker");
    tinker.write(&folder);
    std::fs::write(folder.join("checkpoint_complete"), "").unwrap();
    let adapter = read(&folder).unwrap();
    assert_eq!(adapter.weights.modules.len(), 9);
    assert_same(&adapter, &same);
}

/// The message says why, before it lists tensors.
#[test]
fn causes_are_named() {
    const HEAD: &str = "base_model.model.lm_head.weight";
    const EMBEDDING: &str = "base_model.model.model.embed_tokens.weight";
    type Case = (fn(&mut Draft), &'static [&'static str]);
    let cases: [Case; 8] = [
        (
            |d| d.rename(|n| n.replace("base_model.model.", "transformer.")),
            &["the keys begin with \"transformer.model.\"", "model: the"],
        ),
        (
            |d| {
                d.rename(|n| {
                    n.replace("base_model.model.model.", "").replace("self_attn", "attn").replace("lora_A", "lora_a")
                })
            },
            &["torchtune's own"],
        ),
        (|d| d.set(HEAD, &[97, 64], |_| 0.0), &["saved whole", "save_embedding_layers=False", HEAD]),
        (
            |d| d.set(EMBEDDING, &[98, 64], |_| 0.0),
            &["resized: the adapter's vocabulary has 98 tokens and the base's 97", EMBEDDING],
        ),
        (|d| d.set("base_model.model.lm_head.modules_to_save.weight", &[97, 64], |_| 0.0), &["saved whole"]),
        (
            |d| {
                let name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight";
                d.set(name, &[4, 64], |_| 0.0);
            },
            &["larger base: the served one has 2 layers", "layer 7 is beyond the model's 2 layers"],
        ),
        (
            |d| {
                let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
                d.set(name, &[4, 128], |_| 0.0);
            },
            &["another base: its hidden size is 128 and the served base's 64"],
        ),
        (
            |d| {
                *d = Draft::open(&fixture("lm-head"));
                d.set("base_model.model.lm_head.lora_B.weight", &[99, 4], |_| 0.0);
            },
            &["the vocabulary was resized: the adapter's has 99 tokens and the served base's 97"],
        ),
    ];
    for (change, parts) in cases {
        let mut draft = Draft::open(&fixture("qv-r4"));
        change(&mut draft);
        let dir = tempfile::tempdir().unwrap();
        draft.write(dir.path());
        let (code, message) = refusal(dir.path());
        assert_eq!(code, "adapter_invalid");
        for part in parts {
            assert!(message.contains(part), "{part} not in {message}");
        }
    }
}

/// A folder or a file that holds something else is named, with the way out.
#[test]
fn what_is_no_adapter_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let write = |path: &str, content: &[u8]| {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        File::create(path).unwrap().write_all(content).unwrap();
    };
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234\n";
    let config = std::fs::read(fixture("qv-r4").join("adapter_config.json")).unwrap();
    let mut tar = vec![0; 512];
    tar[257..262].copy_from_slice(b"ustar");
    write("lfs/adapter_config.json", &config);
    write("lfs/adapter_model.safetensors", pointer);
    write("lfs-config/adapter_config.json", pointer);
    write("torchtune/adapter_config.json", &config);
    write("torchtune/adapter_0.pt", b"PK\x03\x04");
    write("pickle/adapter_0.pt", b"PK\x03\x04");
    write("nemo/adapter.nemo", &tar);
    write("archive/weights.tar", &tar);
    write("old-mlx/adapters.npz", b"PK\x03\x04");
    write("base/config.json", b"{}");
    write("base/model.safetensors", b"x");
    write("no-config/adapter_model.safetensors", b"x");
    write("empty/README.md", b"x");
    write("other/adapter_config.json", b"{\"rank\": 3}");
    write("lfs.gguf", pointer);
    write("lfs-gguf/a.gguf", pointer);
    write("adapter.bin", b"\x80\x02");
    write("notes.txt", b"x");
    for step in ["checkpoint-100", "checkpoint-200"] {
        Draft::open(&fixture("qv-r4")).write(&dir.path().join("run").join(step));
    }
    let file = |path: &str| format!("{path}/adapter_model.safetensors");
    Draft::open(&fixture("qv-r4")).write(&dir.path().join("good"));
    for (source, code, parts) in [
        ("lfs", "adapter_unsupported", &["adapter_model.safetensors is a Git LFS pointer", "git lfs pull"][..]),
        ("lfs-config", "adapter_unsupported", &["adapter_config.json is a Git LFS pointer"]),
        ("lfs.gguf", "adapter_unsupported", &["lfs.gguf is a Git LFS pointer"]),
        ("lfs-gguf", "adapter_unsupported", &["a.gguf is a Git LFS pointer"]),
        ("torchtune", "adapter_unsupported", &["adapter_0.pt is a PyTorch pickle", "torchtune"]),
        ("pickle", "adapter_unsupported", &["adapter_0.pt is a PyTorch pickle"]),
        ("nemo", "adapter_unsupported", &["adapter.nemo is a NeMo archive", "PEFT"]),
        ("archive", "adapter_unsupported", &["weights.tar is an archive: unpack it"]),
        ("archive/weights.tar", "adapter_unsupported", &["is an archive"]),
        ("old-mlx", "adapter_unsupported", &["adapters.npz", "MLX-LM"]),
        ("base", "adapter_unsupported", &["holds a base model", "--model"]),
        ("no-config", "adapter_unsupported", &["no adapter_config.json"]),
        ("adapter.bin", "adapter_unsupported", &["pickle"]),
        ("notes.txt", "adapter_unsupported", &["notes.txt is a file"]),
        (&file("good"), "adapter_unsupported", &["give its folder"]),
        ("other", "adapter_invalid", &["another program"]),
        ("empty", "adapter_source_not_found", &["no adapter_config.json"]),
        ("nowhere", "adapter_source_not_found", &["no adapter in"]),
        ("run", "adapter_source_not_found", &["subfolders \"checkpoint-100\", \"checkpoint-200\": give one"]),
    ] {
        let (have, message) = refusal(&dir.path().join(source));
        assert_eq!(have, code, "{source}: {message}");
        for part in parts {
            assert!(message.contains(part), "{source}: {part} not in {message}");
        }
    }
}
