//! Checked reading of JSON objects, such as request bodies and training records.
//!
//! [`Fields`] gives typed access to the fields of one object. Every error names the field, the allowed values and the value
//! found. [`check_unknown`] and [`check_only`] find misspelt and unknown fields.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::{Error, Result};

/// Parses a request body. Errors: `Invalid`, with the line and column of malformed JSON.
pub fn parse(body: &[u8]) -> Result<Value> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(Error::invalid("the request body is empty: send a JSON object").code("invalid_json"));
    }
    serde_json::from_slice(body)
        .map_err(|e| Error::invalid(format!("the request body is not valid JSON: {e}")).code("invalid_json"))
}

/// The fields of one object. A field that is `null` counts as absent, because OpenAI's clients send `null` for that.
pub struct Fields<'a> {
    /// The object.
    object: &'a Map<String, Value>,
    /// The object's path in the body, such as `stream_options`; empty for the body itself.
    path: String,
}

impl<'a> Fields<'a> {
    /// The fields of a request body. Errors: it is not an object.
    pub fn of_body(value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(object) => Ok(Self { object, path: String::new() }),
            other => Err(Error::invalid(format!("the request body must be a JSON object, not {}", describe(other)))),
        }
    }

    /// The fields of the value at `path`. Errors: it is not an object.
    pub fn of_value(value: &'a Value, path: impl Into<String>) -> Result<Self> {
        let path = path.into();
        match value {
            Value::Object(object) => Ok(Self { object, path }),
            other => Err(wrong(&path, "an object", other)),
        }
    }

    /// The path of a field in the body, such as `stream_options.include_usage`.
    pub fn path_of(&self, name: &str) -> String {
        if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) }
    }

    /// The value of a field, whatever its type.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|v| !v.is_null())
    }

    /// The names of all fields that are not `null`.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.object.iter().filter(|(_, v)| !v.is_null()).map(|(k, _)| k.as_str())
    }

    /// The value of a field that must not be absent. `what` describes it in the error.
    pub fn required<T>(&self, name: &str, value: Option<T>, what: &str) -> Result<T> {
        value.ok_or_else(|| {
            let path = self.path_of(name);
            Error::invalid(format!("`{path}` is required: {what}")).param(path).code("missing_required_parameter")
        })
    }

    /// A field that is a string.
    pub fn string(&self, name: &str) -> Result<Option<&'a str>> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A field that is `true` or `false`.
    pub fn boolean(&self, name: &str) -> Result<Option<bool>> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A field that is an array.
    pub fn array(&self, name: &str) -> Result<Option<&'a [Value]>> {
        self.typed(name, "an array", |v| v.as_array().map(Vec::as_slice))
    }

    /// A field that is one of a few words: the value of its word, or of the first if it is absent.
    pub fn one_of<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<T> {
        let Some(value) = self.get(name) else { return Ok(words[0].1) };
        let found = words.iter().find(|(word, _)| value.as_str() == Some(word)).map(|(_, value)| *value);
        let allowed = || words.iter().map(|(word, _)| format!("{word:?}")).collect::<Vec<_>>().join(" or ");
        found.ok_or_else(|| wrong(&self.path_of(name), &allowed(), value))
    }

    /// A field that is an object.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>> {
        self.get(name).map(|v| Fields::of_value(v, self.path_of(name))).transpose()
    }

    /// A field that is a number in a range.
    pub fn number(&self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f64>> {
        self.get(name).map(|v| number(v, &self.path_of(name), range)).transpose()
    }

    /// A field that is an integer in a range. `16.0` counts as an integer.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        self.get(name).map(|v| integer(v, &self.path_of(name), range)).transpose()
    }

    fn typed<T>(&self, name: &str, what: &str, get: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(name).map(|v| get(v).ok_or_else(|| wrong(&self.path_of(name), what, v))).transpose()
    }
}

/// The value at `path` as a number in a range.
pub fn number(value: &Value, path: &str, range: RangeInclusive<f64>) -> Result<f64> {
    value
        .as_f64()
        .filter(|n| range.contains(n))
        .ok_or_else(|| wrong(path, &format!("a number {}", describe_range(&range)), value))
}

/// The value at `path` as an integer in a range.
pub fn integer(value: &Value, path: &str, range: RangeInclusive<i64>) -> Result<i64> {
    // Beyond 2^53 a float is not exact. No token count or id is that large.
    let whole = |n: f64| (n.fract() == 0.0 && n.abs() < 9e15).then_some(n as i64);
    let parsed = value.as_i64().or_else(|| value.as_f64().and_then(whole));
    parsed
        .filter(|n| range.contains(n))
        .ok_or_else(|| wrong(path, &format!("an integer {}", describe_range(&range)), value))
}

fn describe_range<T: Display + RangeEnd>(range: &RangeInclusive<T>) -> String {
    let (from, to) = (range.start(), range.end());
    if to.is_open() { format!("of at least {from}") } else { format!("from {from} to {to}") }
}

/// Numbers of which one value, as the upper end of a range, means no limit.
trait RangeEnd {
    fn is_open(&self) -> bool;
}

impl RangeEnd for i64 {
    fn is_open(&self) -> bool {
        *self == i64::MAX
    }
}

impl RangeEnd for f64 {
    fn is_open(&self) -> bool {
        self.is_infinite()
    }
}

/// `Invalid`: the value at `path` is not among the allowed ones.
pub fn wrong(path: &str, allowed: &str, got: &Value) -> Error {
    Error::invalid(format!("`{path}` must be {allowed}, not {}", describe(got))).param(path).code("invalid_value")
}

/// `Invalid`: the field at `path` is not supported, and why.
pub fn unsupported(path: String, why: &str) -> Error {
    Error::invalid(format!("`{path}` is not supported: {why}")).param(path).code("unsupported_parameter")
}

/// A short description of a value, for messages.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) if s.chars().count() > 40 => {
            format!("the string {:?}", s.chars().take(40).chain(['…']).collect::<String>())
        }
        Value::String(s) => format!("the string {s:?}"),
        Value::Array(a) if a.is_empty() => "an empty array".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

/// Fields by which other servers select an adapter. If one were ignored, the base would answer.
const FOREIGN_SELECTORS: &[&str] = &[
    "lora",
    "lora_path",
    "lora_name",
    "lora_id",
    "lora_request",
    "adapter_id",
    "adapter_name",
    "adapters",
    "adapter_source",
];

/// Limit on the names that are compared with known ones, bytes.
const MAX_COMPARED_NAME: usize = 64;

/// Accepts unknown fields, because clients send extra ones. Refuses a field that is almost certainly meant as one of `known`:
/// misspelt, written in another case, or another server's way to select an adapter.
pub fn check_unknown(fields: &Fields, known: &[&str]) -> Result<()> {
    let meant = |name| meant(name, known).map(|meant| (name, meant));
    match fields.names().filter(|name| !known.contains(name)).find_map(meant) {
        Some((name, meant)) => Err(misspelt_field(fields, name, meant)),
        None => Ok(()),
    }
}

/// The error for a field that was meant as another.
pub fn misspelt_field(fields: &Fields, name: &str, meant: &str) -> Error {
    let path = fields.path_of(name);
    Error::invalid(format!("unknown field `{path}`: did you mean `{}`?", fields.path_of(meant)))
        .param(path)
        .code("unknown_field")
}

/// The one of `known` that an unknown name is almost certainly meant as.
pub fn meant<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    if FOREIGN_SELECTORS.contains(&name) && known.contains(&"adapter") {
        return Some("adapter");
    }
    known.iter().find(|known| name.len() <= MAX_COMPARED_NAME && misspelt(name, known)).copied()
}

/// Refuses fields other than `known`: for objects of our own API, where every field has a meaning.
pub fn check_only(fields: &Fields, known: &[&str]) -> Result<()> {
    let Some(name) = fields.names().find(|name| !known.contains(name)) else { return Ok(()) };
    check_unknown(fields, known)?;
    let path: String = fields.path_of(name).chars().take(2 * MAX_COMPARED_NAME).collect();
    let message = format!("unknown field `{path}`: the known fields are {}", known.join(", "));
    Err(Error::invalid(message).param(path).code("unknown_field"))
}

fn misspelt(name: &str, known: &str) -> bool {
    let plain = |s: &str| s.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_ascii_lowercase();
    let (a, b) = (plain(name), plain(known));
    let allowed = match b.len() {
        0..4 => 0,
        4..7 => 1,
        _ => 2,
    };
    strsim::osa_distance(&a, &b) <= allowed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(name: &str) -> Result<()> {
        let ours = [
            "model",
            "prompt",
            "messages",
            "adapter",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "max_tokens",
            "stop",
            "seed",
            "n",
            "echo",
            "best_of",
            "logprobs",
            "top_logprobs",
            "stream",
            "stream_options",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "stop_token_ids",
            "min_tokens",
            "ignore_eos",
            "user",
            "max_completion_tokens",
            "skip_special_tokens",
            "add_special_tokens",
            "include_stop_str_in_output",
        ];
        check_unknown(&Fields::of_body(&json!({name: 1}))?, &ours)
    }

    #[test]
    fn fields_of_other_servers_are_not_misspellings() {
        for name in "allowed_token_ids audio bad_words cache_prompt cache_salt chat_template chat_template_kwargs \
                     continue_final_message detokenize do_sample documents dynatemp_range function_call grammar guided_json \
                     id_slot json_schema kv_transfer_params length_penalty logits_processors max_new_tokens metadata min_keep \
                     mirostat mirostat_tau modalities n_keep n_predict n_probs parallel_tool_calls prediction priority \
                     prompt_cache_key reasoning_effort repeat_last_n repeat_penalty request_id response_format \
                     return_token_ids safety_identifier samplers service_tier spaces_between_special_tokens store suffix \
                     tfs_z tool_choice tools top_n_sigma truncate typical_p use_beam_search verbosity xtc_probability"
            .split_whitespace()
        {
            check(name).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    #[test]
    fn misspellings_name_the_field() {
        for (name, meant) in [
            ("tempurature", "temperature"),
            ("TEMPERATURE", "temperature"),
            ("top-p", "top_p"),
            ("maxtokens", "max_tokens"),
            ("promt", "prompt"),
            ("message", "messages"),
            ("seeed", "seed"),
            ("adpater", "adapter"),
            ("adapterId", "adapter"),
            ("lora", "adapter"),
        ] {
            let error = check(name).expect_err(name).to_string();
            assert!(error.ends_with(&format!("did you mean `{meant}`?")), "{error}");
        }
    }
}
