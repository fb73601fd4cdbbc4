//! Prefix cache, preemption, budgets and fairness, counted in steps.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use quiver::adapter::Lease;
use quiver::arch::Module;
use quiver::engine::request::{Event, FinishReason, Request, SamplingParams};
use quiver::engine::worker::Tick;
use quiver::engine::{Engine, EngineConfig};
use quiver::error::ErrorKind;
use quiver::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::fake::{Answer, Bench, EOS, Fake, config, greedy, lease, lease_of, reference, request};

fn one(lease: &Lease) -> Vec<(Lease, f32)> {
    vec![(lease.clone(), 1.0)]
}

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

#[test]
fn a_shared_prefix_is_computed_once() {
    let mut bench = Bench::new(&config());
    let prompt: Vec<u32> = (0..22).collect();
    let first = bench.answer(&prompt, &[], greedy(3));
    assert_eq!(first.cached_tokens, 0);
    let rows: usize = bench.worker.runner().rows.iter().sum();
    assert_eq!(rows, 24, "22 prompt rows and 2 decode rows");

    let again = bench.answer(&prompt, &[], greedy(3));
    assert_eq!(again.cached_tokens, 20);
    assert_eq!(again.ids(), first.ids());
    assert_eq!(bench.worker.runner().rows.iter().sum::<usize>() - rows, 4);

    // A longer prompt that contains the first answer: the blocks of the answer are found too.
    let longer: Vec<u32> = prompt.iter().copied().chain(first.ids()).chain([1]).collect();
    let third = bench.answer(&longer, &[], greedy(3));
    assert_eq!(third.cached_tokens, 24);
    assert_eq!(third.ids(), reference(&longer, &[], &greedy(3), 200).ids());

    // The last token of a prompt is always computed, even if a block ends with it.
    assert_eq!(bench.answer(&prompt[..20], &[], greedy(1)).cached_tokens, 16);
    let stats = bench.engine.stats();
    assert_eq!((count(&stats.prefix_queries), count(&stats.prefix_hits)), (22 + 22 + 26 + 20, 20 + 24 + 16));
}

#[test]
fn generations_and_weights_have_their_own_prefixes() {
    let mut bench = Bench::new(&config());
    let prompt: Vec<u32> = (0..17).collect();
    let (a, b, a_again) = (lease("x", "content-a"), lease("x", "content-b"), lease("x", "content-a"));
    let half = vec![(a.clone(), 0.5)];
    let two = vec![(a.clone(), 1.0), (b.clone(), 1.0)];
    for (adapters, cached) in [
        (one(&a), 0),
        (one(&b), 0),
        (vec![], 0),
        (half.clone(), 0),
        (two.clone(), 0),
        // The same content has the same keys and values, bit for bit.
        (one(&a_again), 16),
        (one(&b), 16),
        (vec![], 16),
        (half, 16),
        (two, 16),
    ] {
        let answer = bench.answer(&prompt, &adapters, greedy(5));
        assert_eq!(answer.ids(), reference(&prompt, &adapters, &greedy(5), 200).ids());
        assert_eq!(answer.cached_tokens, cached);
    }
}

#[test]
fn a_salt_separates_prefixes() {
    let mut bench = Bench::new(&config());
    let prompt: Vec<u32> = (0..17).collect();
    for (salt, cached) in [(None, 0), (Some("a"), 0), (Some("b"), 0), (Some("a"), 16), (None, 16)] {
        let (request, mut events) = request(&prompt, &[], greedy(2));
        bench.engine.submit(Request { cache_salt: salt.map(str::to_owned), ..request }).expect("accepted");
        bench.finish();
        let mut answer = Answer::default();
        answer.take(&mut events);
        assert_eq!(answer.cached_tokens, cached, "{salt:?}");
    }
}

#[test]
fn priorities_order_the_requests_of_an_adapter_but_not_between_adapters() {
    let mut bench = Bench::new(&EngineConfig { max_running: 1, ..config() });
    let a = lease("a", "content-a");
    let submit = |priority, adapters: Vec<(Lease, f32)>| {
        let (request, events) = request(&[1, 2, 3], &adapters, greedy(4));
        bench.engine.submit(Request { priority, ..request }).expect("accepted");
        (events, Answer::default())
    };
    let base = Vec::new;
    let mut waiting = [submit(0, base()), submit(5, base()), submit(0, base()), submit(-1, base()), submit(5, one(&a))];
    let mut order = Vec::new();
    while order.len() < waiting.len() {
        bench.worker.tick();
        for (index, (events, answer)) in waiting.iter_mut().enumerate() {
            answer.take(events);
            if answer.ended() && !order.contains(&index) {
                order.push(index);
            }
        }
    }
    // The adapter's request has the largest number of all, and is second: its queue was served less.
    assert_eq!(order, [3, 4, 0, 2, 1]);
}

#[test]
fn the_prefix_cache_can_be_off() {
    let mut bench = Bench::new(&EngineConfig { prefix_cache: false, ..config() });
    let prompt: Vec<u32> = (0..17).collect();
    for _ in 0..2 {
        assert_eq!(bench.answer(&prompt, &[], greedy(2)).cached_tokens, 0);
    }
    assert_eq!(count(&bench.engine.stats().prefix_queries), 0);
}

#[test]
fn preemption_changes_nothing() {
    let tight = EngineConfig { num_blocks: 16, ..config() };
    let mut bench = Bench::new(&tight);
    let adapters = [lease("a", "a"), lease("b", "b")];
    let jobs: Vec<_> = (0..8_u32)
        .map(|i| {
            let prompt: Vec<u32> = (0..6).map(|t| (t * 3 + i) % 40).collect();
            let adapters = if i < 2 { vec![] } else { one(&adapters[i as usize % 2]) };
            let params = SamplingParams { temperature: 0.9, seed: Some(i.into()), logprobs: Some(1), ..greedy(40) };
            (prompt, adapters, params)
        })
        .collect();
    let mut events: Vec<_> =
        jobs.iter().map(|(prompt, adapters, params)| bench.submit(prompt, adapters, params.clone()).unwrap()).collect();
    bench.finish();
    assert!(count(&bench.engine.stats().preemptions) > 3);
    for ((prompt, adapters, params), events) in jobs.iter().zip(&mut events) {
        let mut answer = Answer::default();
        answer.take(events);
        answer.cached_tokens = 0;
        assert_eq!(answer, reference(prompt, adapters, params, 200));
    }
}

#[test]
fn the_seed_decides_and_the_load_does_not() {
    let params = |seed| SamplingParams { temperature: 1.0, seed, ..greedy(12) };
    let mut bench = Bench::new(&config());
    let alone = bench.answer(&[1, 2, 3], &[], params(Some(5))).ids();
    let mut others: Vec<_> = (0..20).map(|i| bench.submit(&[i, 2, 3], &[], params(None)).unwrap()).collect();
    let mut events = bench.submit(&[1, 2, 3], &[], params(Some(5))).unwrap();
    bench.finish();
    let mut answer = Answer::default();
    answer.take(&mut events);
    assert_eq!(answer.ids(), alone);
    // Without a seed, equal prompts differ.
    let mut unseeded = Answer::default();
    unseeded.take(&mut others[1]);
    assert_ne!(unseeded.ids(), alone);
}

#[test]
fn logits_of_long_scored_prompts_stay_bounded() {
    let config = EngineConfig { max_batch_tokens: 150, ..config() };
    let mut bench = Bench::new(&config);
    let prompt: Vec<u32> = (0..150).map(|i| i % 40).collect();
    let params = SamplingParams { prompt_logprobs: Some(2), ..greedy(2) };
    // The fake rejects a step with more logit rows.
    let answer = bench.answer(&prompt, &[], params.clone());
    assert_eq!(answer, reference(&prompt, &[], &params, 200));
    assert_eq!(bench.worker.runner().rows[..3], [64, 64, 22]);
}

#[test]
fn a_prompt_can_be_scored_without_generating() {
    let mut bench = Bench::new(&config());
    for len in [1, 2, 5, 40] {
        let prompt: Vec<u32> = (0..len).collect();
        let params = SamplingParams { prompt_logprobs: Some(3), ..greedy(0) };
        let answer = bench.answer(&prompt, &[], params.clone());
        assert_eq!(answer, reference(&prompt, &[], &params, 200));
        assert_eq!(answer.prompt.unwrap().len(), len as usize);
        assert_eq!(answer.finished, Some((FinishReason::Length, None)));
    }
    assert_eq!(bench.answer(&[1], &[], greedy(0)).finished, Some((FinishReason::Length, None)));
}

#[test]
fn sequences_end_at_stop_ids_and_limits() {
    let mut bench = Bench::new(&config());
    let free = bench.answer(&[9, 8, 7], &[], greedy(30)).ids();
    let stop = free[4];
    let first = free.iter().position(|id| *id == stop).unwrap();
    let stopping = SamplingParams { stop_token_ids: vec![stop], ..greedy(30) };
    let answer = bench.answer(&[9, 8, 7], &[], stopping.clone());
    assert_eq!(answer.ids(), free[..first]);
    assert_eq!(answer.finished, Some((FinishReason::Stop, Some(stop))));

    // The stop id is masked for the first `min_tokens` tokens, so the text continues differently.
    let later = SamplingParams { min_tokens: 10, ..stopping };
    let answer = bench.answer(&[9, 8, 7], &[], later);
    assert!(answer.tokens.len() >= 10 && !answer.ids().contains(&stop));

    // The model's end-of-sequence id, and ignoring it.
    let biased = SamplingParams { logit_bias: vec![(EOS, 100.0)], ignore_eos: false, ..greedy(4) };
    let answer = bench.answer(&[9], &[], biased.clone());
    assert_eq!((answer.ids(), answer.finished), (vec![], Some((FinishReason::Stop, None))));
    assert_eq!(bench.answer(&[9], &[], SamplingParams { ignore_eos: true, ..biased }).ids(), [EOS; 4]);

    // The longest sequence.
    let answer = bench.answer(&[1; 198], &[], greedy(30));
    assert_eq!((answer.tokens.len(), answer.finished), (2, Some((FinishReason::Length, None))));
}

#[test]
fn what_cannot_fit_is_refused_and_says_why() {
    let config = EngineConfig { num_blocks: 10, ..config() };
    let mut bench = Bench::new(&config);
    for (prompt, max_tokens, word) in [
        (vec![], 1, "empty"),
        (vec![1; 200], 1, "200 tokens"),
        (vec![1; 30], 12, "length is 40 tokens"),
        (vec![1; 41], 1, "42 tokens"),
    ] {
        let error = bench.submit(&prompt, &[], greedy(max_tokens)).unwrap_err();
        if prompt.len() != 41 {
            assert!(error.message.contains(word), "{error}");
        }
        assert_eq!(error.kind, ErrorKind::Invalid);
    }
    // 30 + 11 tokens need 40 positions.
    assert_eq!(bench.answer(&[1; 30], &[], greedy(11)).tokens.len(), 11);
    for broken in [EngineConfig { block_size: 0, ..config.clone() }, EngineConfig { max_running: 33, ..config.clone() }]
    {
        assert!(Engine::new(Fake::new(&config), broken, None).is_err());
    }
}

#[test]
fn a_bad_row_ends_its_own_request_only() {
    let mut fake = Fake::new(&config());
    fake.poison = Some(33);
    let mut bench = Bench::with(fake, &config());
    let params = SamplingParams { logit_bias: vec![(33, -100.0)], ..greedy(5) };
    let mut bad = bench.submit(&[33], &[], params.clone()).unwrap();
    let mut good = bench.submit(&[4], &[], params.clone()).unwrap();
    bench.finish();
    let (mut bad_answer, mut good_answer) = (Answer::default(), Answer::default());
    bad_answer.take(&mut bad);
    good_answer.take(&mut good);
    assert!(bad_answer.failed.unwrap().contains("NaN"));
    assert_eq!(good_answer, reference(&[4], &[], &params, 200));
}

#[test]
fn a_cancelled_request_releases_everything_at_once() {
    let mut bench = Bench::new(&config());
    let events = bench.submit(&[1; 20], &one(&lease("a", "a")), greedy(100)).unwrap();
    (0..5).for_each(|_| assert_eq!(bench.worker.tick(), Tick::Stepped));
    assert!(count(&bench.engine.stats().used_blocks) > 0);
    drop(events);
    assert_eq!(bench.worker.tick(), Tick::Idle);
    bench.assert_empty();
}

#[test]
fn a_dora_is_used_alone_and_at_weight_1() {
    let bench = Bench::new(&config());
    let values = || FloatVec::F32([1.0].into());
    let module = ModuleWeights {
        layer: 0,
        module: Module::Q,
        rank: 1,
        scale: 1.0,
        a: values(),
        b: values(),
        bias: None,
        magnitude: Some(values()),
    };
    let (dora, plain) = (lease_of("d", "d", &AdapterWeights { modules: vec![module] }), lease("p", "p"));
    for adapters in [vec![(dora.clone(), 0.5)], vec![(plain.clone(), 1.0), (dora.clone(), 1.0)]] {
        let error = bench.submit(&[1], &adapters, greedy(1)).unwrap_err();
        assert!(error.param.as_deref() == Some("adapter") && error.message.contains("\"d\" is a DoRA"), "{error}");
    }
    assert!(bench.submit(&[1], &[(dora, 1.0)], greedy(1)).is_ok());
    assert!(bench.submit(&[1], &[(plain.clone(), 0.5), (plain, 0.5)], greedy(1)).is_ok());
}

#[test]
fn a_queue_is_bounded() {
    let mut bench = Bench::new(&EngineConfig { max_running: 2, max_waiting: 3, ..config() });
    // Two can run, three wait.
    let mut events: Vec<_> = (0..5).map(|_| bench.submit(&[1], &[], greedy(5)).unwrap()).collect();
    let error = bench.submit(&[1], &[], greedy(5)).unwrap_err();
    assert_eq!((error.kind, error.code), (ErrorKind::Overloaded, Some("queue_full")));
    bench.worker.tick();
    assert!(bench.submit(&[1], &[], greedy(5)).is_err());
    events.truncate(4);
    bench.worker.tick();
    bench.submit(&[1], &[], greedy(5)).unwrap();
    bench.finish();
}

/// The number of ticks from now until each of `events` has a first token.
fn ticks_to_first_token(bench: &mut Bench, events: &mut [UnboundedReceiver<Event>]) -> Vec<usize> {
    let mut found = vec![0; events.len()];
    for tick in 1..5_000 {
        bench.worker.tick();
        for (found, events) in found.iter_mut().zip(events.iter_mut()) {
            if *found == 0 && events.try_recv().is_ok() {
                *found = tick;
            }
        }
        if !found.contains(&0) {
            return found;
        }
    }
    panic!("no first token within 5000 ticks");
}

#[test]
fn a_busy_adapter_does_not_starve_another() {
    let config = EngineConfig { num_blocks: 1000, ..config() };
    let (busy, quiet) = (lease("busy", "busy"), lease("quiet", "quiet"));
    // Short answers take all running places, with hundreds queued: the new adapter gets the next place.
    let mut bench = Bench::new(&config);
    let _busy: Vec<_> = (0..300).map(|i| bench.submit(&[i % 40; 10], &one(&busy), greedy(10)).unwrap()).collect();
    (0..30).for_each(|_| assert_eq!(bench.worker.tick(), Tick::Stepped));
    let mut events = [bench.submit(&[1; 10], &one(&quiet), greedy(1)).unwrap()];
    let ticks = ticks_to_first_token(&mut bench, &mut events);
    assert!(ticks[0] <= 12, "{ticks:?}");

    // There are free places, but long prompts take all rows of many steps: the new adapter gets its share of rows.
    let mut bench = Bench::new(&config);
    let long = |i: u32| (0..190).map(|t| (t * 7 + i) % 40).collect::<Vec<_>>();
    let _busy: Vec<_> = (0..6).map(|i| bench.submit(&long(i), &one(&busy), greedy(5)).unwrap()).collect();
    (0..3).for_each(|_| assert_eq!(bench.worker.tick(), Tick::Stepped));
    let mut events = [bench.submit(&[1; 10], &one(&quiet), greedy(1)).unwrap()];
    let ticks = ticks_to_first_token(&mut bench, &mut events);
    assert!(ticks[0] <= 2, "{ticks:?}");
}

#[test]
fn busy_adapters_share_alike() {
    // Prompts of different lengths with the same total number of tokens: over time the adapters get the same service.
    let config = EngineConfig { num_blocks: 1000, prefix_cache: false, ..config() };
    let mut bench = Bench::new(&config);
    let adapters = [lease("short", "short"), lease("long", "long"), lease("none", "none")];
    let lengths = [10, 160, 40];
    let mut events: Vec<Vec<_>> = (0..3)
        .map(|i| {
            let requests = 6400 / lengths[i];
            let prompt = |n| (0..lengths[i] as u32).map(|t| (t * n + n) % 40).collect::<Vec<_>>();
            (0..requests as u32).map(|n| bench.submit(&prompt(n), &one(&adapters[i]), greedy(1)).unwrap()).collect()
        })
        .collect();
    (0..200).for_each(|_| assert_eq!(bench.worker.tick(), Tick::Stepped));
    let served: Vec<usize> =
        (0..3).map(|i| events[i].iter_mut().filter_map(|e| e.try_recv().ok()).count() * lengths[i]).collect();
    let (least, most) = (served.iter().min().unwrap(), served.iter().max().unwrap());
    assert!(*least > 1000 && most - least <= 2 * 160 + 64, "{served:?}");
}

#[test]
fn an_adapter_being_loaded_delays_no_other_and_gets_its_turn() {
    let config = EngineConfig { max_running: 2, ..config() };
    let mut fake = Fake::new(&config);
    (fake.slots, fake.load_ticks) = (1, 3);
    let mut bench = Bench::with(fake, &config);
    let (busy, other) = (lease("busy", "busy"), lease("other", "other"));
    // The only slot is always in use, because the busy adapter's requests overlap.
    let mut busy_events = Vec::new();
    while busy_events.len() < 400 {
        busy_events.push(bench.submit(&[2; 3], &one(&busy), greedy(4)).unwrap());
    }
    (0..20).for_each(|_| assert_ne!(bench.worker.tick(), Tick::Idle));
    let mut events =
        [bench.submit(&[1; 3], &one(&other), greedy(2)).unwrap(), bench.submit(&[1; 3], &[], greedy(2)).unwrap()];
    let ticks = ticks_to_first_token(&mut bench, &mut events);
    let done = busy_events.iter_mut().filter_map(|e| e.try_recv().ok()).count();
    assert!(ticks[1] < 10, "the base does not wait: {ticks:?}");
    assert!(done <= 64 + 20, "bypassed {done} times");
    assert!(ticks[0] > ticks[1], "{ticks:?}");
    bench.finish();
}

#[test]
fn adapters_that_never_fit_together_are_refused() {
    let mut fake = Fake::new(&config());
    fake.slots = 1;
    let mut bench = Bench::with(fake, &config());
    let both = vec![(lease("a", "a"), 1.0), (lease("b", "b"), 1.0)];
    let mut oversized = bench.submit(&[1], &both, greedy(2)).unwrap();
    let mut fine = bench.submit(&[1], &one(&lease("c", "c")), greedy(2)).unwrap();
    bench.finish();
    let (mut first, mut second) = (Answer::default(), Answer::default());
    first.take(&mut oversized);
    second.take(&mut fine);
    assert!(first.failed.unwrap().contains("a, b"));
    assert_eq!(second.tokens.len(), 2);

    // Two requests that take the only slot from each other before either has been refused often enough.
    let mut fake = Fake::new(&config());
    (fake.slots, fake.load_ticks) = (1, 1);
    let mut bench = Bench::with(fake, &config());
    let [a, b, c] = ["a", "b", "c"].map(|name| (lease(name, name), 1.0));
    let pairs = [vec![a, b.clone()], vec![b, c]];
    let events = pairs.map(|pair| bench.submit(&[1], &pair, greedy(2)).unwrap());
    bench.finish();
    for mut events in events {
        let mut answer = Answer::default();
        answer.take(&mut events);
        assert!(answer.failed.unwrap().contains("no room"));
    }
}

#[test]
fn many_more_adapters_than_slots_all_get_through() {
    let mut fake = Fake::new(&config());
    (fake.slots, fake.load_ticks) = (4, 3);
    let mut bench = Bench::with(fake, &config());
    let leases: Vec<_> = (0..300).map(|i| lease(&format!("a{i}"), &format!("a{i}"))).collect();
    let mut events: Vec<_> = leases.iter().map(|l| bench.submit(&[1, 2], &one(l), greedy(4)).unwrap()).collect();
    let mut ticks = 0;
    while bench.worker.tick() != Tick::Idle {
        ticks += 1;
        // Four at a time, loading and running: a dozen ticks each would be 900.
        assert!(ticks < 1500, "adapters evict each other before they are used");
    }
    bench.assert_empty();
    for (lease, events) in leases.iter().zip(&mut events) {
        let mut answer = Answer::default();
        answer.take(events);
        assert_eq!(answer.ids(), reference(&[1, 2], &one(lease), &greedy(4), 200).ids());
    }
}
