//! Reads and checks the fields that completions and chat completions have in common.

use serde_json::Value;

use super::Serving;
use super::structured::RequestedGrammar;
use crate::engine::request::SamplingParams;
use crate::fields::{self, Fields};
use crate::text::truncation::{Truncation, TruncationSide};
use crate::{Error, Result};

/// Limit on the stop strings of one request.
pub(super) const MAX_STOPS: usize = 16;

/// Limit on the bytes of a stop string.
const MAX_STOP_BYTES: usize = 1024;

/// `max_tokens` of a request that lets its output fill the context.
pub(super) const NO_LIMIT: usize = usize::MAX;

/// Limit on `bad_words` of one request.
const MAX_BAD_WORDS: usize = 256;

/// Limit on the bytes of one of `bad_words`.
const MAX_BAD_WORD_BYTES: usize = 256;

/// Limit on `n`, the choices for one prompt.
const MAX_CHOICES: i64 = 128;

/// Limit on the alternatives that log-probabilities list.
pub(super) const MAX_TOP_LOGPROBS: i64 = 20;

/// Limit on `logprob_token_ids`.
const MAX_LOGPROB_TOKEN_IDS: usize = 128;

/// Limit on the bytes of `request_id`.
const MAX_REQUEST_ID: usize = 128;

/// Limit on the characters of `cache_salt`, as in vLLM.
const MAX_SALT: usize = 1024;

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
    /// The usage that a stream reports.
    pub(super) stream_usage: StreamUsage,
    /// Log-probabilities of the prompt are asked for, with this many alternatives.
    pub(super) prompt_logprobs: Option<usize>,
    /// The cut of the prompt.
    pub(super) truncation: Option<Truncation>,
    /// What the reply has besides the text.
    pub(super) reply: ReplyOptions,
    /// Order among waiting requests of the same adapters.
    pub(super) priority: i64,
    /// Separates cached prefixes.
    pub(super) cache_salt: Option<String>,
    /// The client's part of the reply's id.
    pub(super) request_id: Option<String>,
    /// Strings that are not generated (vLLM).
    pub(super) bad_words: Vec<String>,
    /// What the text must match.
    pub(super) grammar: Option<RequestedGrammar>,
    /// How sampled tokens become text.
    pub(super) text: TextOptions,
}

/// The usage that a stream reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct StreamUsage {
    /// As the last event.
    pub(super) at_end: bool,
    /// In every chunk.
    pub(super) in_chunks: bool,
}

/// What the reply has besides the text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct ReplyOptions {
    /// `token_ids` and `prompt_token_ids` (vLLM).
    pub(super) token_ids: bool,
    /// Log-probabilities name tokens `token_id:ID` (vLLM).
    pub(super) tokens_as_ids: bool,
    /// `service_tier` (OpenAI).
    pub(super) service_tier: bool,
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

/// Reads the common fields. `min_max_tokens` is the lower bound of `max_tokens`.
pub(super) fn parse(body: &Fields, serving: &Serving, min_max_tokens: i64) -> Result<CommonParams> {
    let (vocab_size, max_model_len) = (serving.codec.vocab_size(), serving.limits().max_model_len);
    let defaults = &serving.base.sampling;
    let max_tokens = max_tokens(body, min_max_tokens)?;
    let min_tokens = body.integer("min_tokens", 0..=i64::MAX)?.unwrap_or(0) as usize;
    if let Some(max) = max_tokens.filter(|max| min_tokens > *max) {
        let message = format!("`min_tokens` must be at most `max_tokens` ({max}), not {min_tokens}");
        return Err(Error::invalid(message).param("min_tokens").code("invalid_value"));
    }
    let number = |name, range, default: f32| Ok::<f32, Error>(body.number(name, range)?.map_or(default, |v| v as f32));
    let repetition_penalty = repetition_penalty(body)?.unwrap_or(defaults.repetition_penalty);
    let sampling = SamplingParams {
        temperature: number("temperature", 0.0..=2.0, defaults.temperature)?,
        top_p: number("top_p", 0.0..=1.0, defaults.top_p)?,
        // vLLM's clients send -1 for all tokens.
        top_k: body.integer("top_k", -1..=i64::MAX)?.map_or(defaults.top_k, |k| k.max(0) as usize),
        min_p: number("min_p", 0.0..=1.0, defaults.min_p)?,
        repetition_penalty,
        presence_penalty: number("presence_penalty", -2.0..=2.0, defaults.presence_penalty)?,
        frequency_penalty: number("frequency_penalty", -2.0..=2.0, defaults.frequency_penalty)?,
        logit_bias: logit_bias(body, vocab_size)?,
        allowed_token_ids: allowed_token_ids(body, vocab_size)?,
        bad_words: Vec::new(),
        seed: seed(body)?,
        max_tokens: 0,
        min_tokens,
        stop_token_ids: match body.array("stop_token_ids")? {
            Some(ids) => token_ids(ids, "stop_token_ids", vocab_size)?,
            None => Vec::new(),
        },
        ignore_eos: body.boolean("ignore_eos")?.unwrap_or(false),
        logprobs: None,
        logprob_token_ids: logprob_token_ids(body, vocab_size)?,
        prompt_logprobs: None,
        pooling: None,
    };
    let stream = body.boolean("stream")?.unwrap_or(false);
    Ok(CommonParams {
        sampling,
        max_tokens,
        n: body.integer("n", 1..=MAX_CHOICES)?.unwrap_or(1) as usize,
        stream,
        stream_usage: stream_usage(body, stream)?,
        prompt_logprobs: prompt_logprobs(body, stream)?,
        truncation: truncation(body, max_model_len)?,
        reply: ReplyOptions {
            token_ids: body.boolean("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: body.boolean("return_tokens_as_token_ids")?.unwrap_or(false),
            service_tier: body.string("service_tier")?.is_some(),
        },
        priority: body.integer("priority", i64::MIN..=i64::MAX)?.unwrap_or(0),
        cache_salt: cache_salt(body)?,
        request_id: request_id(body)?,
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

/// `max_tokens` under any of its names.
fn max_tokens(body: &Fields, min: i64) -> Result<Option<usize>> {
    let predict = body.integer("n_predict", -1..=i64::MAX)?;
    let unlimited = predict == Some(-1);
    let predict = match predict {
        Some(-1) => None,
        Some(n) if n < min => return Err(fields::wrong("n_predict", "-1 or an integer of at least 1", &n.into())),
        n => n,
    };
    let mut found: Option<(&str, i64)> = None;
    for (name, value) in [
        ("max_tokens", body.integer("max_tokens", min..=i64::MAX)?),
        ("max_completion_tokens", body.integer("max_completion_tokens", min..=i64::MAX)?),
        ("n_predict", predict),
    ] {
        let Some(value) = value else { continue };
        match found {
            Some((other, earlier)) if earlier != value => {
                let message =
                    format!("`{other}` is {earlier} and `{name}` is {value}: they mean the same, so give one of them");
                return Err(Error::invalid(message).param(name).code("invalid_value"));
            }
            _ => found = Some((name, value)),
        }
    }
    Ok(found.map(|(_, value)| value as usize).or(unlimited.then_some(NO_LIMIT)))
}

/// `repetition_penalty` under either name.
fn repetition_penalty(body: &Fields) -> Result<Option<f32>> {
    let mut found = None;
    for name in ["repetition_penalty", "repeat_penalty"] {
        let Some(value) = body.number(name, 0.0..=10.0)? else { continue };
        if value <= 0.0 {
            return Err(fields::wrong(name, "a number above 0 and at most 10", &value.into()));
        }
        if found.is_some_and(|other| other != value) {
            let message = "`repetition_penalty` and `repeat_penalty` mean the same, so give one of them";
            return Err(Error::invalid(message).param(name).code("invalid_value"));
        }
        found = Some(value);
    }
    Ok(found.map(|value| value as f32))
}

/// Any integer of 64 bits, signed or not.
fn seed(body: &Fields) -> Result<Option<u64>> {
    match body.get("seed") {
        Some(value) if value.is_u64() => Ok(value.as_u64()),
        _ => Ok(body.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64)),
    }
}

fn stream_usage(body: &Fields, stream: bool) -> Result<StreamUsage> {
    let Some(options) = body.object("stream_options")? else { return Ok(StreamUsage::default()) };
    if !stream {
        let message = "`stream_options` is only allowed when `stream` is true";
        return Err(Error::invalid(message).param("stream_options"));
    }
    fields::check_only(&options, &["include_usage", "include_obfuscation", "continuous_usage_stats"])?;
    // Obfuscation pads chunks against observers of their length. OpenAI adds it by default, so false is what happens here.
    if options.boolean("include_obfuscation")? == Some(true) {
        return Err(Error::invalid("`stream_options.include_obfuscation`: chunks are not padded; omit it")
            .param("stream_options.include_obfuscation")
            .code("unsupported_parameter"));
    }
    let at_end = options.boolean("include_usage")?.unwrap_or(false);
    Ok(StreamUsage { at_end, in_chunks: at_end && options.boolean("continuous_usage_stats")?.unwrap_or(false) })
}

fn prompt_logprobs(body: &Fields, stream: bool) -> Result<Option<usize>> {
    let asked = body.integer("prompt_logprobs", 0..=MAX_TOP_LOGPROBS)?.map(|n| n as usize);
    if asked.is_some() && stream {
        return Err(Error::invalid("`prompt_logprobs` cannot be streamed: set `stream` to false")
            .param("prompt_logprobs")
            .code("invalid_value"));
    }
    Ok(asked)
}

fn logprob_token_ids(body: &Fields, vocab_size: usize) -> Result<Vec<u32>> {
    let Some(ids) = body.array("logprob_token_ids")? else { return Ok(Vec::new()) };
    if ids.len() > MAX_LOGPROB_TOKEN_IDS {
        let allowed = format!("an array of at most {MAX_LOGPROB_TOKEN_IDS} token ids");
        return Err(fields::wrong("logprob_token_ids", &allowed, &Value::from(ids.len())));
    }
    if matches!(body.get("logprobs"), None | Some(Value::Bool(false))) {
        let message = "`logprob_token_ids` is only allowed with `logprobs`";
        return Err(Error::invalid(message).param("logprob_token_ids").code("invalid_value"));
    }
    token_ids(ids, "logprob_token_ids", vocab_size)
}

/// The cut of a prompt (vLLM).
pub(super) fn truncation(body: &Fields, max_model_len: usize) -> Result<Option<Truncation>> {
    let side = body.one_of("truncation_side", &[("left", TruncationSide::Left), ("right", TruncationSide::Right)])?;
    match body.integer("truncate_prompt_tokens", -1..=max_model_len as i64)? {
        None => Ok(None),
        Some(-1) => Ok(Some(Truncation { tokens: max_model_len, side })),
        Some(0) => {
            let allowed = format!("-1 for this server's context length, or from 1 to {max_model_len}");
            Err(fields::wrong("truncate_prompt_tokens", &allowed, &0.into()))
        }
        Some(tokens) => Ok(Some(Truncation { tokens: tokens as usize, side })),
    }
}

/// The salt of the prefix cache (vLLM).
pub(super) fn cache_salt(body: &Fields) -> Result<Option<String>> {
    let salt = body.string("cache_salt")?;
    if salt.is_some_and(|salt| !(1..=MAX_SALT).contains(&salt.chars().count())) {
        let message = format!("`cache_salt` must have from 1 to {MAX_SALT} characters");
        return Err(Error::invalid(message).param("cache_salt").code("invalid_value"));
    }
    Ok(salt.map(str::to_owned))
}

/// The client's part of the reply's id (vLLM).
fn request_id(body: &Fields) -> Result<Option<String>> {
    let Some(text) = body.string("request_id")? else { return Ok(None) };
    if !(1..=MAX_REQUEST_ID).contains(&text.len()) || !text.bytes().all(|b| b.is_ascii_graphic()) {
        let allowed = format!("1 to {MAX_REQUEST_ID} printable ASCII characters without spaces");
        return Err(fields::wrong("request_id", &allowed, &text.into()));
    }
    Ok(Some(text.to_owned()))
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
