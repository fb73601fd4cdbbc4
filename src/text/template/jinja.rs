//! What chat templates find in transformers' Jinja, where minijinja lacks it or does otherwise.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value, ValueKind, from_args};
use minijinja::{Environment, Error as JinjaError, ErrorKind, State};
use minijinja_contrib::pycompat;

use super::python_json::{self, JsonStyle};
use crate::{Error, Result};

/// An environment without templates.
pub(super) fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|e| Error::internal(e.to_string()).caused_by(e))?);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::None => Ok(out.write_str("None")?),
        ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", tojson);
    environment.add_filter("from_json", from_json);
    environment.add_filter("fromjson", from_json);
    // In Python, what has a length and can be indexed is a sequence.
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain && value.as_object().is_some());
    environment.add_function("raise_exception", |message: String| -> Result<Value, JinjaError> {
        Err(JinjaError::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

fn failed(why: impl Into<std::borrow::Cow<'static, str>>) -> JinjaError {
    JinjaError::new(ErrorKind::InvalidOperation, why)
}

/// The filter `tojson`: Python's `json.dumps`, with transformers' default of `ensure_ascii=False`.
fn tojson(value: &Value, kwargs: Kwargs) -> Result<Value, JinjaError> {
    let mut style = JsonStyle::default();
    style.ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    style.sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if let Some(indent) = kwargs.get::<Option<Value>>("indent")? {
        style.set_indent(match (indent.as_str(), u8::try_from(indent.clone())) {
            (Some(text), _) => text.to_owned(),
            (None, Ok(width)) => " ".repeat(width.into()),
            _ => return Err(failed("tojson: `indent` must be a string, or a number from 0 to 255")),
        });
    }
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators)
            .map_err(|_| failed("tojson: `separators` must be a pair of strings"))?;
        (style.item_separator, style.key_separator) = (item, key);
    }
    kwargs.assert_all_used()?;
    python_json::dumps(value, &style).map(Value::from_safe_string).map_err(failed)
}

/// The filter `from_json`.
fn from_json(text: &str) -> Result<Value, JinjaError> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|e| failed(format!("from_json: {e}")))?;
    Ok(Value::from(Serde(&value)))
}

/// The function `strftime_now`: the local time in a `strftime` format.
fn strftime_now(format: String) -> Result<String, JinjaError> {
    use std::fmt::Write;
    let mut out = String::new();
    write!(out, "{}", chrono::Local::now().format(&format))
        .map_err(|_| failed(format!("strftime_now: invalid format {format:?}")))?;
    Ok(out)
}

/// Methods of Python's `str`, `list` and `dict`.
fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, JinjaError> {
    if let Some(text) = value.as_str()
        && let Some(result) = string_method(text, method, args)
    {
        return result;
    }
    match (value.kind(), method) {
        (ValueKind::Map, "copy") => from_args::<()>(args).map(|()| value.clone()),
        (ValueKind::Seq, "index") => {
            let (what,): (&Value,) = from_args(args)?;
            let found = value.try_iter()?.position(|item| item == *what);
            found.map(Value::from).ok_or_else(|| failed("list.index: the value is not in the list"))
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// Methods of `str` that minijinja-contrib lacks. `None` for others.
fn string_method(text: &str, method: &str, args: &[Value]) -> Option<Result<Value, JinjaError>> {
    let one = || from_args::<(&str,)>(args).map(|(argument,)| argument);
    let parts = |parts: [&str; 3]| parts.into_iter().map(Value::from).collect::<Value>();
    Some(match method {
        "removeprefix" => one().map(|prefix| Value::from(text.strip_prefix(prefix).unwrap_or(text))),
        "removesuffix" => one().map(|suffix| Value::from(text.strip_suffix(suffix).unwrap_or(text))),
        "partition" => one().map(|by| match text.split_once(by) {
            Some((before, after)) => parts([before, by, after]),
            None => parts([text, "", ""]),
        }),
        "rpartition" => one().map(|by| match text.rsplit_once(by) {
            Some((before, after)) => parts([before, by, after]),
            None => parts(["", "", text]),
        }),
        "rsplit" => from_args::<(Option<&str>, Option<usize>)>(args).map(|(by, most)| rsplit(text, by, most)),
        "casefold" => from_args::<()>(args).map(|()| Value::from(text.to_lowercase())),
        "isdecimal" => {
            from_args::<()>(args).map(|()| Value::from(!text.is_empty() && text.chars().all(|c| c.is_ascii_digit())))
        }
        "index" => one().and_then(|what| match text.find(what) {
            Some(at) => Ok(Value::from(text[..at].chars().count())),
            None => Err(failed("str.index: the text is not found")),
        }),
        "zfill" => from_args::<(u8,)>(args).map(|(width,)| {
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let zeros = usize::from(width).saturating_sub(text.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(zeros)))
        }),
        _ => return None,
    })
}

/// Python's `str.rsplit`: at most `most` splits, from the end.
fn rsplit(text: &str, by: Option<&str>, most: Option<usize>) -> Value {
    let splits = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest = if by.is_none() { text.trim() } else { text };
    while parts.len() < splits {
        let cut = match by {
            Some("") => None,
            Some(by) => rest.rsplit_once(by),
            None => rest.rsplit_once(char::is_whitespace).map(|(before, after)| (before.trim_end(), after)),
        };
        let Some((before, after)) = cut else { break };
        parts.push(after);
        rest = before;
    }
    if by.is_some() || !rest.is_empty() {
        parts.push(rest);
    }
    parts.into_iter().rev().map(Value::from).collect()
}
