//! `POST /v1/completions` and `/v1/chat/completions`: fields to prompts and parameters, checked before the engine sees them.

use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::error_response::ErrorResponse;
use super::extract::Json;
use super::generate::{self, Job};
use super::params::{self, MAX_TOP_LOGPROBS, SHARED, Shared};
use super::response::{Echo, Kind};
use super::select_adapter::Selection;
use super::{Serving, SharedApp};
use crate::fields::{self, Fields};
use crate::text::messages::chat_prompt;
use crate::{Error, Result};

/// `max_tokens` of a completion that does not say (OpenAI's).
const DEFAULT_MAX_TOKENS: usize = 16;

/// Prompts of one request.
const MAX_PROMPTS: usize = 2048;

/// Sequences generated for one prompt, of which `n` are answered.
const MAX_BEST_OF: i64 = 128;

const COMPLETION_FIELDS: &[&str] = &["prompt", "echo", "best_of", "add_special_tokens"];
const CHAT_FIELDS: &[&str] = &["messages", "top_logprobs", "add_generation_prompt"];

/// Fields of OpenAI's, some near ours in spelling, that change nothing here.
const IGNORED: &[&str] = &[
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "suffix",
    "prompt_logprobs",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
];

/// `POST /v1/completions`.
pub(super) async fn completions(State(app): State<SharedApp>, Json(body): Json) -> Result<Response, ErrorResponse> {
    answer(app, &body, Kind::Completion).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat_completions(
    State(app): State<SharedApp>,
    Json(body): Json,
) -> Result<Response, ErrorResponse> {
    answer(app, &body, Kind::Chat).await
}

async fn answer(app: SharedApp, body: &Value, kind: Kind) -> Result<Response, ErrorResponse> {
    let arrived = std::time::Instant::now();
    let serving = app.serving()?.clone();
    let body = Fields::of_body(body)?;
    let known = [SHARED, if kind == Kind::Chat { CHAT_FIELDS } else { COMPLETION_FIELDS }, IGNORED].concat();
    fields::check_unknown(&body, &known)?;
    let selection = Selection::parse(&body, &serving.base.names, |name| serving.registry.get(name).is_ok())?;
    let leased = selection.lease(&serving.registry)?;
    let label = leased.label.clone();
    let parsed = match kind {
        Kind::Completion => Parsed::completion(&body, &serving),
        Kind::Chat => Parsed::chat(&body, &serving),
    };
    let model = body.get("model").and_then(Value::as_str).unwrap_or(serving.base.name()).to_owned();
    let run = async {
        let Parsed { shared, best_of, logprobs, echo, inputs } = parsed?;
        let (prompts, echo) = encode(&serving, inputs, echo).await?;
        let params = prompts
            .iter()
            .map(|ids| {
                let mut params = shared.sampling.clone();
                params.max_tokens = room(&serving, ids.len(), shared.max_tokens, kind)?;
                params.logprobs = logprobs.or((best_of > shared.n).then_some(0));
                params.prompt_logprobs = if echo.is_empty() { None } else { logprobs };
                Ok(params)
            })
            .collect::<Result<Vec<_>>>()?;
        generate::run(
            &app,
            &serving,
            Job { kind, model, leased, shared, best_of, logprobs, prompts, params, echo, arrived },
        )
        .await
    };
    run.await.map_err(|error| ErrorResponse { error: Box::new(error), adapter: label })
}

/// How many tokens a prompt may still make; an error when it does not fit.
fn room(serving: &Serving, prompt: usize, asked: Option<usize>, kind: Kind) -> Result<usize> {
    let limit = serving.limits().max_model_len;
    let too_long = |message: String, param| Err(Error::invalid(message).param(param).code("context_length_exceeded"));
    let (default, param) = match kind {
        Kind::Completion => (DEFAULT_MAX_TOKENS, "prompt"),
        Kind::Chat => (usize::MAX, "messages"),
    };
    match asked {
        _ if prompt > limit || (prompt == limit && asked != Some(0)) => too_long(
            format!("This server's context length is {limit} tokens, and the prompt alone has {prompt}: shorten it."),
            param,
        ),
        Some(asked) if asked > limit - prompt => too_long(
            format!(
                "This server's context length is {limit} tokens: the prompt has {prompt}, which leaves {} for \
                 `max_tokens`, not {asked}.",
                limit - prompt
            ),
            "max_tokens",
        ),
        Some(asked) => Ok(asked),
        None => Ok(default.min(limit - prompt)),
    }
}

/// One prompt before the tokenizer.
enum Input {
    /// Text, and whether the model's special tokens go around it.
    Text(String, bool),
    /// Ids as they are.
    Ids(Vec<u32>),
}

/// A request's fields.
struct Parsed {
    shared: Shared,
    /// Sequences of each prompt.
    best_of: usize,
    /// Alternatives to report.
    logprobs: Option<usize>,
    /// Give the prompt back.
    echo: bool,
    inputs: Vec<Input>,
}

impl Parsed {
    fn completion(body: &Fields, serving: &Serving) -> Result<Self> {
        let vocab_size = serving.codec.vocab_size();
        if body.get("prompt").is_none() && body.get("messages").is_some() {
            return Err(
                Error::invalid("`messages` belongs to /v1/chat/completions; here it is `prompt`").param("messages")
            );
        }
        let shared = params::parse(body, vocab_size, 0)?;
        let best_of = body.integer("best_of", 1..=MAX_BEST_OF)?.map_or(shared.n, |n| n as usize);
        if best_of < shared.n {
            let message = format!("`best_of` must be at least `n` ({}), not {best_of}", shared.n);
            return Err(Error::invalid(message).param("best_of").code("invalid_value"));
        }
        if best_of > shared.n && shared.stream {
            return Err(
                Error::invalid("`best_of` above `n` cannot be streamed: the best is known at the end").param("best_of")
            );
        }
        let add_special_tokens = body.boolean("add_special_tokens")?.unwrap_or(true);
        let inputs = prompts(body, vocab_size, add_special_tokens)?;
        serving.check_sequences(inputs.len() * best_of, "prompt")?;
        Ok(Self {
            best_of,
            logprobs: body.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize),
            echo: body.boolean("echo")?.unwrap_or(false),
            inputs,
            shared,
        })
    }

    fn chat(body: &Fields, serving: &Serving) -> Result<Self> {
        if body.get("messages").is_none() && body.get("prompt").is_some() {
            return Err(Error::invalid("`prompt` belongs to /v1/completions; here it is `messages`").param("prompt"));
        }
        let shared = params::parse(body, serving.codec.vocab_size(), 1)?;
        let top = body.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize);
        let wanted = body.boolean("logprobs")?.unwrap_or(false);
        if top.is_some() && !wanted {
            return Err(Error::invalid("`top_logprobs` is only allowed when `logprobs` is true").param("top_logprobs"));
        }
        serving.check_sequences(shared.n, "n")?;
        let text = chat_prompt(body, &serving.codec)?;
        Ok(Self {
            best_of: shared.n,
            logprobs: wanted.then_some(top.unwrap_or(0)),
            echo: false,
            inputs: vec![Input::Text(text, false)],
            shared,
        })
    }
}

/// `prompt`: text, token ids, or an array of either.
fn prompts(body: &Fields, vocab_size: usize, add_special_tokens: bool) -> Result<Vec<Input>> {
    const ALLOWED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let prompt = body.required("prompt", body.get("prompt"), ALLOWED)?;
    let text = |s: &String| Input::Text(s.clone(), add_special_tokens);
    let list = match prompt {
        Value::String(s) => return Ok(vec![text(s)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(fields::wrong("prompt", ALLOWED, other)),
    };
    if list[0].is_number() {
        return Ok(vec![Input::Ids(params::token_ids(list, "prompt", vocab_size)?)]);
    }
    if list.len() > MAX_PROMPTS {
        let message = format!("`prompt` has {} prompts, and {MAX_PROMPTS} are allowed", list.len());
        return Err(Error::invalid(message).param("prompt").code("invalid_value"));
    }
    list.iter()
        .enumerate()
        .map(|(i, value)| match (value, &list[0]) {
            (Value::String(s), Value::String(_)) => Ok(text(s)),
            (Value::Array(ids), Value::Array(_)) if !ids.is_empty() => {
                Ok(Input::Ids(params::token_ids(ids, &format!("prompt[{i}]"), vocab_size)?))
            }
            (other, Value::String(_)) => {
                Err(fields::wrong(&format!("prompt[{i}]"), "a string as the first one", other))
            }
            (other, _) => Err(fields::wrong(&format!("prompt[{i}]"), "a string or an array of token ids", other)),
        })
        .collect()
}

/// Token ids of all prompts, and what `echo` gives back, off the threads that serve sockets.
async fn encode(serving: &Serving, inputs: Vec<Input>, echo: bool) -> Result<(Vec<Vec<u32>>, Vec<Echo>)> {
    let codec = serving.codec.clone();
    let work = move || {
        let mut prompts = Vec::with_capacity(inputs.len());
        let mut echoes = Vec::new();
        for input in inputs {
            let (ids, text) = match input {
                Input::Text(text, special) => (codec.encode_prompt(&text, special)?, Some(text)),
                Input::Ids(ids) => (ids, None),
            };
            if echo {
                echoes.push(Echo::new(&codec, &ids, text)?);
            }
            prompts.push(ids);
        }
        Ok((prompts, echoes))
    };
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()))?
}
