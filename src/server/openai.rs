//! `POST /v1/completions` and `/v1/chat/completions`: reads and checks the fields, and makes a [`CheckedRequest`] of them.

use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::error_response::ErrorResponse;
use super::extract::JsonBody;
use super::generate::{self, CheckedRequest};
use super::params::{self, COMMON_FIELDS, CommonParams, MAX_TOP_LOGPROBS};
use super::response::{EchoedPrompt, Endpoint};
use super::select_adapter::LeasedAdapters;
use super::structured::STRUCTURED_FIELDS;
use super::{Serving, SharedApp};
use crate::engine::context_length_exceeded;
use crate::fields::{self, Fields};
use crate::text::messages::{CHAT_PROMPT_FIELDS, ChatPrompt};
use crate::{Error, Result};

/// Default of `max_tokens` for completions, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Limit on the prompts of one request.
const MAX_PROMPTS: usize = 2048;

/// Limit on `best_of`, the sequences generated for one prompt.
const MAX_BEST_OF: i64 = 128;

const COMPLETION_FIELDS: &[&str] = &["prompt", "echo", "best_of", "add_special_tokens"];
const CHAT_FIELDS: &[&str] = &["top_logprobs"];

/// Fields of OpenAI's API that have no effect here. They are known, so that those spelt almost like ours are accepted.
const IGNORED: &[&str] = &[
    "tools",
    "tool_choice",
    "functions",
    "function_call",
    "guided_decoding_backend",
    "suffix",
    "prompt_logprobs",
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
];

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    answer(app, &body, Endpoint::Completion).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat_completions(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    answer(app, &body, Endpoint::Chat).await
}

async fn answer(app: SharedApp, body: &Value, endpoint: Endpoint) -> Result<Response, ErrorResponse> {
    let arrived = std::time::Instant::now();
    let serving = app.serving()?.clone();
    let body = Fields::of_body(body)?;
    let own = match endpoint {
        Endpoint::Chat => [CHAT_FIELDS, CHAT_PROMPT_FIELDS].concat(),
        Endpoint::Completion => COMPLETION_FIELDS.to_vec(),
    };
    let known = [COMMON_FIELDS, STRUCTURED_FIELDS, &own, IGNORED].concat();
    fields::check_unknown(&body, &known)?;
    let adapters = LeasedAdapters::select(&body, &serving.base.names, &serving.registry).await?;
    let label = adapters.label.clone();
    let parsed = match endpoint {
        Endpoint::Completion => ParsedRequest::completion(&body, &serving),
        Endpoint::Chat => ParsedRequest::chat(&body, &serving),
    };
    let model = body.get("model").and_then(Value::as_str).unwrap_or(serving.base.name()).to_owned();
    let run = async {
        let ParsedRequest { mut common, best_of, logprobs, echo, inputs } = parsed?;
        let grammar = match common.grammar.take() {
            Some(grammar) => Some(grammar.compile(&serving.grammars).await?),
            None => None,
        };
        let bad_words = std::mem::take(&mut common.bad_words);
        let EncodedRequest { prompts, echo, bad_words } = encode(&serving, inputs, echo, bad_words).await?;
        common.sampling.bad_words = bad_words;
        let params = prompts
            .iter()
            .map(|ids| {
                let mut params = common.sampling.clone();
                params.max_tokens = max_tokens(&serving, ids.len(), common.max_tokens, endpoint)?;
                params.logprobs = logprobs.or((best_of > common.n).then_some(0));
                params.prompt_logprobs = if echo.is_empty() { None } else { logprobs };
                Ok(params)
            })
            .collect::<Result<Vec<_>>>()?;
        generate::run(
            &app,
            &serving,
            CheckedRequest {
                endpoint,
                model,
                adapters,
                common,
                best_of,
                logprobs,
                prompts,
                params,
                grammar,
                echo,
                arrived,
            },
        )
        .await
    };
    run.await.map_err(|error| ErrorResponse { error: Box::new(error), adapter: label })
}

/// How many tokens may be generated after a prompt. Errors: the prompt, or the prompt and `asked`, exceed the context length.
fn max_tokens(serving: &Serving, prompt: usize, asked: Option<usize>, endpoint: Endpoint) -> Result<usize> {
    let limit = serving.limits().max_model_len;
    let (default, param) = match endpoint {
        Endpoint::Completion => (DEFAULT_MAX_TOKENS, "prompt"),
        Endpoint::Chat => (usize::MAX, "messages"),
    };
    match asked {
        _ if prompt > limit || (prompt == limit && asked != Some(0)) => {
            Err(context_length_exceeded(limit, prompt, None, param))
        }
        Some(asked) if asked > limit - prompt => Err(context_length_exceeded(limit, prompt, Some(asked), "max_tokens")),
        Some(asked) => Ok(asked),
        None => Ok(default.min(limit - prompt)),
    }
}

/// A prompt as the request gives it.
pub(super) enum PromptInput {
    /// Text, and whether to add the model's special tokens around it.
    Text(String, bool),
    /// Token ids.
    Ids(Vec<u32>),
    /// A chat to render.
    Chat(Box<ChatPrompt>),
}

/// The fields of a request.
struct ParsedRequest {
    common: CommonParams,
    /// Sequences generated for each prompt.
    best_of: usize,
    /// Log-probabilities are asked for, with this many alternatives.
    logprobs: Option<usize>,
    /// The response repeats the prompt.
    echo: bool,
    inputs: Vec<PromptInput>,
}

impl ParsedRequest {
    fn completion(body: &Fields, serving: &Serving) -> Result<Self> {
        let vocab_size = serving.codec.vocab_size();
        if body.get("prompt").is_none() && body.get("messages").is_some() {
            return Err(
                Error::invalid("`messages` belongs to /v1/chat/completions: use `prompt` here").param("messages")
            );
        }
        let common = params::parse(body, vocab_size, 0)?;
        let best_of = body.integer("best_of", 1..=MAX_BEST_OF)?.map_or(common.n, |n| n as usize);
        if best_of < common.n {
            let message = format!("`best_of` must be at least `n` ({}), not {best_of}", common.n);
            return Err(Error::invalid(message).param("best_of").code("invalid_value"));
        }
        if best_of > common.n && common.stream {
            return Err(Error::invalid(
                "`best_of` above `n` cannot be streamed: the best choices are known only at the end",
            )
            .param("best_of"));
        }
        let add_special_tokens = body.boolean("add_special_tokens")?.unwrap_or(true);
        let inputs = prompts(body, "prompt", vocab_size, add_special_tokens)?;
        serving.check_sequences(inputs.len() * best_of, "prompt")?;
        Ok(Self {
            best_of,
            logprobs: body.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize),
            echo: body.boolean("echo")?.unwrap_or(false),
            inputs,
            common,
        })
    }

    fn chat(body: &Fields, serving: &Serving) -> Result<Self> {
        if body.get("messages").is_none() && body.get("prompt").is_some() {
            return Err(Error::invalid("`prompt` belongs to /v1/completions: use `messages` here").param("prompt"));
        }
        let common = params::parse(body, serving.codec.vocab_size(), 1)?;
        let top = body.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize);
        let wanted = body.boolean("logprobs")?.unwrap_or(false);
        if top.is_some() && !wanted {
            return Err(Error::invalid("`top_logprobs` is only allowed when `logprobs` is true").param("top_logprobs"));
        }
        serving.check_sequences(common.n, "n")?;
        let chat = ChatPrompt::parse(body)?;
        Ok(Self {
            best_of: common.n,
            logprobs: wanted.then_some(top.unwrap_or(0)),
            echo: false,
            inputs: vec![PromptInput::Chat(Box::new(chat))],
            common,
        })
    }
}

/// Reads the field `name`: text, token ids, or an array of either.
pub(super) fn prompts(
    body: &Fields,
    name: &str,
    vocab_size: usize,
    add_special_tokens: bool,
) -> Result<Vec<PromptInput>> {
    const ALLOWED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let prompt = body.required(name, body.get(name), ALLOWED)?;
    let text = |s: &String| PromptInput::Text(s.clone(), add_special_tokens);
    let list = match prompt {
        Value::String(s) => return Ok(vec![text(s)]),
        Value::Array(list) if !list.is_empty() => list,
        other => return Err(fields::wrong(name, ALLOWED, other)),
    };
    if list[0].is_number() {
        return Ok(vec![PromptInput::Ids(params::token_ids(list, name, vocab_size)?)]);
    }
    if list.len() > MAX_PROMPTS {
        let message = format!("`{name}` has {} prompts; at most {MAX_PROMPTS} are allowed", list.len());
        return Err(Error::invalid(message).param(name).code("invalid_value"));
    }
    list.iter()
        .enumerate()
        .map(|(i, value)| match (value, &list[0]) {
            (Value::String(s), Value::String(_)) => Ok(text(s)),
            (Value::Array(ids), Value::Array(_)) if !ids.is_empty() => {
                Ok(PromptInput::Ids(params::token_ids(ids, &format!("{name}[{i}]"), vocab_size)?))
            }
            (other, Value::String(_)) => {
                Err(fields::wrong(&format!("{name}[{i}]"), "a string, like the first prompt", other))
            }
            (other, _) => Err(fields::wrong(&format!("{name}[{i}]"), "a string or an array of token ids", other)),
        })
        .collect()
}

/// The texts of a request as token ids.
struct EncodedRequest {
    prompts: Vec<Vec<u32>>,
    /// What `echo` repeats: parallel to `prompts`, or empty.
    echo: Vec<EchoedPrompt>,
    bad_words: Vec<Vec<u32>>,
}

/// Renders chats and tokenizes, on a blocking thread.
async fn encode(
    serving: &Serving,
    inputs: Vec<PromptInput>,
    echo: bool,
    bad_words: Vec<String>,
) -> Result<EncodedRequest> {
    let codec = serving.codec.clone();
    let work = move || {
        let mut prompts = Vec::with_capacity(inputs.len());
        let mut echoes = Vec::new();
        for input in inputs {
            let (ids, text) = match input {
                PromptInput::Text(text, special) => (codec.encode_prompt(&text, special)?, Some(text)),
                PromptInput::Ids(ids) => (ids, None),
                PromptInput::Chat(chat) => {
                    let text = codec.render_chat(&chat)?;
                    (codec.encode_prompt(&text, false)?, Some(text))
                }
            };
            if echo {
                echoes.push(EchoedPrompt::new(&codec, &ids, text)?);
            }
            prompts.push(ids);
        }
        let mut bad_ids = Vec::new();
        for word in &bad_words {
            // A word has other tokens after a space than at the beginning.
            for text in [word.trim_start().to_owned(), format!(" {}", word.trim_start())] {
                let ids = codec.encode(&text, false)?;
                if !bad_ids.contains(&ids) {
                    bad_ids.push(ids);
                }
            }
        }
        Ok(EncodedRequest { prompts, echo: echoes, bad_words: bad_ids })
    };
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()).caused_by(e))?
}
