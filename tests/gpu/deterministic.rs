//! `--deterministic` on a GPU.

use std::path::Path;

use quiver::engine::request::SamplingParams;
use quiver::gpu::{self, DeviceChoice, OpenOptions};

use crate::smollm2::SmolLm2;

/// Tokens have the same bits when decoded among other sequences, decoded alone, and run as a prompt.
#[test]
fn no_company_and_no_cut_of_the_prompt_changes_a_bit() {
    let options = OpenOptions { deterministic: true };
    let device = gpu::open(DeviceChoice::Cuda(0), options).expect("this test needs a GPU");
    let server = SmolLm2::start(&device, 1 << 30);
    for name in ["qa", "writing", "code"] {
        server.load(name, &Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters").join(name));
    }
    let adapters: [&[(&str, f32)]; 4] = [&[], &[("qa", 1.0)], &[("writing", 1.0)], &[("code", 0.5), ("qa", 0.5)]];
    // From one row to more than a fused product takes at once.
    let prompts: Vec<Vec<u32>> =
        [1usize, 2, 17, 64, 65, 130, 300].map(|n| (0..n as u32).map(|i| (i * 7919 + 13) % 49_000).collect()).to_vec();
    let params =
        SamplingParams { temperature: 0.0, max_tokens: 24, ignore_eos: true, logprobs: Some(2), ..Default::default() };
    let submit = |i: usize| server.submit(&prompts[i], params.clone(), adapters[i % adapters.len()]);
    let together: Vec<_> =
        (0..prompts.len()).map(submit).collect::<Vec<_>>().into_iter().map(|r| r.collect()).collect();
    for (i, together) in together.iter().enumerate() {
        assert_eq!(&submit(i).collect(), together, "prompt {i}, alone and in company");

        let whole: Vec<u32> = prompts[i].iter().chain(&together.tokens).copied().collect();
        let scoring = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..Default::default() };
        let scored = server.submit(&whole, scoring, adapters[i % adapters.len()]).collect();
        for (position, decoded) in together.logprobs.iter().enumerate() {
            let prompt =
                scored.prompt[prompts[i].len() + position].as_ref().expect("a score for every token but the first");
            let decoded = decoded.as_ref().expect("log-probabilities were asked for");
            assert_eq!(prompt.logprob.to_bits(), decoded.logprob.to_bits(), "prompt {i}, output {position}");
        }
    }
}
