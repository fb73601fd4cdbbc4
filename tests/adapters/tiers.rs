//! The tiers: budgets, eviction, leases.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use quiver::adapter::Lease;
use quiver::adapter::registry::{LoadOptions, Registry};
use quiver::adapter::tiers::Residency;
use quiver::adapter::tiers::Tiers;
use quiver::arch::ModelConfig;
use quiver::arch::Site;

use crate::{Draft, registry, small_bytes, small_number, smol_model, tiny_model};

const AMPLE: usize = 1 << 30;

/// Loads adapters `0..n`, each with its own values.
async fn load_small(registry: &Registry, model: &ModelConfig, dir: &Path, n: u32) {
    for seed in 0..n {
        let source = dir.join(seed.to_string());
        Draft::small(model, seed).write(&source);
        registry.load(&seed.to_string(), source.to_str().unwrap(), LoadOptions::default()).await.unwrap();
    }
}

/// Acquires until the answer is not `Loading`.
fn settle(tiers: &mut Tiers, lease: &Lease) -> Residency {
    let started = Instant::now();
    loop {
        match tiers.acquire(lease) {
            Residency::Loading => {}
            answer => return answer,
        }
        assert!(started.elapsed() < Duration::from_secs(30), "loading never ends");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn ready(tiers: &mut Tiers, lease: &Lease) -> u32 {
    match settle(tiers, lease) {
        Residency::Ready(slot) => slot,
        other => panic!("{} is not ready: {other:?}", lease.name),
    }
}

/// Checks that all values in the slot are those of `seed`.
fn check(tiers: &Tiers, model: &ModelConfig, slot: u32, seed: u32) {
    let n = model.num_heads * model.head_dim;
    for layer in 0..model.num_layers {
        let [pair] = tiers.pool().pairs(slot, layer, Site::Qkv) else { panic!("one pair a layer") };
        for (i, a) in pair.a.iter().enumerate() {
            assert_eq!(*a, small_number(seed, layer, i));
        }
        for (i, b) in pair.b.iter().enumerate() {
            assert_eq!(*b, small_number(seed + 1, layer, i % n * 8 + i / n), "B is transposed");
        }
    }
}

#[tokio::test]
async fn least_recently_used_goes_first_and_pinned_stays() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    let registry = registry(model.clone(), 3 * one + one / 2, AMPLE);
    load_small(&registry, &model, dir.path(), 6).await;
    let level = |name: &str| registry.get(name).unwrap().level;
    let lease = |name: &str| registry.lease(name).unwrap();
    let mut tiers = registry.tiers().unwrap();
    let mut touch = |name: &str| {
        let slot = ready(&mut tiers, &lease(name));
        check(&tiers, &model, slot, name.parse().unwrap());
        tiers.release(slot);
    };
    touch("0");
    touch("1");
    touch("2");
    touch("0");
    touch("3");
    assert_eq!(["0", "1", "2", "3"].map(level), ["slot", "host", "slot", "slot"]);
    registry.set_pinned("2", true).unwrap();
    touch("4");
    assert_eq!(["0", "2", "3", "4"].map(level), ["host", "slot", "slot", "slot"]);
    registry.set_pinned("2", false).unwrap();
    touch("5");
    assert_eq!(level("2"), "host");
    assert_eq!(registry.stats().slot_evictions.load(Relaxed), 3);
    assert_eq!(registry.stats().slot_bytes.load(Relaxed) as usize, 3 * one);
    assert_eq!(registry.stats().disk_reads.load(Relaxed), 0);
}

#[tokio::test]
async fn full_while_all_slots_are_used_and_never_over_budget() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    let registry = registry(model.clone(), 2 * one, AMPLE);
    load_small(&registry, &model, dir.path(), 3).await;
    let leases: Vec<_> = (0..3).map(|i| registry.lease(&i.to_string()).unwrap()).collect();
    let mut tiers = registry.tiers().unwrap();
    let first = ready(&mut tiers, &leases[0]);
    let second = ready(&mut tiers, &leases[1]);
    assert_ne!(first, second);
    assert_eq!(ready(&mut tiers, &leases[0]), first, "one slot for all uses of a generation");
    assert!(matches!(tiers.acquire(&leases[2]), Residency::Full));
    tiers.release(first);
    assert!(matches!(tiers.acquire(&leases[2]), Residency::Full), "two uses, one released");
    tiers.release(first);
    let third = ready(&mut tiers, &leases[2]);
    check(&tiers, &model, third, 2);
    check(&tiers, &model, second, 1);
    assert_eq!(registry.stats().slot_bytes.load(Relaxed) as usize, 2 * one);
}

/// A prefetch loads the adapter of a waiting request, but does not evict one that another request waits for.
#[tokio::test]
async fn prefetch_takes_only_room_that_no_request_waits_for() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let registry = registry(model.clone(), small_bytes(&model), AMPLE);
    load_small(&registry, &model, dir.path(), 2).await;
    let (a, b) = (registry.lease("0").unwrap(), registry.lease("1").unwrap());
    let mut tiers = registry.tiers().unwrap();
    let arrives = |tiers: &mut Tiers, name: &str, lease: &Lease| {
        tiers.prefetch(lease);
        let started = Instant::now();
        while registry.get(name).unwrap().level != "slot" && started.elapsed() < Duration::from_millis(500) {
            tiers.update_slots();
        }
        registry.get(name).unwrap().level
    };
    assert_eq!(arrives(&mut tiers, "0", &a), "slot");
    // Used once, so that only the lease protects it.
    assert_eq!(ready(&mut tiers, &a), 0);
    tiers.release(0);
    assert_eq!(arrives(&mut tiers, "1", &b), "host");
    drop(a);
    assert_eq!(arrives(&mut tiers, "1", &b), "slot");
    assert!(matches!(tiers.acquire(&b), Residency::Ready(0)));
}

/// Two adapters that fit only one at a time do not evict each other forever.
#[tokio::test]
async fn an_arrived_adapter_is_used_before_it_is_evicted() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let registry = registry(model.clone(), small_bytes(&model), AMPLE);
    load_small(&registry, &model, dir.path(), 2).await;
    let (a, b) = (registry.lease("0").unwrap(), registry.lease("1").unwrap());
    let mut tiers = registry.tiers().unwrap();
    assert!(matches!(tiers.acquire(&a), Residency::Loading));
    while registry.get("0").unwrap().level != "slot" {
        tiers.update_slots();
    }
    assert!(matches!(tiers.acquire(&b), Residency::Full), "a request still waits for the other");
    assert!(matches!(tiers.acquire(&a), Residency::Ready(0)));
    tiers.release(0);
    assert_eq!(ready(&mut tiers, &b), 0);
    tiers.release(0);

    // An adapter that is leased but no longer asked for does not block the others forever.
    assert!(matches!(tiers.acquire(&a), Residency::Loading));
    while registry.get("0").unwrap().level != "slot" {
        tiers.update_slots();
    }
    let answers = (0..10_000).map(|_| tiers.acquire(&b)).take_while(|r| matches!(r, Residency::Full)).count();
    assert!((1..1000).contains(&answers), "{answers}");
    // Without a lease, it does not block the others at all.
    let slot = ready(&mut tiers, &b);
    tiers.release(slot);
    assert!(matches!(tiers.acquire(&a), Residency::Loading));
    drop(a);
    while registry.get("0").unwrap().level != "slot" {
        tiers.update_slots();
    }
    assert!(matches!(tiers.acquire(&b), Residency::Loading));
}

#[tokio::test]
async fn pinned_adapters_that_leave_no_room_fail_the_others() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    let registry = registry(model.clone(), 2 * one, AMPLE);
    load_small(&registry, &model, dir.path(), 3).await;
    let mut tiers = registry.tiers().unwrap();
    for name in ["0", "1"] {
        registry.set_pinned(name, true).unwrap();
        let slot = ready(&mut tiers, &registry.lease(name).unwrap());
        tiers.release(slot);
    }
    let error = registry.set_pinned("2", true).unwrap_err();
    assert_eq!(error.code, Some("adapter_pin_budget"));
    let lease = registry.lease("2").unwrap();
    let Residency::Failed(error) = tiers.acquire(&lease) else { panic!("waiting would not help") };
    assert_eq!(error.code, Some("adapter_no_room"));
    assert!(error.message.contains(&(2 * one).to_string()), "names the budget: {error}");
    registry.set_pinned("0", false).unwrap();
    ready(&mut tiers, &lease);
}

#[tokio::test]
async fn spilled_adapters_come_back_from_disk() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    // Slots for one, host memory for two.
    let registry = registry(model.clone(), one, 2 * one);
    load_small(&registry, &model, dir.path(), 4).await;
    let levels = || registry.list().iter().map(|i| i.level).collect::<Vec<_>>();
    assert_eq!(levels(), ["disk", "disk", "host", "host"]);
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, 2 * one);
    let mut tiers = registry.tiers().unwrap();
    for seed in [0, 1, 2, 3, 0] {
        let slot = ready(&mut tiers, &registry.lease(&seed.to_string()).unwrap());
        check(&tiers, &model, slot, seed);
        tiers.release(slot);
        assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, 2 * one);
    }
    assert_eq!(registry.stats().disk_reads.load(Relaxed), 5);
    drop(tiers);

    // No host memory at all: still served, straight from disk.
    let registry = crate::registry(model.clone(), one, 0);
    load_small(&registry, &model, &dir.path().join("more"), 2).await;
    assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
    let mut tiers = registry.tiers().unwrap();
    let slot = ready(&mut tiers, &registry.lease("1").unwrap());
    check(&tiers, &model, slot, 1);
}

#[tokio::test]
async fn pinned_adapters_stay_in_host_memory() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    let registry = registry(model.clone(), 2 * one, 2 * one);
    load_small(&registry, &model, dir.path(), 4).await;
    registry.set_pinned("2", true).unwrap();
    let mut tiers = registry.tiers().unwrap();
    for seed in [0, 1, 3] {
        let slot = ready(&mut tiers, &registry.lease(&seed.to_string()).unwrap());
        tiers.release(slot);
    }
    assert_eq!(registry.get("2").unwrap().level, "host");
}

#[tokio::test]
async fn a_source_that_changed_or_went_fails_clearly() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let registry = registry(model.clone(), small_bytes(&model), 0);
    load_small(&registry, &model, dir.path(), 2).await;
    let mut tiers = registry.tiers().unwrap();
    Draft::small(&model, 77).write(&dir.path().join("0"));
    std::fs::remove_dir_all(dir.path().join("1")).unwrap();
    let (changed, gone) = (registry.lease("0").unwrap(), registry.lease("1").unwrap());
    for lease in [&changed, &gone] {
        let Residency::Failed(error) = settle(&mut tiers, lease) else { panic!("the load must fail") };
        assert_eq!(error.code, Some("adapter_source_changed"));
        assert!(error.message.contains(&lease.id), "{error}");
        assert!(!error.message.contains(dir.path().to_str().unwrap()), "clients get it: {error}");
    }
    assert_eq!(registry.stats().slot_bytes.load(Relaxed), 0, "a failed load holds no room");
    // With the right content restored, the next request gets it.
    Draft::small(&model, 0).write(&dir.path().join("0"));
    ready(&mut tiers, &changed);
}

#[tokio::test]
async fn replace_and_unload_wait_for_leases() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let one = small_bytes(&model);
    let registry = registry(model.clone(), AMPLE, AMPLE);
    load_small(&registry, &model, dir.path(), 2).await;
    let mut tiers = registry.tiers().unwrap();
    let old = registry.lease("0").unwrap();
    let old_slot = ready(&mut tiers, &old);

    // Replaced while in use: the running request keeps its weights, and new requests get the new ones.
    Draft::small(&model, 9).write(&dir.path().join("0"));
    let info = registry.load("0", dir.path().join("0").to_str().unwrap(), LoadOptions::REPLACE).await.unwrap();
    assert_ne!(info.generation, old.id);
    assert_eq!(info.leases, 0);
    let new = registry.lease("0").unwrap();
    let new_slot = ready(&mut tiers, &new);
    check(&tiers, &model, old_slot, 0);
    check(&tiers, &model, new_slot, 9);
    // A queued request has a lease on the old generation too: it stays until the last lease ends.
    let second = old.clone();
    tiers.release(old_slot);
    drop(old);
    tiers.update_slots();
    check(&tiers, &model, old_slot, 0);
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, 3 * one);
    drop(second);
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, 2 * one);
    tiers.update_slots();
    assert!(tiers.pool().pairs(old_slot, 0, Site::Qkv).is_empty());
    assert_eq!(registry.stats().slot_bytes.load(Relaxed) as usize, one);

    // Unloaded while in use: all bytes are pending and are freed with the lease, even if the slot is released later.
    let gone = registry.unload("0").unwrap();
    assert_eq!((gone.freed_bytes, gone.pending_bytes), (0, 2 * one));
    assert_eq!(registry.lease("0").err().unwrap().code, Some("adapter_not_found"));
    check(&tiers, &model, new_slot, 9);
    drop(new);
    tiers.update_slots();
    check(&tiers, &model, new_slot, 9);
    tiers.release(new_slot);
    assert_eq!(registry.stats().slot_bytes.load(Relaxed), 0);
    assert_eq!(registry.stats().host_bytes.load(Relaxed) as usize, one);

    // Unloaded while idle: host memory is freed at once, the slot at the next update.
    let lease = registry.lease("1").unwrap();
    let slot = ready(&mut tiers, &lease);
    tiers.release(slot);
    drop(lease);
    let gone = registry.unload("1").unwrap();
    assert_eq!((gone.freed_bytes, gone.pending_bytes), (one, one));
    assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
    tiers.update_slots();
    assert_eq!(registry.stats().slot_bytes.load(Relaxed), 0);

    // Unloaded while it is being loaded into a slot.
    load_small(&registry, &model, &dir.path().join("more"), 1).await;
    let lease = registry.lease("0").unwrap();
    assert!(matches!(tiers.acquire(&lease), Residency::Loading));
    registry.unload("0").unwrap();
    drop(lease);
    let started = Instant::now();
    while registry.stats().slot_bytes.load(Relaxed) > 0 {
        tiers.update_slots();
        assert!(started.elapsed() < Duration::from_secs(30));
    }
    assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
}

/// A retired generation with a lease stays in host memory, because its files may be gone.
#[tokio::test]
async fn queued_requests_survive_a_replace_in_place() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let registry = registry(model.clone(), small_bytes(&model), 2 * small_bytes(&model));
    load_small(&registry, &model, dir.path(), 1).await;
    let old = registry.lease("0").unwrap();
    Draft::small(&model, 5).write(&dir.path().join("0"));
    registry.load("0", dir.path().join("0").to_str().unwrap(), LoadOptions::REPLACE).await.unwrap();
    for seed in 1..5 {
        let source = dir.path().join(seed.to_string());
        Draft::small(&model, seed).write(&source);
        registry.load(&seed.to_string(), source.to_str().unwrap(), LoadOptions::default()).await.unwrap();
    }
    let mut tiers = registry.tiers().unwrap();
    let slot = ready(&mut tiers, &old);
    check(&tiers, &model, slot, 0);
}

/// A thousand adapters are registered, and fifty fit into slots.
#[tokio::test]
async fn a_thousand_adapters_under_a_budget_for_fifty() {
    let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
    let budget = 50 * small_bytes(&model);
    let registry = registry(model.clone(), budget, 2 * budget);
    load_small(&registry, &model, dir.path(), 1000).await;
    assert_eq!(registry.list().len(), 1000);
    let mut tiers = registry.tiers().unwrap();
    // Twenty run at once. All are used twice, in another order than that of loading.
    let mut seen = HashSet::new();
    for step in 0..100u32 {
        let names: Vec<u32> = (0..20).map(|i| (step * 20 + i) * 379 % 1000).collect();
        let leases: Vec<_> = names.iter().map(|n| registry.lease(&n.to_string()).unwrap()).collect();
        let slots: Vec<_> = leases.iter().map(|lease| ready(&mut tiers, lease)).collect();
        assert_eq!(slots.iter().collect::<HashSet<_>>().len(), 20);
        for (slot, name) in slots.iter().zip(&names) {
            check(&tiers, &model, *slot, *name);
            seen.insert(*name);
        }
        assert!(registry.stats().slot_bytes.load(Relaxed) as usize <= budget);
        assert!(registry.stats().host_bytes.load(Relaxed) as usize <= 2 * budget);
        slots.into_iter().for_each(|slot| tiers.release(slot));
    }
    assert_eq!(seen.len(), 1000);
    assert!(registry.stats().slot_evictions.load(Relaxed) >= 1900);
    assert!(registry.stats().disk_reads.load(Relaxed) > 0);
}

/// The same with SmolLM2's shape.
#[tokio::test]
async fn many_adapters_of_a_real_shape() {
    let (model, dir) = (smol_model(), tempfile::tempdir().unwrap());
    let registry = registry(model.clone(), 3 * small_bytes(&model), 6 * small_bytes(&model));
    load_small(&registry, &model, dir.path(), 12).await;
    let mut tiers = registry.tiers().unwrap();
    for seed in (0..12).chain(0..12) {
        let slot = ready(&mut tiers, &registry.lease(&seed.to_string()).unwrap());
        check(&tiers, &model, slot, seed);
        tiers.release(slot);
    }
    assert_eq!(registry.stats().disk_reads.load(Relaxed), 24);
}

#[derive(Debug, Clone)]
enum Op {
    Acquire(u32),
    Release(usize),
    DropLease(usize),
    Pin(u32, bool),
    Replace(u32),
    Unload(u32),
    UpdateSlots,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0..6u32).prop_map(Op::Acquire),
        6 => any::<usize>().prop_map(Op::Release),
        3 => any::<usize>().prop_map(Op::DropLease),
        1 => (0..6u32, any::<bool>()).prop_map(|(n, p)| Op::Pin(n, p)),
        1 => (0..6u32).prop_map(Op::Replace),
        1 => (0..6u32).prop_map(Op::Unload),
        1 => Just(Op::UpdateSlots),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..Default::default() })]

    /// In any order of operations: budgets hold, a slot in use keeps its adapter, and nothing is leaked.
    #[test]
    fn no_leak_and_no_eviction_under_use(ops in proptest::collection::vec(op(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (model, dir) = (tiny_model(), tempfile::tempdir().unwrap());
        let budget = 3 * small_bytes(&model);
        let registry = registry(model.clone(), budget, budget);
        let mut tiers = registry.tiers().unwrap();
        let mut sources = HashMap::new();
        for name in 0..6u32 {
            let source = dir.path().join(name.to_string());
            Draft::small(&model, name).write(&source);
            runtime.block_on(registry.load(&name.to_string(), source.to_str().unwrap(), LoadOptions::default())).unwrap();
            sources.insert(name, (source, name));
        }
        let mut next_seed = 100;
        // Running requests: lease (which some drop early), slot, seed.
        let mut running: Vec<(Option<Lease>, u32, u32)> = Vec::new();
        for op in ops {
            match op {
                Op::Acquire(name) => {
                    let Ok(lease) = registry.lease(&name.to_string()) else { continue };
                    match settle(&mut tiers, &lease) {
                        Residency::Ready(slot) => running.push((Some(lease), slot, sources[&name].1)),
                        Residency::Full => prop_assert!(!running.is_empty(), "full, but no sequence runs"),
                        Residency::Failed(e) => prop_assert_eq!(e.code, Some("adapter_no_room")),
                        Residency::Loading => unreachable!(),
                    }
                }
                Op::Release(i) if !running.is_empty() => {
                    let (_lease, slot, _) = running.remove(i % running.len());
                    tiers.release(slot);
                }
                Op::DropLease(i) if !running.is_empty() => {
                    let i = i % running.len();
                    running[i].0 = None;
                }
                Op::Pin(name, pinned) => drop(registry.set_pinned(&name.to_string(), pinned)),
                Op::Replace(name) => {
                    next_seed += 10;
                    let source = dir.path().join(next_seed.to_string());
                    Draft::small(&model, next_seed).write(&source);
                    let name_text = name.to_string();
                    runtime.block_on(registry.load(&name_text, source.to_str().unwrap(), LoadOptions::REPLACE)).unwrap();
                    sources.insert(name, (source, next_seed));
                }
                Op::Unload(name) => drop(registry.unload(&name.to_string())),
                Op::UpdateSlots => tiers.update_slots(),
                Op::Release(_) | Op::DropLease(_) => {}
            }
            prop_assert!(registry.stats().slot_bytes.load(Relaxed) as usize <= budget);
            for (_, slot, seed) in &running {
                check(&tiers, &model, *slot, *seed);
            }
        }
        for (_lease, slot, _) in running.drain(..) {
            tiers.release(slot);
        }
        for info in registry.list() {
            prop_assert_eq!(info.leases, 0);
            registry.unload(&info.name).unwrap();
        }
        tiers.update_slots();
        prop_assert_eq!(registry.stats().slot_bytes.load(Relaxed), 0);
        prop_assert_eq!(registry.stats().host_bytes.load(Relaxed), 0);
    }
}
