//! The registry: names, conflicts, allowed sources, the manifest.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use quiver::adapter::ServedBase;
use quiver::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use quiver::error::ErrorKind;
use serde_json::{Value, json};

use crate::{Draft, fixture, small_bytes, tiny_model};

const AMPLE: usize = 1 << 30;

fn config() -> RegistryConfig {
    RegistryConfig { slot_budget: AMPLE, host_budget: AMPLE, ..Default::default() }
}

fn open(config: RegistryConfig) -> Registry {
    Registry::new(Arc::new(tiny_model()), config).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn write_small(dir: &Path, seed: u32) -> String {
    Draft::small(&tiny_model(), seed).write(dir);
    text(dir).to_owned()
}

#[tokio::test]
async fn load_get_list_unload() {
    let registry = open(config());
    let source = fixture("all-linear-r8");
    let info = registry.load("tuned", text(&source), LoadOptions { pinned: true, replace: false }).await.unwrap();
    assert_eq!((info.rank, info.modules, info.leases, info.level), (8, 14, 0, "host"));
    assert!(info.pinned && info.bytes > 0 && info.source.ends_with("all-linear-r8"));
    registry.load("base-like/v1.2:x@y_z-0", text(&fixture("qv-r4")), LoadOptions::default()).await.unwrap();
    let names: Vec<_> = registry.list().into_iter().map(|i| i.name).collect();
    assert_eq!(names, ["base-like/v1.2:x@y_z-0", "tuned"]);

    let lease = registry.lease("tuned").unwrap();
    let (second, third) = (lease.clone(), registry.lease("tuned").unwrap());
    assert_eq!(registry.get("tuned").unwrap().leases, 3);
    assert_eq!((lease.key(), &lease.id), (third.key(), &info.generation));
    drop((lease, second));
    assert_eq!(registry.get("tuned").unwrap().leases, 1);
    let gone = registry.unload("tuned").unwrap();
    assert_eq!((gone.generation, gone.freed_bytes, gone.pending_bytes), (info.generation, 0, info.bytes));
    drop(third);
    let rest = registry.list()[0].bytes;
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, rest);
    assert_eq!(registry.unload("base-like/v1.2:x@y_z-0").unwrap().freed_bytes, rest);

    for error in [
        registry.get("tuned").unwrap_err(),
        registry.lease("tuned").err().unwrap(),
        registry.unload("tuned").unwrap_err(),
        registry.set_pinned("tuned", true).unwrap_err(),
    ] {
        assert_eq!((error.kind, error.code), (ErrorKind::NotFound, Some("adapter_not_found")));
        assert!(error.message.contains("\"tuned\""));
    }
    assert_eq!(registry.stats().loads.load(Relaxed), 2);
}

#[tokio::test]
async fn bad_names_and_sources() {
    let registry = open(RegistryConfig { reserved_names: vec!["the-base".into()], ..config() });
    let long = "x".repeat(257);
    for name in ["", " a", "a,b", "the-base", "ü", "a\n", "a+b", &long] {
        let error = registry.load(name, text(&fixture("qv-r4")), LoadOptions::default()).await.unwrap_err();
        assert_eq!((error.kind, error.code), (ErrorKind::Invalid, Some("adapter_name_invalid")), "{name:?}");
    }
    let error = registry.load("a", "/no/such/place", LoadOptions::default()).await.unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::NotFound, Some("adapter_source_not_found")));
    assert_eq!(error.param.as_deref(), Some("source"));
    assert_eq!(registry.load("a", "", LoadOptions::default()).await.unwrap_err().kind, ErrorKind::Invalid);
    let error = registry.load("a", text(&fixture("embed")), LoadOptions::default()).await.unwrap_err();
    assert_eq!(error.code, Some("adapter_unsupported"));
    assert!(registry.list().is_empty());
    assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
    assert_eq!(registry.stats().load_failures.load(Relaxed), 11);
}

#[tokio::test]
async fn replace_makes_a_generation_only_when_something_changed() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(config());
    let source = write_small(&dir.path().join("a"), 1);
    let first = registry.load("a", &source, LoadOptions::default()).await.unwrap();
    let error = registry.load("a", &source, LoadOptions::default()).await.unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::Conflict, Some("adapter_exists")));

    let key = registry.lease("a").unwrap().key();
    let same = registry.load("a", &source, LoadOptions { pinned: true, replace: true }).await.unwrap();
    assert_eq!((same.generation, same.pinned), (first.generation.clone(), true));
    assert_eq!(registry.lease("a").unwrap().key(), key);

    // The same content from another source has the same generation id and the new source.
    let moved = registry.load("a", &write_small(&dir.path().join("b"), 1), LoadOptions::REPLACE).await.unwrap();
    assert_eq!(moved.generation, first.generation);
    assert!(moved.source.ends_with("b"));

    // A bad replacement changes nothing.
    registry.load("a", text(&fixture("pissa")), LoadOptions::REPLACE).await.unwrap_err();
    assert_eq!(registry.get("a").unwrap().generation, first.generation);
    let other = registry.load("a", &write_small(&dir.path().join("c"), 2), LoadOptions::REPLACE).await.unwrap();
    assert_ne!(other.generation, first.generation);
    // Loading the first content again gives its generation id again.
    let back = registry.load("a", &source, LoadOptions::REPLACE).await.unwrap();
    assert_eq!(back.generation, first.generation);
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, back.bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_load_a_name_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(config());
    let source = write_small(dir.path(), 1);
    let load = |name: String, replace: bool| {
        let (registry, source) = (registry.clone(), source.clone());
        tokio::spawn(async move { registry.load(&name, &source, LoadOptions { pinned: false, replace }).await })
    };
    let racing: Vec<_> = (0..16).map(|_| load("a".into(), false)).collect();
    let mut won = 0;
    for one in racing {
        match one.await.unwrap() {
            Ok(_) => won += 1,
            Err(e) => assert_eq!(e.code, Some("adapter_exists")),
        }
    }
    assert_eq!(won, 1);
    let key = registry.lease("a").unwrap().key();
    for one in (0..16).map(|i| load(if i % 2 == 0 { "a".into() } else { format!("b{i}") }, true)).collect::<Vec<_>>() {
        one.await.unwrap().unwrap();
    }
    assert_eq!(registry.lease("a").unwrap().key(), key);
    assert_eq!(registry.list().len(), 9);
}

/// Leases, loads, pins and unloads from many threads: no deadlock, and no lease is left.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let one = small_bytes(&tiny_model());
    let registry = open(RegistryConfig { slot_budget: 4 * one, host_budget: 4 * one, ..config() });
    let sources: Vec<_> = (0..4).map(|i| write_small(&dir.path().join(i.to_string()), i)).collect();
    let tasks: Vec<_> = (0..8usize)
        .map(|task| {
            let (registry, sources) = (registry.clone(), sources.clone());
            tokio::spawn(async move {
                for i in 0..40 {
                    let name = format!("n{}", (i + task) % 3);
                    match (i * 7 + task) % 5 {
                        0 => drop(registry.unload(&name)),
                        1 => drop(registry.set_pinned(&name, i % 2 == 0)),
                        2 | 3 => drop(registry.lease(&name).map(|l| (l.clone(), l))),
                        _ => drop(registry.load(&name, &sources[(i + task) % 4], LoadOptions::REPLACE).await.unwrap()),
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert!(registry.list().iter().all(|info| info.leases == 0));
    registry.list().iter().for_each(|info| drop(registry.unload(&info.name).unwrap()));
    assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
}

#[tokio::test]
async fn larger_than_all_slots_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let one = small_bytes(&tiny_model());
    let registry = open(RegistryConfig { slot_budget: one - 1, ..config() });
    let error = registry.load("a", &write_small(dir.path(), 1), LoadOptions::default()).await.unwrap_err();
    assert_eq!(error.code, Some("adapter_too_large"));
    assert!(error.message.contains(&one.to_string()) && error.message.contains(&(one - 1).to_string()), "{error}");
    assert!(registry.list().is_empty());
}

#[cfg(unix)]
#[tokio::test]
async fn the_root_confines() {
    use std::os::unix::fs::symlink;
    let dir = tempfile::tempdir().unwrap();
    let (real, outside) = (dir.path().join("real"), dir.path().join("outside"));
    write_small(&real.join("in"), 1);
    write_small(&outside, 2);
    symlink(&real, dir.path().join("root")).unwrap();
    symlink(&outside, real.join("out")).unwrap();
    symlink(real.join("in"), real.join("alias")).unwrap();
    std::fs::create_dir(real.join("mixed")).unwrap();
    symlink(real.join("in/adapter_config.json"), real.join("mixed/adapter_config.json")).unwrap();
    symlink(outside.join("adapter_model.safetensors"), real.join("mixed/adapter_model.safetensors")).unwrap();

    let root = dir.path().join("root");
    let registry = open(RegistryConfig { adapter_root: Some(root.clone()), ..config() });
    let inside = [text(&real.join("in")).to_owned(), text(&root.join("in")).to_owned(), "in".into(), "alias".into()];
    for source in inside {
        registry.load("a", &source, LoadOptions::REPLACE).await.unwrap();
    }
    let escapes = ["out", "mixed", "../outside", "in/../in", "/etc", text(&outside), "/no/such/place", "../no-such"];
    for source in escapes {
        let error = registry.load("a", source, LoadOptions::REPLACE).await.unwrap_err();
        assert_eq!((error.kind, error.code), (ErrorKind::Forbidden, Some("adapter_path_forbidden")), "{source}");
    }
    assert_eq!(registry.load("a", "none", LoadOptions::REPLACE).await.unwrap_err().kind, ErrorKind::NotFound);
    let missing = RegistryConfig { adapter_root: Some(dir.path().join("nowhere")), ..config() };
    assert!(Registry::new(Arc::new(tiny_model()), missing).is_err());
}

#[tokio::test]
async fn a_directory_of_adapters() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    write_small(&one, 1);
    write_small(&two, 2);
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    std::fs::write(dir.path().join("README.md"), "x").unwrap();
    let bad = dir.path().join("bad");
    std::fs::create_dir(&bad).unwrap();
    std::fs::write(bad.join("adapter_config.json"), "{}").unwrap();

    let registry = open(config());
    registry.load("two", &write_small(&dir.path().join("one/other"), 3), LoadOptions::default()).await.unwrap();
    let other = registry.get("two").unwrap().generation;
    let loaded = registry.load_directory(dir.path()).await.unwrap();
    let outcome: Vec<_> = loaded.iter().map(|(name, loaded)| (name.as_str(), loaded.is_ok())).collect();
    assert_eq!(outcome, [("bad", false), ("one", true)]);
    assert_eq!(registry.get("two").unwrap().generation, other, "what is loaded stays");
    assert!(registry.load_directory(&dir.path().join("nowhere")).await.is_err());
}

#[tokio::test]
async fn a_restart_brings_the_same_adapters_back() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state/of/quiver");
    let config = || RegistryConfig { state_dir: Some(state.clone()), ..config() };
    let registry = open(config());
    for (name, seed, pinned) in [("kept", 1, true), ("changed", 2, false), ("gone", 3, false), ("unloaded", 4, false)] {
        registry
            .load(name, &write_small(&dir.path().join(name), seed), LoadOptions { pinned, replace: false })
            .await
            .unwrap();
    }
    registry.load("late", &write_small(&dir.path().join("late"), 5), LoadOptions::default()).await.unwrap();
    registry.set_pinned("late", true).unwrap();
    registry.unload("unloaded").unwrap();
    let before = registry.list();
    drop(registry);

    write_small(&dir.path().join("changed"), 22);
    std::fs::rename(dir.path().join("gone"), dir.path().join("away")).unwrap();
    let registry = open(config());
    let mut problems = registry.restore().await;
    problems.sort();
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].contains("\"changed\"") && problems[0].contains(&before[0].generation), "{problems:?}");
    assert!(problems[1].contains("\"gone\" was not restored"), "{problems:?}");
    let after = registry.list();
    let names: Vec<_> = after.iter().map(|i| (i.name.as_str(), i.pinned)).collect();
    assert_eq!(names, [("changed", false), ("kept", true), ("late", true)]);
    assert_ne!(after[0].generation, before[0].generation);
    assert_eq!(after[1].generation, before[2].generation);
    drop(registry);

    // A source that was missing at one start is restored at the next, and the changed one is now as expected.
    std::fs::rename(dir.path().join("away"), dir.path().join("gone")).unwrap();
    let registry = open(config());
    assert_eq!(registry.restore().await, Vec::<String>::new());
    assert_eq!(registry.list().len(), 4);
    // An unload also removes an entry that could not be restored.
    std::fs::remove_dir_all(dir.path().join("gone")).unwrap();
    let registry = open(config());
    assert_eq!(registry.restore().await.len(), 1);
    registry.unload("gone").unwrap();
    assert!(registry.unload("gone").is_err());
    assert_eq!(open(config()).restore().await, Vec::<String>::new());
}

#[tokio::test]
async fn a_damaged_manifest_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let config = || RegistryConfig { state_dir: Some(dir.path().join("state")), ..config() };
    let path = dir.path().join("state/adapters.json");
    let registry = open(config());
    assert_eq!(registry.restore().await, Vec::<String>::new());
    for (name, seed) in [("a", 1), ("b", 2)] {
        registry.load(name, &write_small(&dir.path().join(name), seed), LoadOptions::default()).await.unwrap();
    }

    // A damaged entry does not affect the others.
    let mut manifest: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    manifest["adapters"][0]["source"] = Value::Null;
    std::fs::write(&path, manifest.to_string()).unwrap();
    let registry = open(config());
    let problems = registry.restore().await;
    assert!(problems.len() == 1 && problems[0].contains("entry 0 is damaged"), "{problems:?}");
    assert_eq!(registry.list().iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["b"]);

    // A file that is not a manifest is moved aside.
    for broken in ["", "{\"adapters\": [{\"na", "[]", "{\"adapters\": 3}", "\u{0}"] {
        std::fs::write(&path, broken).unwrap();
        let registry = open(config());
        let problems = registry.restore().await;
        assert!(problems.len() == 1 && problems[0].contains("adapters.json.damaged"), "{problems:?}");
        assert_eq!(std::fs::read_to_string(path.with_extension("json.damaged")).unwrap(), broken);
        assert!(registry.list().is_empty());
    }
    std::fs::write(dir.path().join("file"), "x").unwrap();
    let unusable = RegistryConfig { state_dir: Some(dir.path().join("file")), ..config() };
    assert!(Registry::new(Arc::new(tiny_model()), unusable).is_err());
}

/// At start-up, the adapters directory is loaded first, and the manifest then overrides it.
#[tokio::test]
async fn directory_and_manifest_together() {
    let dir = tempfile::tempdir().unwrap();
    let (root, shipped) = (dir.path().join("root"), dir.path().join("shipped"));
    write_small(&shipped.join("a"), 1);
    write_small(&shipped.join("b"), 2);
    let other = write_small(&root.join("other"), 3);
    let config =
        || RegistryConfig { state_dir: Some(dir.path().join("state")), adapter_root: Some(root.clone()), ..config() };
    let registry = open(config());
    registry.load_directory(&shipped).await.unwrap();
    assert_eq!(registry.restore().await, Vec::<String>::new());
    registry.set_pinned("a", true).unwrap();
    let replaced = registry.load("b", &other, LoadOptions::REPLACE).await.unwrap().generation;

    for _ in 0..2 {
        let registry = open(config());
        registry.load_directory(&shipped).await.unwrap();
        // If the server stops before the restore, the manifest still lists everything.
        let registry = {
            drop(registry);
            let registry = open(config());
            registry.load_directory(&shipped).await.unwrap();
            registry
        };
        assert_eq!(registry.restore().await, Vec::<String>::new());
        assert!(registry.get("a").unwrap().pinned, "its pin came back, though it lies outside the root");
        assert_eq!(registry.get("b").unwrap().generation, replaced);
    }
}

/// An adapter of [`Draft::small`] that names a base.
fn write_of_base(dir: &Path, base: Value) -> String {
    let mut draft = Draft::small(&tiny_model(), 1);
    for (key, value) in base.as_object().unwrap() {
        draft.config[key] = value.clone();
    }
    draft.write(dir);
    text(dir).to_owned()
}

#[tokio::test]
async fn adapters_of_another_base() {
    let dir = tempfile::tempdir().unwrap();
    let base = ServedBase {
        names: vec!["org/tiny".into()],
        fingerprint: "f00d".into(),
        chat_template: Some("the base's".into()),
    };
    let config = || RegistryConfig { base: base.clone(), ..config() };
    let (lenient, strict) = (open(config()), open(RegistryConfig { strict_base: true, ..config() }));
    for (claim, warned, refused) in [
        (json!({}), None, false),
        (json!({"base_model_name_or_path": "unsloth/Tiny-bnb-4bit"}), None, false),
        (json!({"base_model_name_or_path": "org/huge"}), Some("\"org/huge\""), true),
        (json!({"base_model_name_or_path": "/data/run-7/merged"}), Some("\"/data/run-7/merged\""), false),
        (json!({"base_model_name_or_path": "x", "quiver": {"base_fingerprint": "f00d"}}), None, false),
        (
            json!({"base_model_name_or_path": "tiny", "quiver": {"base_fingerprint": "beef"}}),
            Some("other weights"),
            true,
        ),
    ] {
        let source = write_of_base(&dir.path().join("a"), claim.clone());
        let info = lenient.load("a", &source, LoadOptions::REPLACE).await.unwrap();
        assert_eq!(info.warnings.len(), usize::from(warned.is_some()), "{claim}: {:?}", info.warnings);
        warned.iter().for_each(|part| assert!(info.warnings[0].contains(part), "{:?}", info.warnings));
        assert_eq!(lenient.get("a").unwrap().warnings, info.warnings);
        let error = strict.load("a", &source, LoadOptions::REPLACE).await.err();
        assert_eq!(error.as_ref().and_then(|e| e.code), refused.then_some("adapter_of_another_base"), "{claim}");
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
    }
}

#[tokio::test]
async fn an_adapter_with_a_chat_template_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let base = ServedBase { chat_template: Some("the base's\n".into()), ..ServedBase::default() };
    let registry = open(RegistryConfig { base, ..config() });
    for (file, content, warned) in [
        ("chat_template.jinja", "the base's", false),
        ("chat_template.jinja", "its own", true),
        ("tokenizer_config.json", "{\"chat_template\": \"its own\"}", true),
        ("tokenizer_config.json", "{\"eos_token\": \"x\"}", false),
    ] {
        let source = write_of_base(&dir.path().join("a"), json!({}));
        std::fs::write(dir.path().join("a").join(file), content).unwrap();
        let warnings = registry.load("a", &source, LoadOptions::REPLACE).await.unwrap().warnings;
        assert_eq!(
            warnings.iter().filter(|w| w.contains("chat template")).count(),
            usize::from(warned),
            "{file} {content}"
        );
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
    }
}

#[tokio::test]
async fn an_adapter_without_effect() {
    let dir = tempfile::tempdir().unwrap();
    let registry = open(RegistryConfig { strict_base: true, ..config() });
    let zero = |half: &str, alpha: f64| {
        let mut draft = Draft::small(&tiny_model(), 1);
        draft.config["lora_alpha"] = json!(alpha);
        for (name, (_, _, bytes)) in &mut draft.tensors {
            if name.contains(half) {
                bytes.fill(0);
            }
        }
        draft
    };
    for (draft, warned) in [
        (zero("lora_B", 16.0), true),
        (zero("lora_A", 16.0), true),
        (zero("-", 0.0), true),
        (zero("layers.0", 16.0), false),
    ] {
        draft.write(dir.path());
        let info = registry.load("a", text(dir.path()), LoadOptions::REPLACE).await.unwrap();
        let told = info.warnings.iter().any(|warning| warning.contains("all deltas of the adapter are zero"));
        assert_eq!(told, warned, "{:?}", info.warnings);
    }
}

/// A folder that is put into the adapters directory while the server runs.
#[tokio::test]
async fn on_demand() {
    let dir = tempfile::tempdir().unwrap();
    let adapters = dir.path().join("adapters");
    write_small(&adapters.join("at start"), 1);
    let registry = open(RegistryConfig { directory: Some(adapters.clone()), ..config() });
    registry.load_directory(&adapters).await.unwrap();
    assert_eq!(registry.list().iter().map(|i| i.name.clone()).collect::<Vec<_>>(), ["at start"]);
    let loads = || registry.stats().loads.load(Relaxed);
    let failures = || registry.stats().load_failures.load(Relaxed);

    write_small(&adapters.join("late"), 2);
    assert!(registry.offers("late") && registry.get("late").is_err());
    let tasks: Vec<_> = (0..8).map(|_| (registry.clone(), "late")).collect();
    let leases = futures::future::join_all(tasks.iter().map(|(registry, name)| registry.lease_or_load(name))).await;
    assert!(leases.iter().all(|lease| lease.as_ref().unwrap().key() == leases[0].as_ref().unwrap().key()));
    assert_eq!((loads(), failures()), (2, 0), "they loaded it once");

    // A broken one is that request's error, by name, and is not read again for each request.
    std::fs::create_dir(adapters.join("broken")).unwrap();
    std::fs::write(adapters.join("broken/adapter_config.json"), "{}").unwrap();
    for _ in 0..3 {
        let error = registry.lease_or_load("broken").await.err().unwrap();
        assert_eq!((error.kind, error.code), (ErrorKind::Invalid, Some("adapter_invalid")));
        assert!(error.message.contains("\"broken\""), "{error}");
    }
    assert_eq!(failures(), 1);

    // No name leads out of the directory.
    write_small(&dir.path().join("outside"), 3);
    write_small(&adapters.join(".hidden"), 4);
    write_small(&adapters.join("a/b"), 5);
    for name in
        ["../outside", "..", ".", "", "a/b", ".hidden", "a\\b", "\0", "nowhere", text(&dir.path().join("outside"))]
    {
        assert!(!registry.offers(name), "{name}");
        assert_eq!(registry.lease_or_load(name).await.err().unwrap().code, Some("adapter_not_found"), "{name}");
    }
    // What was unloaded stays unloaded until it is loaded again.
    drop(leases);
    registry.unload("late").unwrap();
    assert_eq!(registry.lease_or_load("late").await.err().unwrap().code, Some("adapter_not_found"));
    registry.load("late", text(&adapters.join("late")), LoadOptions::default()).await.unwrap();
    registry.lease_or_load("late").await.unwrap();
    // Without a directory, nothing is looked for.
    assert!(open(config()).lease_or_load("late").await.is_err());
}

/// Publishing a checkpoint keeps the pin of its name, and is counted as a load.
#[tokio::test]
async fn a_published_name_stays_pinned() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = small_bytes(&tiny_model());
    let registry = open(RegistryConfig { slot_budget: bytes * 3 / 2, ..config() });
    let (first, second) = (write_small(&dir.path().join("1"), 1), write_small(&dir.path().join("2"), 2));
    registry.load("a", &first, LoadOptions { pinned: true, replace: false }).await.unwrap();
    let staged = registry.load_unpublished("a", &second).await.unwrap();
    assert_eq!(registry.stats().loads.load(Relaxed), 2);
    assert!(registry.load_unpublished("a", text(&dir.path().join("3"))).await.is_err());
    assert_eq!(registry.stats().load_failures.load(Relaxed), 1);
    assert!(registry.publish(staged).await.pinned);
    assert!(registry.get("a").unwrap().pinned);
    // A new name is not pinned.
    let staged = registry.load_unpublished("b", &first).await.unwrap();
    assert!(!registry.publish(staged).await.pinned);
}
