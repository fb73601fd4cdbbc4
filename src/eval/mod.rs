//! Scores the base or an adapter on held-out examples through the serving engine, so that they are scores of what users get.
//!
//! The loss is the mean over the examples' trained tokens, from the engine's prompt log-probabilities. For text scores, each
//! trained span is a reference answer to the text before it: the engine generates an answer, which is compared with it.

mod metrics;

use futures::{StreamExt, TryStreamExt, stream};
use serde::Serialize;
use tokio::sync::mpsc::unbounded_channel;

pub use metrics::TextScores;

use crate::adapter::Lease;
use crate::engine::Engine;
use crate::engine::request::{Event, Logprobs, Request, SamplingParams};
use crate::text::codec::TextCodec;
use crate::train::data::Example;
use crate::{Error, Result};

/// Concurrent requests: enough to fill the engine's steps, and few compared with the load that the engine can serve.
const CONCURRENCY: usize = 32;

/// The scores of the base or an adapter on a set of examples.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EvalScores {
    pub examples: usize,
    /// Trained tokens of the examples, over which the loss is a mean.
    pub trained_tokens: usize,
    /// Mean negative log-likelihood of a trained token, nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Fraction of trained tokens that were the likeliest.
    pub token_accuracy: f64,
    /// Scores of generated answers, if answers were requested.
    #[serde(flatten)]
    pub text: Option<TextScores>,
}

/// Scores the base with the weighted sum of `adapters` on `examples`; without adapters, the base alone. `sampling` says how
/// answers are generated; with `max_tokens` 0, none are.
///
/// # Errors
/// The engine's: a prompt that does not fit, an adapter that cannot be loaded, a shutdown. `Invalid` if no example has a
/// trained token.
pub async fn evaluate(
    engine: &Engine,
    codec: &TextCodec,
    adapters: &[(Lease, f32)],
    examples: &[Example],
    sampling: &SamplingParams,
) -> Result<EvalScores> {
    let scoring = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..SamplingParams::default() };
    let logprobs: Vec<_> = stream::iter(examples)
        .map(|example| complete(engine, adapters, &example.tokens, &scoring))
        .buffered(CONCURRENCY)
        .map_ok(|completion| completion.prompt_logprobs)
        .try_collect()
        .await?;
    let (mut trained_tokens, mut nll, mut likeliest) = (0, 0.0, 0);
    for (example, logprobs) in examples.iter().zip(&logprobs) {
        for (token, _) in logprobs.iter().zip(&example.trained).filter(|(_, trained)| **trained) {
            let Some(token) = token else { continue };
            trained_tokens += 1;
            nll -= f64::from(token.logprob);
            likeliest += usize::from(token.rank == 1);
        }
    }
    if trained_tokens == 0 {
        return Err(Error::invalid("nothing to evaluate: no example has a trained token"));
    }
    let loss = nll / trained_tokens as f64;
    Ok(EvalScores {
        examples: examples.len(),
        trained_tokens,
        loss,
        perplexity: loss.exp(),
        token_accuracy: likeliest as f64 / trained_tokens as f64,
        text: answers(engine, codec, adapters, examples, sampling).await?,
    })
}

/// Generates an answer to every prompt in the examples and scores it.
async fn answers(
    engine: &Engine,
    codec: &TextCodec,
    adapters: &[(Lease, f32)],
    examples: &[Example],
    sampling: &SamplingParams,
) -> Result<Option<TextScores>> {
    if sampling.max_tokens == 0 {
        return Ok(None);
    }
    let text = |ids: &[u32]| codec.decode(ids, true).map(|text| text.trim().to_owned());
    let spans = examples.iter().flat_map(|example| spans(example).map(move |span| (example, span)));
    let pairs: Vec<(String, String)> = stream::iter(spans)
        .map(async |(example, (from, to))| {
            let completion = complete(engine, adapters, &example.tokens[..from], sampling).await?;
            Ok::<_, Error>((text(&completion.tokens)?, text(&example.tokens[from..to])?))
        })
        .buffered(CONCURRENCY)
        .try_collect()
        .await?;
    Ok(TextScores::of(&pairs))
}

/// The trained spans that answer a prompt. A span that begins at the first token or right after it is a
/// plain text without a prompt.
fn spans(example: &Example) -> impl Iterator<Item = (usize, usize)> {
    let runs = example.trained.chunk_by(|a, b| a == b).scan(0, |end, run| {
        let start = std::mem::replace(end, *end + run.len());
        Some((start, *end, run[0]))
    });
    runs.filter(|&(start, _, trained)| trained && start > 1).map(|(start, end, _)| (start, end))
}

/// The engine's answer to a request.
#[derive(Default)]
struct Completion {
    /// Log-probabilities of the prompt's tokens, if they were requested.
    prompt_logprobs: Vec<Option<Logprobs>>,
    /// Generated tokens.
    tokens: Vec<u32>,
}

async fn complete(
    engine: &Engine,
    adapters: &[(Lease, f32)],
    prompt: &[u32],
    params: &SamplingParams,
) -> Result<Completion> {
    let (events, mut receiver) = unbounded_channel();
    engine.submit(Request {
        adapters: adapters.to_vec(),
        ..Request::new("eval", prompt.to_vec(), params.clone(), events)
    })?;
    let mut completion = Completion::default();
    while let Some(event) = receiver.recv().await {
        match event {
            Event::Scheduled { .. } | Event::Pooled(_) => {}
            Event::Prompt(logprobs) => completion.prompt_logprobs = logprobs,
            Event::Token { id, .. } => completion.tokens.push(id),
            Event::Finished { .. } => return Ok(completion),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(Error::internal("the engine stopped during the evaluation"))
}
