//! Runs a checked request: submits its sequences to the engine and answers with one body or with server-sent events, in the form
//! of any of the APIs.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::http::{HeaderName, HeaderValue};
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream::{self, StreamExt};
use serde_json::Value;
use tokio::sync::mpsc;

use super::error_response::{self, ErrorResponse};
use super::middleware::request_id;
use super::openai;
use super::response::{CompletionOutput, Endpoint, ReplyContext, UsageInfo};
use super::select_adapter::LeasedAdapters;
use super::stream::{OutputDelta, OutputOptions, RunningSequence, output_deltas};
use super::{Serving, SharedApp};
use crate::engine::request::{Request, SamplingParams};
use crate::text::grammar::CompiledGrammar;
use crate::{Error, Result};

/// A request whose fields are all checked.
pub(super) struct CheckedRequest {
    /// What its reply needs.
    pub(super) context: ReplyContext,
    /// Its adapters.
    pub(super) adapters: LeasedAdapters,
    /// Answer with server-sent events.
    pub(super) stream: bool,
    /// How tokens become an output.
    pub(super) output: OutputOptions,
    /// Sequences generated for each prompt; the response has the best `n`.
    pub(super) best_of: usize,
    /// How to sample, parallel to the context's prompts.
    pub(super) params: Vec<SamplingParams>,
    /// What each output must match.
    pub(super) grammar: Option<Arc<CompiledGrammar>>,
    /// Order among waiting requests of the same adapters.
    pub(super) priority: i64,
    /// Separates cached prefixes.
    pub(super) cache_salt: Option<String>,
    /// When the request arrived, for queue time and latency.
    pub(super) arrived: Instant,
}

/// The form of a reply: the JSON objects and events of one API.
pub(super) trait ReplyFormat: Send {
    /// The whole reply, of the chosen outputs in order.
    fn whole(&mut self, outputs: Vec<CompletionOutput>, usage: &UsageInfo) -> Result<Value>;

    /// The first events of a stream of `choices` outputs.
    fn opening(&mut self, choices: usize) -> Vec<SseEvent>;

    /// The events of the next delta of output `index`.
    fn delta(&mut self, index: usize, delta: OutputDelta) -> Vec<SseEvent>;

    /// The last events of a stream without an error.
    fn ending(&mut self, usage: &UsageInfo) -> Vec<SseEvent>;

    /// The last events of a stream that ends with an error. `request_id` stands for the message of an internal one.
    fn failure(&mut self, error: &Error, request_id: &str) -> Vec<SseEvent>;
}

/// Answers a request whose `body` has the fields of `endpoint`, in the form that `format` makes. `prefix` begins the reply's id.
pub(super) async fn answer(
    app: SharedApp,
    body: &Value,
    endpoint: Endpoint,
    prefix: &str,
    format: impl FnOnce(ReplyContext) -> Box<dyn ReplyFormat>,
) -> Result<Response, ErrorResponse> {
    let serving = app.serving()?.clone();
    let request = openai::prepare(&serving, body, endpoint, prefix).await?;
    let adapter = request.adapters.label.clone();
    let reply = run(&app, &serving, request, format).await;
    reply.map_err(|error| ErrorResponse { error: Box::new(error), adapter })
}

/// Runs the request. An error here comes before the first byte of the answer; later ones become events of the stream.
async fn run(
    app: &SharedApp,
    serving: &Arc<Serving>,
    request: CheckedRequest,
    format: impl FnOnce(ReplyContext) -> Box<dyn ReplyFormat>,
) -> Result<Response> {
    let mut usage = UsageInfo { prompt: request.context.prompt_tokens(), ..UsageInfo::default() };
    let sequences = submit(app, serving, &request)?;
    let count = sequences.len();
    let deltas = output_deltas(&serving.codec, &request.output, sequences);
    let (n, best_of) = (request.context.n, request.best_of);
    let mut format = format(request.context);
    if request.stream {
        return Ok(event_stream(format, deltas, count, n, usage));
    }
    let outputs = collect(deltas, count).await?;
    for (index, output) in outputs.iter().enumerate() {
        output.finish.iter().for_each(|finish| usage.add(finish, index, best_of));
    }
    Ok(Json(format.whole(best(outputs, n, best_of), &usage)?).into_response())
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

/// Of each prompt's `best_of` outputs, the best `n`.
fn best(outputs: Vec<CompletionOutput>, n: usize, best_of: usize) -> Vec<CompletionOutput> {
    if best_of == n {
        return outputs;
    }
    let mut chosen = Vec::new();
    let mut outputs = outputs.into_iter().peekable();
    while outputs.peek().is_some() {
        let mut candidates: Vec<CompletionOutput> = outputs.by_ref().take(best_of).collect();
        candidates.sort_by(|a, b| b.score().total_cmp(&a.score()));
        candidates.truncate(n);
        chosen.extend(candidates);
    }
    chosen
}

/// Submits all sequences to the engine, or none: on an error, dropping the receivers cancels those submitted before.
fn submit(app: &SharedApp, serving: &Serving, request: &CheckedRequest) -> Result<Vec<RunningSequence>> {
    let mut sequences = Vec::with_capacity(request.params.len() * request.best_of);
    for (prompt, params) in request.context.prompts.iter().zip(&request.params) {
        for choice in 0..request.best_of {
            let (events, receiver) = mpsc::unbounded_channel();
            let mut params = params.clone();
            // Each choice has its own seed. The same request gives the same choices again.
            params.seed = params.seed.map(|seed| seed.wrapping_add(choice as u64));
            serving.engine.submit(Request {
                adapters: request.adapters.terms.clone(),
                constraint: request.grammar.as_ref().map(CompiledGrammar::constraint),
                arrived: request.arrived,
                priority: request.priority,
                cache_salt: request.cache_salt.clone(),
                ..Request::new(&request.context.id, prompt.clone(), params, events)
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
    mut format: Box<dyn ReplyFormat>,
    deltas: impl stream::Stream<Item = (usize, Result<OutputDelta>)> + Send + 'static,
    choices: usize,
    n: usize,
    usage: UsageInfo,
) -> Response {
    let opening = (format.opening(choices), false);
    let mut writer = EventWriter { format, usage, n, request_id: request_id() };
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
    format: Box<dyn ReplyFormat>,
    usage: UsageInfo,
    /// Choices for each prompt.
    n: usize,
    /// For internal errors: events are written after the handler has returned.
    request_id: String,
}

impl EventWriter {
    /// The events of a delta, or of the end (`None`), and whether they are the last.
    fn events(&mut self, item: Option<(usize, Result<OutputDelta>)>) -> (Vec<SseEvent>, bool) {
        match item {
            Some((index, Ok(delta))) => {
                if let Some(finish) = &delta.finish {
                    self.usage.add(finish, index, self.n);
                }
                (self.format.delta(index, delta), false)
            }
            Some((_, Err(error))) => {
                error_response::log_internal(&error, &self.request_id);
                (self.format.failure(&error, &self.request_id), true)
            }
            None => (self.format.ending(&self.usage), true),
        }
    }
}
