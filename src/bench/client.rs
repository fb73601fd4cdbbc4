//! An HTTP client that sends JSON and times streamed replies. Plain HTTP only.
//!
//! hyper's own client, which is in the tree as half of the server: it keeps connections, adds nothing to a request, and hands
//! over each piece of a reply as it arrives.

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

/// Speaks to one server.
#[derive(Clone)]
pub struct Client {
    http: legacy::Client<HttpConnector, Full<Bytes>>,
    /// `http://host:port`, without a slash at the end.
    base: String,
    /// Bearer token.
    key: Option<String>,
    /// A request that takes longer has failed.
    timeout: Duration,
}

/// A streamed reply, timed.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// When its first text came.
    pub first: Option<Instant>,
    /// Between pieces of text, milliseconds.
    pub gaps: Vec<f32>,
    /// All text.
    pub text: String,
    /// Tokens of the prompt, where the server says.
    pub prompt_tokens: usize,
    /// Tokens generated: what the server says, or else pieces of text.
    pub tokens: usize,
    /// Which content of its adapter answered, where the server says.
    pub generation: Option<String>,
    /// After how many seconds to come again, as the refusal said.
    pub retry_after: Option<f64>,
    /// What went wrong, as a word to count by: `http 429`, `connect`, `timeout`, `broken`, `error`, `empty`, or `mixed`
    /// where the content of its adapter changed on the way.
    pub failure: Option<String>,
}

/// What is read of a chunk. Fields that are no concern of ours are many and differ between servers.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
    adapter_generation: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Client {
    /// For a server at `http://host:port`. Errors: another scheme.
    pub fn new(url: &str, key: Option<String>, timeout: Duration) -> Result<Self> {
        if !url.starts_with("http://") {
            return Err(Error::invalid(format!("{url}: the load generator speaks plain HTTP, write http://HOST:PORT")));
        }
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        // A connection for each request: llama.cpp closes one after each stream without saying so, and a request that was to reuse
        // it would fail, or wait for ever.
        let http = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { http, base: url.trim_end_matches('/').to_owned(), key, timeout })
    }

    /// Where it sends to.
    pub fn url(&self) -> &str {
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
    pub async fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(StatusCode, String)> {
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

    /// The JSON at `path`, if it answers 200.
    pub async fn get(&self, path: &str) -> Option<Value> {
        let (status, text) = self.call(Method::GET, path, None).await.ok()?;
        (status == StatusCode::OK).then(|| serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Sends a request with `"stream": true` and reads the reply to its end. What goes wrong stands in the reply.
    pub async fn stream(&self, path: &str, body: Bytes) -> Reply {
        let mut reply = Reply::default();
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

    async fn read(&self, request: Request<Full<Bytes>>, reply: &mut Reply) -> Result<(), String> {
        let response = self.http.request(request).await;
        let response = response.map_err(|e| if e.is_connect() { "connect" } else { "broken" }.to_owned())?;
        if response.status() != StatusCode::OK {
            let seconds =
                response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
            reply.retry_after = seconds;
            return Err(format!("http {}", response.status().as_u16()));
        }
        let mut body = response.into_body();
        let (mut buffer, mut last, mut usage, mut done) = (Vec::new(), None::<Instant>, None, false);
        while let Some(frame) = body.frame().await {
            let now = Instant::now();
            let Ok(data) = frame.map_err(|_| "broken".to_owned())?.into_data() else { continue };
            buffer.extend_from_slice(&data);
            // Lines that are whole; an event may end in the middle of a frame.
            let whole = buffer.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
            for line in buffer[..whole].split(|b| *b == b'\n') {
                let Some(data) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
                if data == b"[DONE]" {
                    done = true;
                    continue;
                }
                let chunk: Chunk = serde_json::from_slice(data).map_err(|_| "broken".to_owned())?;
                if chunk.error.is_some() {
                    return Err("error".into());
                }
                usage = chunk.usage.or(usage);
                let generation = chunk.adapter_generation.as_ref().and_then(Value::as_str).map(str::to_owned);
                if reply.generation.is_some() && generation.is_some() && reply.generation != generation {
                    return Err("mixed".into());
                }
                reply.generation = generation.or(reply.generation.take());
                for choice in chunk.choices {
                    let text = choice.text.or(choice.delta.and_then(|delta| delta.content)).unwrap_or_default();
                    if text.is_empty() {
                        continue;
                    }
                    reply.text += &text;
                    reply.tokens += 1;
                    reply.first.get_or_insert(now);
                    reply.gaps.extend(last.map(|last| (now - last).as_secs_f32() * 1e3));
                    last = Some(now);
                }
            }
            buffer.drain(..whole);
        }
        if let Some(usage) = usage {
            (reply.prompt_tokens, reply.tokens) = (usage.prompt_tokens, usage.completion_tokens);
        }
        // Tokens whose bytes never made a character: their time is that of the end.
        if reply.tokens > 0 {
            reply.first.get_or_insert_with(Instant::now);
        }
        if done { Ok(()) } else { Err("broken".into()) }
    }
}
