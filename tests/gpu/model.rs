//! SmolLM2 with three adapters on a GPU against the CPU, in mixed batches and captured steps.

use std::collections::BTreeMap;
use std::path::Path;

use quiver::engine::request::{Logprobs, SamplingParams};
use serde::Deserialize;

use crate::common::device;
use crate::smollm2::{Collected, SmolLm2};

/// The chat prompts of the accuracy test.
#[derive(Deserialize)]
struct Prompt {
    prompt_ids: Vec<u32>,
}

fn prompts() -> Vec<(String, Vec<u32>)> {
    let all: BTreeMap<String, BTreeMap<String, Prompt>> =
        serde_json::from_str(include_str!("../fixtures/smollm2-peft/expected.json"))
            .expect("the fixture is valid JSON");
    all.into_iter().flat_map(|(adapter, of)| of.into_values().map(move |p| (adapter.clone(), p.prompt_ids))).collect()
}

fn with_adapters(server: SmolLm2) -> SmolLm2 {
    for name in ["qa", "writing", "code"] {
        server.load(name, &Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters").join(name));
    }
    server
}

/// All prompts at once, each under its adapter.
fn run(server: &SmolLm2, params: &SamplingParams) -> Vec<Collected> {
    let submit = |(adapter, ids): &(String, Vec<u32>)| {
        let adapters: &[(&str, f32)] = if adapter == "base" { &[] } else { &[(adapter, 1.0)] };
        server.submit(ids, params.clone(), adapters)
    };
    let replies: Vec<_> = prompts().iter().map(submit).collect();
    replies.into_iter().map(|r| r.collect()).collect()
}

#[test]
fn log_probabilities_match_the_cpus() {
    let params = SamplingParams {
        temperature: 0.0,
        max_tokens: 24,
        ignore_eos: true,
        prompt_logprobs: Some(0),
        logprobs: Some(0),
        ..Default::default()
    };
    let cpu = run(&with_adapters(SmolLm2::start(&candle_core::Device::Cpu, 1 << 30)), &params);
    let gpu = run(&with_adapters(SmolLm2::start(&device(), 1 << 30)), &params);
    let (mut sum, mut count, mut worst, mut equal) = (0f64, 0, 0f32, 0);
    for (cpu, gpu) in cpu.iter().zip(&gpu) {
        // The output counts as far as both chose the same tokens.
        let same = cpu.tokens.iter().zip(&gpu.tokens).take_while(|(a, b)| a == b).count();
        equal += usize::from(same == cpu.tokens.len());
        let of =
            |r: &Collected| -> Vec<Option<Logprobs>> { r.prompt.iter().chain(&r.logprobs[..same]).cloned().collect() };
        for (a, b) in of(cpu).iter().zip(&of(gpu)) {
            if let (Some(a), Some(b)) = (a, b) {
                let error = (a.logprob - b.logprob).abs();
                (sum, count, worst) = (sum + f64::from(error), count + 1, worst.max(error));
            }
        }
    }
    let mean = sum / f64::from(count);
    println!(
        "mean |difference| to the CPU {mean:.5} nats over {count} tokens, largest {worst}; {equal} of {} replies equal",
        cpu.len()
    );
    assert!(mean < 0.03, "mean {mean}");
    assert!(worst < 0.5, "largest {worst}");
}

#[test]
fn a_mixed_batch_of_decode_rows_is_one_by_one_bit_for_bit() {
    let params =
        SamplingParams { temperature: 0.0, max_tokens: 40, ignore_eos: true, logprobs: Some(3), ..Default::default() };
    let server = with_adapters(SmolLm2::start(&device(), 1 << 30));
    let together = run(&server, &params);
    for ((adapter, ids), together) in prompts().iter().zip(&together) {
        let adapters: &[(&str, f32)] = if adapter == "base" { &[] } else { &[(adapter, 1.0)] };
        let alone = server.submit(ids, params.clone(), adapters).collect();
        // The first token comes from the prompt's step, whose products depend on the step's size; so may all that follow.
        if alone.logprobs[0] == together.logprobs[0] {
            assert_eq!(&alone, together, "{adapter}");
        } else {
            assert_eq!(alone.tokens[0], together.tokens[0], "{adapter}");
        }
    }
    let again = run(&server, &params);
    assert_eq!(
        again.iter().map(|r| &r.tokens).collect::<Vec<_>>(),
        together.iter().map(|r| &r.tokens).collect::<Vec<_>>()
    );
}
