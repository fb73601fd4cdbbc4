//! Reads and checks the fields that completions and chat completions have in common.

use serde_json::Value;

use super::structured::RequestedGrammar;
use crate::engine::request::SamplingParams;
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// Limit on the stop strings of one request.
const MAX_STOPS: usize = 16;

/// Limit on the bytes of a stop string.
const MAX_STOP_BYTES: usize = 1024;

/// Limit on `bad_words` of one request.
const MAX_BAD_WORDS: usize = 256;

/// Limit on the bytes of one of `bad_words`.
const MAX_BAD_WORD_BYTES: usize = 256;

/// Limit on `n`, the choices for one prompt.
const MAX_CHOICES: i64 = 128;

/// Limit on the alternatives that log-probabilities list.
pub(super) const MAX_TOP_LOGPROBS: i64 = 20;

/// The fields read here, and `user`, which OpenAI's clients send and which has no effect.
pub(super) const COMMON_FIELDS: &[&str] = &[
    "model",
    "adapter",
    "stream",
    "stream_options",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "ignore_eos",
    "logprobs",
    "user",
];

/// Fields of OpenAI's and vLLM's APIs that are not supported and cannot be ignored: an answer without them would be wrong.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("suffix", "insertion is not supported"),
    ("tools", "tools are not supported"),
    ("functions", "functions are not supported"),
    ("grammar_lazy", "a grammar holds from the first token on"),
    ("use_beam_search", "beam search is not supported"),
    ("prompt_logprobs", "use `echo` with `logprobs` on /v1/completions"),
    ("prompt_embeds", "embeddings as prompts are not supported"),
    ("audio", "only text is supported"),
];

/// The parameters that completions and chat completions have in common.
#[derive(Debug)]
pub(super) struct CommonParams {
    /// How to sample. The endpoint sets its `max_tokens` and its log-probabilities later.
    pub(super) sampling: SamplingParams,
    /// Limit on the generated tokens, if the request has one.
    pub(super) max_tokens: Option<usize>,
    /// Choices for each prompt.
    pub(super) n: usize,
    /// Answer with server-sent events.
    pub(super) stream: bool,
    /// Send the usage as the last event of a stream.
    pub(super) include_usage: bool,
    /// Strings that are not generated (vLLM).
    pub(super) bad_words: Vec<String>,
    /// What the text must match.
    pub(super) grammar: Option<RequestedGrammar>,
    /// How sampled tokens become text.
    pub(super) text: TextOptions,
}

/// How sampled tokens become text.
#[derive(Debug, Clone, Default)]
pub(super) struct TextOptions {
    /// Strings that end the text.
    pub(super) stops: Vec<String>,
    /// Keep the stop string in the text.
    pub(super) include_stop: bool,
    /// Leave special tokens out of the text.
    pub(super) skip_special_tokens: bool,
}

/// Reads the common fields. `vocab_size` bounds token ids; `min_max_tokens` is the lower bound of `max_tokens`.
pub(super) fn parse(body: &Fields, vocab_size: usize, min_max_tokens: i64) -> Result<CommonParams> {
    refuse_unsupported(body)?;
    let defaults = SamplingParams::default();
    let max_tokens = match (
        body.integer("max_tokens", min_max_tokens..=i64::MAX)?,
        body.integer("max_completion_tokens", min_max_tokens..=i64::MAX)?,
    ) {
        (Some(a), Some(b)) if a != b => {
            return Err(Error::invalid(format!(
                "`max_tokens` is {a} and `max_completion_tokens` is {b}: they mean the same, so give one of them"
            ))
            .param("max_completion_tokens"));
        }
        (a, b) => a.or(b).map(|n| n as usize),
    };
    let min_tokens = body.integer("min_tokens", 0..=i64::MAX)?.unwrap_or(0) as usize;
    if let Some(max) = max_tokens.filter(|max| min_tokens > *max) {
        let message = format!("`min_tokens` must be at most `max_tokens` ({max}), not {min_tokens}");
        return Err(Error::invalid(message).param("min_tokens").code("invalid_value"));
    }
    let number = |name, range, default: f32| Ok::<f32, Error>(body.number(name, range)?.map_or(default, |v| v as f32));
    let repetition_penalty = number("repetition_penalty", 0.0..=10.0, defaults.repetition_penalty)?;
    if repetition_penalty <= 0.0 {
        return Err(Error::invalid("`repetition_penalty` must be a number above 0 and at most 10, not 0")
            .param("repetition_penalty")
            .code("invalid_value"));
    }
    let sampling = SamplingParams {
        temperature: number("temperature", 0.0..=2.0, defaults.temperature)?,
        top_p: number("top_p", 0.0..=1.0, defaults.top_p)?,
        // vLLM's clients send -1 for all tokens.
        top_k: body.integer("top_k", -1..=i64::MAX)?.unwrap_or(0).max(0) as usize,
        min_p: number("min_p", 0.0..=1.0, defaults.min_p)?,
        repetition_penalty,
        presence_penalty: number("presence_penalty", -2.0..=2.0, defaults.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, defaults.frequency_penalty)?,
        logit_bias: logit_bias(body, vocab_size)?,
        allowed_token_ids: allowed_token_ids(body, vocab_size)?,
        bad_words: Vec::new(),
        seed: body.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        max_tokens: 0,
        min_tokens,
        stop_token_ids: match body.array("stop_token_ids")? {
            Some(ids) => token_ids(ids, "stop_token_ids", vocab_size)?,
            None => Vec::new(),
        },
        ignore_eos: body.boolean("ignore_eos")?.unwrap_or(false),
        logprobs: None,
        logprob_token_ids: Vec::new(),
        prompt_logprobs: None,
        pooling: None,
    };
    let stream = body.boolean("stream")?.unwrap_or(false);
    let include_usage = match body.object("stream_options")? {
        Some(_) if !stream => {
            return Err(
                Error::invalid("`stream_options` is only allowed when `stream` is true").param("stream_options")
            );
        }
        Some(options) => {
            fields::check_unknown(&options, &["include_usage", "include_obfuscation", "continuous_usage_stats"])?;
            options.boolean("include_usage")?.unwrap_or(false)
        }
        None => false,
    };
    Ok(CommonParams {
        sampling,
        max_tokens,
        n: body.integer("n", 1..=MAX_CHOICES)?.unwrap_or(1) as usize,
        stream,
        include_usage,
        bad_words: bad_words(body)?,
        grammar: RequestedGrammar::parse(body)?,
        text: TextOptions {
            stops: stops(body)?,
            include_stop: body.boolean("include_stop_str_in_output")?.unwrap_or(false),
            skip_special_tokens: body.boolean("skip_special_tokens")?.unwrap_or(true),
        },
    })
}

/// The elements of an array as token ids.
pub(super) fn token_ids(values: &[Value], path: &str, vocab_size: usize) -> Result<Vec<u32>> {
    let id = |(i, value)| fields::integer(value, &format!("{path}[{i}]"), 0..=vocab_size as i64 - 1);
    values.iter().enumerate().map(|entry| id(entry).map(|id| id as u32)).collect()
}

fn refuse_unsupported(body: &Fields) -> Result<()> {
    for (name, reason) in UNSUPPORTED {
        let Some(value) = body.get(name) else { continue };
        let harmless = match value {
            Value::Bool(on) => !on,
            Value::String(s) => s.is_empty(),
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            Value::Null | Value::Number(_) => false,
        };
        if !harmless {
            return Err(Error::invalid(format!("`{name}`: {reason}")).param(*name).code("unsupported_parameter"));
        }
    }
    Ok(())
}

fn logit_bias(body: &Fields, vocab_size: usize) -> Result<Vec<(u32, f32)>> {
    let Some(map) = body.object("logit_bias")? else { return Ok(Vec::new()) };
    map.names()
        .map(|key| {
            let path = map.path_of(key);
            let id = key.parse::<u32>().ok().filter(|id| (*id as usize) < vocab_size).ok_or_else(|| {
                Error::invalid(format!("`{path}`: keys must be token ids from 0 to {}, not {key:?}", vocab_size - 1))
                    .param("logit_bias")
                    .code("invalid_value")
            })?;
            let bias = map.number(key, -100.0..=100.0)?.unwrap_or(0.0);
            Ok((id, bias as f32))
        })
        .collect()
}

fn allowed_token_ids(body: &Fields, vocab_size: usize) -> Result<Vec<u32>> {
    match body.array("allowed_token_ids")? {
        None => Ok(Vec::new()),
        Some([]) => {
            Err(fields::wrong("allowed_token_ids", "an array of at least one token id", &Value::Array(Vec::new())))
        }
        Some(ids) => token_ids(ids, "allowed_token_ids", vocab_size),
    }
}

fn bad_words(body: &Fields) -> Result<Vec<String>> {
    let Some(words) = body.array("bad_words")? else { return Ok(Vec::new()) };
    let allowed = format!("up to {MAX_BAD_WORDS} strings, each of 1 to {MAX_BAD_WORD_BYTES} bytes");
    if words.len() > MAX_BAD_WORDS {
        return Err(fields::wrong("bad_words", &allowed, &words.len().into()));
    }
    let word = |(i, value): (usize, &Value)| match value.as_str().filter(|word| !word.trim().is_empty()) {
        Some(word) if word.len() <= MAX_BAD_WORD_BYTES => Ok(word.to_owned()),
        _ => Err(fields::wrong(&format!("bad_words[{i}]"), &allowed, value)),
    };
    words.iter().enumerate().map(word).collect()
}

fn stops(body: &Fields) -> Result<Vec<String>> {
    let allowed = format!("a string or an array of up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_BYTES} bytes");
    let check = |value: &Value, path: &str| match value {
        Value::String(s) if (1..=MAX_STOP_BYTES).contains(&s.len()) => Ok(s.clone()),
        other => Err(fields::wrong(path, &allowed, other)),
    };
    match body.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_STOPS => {
            list.iter().enumerate().map(|(i, v)| check(v, &format!("stop[{i}]"))).collect()
        }
        Some(Value::Array(list)) => {
            Err(Error::invalid(format!("`stop` must be {allowed}, not an array of {}", list.len()))
                .param("stop")
                .code("invalid_value"))
        }
        Some(other) => Ok(vec![check(other, "stop")?]),
    }
}
