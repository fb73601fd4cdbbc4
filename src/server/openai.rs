//! `POST /v1/completions` and `/v1/chat/completions`: reads and checks the fields, and makes a [`CheckedRequest`] of them.

use std::time::Instant;

use axum::extract::State;
use axum::response::Response;
use serde_json::Value;

use super::chat::{self, CheckedChat};
use super::error_response::ErrorResponse;
use super::extract::JsonBody;
use super::field_table::{CHAT_COMPLETIONS, COMPLETIONS};
use super::generate::{self, CheckedRequest};
use super::params::{self, CommonParams, MAX_TOP_LOGPROBS, NO_LIMIT};
use super::response::{EchoedPrompt, Endpoint, ReplyContext, ResponseBuilder};
use super::select_adapter::LeasedAdapters;
use super::stream::{AnswerFormat, OutputOptions};
use super::{Serving, SharedApp};
use crate::engine::context_length_exceeded;
use crate::error::blocking;
use crate::fields::{self, Fields};
use crate::text::codec::TextCodec;
use crate::text::messages::ChatPrompt;
use crate::text::reasoning::ReasoningFormat;
use crate::text::truncation::Truncation;
use crate::{Error, Result};

/// Default of `max_tokens` for completions, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Limit on the prompts of one request.
const MAX_PROMPTS: usize = 2048;

/// Limit on `best_of`, the sequences generated for one prompt.
pub(super) const MAX_BEST_OF: i64 = 128;

/// `POST /v1/completions`.
pub(super) async fn completions(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    COMPLETIONS.check(&Fields::of_body(&body)?)?;
    answer(app, &body, Endpoint::Completion).await
}

/// `POST /v1/chat/completions`.
pub(super) async fn chat_completions(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    CHAT_COMPLETIONS.check(&Fields::of_body(&body)?)?;
    answer(app, &body, Endpoint::Chat).await
}

async fn answer(app: SharedApp, body: &Value, endpoint: Endpoint) -> Result<Response, ErrorResponse> {
    let prefix = if endpoint == Endpoint::Chat { "chatcmpl-" } else { "cmpl-" };
    generate::answer(app, body, endpoint, prefix, |context| Box::new(ResponseBuilder::new(context))).await
}

/// Reads the fields of a completion or a chat, and tokenizes its prompts. The caller has checked that all fields are known.
///
/// `prefix` begins the id of the reply. Errors name the adapter, once it is known, for the metrics.
pub(super) async fn prepare(
    serving: &Serving,
    body: &Value,
    endpoint: Endpoint,
    prefix: &str,
) -> Result<CheckedRequest, ErrorResponse> {
    let arrived = Instant::now();
    let body = Fields::of_body(body)?;
    let adapters = LeasedAdapters::select(&body, &serving.base.names, &serving.registry).await?;
    let label = adapters.label.clone();
    let run = async {
        let parsed = match endpoint {
            Endpoint::Completion => ParsedRequest::completion(&body, serving),
            Endpoint::Chat => ParsedRequest::chat(&body, serving),
        };
        let ParsedRequest { mut common, best_of, logprobs, echo, inputs, mut answer, include_reasoning } = parsed?;
        let work = EncodingWork {
            inputs,
            echo,
            truncation: common.truncation,
            bad_words: std::mem::take(&mut common.bad_words),
            reasoning: answer.as_ref().and_then(|answer| answer.reasoning),
        };
        let encoded = encode(serving, work).await?;
        common.sampling.bad_words = encoded.bad_words;
        if let Some(answer) = &mut answer {
            answer.starts_in_reasoning = encoded.starts_in_reasoning;
            common.grammar = chat::grammar(common.grammar.take(), answer)?;
        }
        let grammar = match common.grammar.take() {
            Some(grammar) => Some(grammar.compile(&serving.grammars).await?),
            None => None,
        };
        let chosen = !common.sampling.logprob_token_ids.is_empty();
        let params = encoded.prompts.iter().map(|ids| {
            let mut params = common.sampling.clone();
            params.max_tokens = max_tokens(serving, ids.len(), common.max_tokens, endpoint)?;
            params.logprobs = if chosen { Some(0) } else { logprobs.or((best_of > common.n).then_some(0)) };
            params.prompt_logprobs = if echo { logprobs.max(common.prompt_logprobs) } else { common.prompt_logprobs };
            Ok(params)
        });
        let params = params.collect::<Result<Vec<_>>>()?;
        let id = match &common.request_id {
            Some(id) => format!("{prefix}{id}"),
            None => format!("{prefix}{}", uuid::Uuid::new_v4().simple()),
        };
        let tools = answer.as_ref().and_then(|answer| answer.tools.clone());
        let context = ReplyContext {
            endpoint,
            id,
            model: body.get("model").and_then(Value::as_str).unwrap_or(serving.base.name()).to_owned(),
            adapter: adapters.adapter.clone(),
            generation: adapters.generation.clone(),
            system_fingerprint: system_fingerprint(serving),
            created: crate::time::unix_seconds(std::time::SystemTime::now()),
            temperature: common.sampling.temperature,
            top_p: common.sampling.top_p,
            logprobs,
            prompt_logprobs: common.prompt_logprobs,
            options: common.reply,
            stream_usage: common.stream_usage,
            include_reasoning,
            tools,
            echo: encoded.echo,
            prompts: encoded.prompts,
            n: common.n,
            codec: serving.codec.clone(),
        };
        let output = OutputOptions { text: common.text, min_tokens: common.sampling.min_tokens, answer };
        Ok(CheckedRequest {
            context,
            adapters,
            stream: common.stream,
            output,
            best_of,
            params,
            grammar,
            priority: common.priority,
            cache_salt: common.cache_salt,
            arrived,
        })
    };
    run.await.map_err(|error| ErrorResponse { error: Box::new(error), adapter: label })
}

/// OpenAI's `system_fingerprint`: the same for the same server version and base.
fn system_fingerprint(serving: &Serving) -> String {
    let base: String = serving.base.fingerprint.chars().take(10).collect();
    format!("fp_{base}_{}", env!("CARGO_PKG_VERSION"))
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
        Some(NO_LIMIT) => Ok(limit - prompt),
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
    /// The texts before and behind the output.
    Infill {
        /// Before it.
        prefix: String,
        /// Behind it.
        suffix: String,
    },
    /// A chat, which the template renders.
    Chat(Box<ChatPrompt>),
}

impl PromptInput {
    /// Its token ids, cut as asked for, and its text, if it has one. Renders a chat.
    pub(super) fn encode(
        self,
        codec: &TextCodec,
        truncation: Option<Truncation>,
    ) -> Result<(Vec<u32>, Option<String>)> {
        let encode = |text: &str, special| match truncation {
            Some(truncation) => truncation.encode_prompt(codec, text, special),
            None => codec.encode_prompt(text, special),
        };
        let cut = |ids: Vec<u32>| match truncation {
            Some(truncation) => truncation.cut(&ids).to_vec(),
            None => ids,
        };
        Ok(match self {
            Self::Text(text, special) => (encode(&text, special)?, Some(text)),
            Self::Ids(ids) => (cut(ids), None),
            Self::Infill { prefix, suffix } => (cut(codec.encode_infill(&prefix, &suffix)?), None),
            Self::Chat(prompt) => {
                let text = codec.render_chat(&prompt)?;
                (encode(&text, false)?, Some(text))
            }
        })
    }
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
    /// For chats: how the answer is read.
    answer: Option<AnswerFormat>,
    /// The thinking is part of the reply.
    include_reasoning: bool,
}

impl ParsedRequest {
    fn completion(body: &Fields, serving: &Serving) -> Result<Self> {
        let vocab_size = serving.codec.vocab_size();
        let common = params::parse(body, serving, 0)?;
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
        let echo = body.boolean("echo")?.unwrap_or(false);
        let mut inputs = prompts(body, "prompt", vocab_size, add_special_tokens)?;
        serving.check_sequences(inputs.len() * best_of, "prompt")?;
        if let Some(suffix) = body.string("suffix")?.filter(|suffix| !suffix.is_empty()) {
            inputs = inputs.into_iter().map(|input| infill(input, suffix, echo)).collect::<Result<_>>()?;
        }
        Ok(Self {
            best_of,
            logprobs: body.integer("logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize),
            echo,
            inputs,
            common,
            answer: None,
            include_reasoning: true,
        })
    }

    fn chat(body: &Fields, serving: &Serving) -> Result<Self> {
        let common = params::parse(body, serving, 1)?;
        let top = body.integer("top_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize);
        let wanted = body.boolean("logprobs")?.unwrap_or(false);
        if top.is_some_and(|top| top > 0) && !wanted {
            return Err(Error::invalid("`top_logprobs` is only allowed when `logprobs` is true").param("top_logprobs"));
        }
        serving.check_sequences(common.n, "n")?;
        let CheckedChat { prompt, answer, include_reasoning } = chat::parse(body, &serving.codec)?;
        Ok(Self {
            best_of: common.n,
            logprobs: wanted.then_some(top.unwrap_or(0)),
            echo: false,
            inputs: vec![PromptInput::Chat(Box::new(prompt))],
            common,
            answer: Some(answer),
            include_reasoning,
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

/// The prompt of a text before and a text behind the output.
fn infill(input: PromptInput, suffix: &str, echo: bool) -> Result<PromptInput> {
    let refuse = |message: &str| Err(Error::invalid(message).param("suffix").code("invalid_value"));
    match input {
        PromptInput::Text(..) if echo => {
            refuse("`suffix` and `echo` cannot be combined: the prompt is not the text before it")
        }
        PromptInput::Text(prefix, _) => Ok(PromptInput::Infill { prefix, suffix: suffix.to_owned() }),
        _ => refuse("`suffix` needs a `prompt` of text, not token ids"),
    }
}

/// The texts of a request, to be tokenized.
struct EncodingWork {
    inputs: Vec<PromptInput>,
    /// The reply repeats the prompts.
    echo: bool,
    /// The cut of the prompts.
    truncation: Option<Truncation>,
    bad_words: Vec<String>,
    /// Whether a prompt opens the thinking is found by this format.
    reasoning: Option<ReasoningFormat>,
}

/// The texts of a request as token ids.
struct EncodedRequest {
    prompts: Vec<Vec<u32>>,
    /// What `echo` repeats: parallel to `prompts`, or empty.
    echo: Vec<EchoedPrompt>,
    bad_words: Vec<Vec<u32>>,
    /// The prompt of a chat has opened the thinking.
    starts_in_reasoning: bool,
}

/// Renders and tokenizes on a blocking thread.
async fn encode(serving: &Serving, work: EncodingWork) -> Result<EncodedRequest> {
    let codec = serving.codec.clone();
    let run = move || {
        let mut encoded =
            EncodedRequest { prompts: Vec::new(), echo: Vec::new(), bad_words: Vec::new(), starts_in_reasoning: false };
        for input in work.inputs {
            let is_chat = matches!(input, PromptInput::Chat(_));
            let (ids, text) = input.encode(&codec, work.truncation)?;
            if let (true, Some(text), Some(format)) = (is_chat, &text, work.reasoning) {
                encoded.starts_in_reasoning = format.opened_by(text);
            }
            // A cut prompt is no longer the text of the request.
            let text = text.filter(|_| work.truncation.is_none_or(|cut| ids.len() < cut.tokens));
            if work.echo {
                encoded.echo.push(EchoedPrompt::new(&codec, &ids, text)?);
            }
            encoded.prompts.push(ids);
        }
        for word in &work.bad_words {
            // A word has other tokens after a space than at the beginning.
            for text in [word.trim_start().to_owned(), format!(" {}", word.trim_start())] {
                let ids = codec.encode(&text, false)?;
                if !encoded.bad_words.contains(&ids) {
                    encoded.bad_words.push(ids);
                }
            }
        }
        Ok(encoded)
    };
    blocking(run).await
}
