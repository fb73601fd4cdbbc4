//! SmolLM2 (Q4_1) against transformers and PEFT in float32 on the dequantised weights: the base and three adapters, in mixed batches of
//! one engine. The expected answers are in `fixtures/smollm2-peft/expected.json`.

#[path = "common/smollm2.rs"]
mod smollm2;

use std::collections::BTreeMap;
use std::path::Path;

use quiver::engine::request::SamplingParams;
use serde::Deserialize;
use smollm2::SmolLm2;

/// The answers of transformers and PEFT for one prompt, in float32.
#[derive(Deserialize)]
struct Expected {
    /// Token ids of the chat prompt.
    prompt_ids: Vec<u32>,
    /// Log-probability of each prompt token, except the first.
    token_logprobs: Vec<f32>,
    /// The greedy reply.
    greedy_ids: Vec<u32>,
}

/// Adapter name (or `base`) -> prompt name -> answers.
fn expected() -> BTreeMap<String, BTreeMap<String, Expected>> {
    serde_json::from_str(include_str!("fixtures/smollm2-peft/expected.json")).expect("the fixture is valid JSON")
}

#[test]
fn log_probabilities_and_greedy_text_match_float32() {
    let server = SmolLm2::start(&candle_core::Device::Cpu, 1 << 30);
    for name in ["qa", "writing", "code"] {
        server.load(name, &Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters").join(name));
    }
    let mut runs = Vec::new();
    for (adapter, prompts) in expected() {
        for (prompt, want) in prompts {
            let params = SamplingParams {
                temperature: 0.0,
                max_tokens: want.greedy_ids.len(),
                ignore_eos: true,
                prompt_logprobs: Some(0),
                ..Default::default()
            };
            let adapters: &[(&str, f32)] = if adapter == "base" { &[] } else { &[(&adapter, 1.0)] };
            // All requests are submitted before any reply is read, so that the engine mixes them.
            let reply = server.submit(&want.prompt_ids, params, adapters);
            runs.push((format!("{adapter}/{prompt}"), want, reply));
        }
    }
    assert_eq!(runs.len(), 12);
    let (mut sum, mut count, mut worst) = (0f64, 0usize, (0f32, String::new()));
    for (name, want, reply) in runs {
        let got = reply.collect();
        let logprobs: Vec<f32> = got.prompt.iter().skip(1).map(|l| l.as_ref().expect("asked for").logprob).collect();
        assert_eq!(logprobs.len(), want.token_logprobs.len(), "{name}");
        for (i, (a, b)) in logprobs.iter().zip(&want.token_logprobs).enumerate() {
            let error = (a - b).abs();
            sum += f64::from(error);
            count += 1;
            if error > worst.0 {
                worst = (error, format!("{name} token {}: {a} for {b}", i + 1));
            }
        }
        assert_eq!(got.tokens, want.greedy_ids, "{name}: greedy text");
    }
    let mean = sum / count as f64;
    println!("mean |difference| {mean:.5} nats over {count} tokens, largest {} ({})", worst.0, worst.1);
    assert!(mean < 0.02, "mean {mean}");
    assert!(worst.0 < 0.2, "largest {worst:?}");
}

#[test]
fn agrees_with_the_quantised_llama_of_candle_transformers() {
    use candle_core::quantized::gguf_file::Content;
    use candle_core::{Device, Tensor};
    use candle_transformers::models::quantized_llama::ModelWeights;

    let mut file = std::fs::File::open(smollm2::files().path()).expect("the model file");
    let content = Content::read(&mut file).expect("a GGUF header");
    let mut reference = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("candle loads it");
    let server = SmolLm2::start(&candle_core::Device::Cpu, 1 << 30);
    let params = SamplingParams { temperature: 0.0, max_tokens: 1, logprobs: Some(20), ..Default::default() };
    let (mut sum, mut count) = (0f64, 0);
    // One prompt only, since candle's product is scalar for this format.
    for (name, prompt) in expected()["base"].iter().take(1) {
        let ids = &prompt.prompt_ids;
        let input = Tensor::new(&ids[..], &Device::Cpu).and_then(|t| t.unsqueeze(0)).expect("a tensor");
        let logits: Vec<f32> =
            reference.forward(&input, 0).and_then(|t| t.flatten_all()?.to_vec1()).expect("candle runs it");
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let ours = server.submit(ids, params.clone(), &[]).collect();
        let ours = ours.logprobs[0].as_ref().expect("asked for");
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a vocabulary");
        assert_eq!(ours.top[0].0 as usize, best, "{name}: the most likely token");
        for &(id, logprob) in &ours.top {
            sum += (f64::from(logits[id as usize]) - total.ln() - f64::from(logprob)).abs();
            count += 1;
        }
    }
    // candle rounds activations to 8 bits, which costs about 0.07 nats on this model. A wrong rotation, head or row order would
    // cost whole nats.
    let mean = sum / f64::from(count);
    println!("mean |difference| to candle-transformers: {mean:.4} nats");
    assert!(mean < 0.25, "mean {mean}");
}
