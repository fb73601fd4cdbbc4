//! `quiver eval` on held-out examples of the adapters' own tasks.

#[path = "common/smollm2.rs"]
mod smollm2;

use quiver::engine::request::SamplingParams;
use quiver::eval::{EvalScores, evaluate};
use quiver::text::codec::TextCodec;
use quiver::train::data::Example;
use quiver::train::data::{AlpacaEnding, DataOptions, parse};
use smollm2::{SmolLm2, files};

const TASKS: [&str; 3] = ["code", "qa", "writing"];

/// The default model with the project's adapters, and its text.
fn start() -> (SmolLm2, TextCodec) {
    let model = SmolLm2::start(&candle_core::Device::Cpu, 256 << 20);
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters");
    TASKS.iter().for_each(|task| model.load(task, &root.join(task)));
    (model, TextCodec::load(&files()).expect("the model has a tokenizer"))
}

fn held_out(task: &str, codec: &TextCodec) -> Vec<Example> {
    let path = format!("{}/tests/fixtures/tasks/{task}.jsonl", env!("CARGO_MANIFEST_DIR"));
    let options = DataOptions { max_length: 256, train_on_inputs: false, alpaca_ending: AlpacaEnding::Colon };
    parse(&std::fs::read(path).expect("the fixture is there"), codec, &options).expect("it is well-formed").examples
}

fn score(
    model: &SmolLm2,
    codec: &TextCodec,
    adapter: Option<&str>,
    examples: &[Example],
    max_tokens: usize,
) -> EvalScores {
    let adapters: Vec<_> = adapter.iter().map(|name| (model.registry.lease(name).expect("loaded"), 1.0)).collect();
    let sampling = SamplingParams { temperature: 0.0, max_tokens, ..SamplingParams::default() };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(evaluate(&model.engine, codec, &adapters, examples, &sampling)).expect("an evaluation")
}

/// Each adapter is the best at its own task: better than the base and than the other two.
#[test]
fn every_task_is_done_best_by_its_own_adapter() {
    let (model, codec) = start();
    for task in TASKS {
        let examples = held_out(task, &codec);
        let loss = |adapter| score(&model, &codec, adapter, &examples, 0).loss;
        let own = loss(Some(task));
        let others = TASKS.into_iter().filter(|&other| other != task).map(Some);
        for (other, loss) in others.chain([None]).map(|other| (other, loss(other))) {
            println!("{task}: own {own:.3}, {} {loss:.3}", other.unwrap_or("base"));
            assert!(own < loss - 0.02, "{task}: {own} of its own adapter, {loss} of {other:?}");
        }
    }
}

/// The loss is the mean of what the engine says of each trained token, asked one by one; generated answers are compared.
#[test]
fn scores_are_those_of_requests_one_by_one() {
    let (model, codec) = start();
    let examples = &held_out("qa", &codec)[..4];
    let scores = score(&model, &codec, Some("qa"), examples, 12);
    let (mut nll, mut likeliest, mut trained) = (0.0, 0, 0);
    for example in examples {
        for at in (0..example.tokens.len()).filter(|&at| example.trained[at]) {
            let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(1), ..SamplingParams::default() };
            let reply = model.submit(&example.tokens[..=at], params, &[("qa", 1.0)]).collect();
            let last = reply.prompt.last().cloned().flatten().expect("asked for");
            nll -= f64::from(last.logprob);
            likeliest += usize::from(last.top[0].0 == example.tokens[at]);
            trained += 1;
        }
    }
    assert_eq!((scores.examples, scores.trained_tokens), (4, trained));
    assert!((scores.loss - nll / trained as f64).abs() < 1e-9);
    assert!((scores.perplexity.ln() - scores.loss).abs() < 1e-9);
    assert_eq!(scores.token_accuracy, likeliest as f64 / trained as f64);
    let text = scores.text.expect("answers were generated");
    assert_eq!(text.answers, 4);
    assert!(text.rouge1 > 0.0, "some word is right: {text:?}");

    // The reference itself is answered where the model is made to say it.
    let mut own = examples[0].clone();
    let start = own.trained.iter().position(|&trained| trained).expect("an answer");
    let params = SamplingParams { temperature: 0.0, max_tokens: 12, ..SamplingParams::default() };
    let said = model.submit(&own.tokens[..start], params, &[("qa", 1.0)]).collect().tokens;
    own.tokens.splice(start.., said);
    own.trained = (0..own.tokens.len()).map(|at| at >= start).collect();
    let scores = score(&model, &codec, Some("qa"), &[own], 12).text.expect("an answer was generated");
    assert_eq!((scores.exact_match, scores.f1), (1.0, 1.0));
}
