//! Runs a checked request: submits its sequences to the engine and answers with one body or with server-sent events.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;

use super::middleware::request_id;
use super::params::CommonParams;
use super::response::{CompletionOutput, EchoedPrompt, Endpoint, ResponseBuilder, StreamedChoice, UsageInfo};
use super::select_adapter::LeasedAdapters;
use super::stream::{OutputDelta, RunningSequence, output_deltas};
use super::{Serving, SharedApp, error_response};
use crate::Result;
use crate::engine::request::{Request, SamplingParams};
use crate::text::grammar::CompiledGrammar;
use crate::time::unix_seconds;

/// A request whose fields are all checked.
pub(super) struct CheckedRequest {
    /// The endpoint that it came to.
    pub(super) endpoint: Endpoint,
    /// `model` in the response.
    pub(super) model: String,
    /// Its adapters.
    pub(super) adapters: LeasedAdapters,
    /// Parameters of both endpoints.
    pub(super) common: CommonParams,
    /// Sequences generated for each prompt; the response has the best `n`.
    pub(super) best_of: usize,
    /// Log-probabilities are asked for, with this many alternatives.
    pub(super) logprobs: Option<usize>,
    /// Token ids of each prompt.
    pub(super) prompts: Vec<Vec<u32>>,
    /// How to sample, parallel to `prompts`.
    pub(super) params: Vec<SamplingParams>,
    /// What each output must match.
    pub(super) grammar: Option<Arc<CompiledGrammar>>,
    /// Parallel to `prompts`, or empty without `echo`.
    pub(super) echo: Vec<EchoedPrompt>,
    /// When the request arrived, for queue time and latency.
    pub(super) arrived: Instant,
}

/// Runs the request. An error here comes before the first byte of the answer; later ones become events of the stream.
pub(super) async fn run(app: &SharedApp, serving: &Arc<Serving>, request: CheckedRequest) -> Result<Response> {
    let prefix = if request.endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" };
    let id = format!("{prefix}-{}", uuid::Uuid::new_v4().simple());
    let mut usage = UsageInfo { prompt: request.prompts.iter().map(Vec::len).sum(), ..UsageInfo::default() };
    let sequences = submit(app, serving, &request, &id)?;
    let count = sequences.len();
    let deltas = output_deltas(&serving.codec, &request.common.text, request.common.sampling.min_tokens, sequences);
    let builder = ResponseBuilder {
        endpoint: request.endpoint,
        id,
        model: request.model,
        adapter: request.adapters.adapter,
        generation: request.adapters.generation,
        created: unix_seconds(SystemTime::now()),
        logprobs: request.logprobs,
        echo: request.echo,
        n: request.common.n,
        codec: serving.codec.clone(),
    };
    if request.common.stream {
        return Ok(event_stream(builder, deltas, count, usage, request.common.include_usage));
    }
    let outputs = collect(deltas, count).await?;
    for (index, output) in outputs.iter().enumerate() {
        output.finish.iter().for_each(|finish| usage.add(finish, index, request.best_of));
    }
    let mut object = builder.object(choices(&builder, outputs, request.best_of)?, false);
    object["usage"] = usage.object();
    Ok(Json(object).into_response())
}

/// The whole output of each sequence.
async fn collect(
    mut deltas: impl stream::Stream<Item = (usize, Result<OutputDelta>)> + Unpin,
    sequences: usize,
) -> Result<Vec<CompletionOutput>> {
    let mut outputs = Vec::new();
    outputs.resize_with(sequences, CompletionOutput::default);
    while let Some((index, delta)) = deltas.next().await {
        outputs[index].push(delta?);
    }
    Ok(outputs)
}

/// The choices of a whole response: of each prompt's `best_of` outputs, the best `n`.
fn choices(builder: &ResponseBuilder, outputs: Vec<CompletionOutput>, best_of: usize) -> Result<Vec<Value>> {
    let mut choices = Vec::new();
    let mut outputs = outputs.into_iter().peekable();
    while outputs.peek().is_some() {
        let mut candidates: Vec<CompletionOutput> = outputs.by_ref().take(best_of).collect();
        if best_of > builder.n {
            candidates.sort_by(|a, b| b.score().total_cmp(&a.score()));
            candidates.truncate(builder.n);
        }
        for output in candidates {
            choices.push(builder.choice(choices.len(), output)?);
        }
    }
    Ok(choices)
}

/// Submits all sequences to the engine, or none: on an error, dropping the receivers cancels those submitted before.
fn submit(app: &SharedApp, serving: &Serving, request: &CheckedRequest, id: &str) -> Result<Vec<RunningSequence>> {
    let mut sequences = Vec::with_capacity(request.prompts.len() * request.best_of);
    for (prompt, params) in request.prompts.iter().zip(&request.params) {
        for choice in 0..request.best_of {
            let (events, receiver) = mpsc::unbounded_channel();
            let mut params = params.clone();
            // Each choice has its own seed. The same request gives the same choices again.
            params.seed = params.seed.map(|seed| seed.wrapping_add(choice as u64));
            serving.engine.submit(Request {
                adapters: request.adapters.terms.clone(),
                constraint: request.grammar.as_ref().map(CompiledGrammar::constraint),
                arrived: request.arrived,
                ..Request::new(id, prompt.clone(), params, events)
            })?;
            let (model, adapter) = (serving.base.name(), &request.adapters.label);
            let metrics = app.metrics.track(model, adapter, prompt.len(), request.arrived);
            sequences.push(RunningSequence { events: receiver, metrics });
        }
    }
    Ok(sequences)
}

/// Answers with server-sent events.
fn event_stream(
    builder: ResponseBuilder,
    deltas: impl stream::Stream<Item = (usize, Result<OutputDelta>)> + Send + 'static,
    choices: usize,
    usage: UsageInfo,
    include_usage: bool,
) -> Response {
    let opening = builder.opening(choices);
    let request_id = request_id();
    let mut writer =
        EventWriter { builder, usage, include_usage, request_id, sent: vec![StreamedChoice::default(); choices] };
    let opening = writer.data(opening);
    let events = stream::iter([opening])
        .chain(deltas.map(Some).chain(stream::once(async { None })).map(move |item| writer.events(item)))
        // An error ends the stream, also for the other choices.
        .scan(false, |ended, (events, last)| {
            let done = std::mem::replace(ended, last);
            async move { (!done).then(|| stream::iter(events.into_iter().map(Ok::<_, Infallible>))) }
        })
        .flatten();
    // Proxies that buffer, such as nginx, would hold tokens back.
    let headers = [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
    (headers, Sse::new(events).keep_alive(KeepAlive::default())).into_response()
}

/// Turns output deltas into server-sent events.
struct EventWriter {
    builder: ResponseBuilder,
    usage: UsageInfo,
    include_usage: bool,
    /// For internal errors: events are written after the handler has returned.
    request_id: String,
    /// One for each choice.
    sent: Vec<StreamedChoice>,
}

impl EventWriter {
    /// The events of a delta, or of the end (`None`), and whether they are the last.
    fn events(&mut self, item: Option<(usize, Result<OutputDelta>)>) -> (Vec<SseEvent>, bool) {
        match item {
            Some((index, Ok(delta))) => {
                if let Some(finish) = &delta.finish {
                    self.usage.add(finish, index, self.builder.n);
                }
                let chunks = self.builder.chunks(index, delta, &mut self.sent[index]);
                self.data(chunks)
            }
            Some((_, Err(error))) => {
                let body = error_response::body(&error, &self.request_id);
                (vec![SseEvent::default().data(body.to_string()), done()], true)
            }
            None => {
                let mut events = Vec::new();
                if self.include_usage {
                    let mut chunk = self.builder.object(Vec::new(), true);
                    chunk["usage"] = self.usage.object();
                    events.push(SseEvent::default().data(chunk.to_string()));
                }
                events.push(done());
                (events, true)
            }
        }
    }

    fn data(&self, chunks: Vec<Value>) -> (Vec<SseEvent>, bool) {
        let event = |mut chunk: Value| {
            if self.include_usage {
                chunk["usage"] = Value::Null;
            }
            SseEvent::default().data(chunk.to_string())
        };
        (chunks.into_iter().map(event).collect(), false)
    }
}

fn done() -> SseEvent {
    SseEvent::default().data("[DONE]")
}
