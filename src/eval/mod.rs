//! How well the base or an adapter does on held-out examples, through the engine that serves: what users get is measured.
//!
//! The loss is of the examples' trained tokens, from the engine's log-probabilities of prompts. For scores of texts, every
//! trained span is an answer to what stands before it: the engine generates one and it is compared.

mod metrics;

use std::time::Instant;

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

/// Requests at once: enough to fill the engine's steps, and few beside what it serves.
const AT_ONCE: usize = 32;

/// What a model scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scores {
    pub examples: usize,
    /// Tokens that the loss is of.
    pub trained_tokens: usize,
    /// Mean negative log-likelihood of a trained token, nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// Share of trained tokens that were the likeliest.
    pub token_accuracy: f64,
    /// Of generated answers, where asked for.
    #[serde(flatten)]
    pub text: Option<TextScores>,
}

/// Scores the base with `adapters` (weighted sum; empty: the base alone) on `examples`. `sampling` says how answers are
/// generated; with `max_tokens` 0 there are none.
///
/// # Errors
/// What the engine answers: a prompt that does not fit, an adapter that cannot be loaded, a shutdown. `Invalid` without
/// examples.
pub async fn evaluate(
    engine: &Engine,
    codec: &TextCodec,
    adapters: &[(Lease, f32)],
    examples: &[Example],
    sampling: &SamplingParams,
) -> Result<Scores> {
    let scoring = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..SamplingParams::default() };
    let logprobs: Vec<_> = stream::iter(examples)
        .map(|example| ask(engine, adapters, &example.tokens, &scoring))
        .buffered(AT_ONCE)
        .map_ok(|reply| reply.prompt)
        .try_collect()
        .await?;
    let (mut trained_tokens, mut nll, mut likeliest) = (0, 0.0, 0);
    for (example, logprobs) in examples.iter().zip(&logprobs) {
        for token in
            logprobs.iter().zip(&example.trained).filter_map(|(token, &trained)| token.as_ref().filter(|_| trained))
        {
            trained_tokens += 1;
            nll -= f64::from(token.logprob);
            likeliest += usize::from(token.rank == 1);
        }
    }
    if trained_tokens == 0 {
        return Err(Error::invalid("there is nothing to evaluate: no example has a trained token"));
    }
    let loss = nll / trained_tokens as f64;
    Ok(Scores {
        examples: examples.len(),
        trained_tokens,
        loss,
        perplexity: loss.exp(),
        token_accuracy: likeliest as f64 / trained_tokens as f64,
        text: answers(engine, codec, adapters, examples, sampling).await?,
    })
}

/// Generates an answer to every prompt in the examples and compares it.
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
            let reply = ask(engine, adapters, &example.tokens[..from], sampling).await?;
            Ok::<_, Error>((text(&reply.tokens)?, text(&example.tokens[from..to])?))
        })
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    Ok(TextScores::of(&pairs))
}

/// Where answers stand. What begins behind the first token answers nothing: it is a text alone.
fn spans(example: &Example) -> impl Iterator<Item = (usize, usize)> {
    let runs = example.trained.chunk_by(|a, b| a == b).scan(0, |end, run| {
        let start = std::mem::replace(end, *end + run.len());
        Some((start, *end, run[0]))
    });
    runs.filter(|&(start, _, trained)| trained && start > 1).map(|(start, end, _)| (start, end))
}

/// What came back.
#[derive(Default)]
struct Reply {
    /// Of prompt tokens, where asked for.
    prompt: Vec<Option<Logprobs>>,
    /// Generated.
    tokens: Vec<u32>,
}

async fn ask(engine: &Engine, adapters: &[(Lease, f32)], prompt: &[u32], params: &SamplingParams) -> Result<Reply> {
    let (events, mut receiver) = unbounded_channel();
    engine.submit(Request {
        id: "eval".into(),
        prompt: prompt.to_vec(),
        params: params.clone(),
        adapters: adapters.to_vec(),
        arrived: Instant::now(),
        events,
    })?;
    let mut reply = Reply::default();
    while let Some(event) = receiver.recv().await {
        match event {
            Event::Scheduled => {}
            Event::Prompt(logprobs) => reply.prompt = logprobs,
            Event::Token { id, .. } => reply.tokens.push(id),
            Event::Finished { .. } => return Ok(reply),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(Error::internal("the engine ended while it evaluated"))
}
