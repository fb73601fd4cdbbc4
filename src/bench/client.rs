//! An HTTP client that sends JSON and times streamed replies. Plain HTTP only.
//!
//! It uses hyper's own client, which is in the dependency tree as half of the server. hyper adds nothing to a request and
//! returns each frame of a reply as it arrives.

use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// A client of one server.
#[derive(Clone)]
pub struct Client {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    /// `http://host:port`, without a trailing slash.
    base: String,
    /// Bearer token.
    key: Option<String>,
    /// A request that takes longer counts as failed.
    timeout: Duration,
}

/// A streamed reply with its timing.
#[derive(Debug, Clone, Default)]
pub(super) struct StreamedReply {
    /// Time of the first text.
    pub(super) first: Option<Instant>,
    /// Gaps between pieces of text, milliseconds.
    pub(super) gaps: Vec<f32>,
    /// The whole text.
    pub(super) text: String,
    /// Prompt tokens as reported by the server, otherwise 0.
    pub(super) prompt_tokens: usize,
    /// Generated tokens as reported by the server, otherwise the number of pieces of text.
    pub(super) tokens: usize,
    /// Adapter generation that answered, if the server reports it.
    pub(super) generation: Option<String>,
    /// `Retry-After` of a refusal, seconds.
    pub(super) retry_after: Option<f64>,
    /// Kind of failure: `http 429`, `connect`, `timeout`, `broken`, `error`, `empty`, or `mixed` if the adapter generation
    /// changed within the reply.
    pub(super) failure: Option<String>,
    /// Time of the last text.
    last: Option<Instant>,
    /// The stream ended with `[DONE]`.
    done: bool,
}

/// The fields of a chunk that are read. Servers differ in the others.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<ChunkChoice>,
    usage: Option<ChunkUsage>,
    error: Option<Value>,
    adapter_generation: Option<Value>,
}

#[derive(Deserialize)]
struct ChunkChoice {
    text: Option<String>,
    delta: Option<ChunkDelta>,
}

#[derive(Deserialize)]
struct ChunkDelta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct ChunkUsage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Client {
    /// A client of the server at `http://host:port`. Errors: another scheme, a key in the URL.
    pub fn new(url: &str, key: Option<String>, timeout: Duration) -> Result<Self> {
        if !url.starts_with("http://") {
            return Err(Error::invalid(format!(
                "{url}: the load generator supports plain HTTP only: write http://HOST:PORT"
            )));
        }
        if url.contains(['@', '?', '#']) {
            let message = "--url must be http://HOST:PORT: keys go to --api-key, not into the URL";
            return Err(Error::invalid(message));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // One connection per request: llama.cpp closes a connection after each stream without announcing it, so a request on a
        // reused connection would fail or hang.
        let http = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { http, base: url.trim_end_matches('/').to_owned(), key, timeout })
    }

    /// The server's URL.
    pub(super) fn url(&self) -> &str {
        &self.base
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
        let uri = format!("{}{path}", self.base);
        let mut request = Request::builder().method(method).uri(&uri).header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        request.body(Full::new(body)).map_err(|e| Error::invalid(format!("{uri}: {e}")))
    }

    /// Status and body of a call.
    pub(super) async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, String)> {
        let failed = |e: &dyn std::fmt::Display| Error::invalid(format!("{}{path}: {e}", self.base));
        let body = body.map_or_else(Bytes::new, |body| body.to_string().into());
        let request = self.request(method, path, body)?;
        let whole = async {
            let reply = self.http.request(request).await.map_err(|e| failed(&e))?;
            let status = reply.status();
            let bytes = reply.into_body().collect().await.map_err(|e| failed(&e))?.to_bytes();
            Ok((status, String::from_utf8_lossy(&bytes).into_owned()))
        };
        tokio::time::timeout(self.timeout, whole).await.map_err(|e| failed(&e))?
    }

    /// The body at `path` as JSON (as a string if it is not JSON); `None` unless the status is 200.
    pub(crate) async fn get(&self, path: &str) -> Option<Value> {
        let (status, text) = self.call(Method::GET, path, None).await.ok()?;
        (status == StatusCode::OK).then(|| serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Sends a request with `"stream": true` and reads the reply to its end. The reply holds the failure, if any.
    pub(super) async fn stream(&self, path: &str, body: Bytes) -> StreamedReply {
        let mut reply = StreamedReply::default();
        let result = match self.request(Method::POST, path, body) {
            Ok(request) => tokio::time::timeout(self.timeout, self.read(request, &mut reply)).await,
            Err(_) => Ok(Err("connect".into())),
        };
        reply.failure = match result {
            Ok(Ok(())) if reply.first.is_none() && reply.tokens == 0 => Some("empty".into()),
            Ok(result) => result.err(),
            Err(_) => Some("timeout".into()),
        };
        reply
    }

    /// Sends a request and reads its event stream into `reply`. The error is the kind of failure.
    async fn read(&self, request: Request<Full<Bytes>>, reply: &mut StreamedReply) -> Result<(), String> {
        let response = self.http.request(request).await;
        let response = response.map_err(|e| if e.is_connect() { "connect" } else { "broken" }.to_owned())?;
        if response.status() != StatusCode::OK {
            let seconds =
                response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            reply.retry_after = seconds;
            return Err(format!("http {}", response.status().as_u16()));
        }
        let mut body = response.into_body();
        let (mut buffer, mut usage) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            let now = Instant::now();
            let Ok(data) = frame.map_err(|_| "broken".to_owned())?.into_data() else { continue };
            buffer.extend_from_slice(&data);
            // An event may end in the middle of a frame: only whole lines are read.
            let whole = buffer.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            for line in buffer[..whole].split(|b| *b == b'\n') {
                usage = reply.read_line(line, now)?.or(usage);
            }
            buffer.drain(..whole);
        }
        if let Some(usage) = usage {
            (reply.prompt_tokens, reply.tokens) = (usage.prompt_tokens, usage.completion_tokens);
        }
        // Tokens whose bytes never formed a character count from the end of the reply.
        if reply.tokens > 0 {
            reply.first.get_or_insert_with(Instant::now);
        }
        if reply.done { Ok(()) } else { Err("broken".into()) }
    }
}

impl StreamedReply {
    /// Reads a line of the event stream that arrived at `now`. The error is the kind of failure.
    fn read_line(&mut self, line: &[u8], now: Instant) -> Result<Option<ChunkUsage>, String> {
        let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { return Ok(None) };
        if data == b"[DONE]" {
            self.done = true;
            return Ok(None);
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|_| "broken".to_owned())?;
        if chunk.error.is_some() {
            return Err("error".into());
        }
        let generation = chunk.adapter_generation.as_ref().and_then(Value::as_str).map(str::to_owned);
        if self.generation.is_some() && generation.is_some() && self.generation != generation {
            return Err("mixed".into());
        }
        self.generation = generation.or(self.generation.take());
        for choice in chunk.choices {
            let text = choice.text.or(choice.delta.and_then(|delta| delta.content)).unwrap_or_default();
            if !text.is_empty() {
                self.push(&text, now);
            }
        }
        Ok(chunk.usage)
    }

    /// Appends a piece of text that arrived at `now`.
    fn push(&mut self, text: &str, now: Instant) {
        self.text += text;
        self.tokens += 1;
        self.first.get_or_insert(now);
        self.gaps.extend(self.last.map(|last| (now - last).as_secs_f32() * 1e3));
        self.last = Some(now);
    }
}
