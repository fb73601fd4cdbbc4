//! A checked request through the engine: submit its sequences, then answer whole or as server-sent events.

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
use super::params::Shared;
use super::response::{Echo, Form, Kind, Sent, Usage, Whole};
use super::select_adapter::Leased;
use super::stream::{Piece, pieces};
use super::{Serving, SharedApp, error_response};
use crate::Result;
use crate::engine::request::{Request, SamplingParams};
use crate::time::unix_seconds;

/// A request with nothing left to check.
pub(super) struct Job {
    /// Which endpoint.
    pub(super) kind: Kind,
    /// `model` of the response.
    pub(super) model: String,
    /// Adapters that answer.
    pub(super) leased: Leased,
    /// Fields of both endpoints.
    pub(super) shared: Shared,
    /// Sequences of each prompt; the best `n` are answered.
    pub(super) best_of: usize,
    /// Alternatives to report.
    pub(super) logprobs: Option<usize>,
    /// Token ids of each prompt, and how to sample it.
    pub(super) prompts: Vec<Vec<u32>>,
    /// Parallel to `prompts`.
    pub(super) params: Vec<SamplingParams>,
    /// Parallel to `prompts`, or empty.
    pub(super) echo: Vec<Echo>,
    /// For queue time and latency.
    pub(super) arrived: Instant,
}

/// Runs the job. Errors come before the first byte of an answer; later ones inside the stream.
pub(super) async fn run(app: &SharedApp, serving: &Arc<Serving>, job: Job) -> Result<Response> {
    let prefix = if job.kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
    let id = format!("{prefix}-{}", uuid::Uuid::new_v4().simple());
    let mut usage = Usage { prompt: job.prompts.iter().map(Vec::len).sum(), ..Usage::default() };
    let sequences = submit(app, serving, &job, &id)?;
    let count = sequences.len();
    let pieces = pieces(&serving.codec, &job.shared.text, job.shared.sampling.min_tokens, sequences);
    let form = Form {
        kind: job.kind,
        id,
        model: job.model,
        adapter: job.leased.adapter,
        generation: job.leased.generation,
        created: unix_seconds(SystemTime::now()),
        logprobs: job.logprobs,
        echo: job.echo,
        n: job.shared.n,
        codec: serving.codec.clone(),
    };
    if job.shared.stream {
        return Ok(event_stream(form, pieces, count, usage, job.shared.include_usage));
    }
    let mut wholes: Vec<Whole> = std::iter::repeat_with(Whole::default).take(count).collect();
    tokio::pin!(pieces);
    while let Some((index, piece)) = pieces.next().await {
        wholes[index].push(piece?);
    }
    for (index, whole) in wholes.iter().enumerate() {
        whole.finish.iter().for_each(|finish| usage.add(finish, index, job.best_of));
    }
    let mut choices = Vec::new();
    let mut wholes = wholes.into_iter();
    loop {
        let mut candidates: Vec<Whole> = wholes.by_ref().take(job.best_of).collect();
        if candidates.is_empty() {
            break;
        }
        if job.best_of > job.shared.n {
            candidates.sort_by(|a, b| b.score().total_cmp(&a.score()));
            candidates.truncate(job.shared.n);
        }
        for whole in candidates {
            choices.push(form.choice(choices.len(), whole)?);
        }
    }
    let mut object = form.object(choices, false);
    object["usage"] = usage.object();
    Ok(Json(object).into_response())
}

type Sequences = Vec<(mpsc::UnboundedReceiver<crate::engine::request::Event>, crate::server::metrics::Track)>;

/// Hands every sequence to the engine, or none: those already in are cancelled by dropping their receivers.
fn submit(app: &SharedApp, serving: &Serving, job: &Job, id: &str) -> Result<Sequences> {
    let mut sequences = Vec::with_capacity(job.prompts.len() * job.best_of);
    for (prompt, params) in job.prompts.iter().zip(&job.params) {
        for choice in 0..job.best_of {
            let (events, receiver) = mpsc::unbounded_channel();
            let mut params = params.clone();
            // Choices of one prompt differ, and the same request repeats them.
            params.seed = params.seed.map(|seed| seed.wrapping_add(choice as u64));
            serving.engine.submit(Request {
                id: id.to_owned(),
                prompt: prompt.clone(),
                params,
                adapters: job.leased.terms.clone(),
                arrived: job.arrived,
                events,
            })?;
            sequences
                .push((receiver, app.metrics.track(serving.base.name(), &job.leased.label, prompt.len(), job.arrived)));
        }
    }
    Ok(sequences)
}

fn event_stream(
    form: Form,
    pieces: impl stream::Stream<Item = (usize, Result<Piece>)> + Send + 'static,
    choices: usize,
    usage: Usage,
    include_usage: bool,
) -> Response {
    let opening = form.opening(choices);
    let request_id = request_id();
    let mut writer = Writer { form, usage, include_usage, request_id, sent: vec![Sent::default(); choices] };
    let opening = writer.data(opening);
    let events = stream::iter([opening])
        .chain(pieces.map(Some).chain(stream::once(async { None })).map(move |item| writer.events(item)))
        // An error ends the stream; what other choices still send is of no use then.
        .scan(false, |ended, (events, last)| {
            let done = std::mem::replace(ended, last);
            async move { (!done).then(|| stream::iter(events.into_iter().map(Ok::<_, Infallible>))) }
        })
        .flatten();
    // Proxies that buffer (nginx) would hold tokens back.
    let headers = [(HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"))];
    (headers, Sse::new(events).keep_alive(KeepAlive::default())).into_response()
}

/// Turns pieces into server-sent events.
struct Writer {
    form: Form,
    usage: Usage,
    include_usage: bool,
    /// For internal errors: events are written after the handler has returned.
    request_id: String,
    /// By choice.
    sent: Vec<Sent>,
}

impl Writer {
    /// The events of a piece, or of the end (`None`), and whether they are the last.
    fn events(&mut self, item: Option<(usize, Result<Piece>)>) -> (Vec<SseEvent>, bool) {
        match item {
            Some((index, Ok(piece))) => {
                if let Some(finish) = &piece.finish {
                    self.usage.add(finish, index, self.form.n);
                }
                let chunks = self.form.chunks(index, piece, &mut self.sent[index]);
                self.data(chunks)
            }
            Some((_, Err(error))) => {
                let body = error_response::body(&error, &self.request_id);
                (vec![SseEvent::default().data(body.to_string()), done()], true)
            }
            None => {
                let mut events = Vec::new();
                if self.include_usage {
                    let mut chunk = self.form.object(Vec::new(), true);
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
