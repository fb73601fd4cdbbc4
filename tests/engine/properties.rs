//! Random workloads: every request ends as a plain loop would answer it, and no block, slot or place is leaked.

use proptest::prelude::*;
use quiver::adapter::Lease;
use quiver::engine::EngineConfig;
use quiver::engine::request::{Pooling, SamplingParams};
use quiver::engine::worker::Tick;
use quiver::error::ErrorKind;

use crate::fake::{Answer, Bench, EOS, Fake, lease, reference};

/// A request of the workload.
#[derive(Debug, Clone)]
struct Job {
    /// Tick in which it arrives.
    at: usize,
    /// Prompts of the same family have a common prefix.
    family: u32,
    prompt_len: usize,
    adapters: Vec<(usize, f32)>,
    params: SamplingParams,
    /// Ticks after its arrival at which the client goes.
    cancel: Option<usize>,
}

#[derive(Debug, Clone)]
struct World {
    config: EngineConfig,
    slots: usize,
    load_ticks: usize,
    jobs: Vec<Job>,
}

fn params() -> impl Strategy<Value = SamplingParams> {
    let shape = (prop_oneof![Just(0.0_f32), 0.3_f32..1.5], 0.5_f32..=1.0, 0_usize..10, any::<u64>());
    let penalties = (prop_oneof![Just(1.0_f32), Just(1.3)], prop_oneof![Just(0.0_f32), Just(0.5)]);
    let lengths = (0_usize..24, 0_usize..6, any::<bool>());
    let logprobs = (proptest::option::of(0_usize..4), proptest::option::weighted(0.2, 0_usize..4));
    let pooling = proptest::option::weighted(0.3, prop_oneof![Just(Pooling::Mean), Just(Pooling::Last)]);
    (shape, penalties, lengths, logprobs, pooling).prop_map(|(shape, penalties, lengths, logprobs, pooling)| {
        SamplingParams {
            temperature: shape.0,
            top_p: shape.1,
            top_k: shape.2,
            seed: Some(shape.3),
            repetition_penalty: penalties.0,
            presence_penalty: penalties.1,
            max_tokens: lengths.0,
            min_tokens: lengths.1,
            ignore_eos: lengths.2,
            stop_token_ids: vec![3, 5],
            logprobs: logprobs.0,
            prompt_logprobs: logprobs.1,
            pooling,
            ..SamplingParams::default()
        }
    })
}

fn job() -> impl Strategy<Value = Job> {
    // Adapters 0 to 3 can be loaded, adapter 4 cannot.
    let adapter = prop_oneof![9 => 0_usize..4, 1 => Just(4)];
    let weight = prop_oneof![Just(1.0_f32), Just(0.5)];
    let adapters = prop_oneof![
        2 => Just(Vec::new()),
        5 => proptest::collection::vec((adapter.clone(), weight.clone()), 1),
        1 => proptest::collection::vec((adapter, weight), 2),
    ];
    let cancel = proptest::option::weighted(0.15, 0_usize..40);
    (0_usize..60, 0_u32..3, 1_usize..50, adapters, params(), cancel).prop_map(
        |(at, family, prompt_len, adapters, params, cancel)| Job { at, family, prompt_len, adapters, params, cancel },
    )
}

fn world() -> impl Strategy<Value = World> {
    let limits = (1_usize..=5, 3_usize..40, 1_usize..8, 0_usize..24, any::<bool>());
    (limits, 1_usize..4, 0_usize..5, proptest::collection::vec(job(), 1..30)).prop_map(
        |((block_size, num_blocks, max_running, more_rows, prefix_cache), slots, load_ticks, jobs)| World {
            config: EngineConfig {
                block_size,
                num_blocks,
                max_batch_tokens: max_running + more_rows,
                max_running,
                max_waiting: 1000,
                max_model_len: 60,
                eos_token_ids: vec![EOS],
                prefix_cache,
            },
            slots,
            load_ticks,
            jobs,
        },
    )
}

fn prompt(job: &Job) -> Vec<u32> {
    let own = job.prompt_len as u32;
    (0..own).map(|i| if i < 20 { (i * 7 + job.family) % 40 } else { (i * own + job.family) % 40 }).collect()
}

fn run(world: &World) {
    let config = &world.config;
    let mut fake = Fake::new(config);
    (fake.slots, fake.load_ticks, fake.broken) = (world.slots, world.load_ticks, vec!["id4".into()]);
    let mut bench = Bench::with(fake, config);
    let leases: Vec<Lease> = (0..5).map(|i| lease(&format!("adapter{i}"), &format!("id{i}"))).collect();
    let adapters =
        |job: &Job| -> Vec<(Lease, f32)> { job.adapters.iter().map(|(i, w)| (leases[*i].clone(), *w)).collect() };

    let mut live: Vec<_> = world.jobs.iter().map(|job| (job, None, Answer::default())).collect();
    let last = world.jobs.iter().map(|job| job.at).max().unwrap_or(0);
    let mut ticks = 0;
    loop {
        for (job, events, answer) in &mut live {
            if job.at == ticks {
                let fits = {
                    let longest = (job.prompt_len + job.params.max_tokens).min(config.max_model_len) - 1;
                    longest.max(job.prompt_len).div_ceil(config.block_size) <= config.num_blocks
                };
                match bench.submit(&prompt(job), &adapters(job), job.params.clone()) {
                    Ok(receiver) => {
                        assert!(fits);
                        *events = Some(receiver);
                    }
                    Err(error) => {
                        assert!(!fits && error.kind == ErrorKind::Invalid, "{error}");
                        answer.failed = Some(error.message);
                    }
                }
            }
            if job.cancel.is_some_and(|after| job.at + after == ticks) {
                *events = None;
            }
        }
        let tick = bench.worker.tick();
        for (_, events, answer) in &mut live {
            if let Some(events) = events {
                answer.take(events);
            }
        }
        ticks += 1;
        if tick == Tick::Idle && ticks > last {
            break;
        }
        assert!(ticks < 20_000, "a request starves");
    }
    bench.assert_empty();

    for (job, events, answer) in &live {
        let Some(_) = events else { continue };
        let needs_broken = job.adapters.iter().any(|(i, _)| *i == 4);
        let mut distinct: Vec<_> = job.adapters.iter().map(|(i, _)| *i).collect();
        distinct.sort();
        distinct.dedup();
        if !needs_broken && distinct.len() <= world.slots {
            let mut want = reference(&prompt(job), &adapters(job), &job.params, config.max_model_len);
            want.cached_tokens = answer.cached_tokens;
            assert_eq!(*answer, want);
            if job.params.prompt_logprobs.is_some() || job.params.pooling == Some(Pooling::Mean) {
                assert_eq!(answer.cached_tokens, 0);
            }
        } else {
            let failed = answer.failed.as_deref().expect("it cannot be served");
            assert!(failed.contains("is gone") || failed.contains("no room"), "{failed}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_ends_as_if_it_were_alone(world in world()) {
        run(&world);
    }
}
