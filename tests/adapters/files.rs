//! Reading PEFT directories: correct values, or an error that names the option or the tensor.

use quiver::adapter::dummy;
use quiver::adapter::reader;
use quiver::arch::Module;
use quiver::lora::slots::SlotWeights;
use quiver::lora::weights::{AdapterWeights, FloatVec};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::reference::{Tensors, logits};
use crate::{Draft, fixture, smol_model, tiny_model};

const SERVED: [&str; 8] =
    ["qv-r4", "all-linear-r8", "rslora-patterns", "one-layer-regex", "r33", "lora-bias", "lm-head", "adalora"];

fn read(name: &str) -> AdapterWeights {
    reader::read(&fixture(name), &tiny_model()).unwrap().weights
}

/// Writes a draft and reads it back.
fn reread(draft: &Draft) -> quiver::Result<(AdapterWeights, String)> {
    let dir = tempfile::tempdir().unwrap();
    draft.write(dir.path());
    reader::read(dir.path(), &tiny_model()).map(|adapter| (adapter.weights, adapter.id))
}

/// The id, or the code and message of the error.
fn outcome(draft: &Draft) -> Result<String, (&'static str, String)> {
    reread(draft).map(|(_, id)| id).map_err(|e| (e.code.unwrap(), e.message))
}

#[test]
fn logits_equal_those_of_peft() {
    let relative = |have: &[f64], want: &[f64]| {
        let (mut difference, mut size) = (0.0, 0.0);
        for (a, b) in have.iter().zip(want) {
            difference += (a - b) * (a - b);
            size += b * b;
        }
        assert_eq!(have.len(), want.len());
        f64::sqrt(difference / size)
    };
    let base = Tensors::open(&fixture("base/expected.safetensors"));
    let without = logits(&AdapterWeights::default());
    assert!(relative(&without, base.get("logits")) < 1e-5);
    for name in SERVED {
        let expected = Tensors::open(&fixture(name).join("expected.safetensors"));
        let have = logits(&read(name));
        assert!(relative(&have, expected.get("logits")) < 1e-5, "{name}");
        assert!(relative(&without, expected.get("logits")) > 1e-3, "{name} must have an effect");
    }
}

#[test]
fn ranks_and_scales() {
    let of =
        |name: &str| -> Vec<_> { read(name).modules.iter().map(|m| (m.layer, m.module, m.rank, m.scale)).collect() };
    use Module::*;
    let qv = [(0, Q, 4, 2.0), (0, V, 4, 2.0), (1, Q, 4, 2.0), (1, V, 4, 2.0)];
    assert_eq!(of("qv-r4"), qv);
    assert_eq!(of("one-layer-regex"), [(1, O, 3, 5.0 / 3.0), (1, Gate, 3, 5.0 / 3.0)]);
    assert_eq!(of("lm-head"), [(2, LmHead, 4, 2.0)]);
    assert_eq!(of("r33"), [(0, K, 33, 1.0), (0, Up, 33, 1.0), (1, K, 33, 1.0), (1, Up, 33, 1.0)]);
    // alpha / sqrt(r), with rank 2 for the first q, rank 7 for down, and alpha 32 for up.
    let root = |rank: usize, alpha: f64| (alpha / (rank as f64).sqrt()) as f32;
    let patterns = of("rslora-patterns");
    assert_eq!(patterns.len(), 14);
    for (layer, module, rank, scale) in patterns {
        let (want_rank, alpha) = match (layer, module) {
            (0, Q) => (2, 8.0),
            (_, Down) => (7, 8.0),
            (_, Up) => (4, 32.0),
            _ => (4, 8.0),
        };
        assert_eq!((rank, scale), (want_rank, root(want_rank, alpha)), "{layer} {module:?}");
    }
    // AdaLoRA has pruned away down_proj; the other modules have different ranks.
    let scale = (8.0 / (6.0 + 1e-5)) as f32;
    assert_eq!(of("adalora"), [(0, Q, 4, scale), (0, V, 6, scale), (1, Q, 2, scale), (1, V, 6, scale)]);
}

/// Compares the dense update of each module, computed in f64 from the file's tensors, with the one in the slot.
#[test]
fn slots_hold_the_values_of_the_file_at_their_places() {
    let model = tiny_model();
    for name in SERVED {
        let file = Tensors::open(&fixture(name).join("adapter_model.safetensors"));
        let weights = read(name);
        let slot = SlotWeights::from_adapter(&weights, &model);
        assert_eq!(slot.bytes(), weights.slot_bytes());
        let mut pairs = 0;
        for m in &weights.modules {
            let (n, k) = m.module.shape(&model);
            let offset = match m.module {
                Module::K => 64,
                Module::V => 96,
                Module::Up => 160,
                _ => 0,
            };
            let site = match m.module {
                Module::LmHead => &slot.head,
                module => &slot.layers[m.layer][module.site() as usize],
            };
            let pair = site.iter().find(|p| p.offset == offset && p.n == n).unwrap();
            pairs += 1;
            assert_eq!((pair.k, pair.rank, pair.scale), (k, m.rank, m.scale));
            let path = format!("base_model.model.{}", m.module.path(m.layer));
            let ada = file.has(&format!("{path}.lora_E"));
            let suffix = if ada { "" } else { ".weight" };
            let (a, b) = (file.get(&format!("{path}.lora_A{suffix}")), file.get(&format!("{path}.lora_B{suffix}")));
            for i in 0..n {
                for j in 0..k {
                    let term = |r: usize| {
                        let e = if ada { file.get(&format!("{path}.lora_E"))[r] } else { 1.0 };
                        b[i * m.rank + r] * e * a[r * k + j]
                    };
                    let want: f64 = (0..m.rank).map(term).sum();
                    let have: f64 = (0..m.rank).map(|r| pair.b[r * n + i] as f64 * pair.a[r * k + j] as f64).sum();
                    let size: f64 = (0..m.rank).map(|r| term(r).abs()).sum();
                    assert!((want - have).abs() <= 1e-7 * size, "{name} {path} {i} {j}: {want} {have}");
                }
            }
            let bias = file.has(&format!("{path}.lora_B.bias"));
            assert_eq!(pair.bias.is_some(), bias);
            if let Some(bias) = &pair.bias {
                let want = file.get(&format!("{path}.lora_B.bias"));
                assert!(bias.iter().zip(want).all(|(have, want)| *have as f64 == *want));
            }
        }
        assert_eq!(pairs, slot.layers.iter().flatten().flatten().count() + slot.head.len());
    }
}

#[test]
fn unsupported_adapters_are_rejected_by_name() {
    for (name, option) in [("embed", "embed_tokens"), ("modules-to-save", "modules_to_save"), ("pissa", "\"pissa\"")] {
        let error = reader::read(&fixture(name), &tiny_model()).err().unwrap();
        assert_eq!(error.code, Some("adapter_unsupported"), "{name}");
        assert!(error.message.contains(option), "{name}: {error}");
    }
}

#[test]
fn the_shipped_adapters_fit_their_model() {
    for name in ["code", "qa", "writing"] {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters").join(name);
        let weights = reader::read(&dir, &smol_model()).unwrap().weights;
        assert_eq!(weights.modules.len(), 210);
        assert!(weights.modules.iter().all(|m| m.rank == 8 && m.scale == 2.0));
        // Half precision takes half the bytes of a slot.
        assert_eq!(weights.bytes() * 2, weights.slot_bytes());
        let error = reader::read(&dir, &tiny_model()).err().unwrap();
        assert!(error.message.contains("more"), "a long list is cut: {error}");
    }
}

#[test]
fn rejected_configs_name_the_option() {
    let draft = Draft::open(&fixture("qv-r4"));
    let cases: Vec<(&str, Value, &str)> = vec![
        ("use_dora", json!("yes"), "adapter_invalid"),
        ("modules_to_save", json!(["lm_head"]), "adapter_unsupported"),
        ("layer_replication", json!([[0, 2]]), "adapter_unsupported"),
        ("trainable_token_indices", json!([1]), "adapter_unsupported"),
        ("target_parameters", json!(["x"]), "adapter_unsupported"),
        ("use_qalora", json!(true), "adapter_unsupported"),
        ("use_bdlora", json!({"nblocks": 2}), "adapter_unsupported"),
        ("megatron_config", json!({"a": 1}), "adapter_unsupported"),
        ("loftq_config", json!({"loftq_bits": 4}), "adapter_unsupported"),
        ("corda_config", json!({"a": 1}), "adapter_unsupported"),
        ("lora_ga_config", json!({"a": 1}), "adapter_unsupported"),
        ("ensure_weight_tying", json!(true), "adapter_unsupported"),
        ("alora_invocation_tokens", json!([]), "adapter_unsupported"),
        ("bias", json!("lora_only"), "adapter_unsupported"),
        ("task_type", json!("SEQ_CLS"), "adapter_unsupported"),
        ("init_lora_weights", json!("pissa_niter_4"), "adapter_unsupported"),
        ("init_lora_weights", json!("olora"), "adapter_unsupported"),
        ("init_lora_weights", json!("loftq"), "adapter_unsupported"),
        ("init_lora_weights", json!("lora_ga"), "adapter_unsupported"),
        ("init_lora_weights", json!("corda"), "adapter_unsupported"),
        ("init_lora_weights", json!("something"), "adapter_unsupported"),
        ("init_lora_weights", json!(3), "adapter_unsupported"),
        ("peft_type", json!("IA3"), "adapter_unsupported"),
        ("peft_type", json!(null), "adapter_invalid"),
        ("an_option_of_2027", json!(1), "adapter_unsupported"),
        ("r", json!(0), "adapter_invalid"),
        ("r", json!("4"), "adapter_invalid"),
        ("lora_alpha", json!("8"), "adapter_invalid"),
        ("use_rslora", json!("yes"), "adapter_invalid"),
        ("lora_bias", json!(1), "adapter_invalid"),
        ("rank_pattern", json!([1]), "adapter_invalid"),
        ("rank_pattern", json!({"q_proj": 0}), "adapter_invalid"),
        ("rank_pattern", json!({"(q_proj": 4}), "adapter_invalid"),
        ("alpha_pattern", json!({"q_proj": "4"}), "adapter_invalid"),
        ("target_modules", json!(7), "adapter_invalid"),
        ("target_modules", json!("*q"), "adapter_invalid"),
        ("target_modules", json!("nothing"), "adapter_invalid"),
        ("target_modules", json!(["embed_tokens", "q_proj", "v_proj"]), "adapter_unsupported"),
        ("layers_to_transform", json!("0"), "adapter_invalid"),
        ("exclude_modules", json!({"a": 1}), "adapter_invalid"),
    ];
    for (key, value, code) in cases {
        let mut draft = draft.clone();
        draft.config[key] = value.clone();
        let (have, message) = outcome(&draft).expect_err(key);
        assert_eq!(have, code, "{key} {value}: {message}");
        let named = if value == json!("nothing") { "target_modules" } else { key };
        assert!(message.contains(named), "{key} {value}: {message}");
    }
    // One message names all of them.
    let mut draft = draft.clone();
    draft.config["use_qalora"] = json!(true);
    draft.config["bias"] = json!("all");
    let (_, message) = outcome(&draft).unwrap_err();
    assert!(message.contains("use_qalora") && message.contains("bias"), "{message}");
}

#[test]
fn options_without_effect_are_accepted_and_keep_the_generation() {
    let mut draft = Draft::open(&fixture("qv-r4"));
    let id = outcome(&draft).unwrap();
    assert_eq!(id.len(), 16);
    for (key, value) in [
        ("lora_dropout", json!(0.1)),
        ("base_model_name_or_path", json!("x/y")),
        ("inference_mode", json!(false)),
        ("init_lora_weights", json!("gaussian")),
        ("init_lora_weights", json!("eva")),
        ("eva_config", json!({"rho": 2.0})),
        ("fan_in_fan_out", json!(true)),
        ("task_type", json!(null)),
        ("an_option_of_2027", json!(false)),
        ("target_modules", json!(["v_proj", "q_proj"])),
        ("target_modules", json!(r".*\.self_attn\.(q|v)_proj")),
        ("target_modules", json!(null)),
    ] {
        draft.config[key] = value.clone();
        assert_eq!(outcome(&draft), Ok(id.clone()), "{key} {value}");
    }
    // All tensors with an adapter's name, as some trainers write them.
    draft.rename(|name| name.replace(".weight", ".default.weight"));
    assert_eq!(outcome(&draft), Ok(id.clone()));
    draft.config["lora_alpha"] = json!(9);
    assert_ne!(outcome(&draft), Ok(id.clone()));
    draft.config["lora_alpha"] = json!(8.0);
    assert_eq!(outcome(&draft), Ok(id.clone()));
    draft.tensors.values_mut().last().unwrap().2[0] ^= 1;
    assert_ne!(outcome(&draft), Ok(id));
}

#[test]
fn rejected_tensors_are_named() {
    const Q: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    const B: &str = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight";
    type Case = (&'static str, fn(&mut Draft), &'static [&'static str]);
    let cases: Vec<Case> = vec![
        ("missing half", |d| drop(d.tensors.remove(Q)), &["layers.0.self_attn.q_proj", "lora_A is missing"]),
        (
            "missing module",
            |d| d.tensors.retain(|n, _| !n.contains("layers.1.self_attn.v")),
            &["layers.1.self_attn.v_proj"],
        ),
        ("rank", |d| d.config["r"] = json!(5), &[Q, "[4, 64]", "[5, 64]"]),
        ("pattern", |d| d.config["rank_pattern"] = json!({"v_proj": 2}), &[B, "[32, 4]", "[32, 2]"]),
        ("wrong width", |d| d.set(Q, &[4, 65], |_| 0.0), &[Q, "[4, 65]", "[4, 64]"]),
        ("one dimension", |d| d.set(Q, &[256], |_| 0.0), &[Q, "[256]"]),
        ("zero-sized", |d| d.set(Q, &[0], |_| 0.0), &[Q, "[0]"]),
        ("NaN", |d| d.set(Q, &[4, 64], |i| if i == 70 { f32::NAN } else { 0.0 }), &[Q, "70"]),
        ("infinity", |d| d.set(B, &[32, 4], |i| if i == 0 { f32::INFINITY } else { 0.0 }), &[B, "infinity"]),
        (
            "extra layer",
            |d| d.set(&Q.replace("layers.0", "layers.2"), &[4, 64], |_| 0.0),
            &["layer 2 is beyond", "2 layers"],
        ),
        (
            "not targeted",
            |d| d.set(&Q.replace("q_proj", "o_proj"), &[4, 64], |_| 0.0),
            &["o_proj.lora_A.weight: not used"],
        ),
        (
            "full tensor",
            |d| d.set("base_model.model.lm_head.weight", &[97, 64], |_| 0.0),
            &["lm_head.weight: not used"],
        ),
        (
            "unknown prefix",
            |d| d.rename(|n| n.replace("base_model.model.", "x.")),
            &["q_proj.lora_A.weight: not used", "and 9 more"],
        ),
        (
            "two adapters",
            |d| d.set(&Q.replace(".weight", ".b.weight"), &[4, 64], |_| 0.0),
            &["several adapters", "\"b\""],
        ),
        ("bias", |d| d.set(&B.replace(".weight", ".bias"), &[32], |_| 0.0), &["lora_B.bias", "lora_bias is false"]),
        ("no bias", |d| d.config["lora_bias"] = json!(true), &["lora_B.bias is missing"]),
        (
            "magnitude",
            |d| d.set(&Q.replace("lora_A.weight", "lora_magnitude_vector"), &[64], |_| 1.0),
            &["lora_magnitude_vector", "use_dora is false"],
        ),
        ("no magnitude", |d| d.config["use_dora"] = json!(true), &["lora_magnitude_vector is missing"]),
        ("dtype", |d| drop(d.tensors.insert(Q.into(), (Dtype::F64, vec![4, 64], vec![0; 2048]))), &[Q, "F64", "BF16"]),
    ];
    for (case, change, parts) in cases {
        let mut draft = Draft::open(&fixture("qv-r4"));
        change(&mut draft);
        let (code, message) = outcome(&draft).expect_err(case);
        assert_eq!(code, "adapter_invalid", "{case}");
        for part in parts {
            assert!(message.contains(part), "{case}: {part} not in {message}");
        }
    }
    // The frozen copy of a targeted head must be the model's.
    let mut draft = Draft::open(&fixture("lm-head"));
    draft.set("base_model.model.lm_head.base_layer.weight", &[98, 64], |_| 0.0);
    let (_, message) = outcome(&draft).unwrap_err();
    assert!(message.contains("[98, 64]") && message.contains("[97, 64]"), "{message}");
}

#[test]
fn broken_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let read = || reader::read(dir.path(), &tiny_model()).err().unwrap();
    assert_eq!(read().code, Some("adapter_source_not_found"));
    Draft::open(&fixture("qv-r4")).write(dir.path());
    let model = dir.path().join("adapter_model.safetensors");
    let good = std::fs::read(&model).unwrap();
    for bytes in [&good[..4], &good[..100], &good[..good.len() - 1], &[&good[..], b"x"].concat(), &[255; 64]] {
        std::fs::write(&model, bytes).unwrap();
        let error = read();
        assert_eq!(error.code, Some("adapter_invalid"), "{error}");
        assert!(error.message.contains("adapter_model.safetensors"), "{error}");
    }
    std::fs::remove_file(&model).unwrap();
    assert_eq!(read().code, Some("adapter_source_not_found"));
    std::fs::write(dir.path().join("adapter_model.bin"), b"pickle").unwrap();
    assert!(read().message.contains("save_pretrained"));
    for text in ["", "[]", "{", "{\"peft_type\": \"LORA\""] {
        std::fs::write(dir.path().join("adapter_config.json"), text).unwrap();
        assert_eq!(read().code, Some("adapter_invalid"), "{text}");
    }
}

/// The targeted modules follow PEFT's rules.
#[test]
fn targets_follow_peft() {
    let all = Draft::open(&fixture("all-linear-r8"));
    let with = |changes: Value, keep: &dyn Fn(&str) -> bool| {
        let mut draft = all.clone();
        for (key, value) in changes.as_object().unwrap() {
            draft.config[key] = value.clone();
        }
        draft.tensors.retain(|name, _| keep(name));
        reread(&draft).map(|(weights, _)| weights.modules.len()).map_err(|e| e.message)
    };
    assert_eq!(with(json!({"target_modules": "all-linear"}), &|_| true), Ok(14));
    assert_eq!(
        with(json!({"target_modules": "ALL-LINEAR", "exclude_modules": ["down_proj"]}), &|n| !n.contains("down")),
        Ok(12)
    );
    assert_eq!(with(json!({"exclude_modules": r".*layers\.0\..*"}), &|n| n.contains("layers.1")), Ok(7));
    assert_eq!(with(json!({"layers_to_transform": 1}), &|n| n.contains("layers.1")), Ok(7));
    assert_eq!(
        with(json!({"layers_to_transform": [0], "layers_pattern": "layers"}), &|n| n.contains("layers.0")),
        Ok(7)
    );
    assert_eq!(with(json!({"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]}), &|_| true), Ok(14));
    assert_eq!(with(json!({"layers_to_transform": []}), &|_| true), Ok(14));
    // A full path is targeted despite a layer limit.
    let path = "model.layers.1.mlp.up_proj";
    assert_eq!(with(json!({"target_modules": [path], "layers_to_transform": [0]}), &|n| n.contains(path)), Ok(1));
    // Names match only whole components.
    assert!(with(json!({"target_modules": ["proj"]}), &|_| true).unwrap_err().contains("target_modules"));
    assert!(
        with(json!({"target_modules": "all-linear", "layers_to_transform": [0]}), &|_| true)
            .unwrap_err()
            .contains("layers_to_transform")
    );

    // The first pattern that matches wins. A pattern matches a suffix of the path that starts with a whole component.
    let scales = |alpha: Value| {
        let mut draft = all.clone();
        draft.config["alpha_pattern"] = alpha;
        let weights = reread(&draft).unwrap().0;
        let of = |layer, module| weights.modules.iter().find(|m| (m.layer, m.module) == (layer, module)).unwrap().scale;
        [of(0, Module::Q), of(1, Module::Q), of(0, Module::Up)]
    };
    assert_eq!(scales(json!({"layers.0.self_attn.q_proj": 8, "q_proj": 32})), [1.0, 4.0, 2.0]);
    assert_eq!(scales(json!({"q_proj": 32, "layers.0.self_attn.q_proj": 8})), [4.0, 4.0, 2.0]);
    assert_eq!(scales(json!({"proj": 8})), [2.0; 3]);
    assert_eq!(scales(json!({r"^model\.layers\.(?!0).*q_proj": 8})), [2.0, 1.0, 2.0]);
    assert_eq!(scales(json!({".*up_proj|x": 4})), [2.0, 2.0, 0.5]);
}

#[test]
fn adalora_must_be_complete() {
    let fixture = Draft::open(&fixture("adalora"));
    let e = "base_model.model.model.layers.0.self_attn.q_proj.lora_E";
    let mut draft = fixture.clone();
    draft.tensors.remove(e);
    assert!(outcome(&draft).unwrap_err().1.contains("lora_E is missing"));
    let mut draft = fixture.clone();
    draft.config["rank_pattern"]["model.layers.0.self_attn.q_proj.lora_E"] =
        json!([true, true, true, true, true, true]);
    assert!(outcome(&draft).unwrap_err().1.contains("[6, 1]"));
    for (key, value) in
        [("use_rslora", json!(true)), ("alpha_pattern", json!({"q_proj": 4})), ("lora_bias", json!(true))]
    {
        let mut draft = fixture.clone();
        draft.config[key] = value;
        let (code, message) = outcome(&draft).unwrap_err();
        assert!(code == "adapter_unsupported" && message.contains(key), "{message}");
    }
    let mut draft = fixture.clone();
    draft.rename(|name| {
        name.replace("lora_E", "lora_E.default").replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")
    });
    assert_eq!(outcome(&draft), outcome(&fixture));
}

#[test]
fn half_precision_is_widened_exactly() {
    let mut draft = Draft::open(&fixture("qv-r4"));
    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    let numbers: Vec<f32> = (0..256).map(|i| (i as f32 - 100.0) / 8.0).collect();
    let f16 = numbers.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let bf16 = numbers.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    for (dtype, bytes) in [(Dtype::F16, f16), (Dtype::BF16, bf16)] {
        draft.tensors.insert(name.into(), (dtype, vec![4, 64], bytes));
        let a = reread(&draft).unwrap().0.modules[0].a.clone();
        assert!(!matches!(a, FloatVec::F32(_)));
        assert_eq!(a.bytes(), 512);
        assert_eq!(a.to_f32(), numbers);
    }
}

#[test]
fn dummy_adapters_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let model = tiny_model();
    let read = |name: &str, modules: &[Module], rank: usize| {
        let dir = dir.path().join(name);
        dummy::write(&dir, &model, modules, rank).unwrap();
        reader::read(&dir, &model).map(|adapter| (adapter.weights, adapter.id)).unwrap()
    };
    let (weights, id) = read("dummy-0000", &Module::BLOCK, 8);
    assert_eq!(weights.modules.len(), 14);
    assert!(weights.modules.iter().all(|m| m.rank == 8 && m.scale == 2.0));
    let size = |v: &FloatVec| v.to_f32().iter().map(|x| x * x).sum::<f32>() / v.to_f32().len() as f32;
    let q = &weights.modules[0];
    assert!((size(&q.a) * 64.0 - 1.0).abs() < 0.1 && (size(&q.b) * 1e4 - 1.0).abs() < 0.1);
    assert_eq!(read("dummy-0000", &Module::BLOCK, 8).1, id);
    assert_ne!(read("dummy-0001", &Module::BLOCK, 8).1, id);
    assert_eq!(read("head", &[Module::Q, Module::LmHead], 3).0.modules.len(), 3);
}
