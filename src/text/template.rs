//! Chat templates: the model's Jinja source, rendered as in transformers.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

use crate::{Error, Result};

/// Special tokens by the names that templates use, such as `bos_token`.
pub(super) type SpecialTokens = BTreeMap<String, String>;

/// A compiled template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// `Invalid` with the line for a syntax error.
    pub(super) fn new(source: &str, special: SpecialTokens) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::internal(e.to_string()).caused_by(e))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match value.kind() {
            ValueKind::None => Ok(out.write_str("None")?),
            ValueKind::Bool => Ok(out.write_str(if value.is_true() { "True" } else { "False" })?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Jinja, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|e| Error::invalid(format!("the model's chat template: {e}")))?;
        Ok(Self { environment, special })
    }

    /// The source of the template.
    pub(super) fn source(&self) -> Result<String> {
        self.environment
            .get_template(NAME)
            .map(|t| t.source().to_owned())
            .map_err(|e| Error::internal(e.to_string()).caused_by(e))
    }

    /// Renders `messages` to a prompt. Text parts of a message are joined by newlines.
    ///
    /// # Errors
    /// `Invalid` on `messages` if the template raises an exception, for example for a role or an order that the model does not
    /// know, or if a message has a part that is not text.
    pub(super) fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let messages = messages.iter().map(with_plain_content).collect::<Result<Vec<_>>>()?;
        let none = Jinja::from(());
        let values = context! {
            messages => Jinja::from(Serde(&messages)),
            tools => none.clone(), documents => none, add_generation_prompt,
            ..Jinja::from(Serde(&self.special))
        };
        self.environment.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| {
            let why = e.detail().map_or_else(|| e.to_string(), str::to_string);
            Error::invalid(format!("the model's chat template refuses these messages: {why}")).param("messages")
        })
    }
}

/// The message with its content as one string: its text parts, joined.
fn with_plain_content(message: &Value) -> Result<Value> {
    let Some(parts) = message["content"].as_array() else { return Ok(message.clone()) };
    let texts = parts.iter().map(|part| match part {
        Value::String(text) => Ok(text.as_str()),
        _ if part["type"] == "text" && part["text"].is_string() => Ok(part["text"].as_str().unwrap_or_default()),
        _ => Err(Error::invalid(format!(
            "unsupported content part of type {}: only {{\"type\": \"text\", \"text\": \"...\"}} is supported",
            part["type"]
        ))
        .param("messages")),
    });
    let mut message = message.clone();
    message["content"] = texts.collect::<Result<Vec<_>>>()?.join("\n").into();
    Ok(message)
}

/// Neutralises `{% generation %}`, which marks text for training and has no meaning in a prompt.
fn without_generation_marks(source: &str) -> String {
    let mut out = source.to_string();
    for (mark, neutral) in [("endgeneration", "endif"), ("generation", "if true")] {
        for open in ["{%", "{%-", "{%+"] {
            for close in ["%}", "-%}", "+%}"] {
                out = out.replace(&format!("{open} {mark} {close}"), &format!("{open} {neutral} {close}"));
            }
        }
    }
    out
}

/// The filter `tojson`: Python's `json.dumps(value, ensure_ascii=False, indent=...)`.
fn tojson(value: Jinja, kwargs: Kwargs) -> Result<Jinja, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    for other in ["ensure_ascii", "separators", "sort_keys"] {
        let _: Option<Jinja> = kwargs.get(other)?;
    }
    kwargs.assert_all_used()?;
    let mut out = Vec::new();
    let done = match indent {
        Some(width) => {
            let spaces = " ".repeat(width);
            value.serialize(&mut Serializer::with_formatter(&mut out, PrettyFormatter::with_indent(spaces.as_bytes())))
        }
        None => value.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    done.map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    Ok(Jinja::from_safe_string(String::from_utf8_lossy(&out).into_owned()))
}

/// Writes a space after commas and colons, as Python does.
struct PythonFormatter;

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, w: &mut W, first: bool) -> std::io::Result<()> {
        self.begin_array_value(w, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, w: &mut W) -> std::io::Result<()> {
        w.write_all(b": ")
    }
}

/// The function `strftime_now`: the local time in a `strftime` format.
fn strftime_now(format: String) -> Result<String, minijinja::Error> {
    use std::fmt::Write;
    let mut out = String::new();
    write!(out, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: invalid format {format:?}"))
    })?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: Value) -> Result<String> {
        let special = SpecialTokens::from([("bos_token".to_string(), "<s>".to_string())]);
        ChatTemplate::new(source, special)?.render(messages.as_array().unwrap(), true)
    }

    #[test]
    fn python_habits_work() {
        let messages =
            json!([{"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]}]);
        let source = "{{ bos_token }}{% for m in messages %}{{ m['content'].strip() + '!' }}{% endfor %}\n{%- if tools is not none %}T{% endif %}{{ messages[0].name is defined }}{{ none }}";
        assert_eq!(render(source, messages).unwrap(), "<s>a\nb!FalseNone");
    }

    #[test]
    fn json_as_python_writes_it() {
        let messages = json!([{"role": "user", "content": "é<'", "n": [1, {"a": null}]}]);
        assert_eq!(
            render("{{ messages[0] | tojson }}", messages.clone()).unwrap(),
            "{\"role\": \"user\", \"content\": \"é<'\", \"n\": [1, {\"a\": null}]}"
        );
        assert_eq!(
            render("{{ messages[0].n | tojson(indent=1) }}", messages).unwrap(),
            "[\n 1,\n {\n  \"a\": null\n }\n]"
        );
    }

    #[test]
    fn refusals_reach_the_client() {
        let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
        assert_eq!(error.kind, crate::error::ErrorKind::Invalid);
        assert!(error.message.contains("roles must alternate"), "{error}");
        let error = render("x", json!([{"content": [{"type": "image_url"}]}])).unwrap_err();
        assert!(error.message.contains("image_url"), "{error}");
        assert!(ChatTemplate::new("{% if %}", SpecialTokens::new()).is_err());
        assert!(render("{{ strftime_now('%Q%') }}", json!([])).is_err());
        assert_eq!(render("{{ strftime_now('%Y') | length }}", json!([])).unwrap(), "4");
        assert_eq!(render("a{%- generation -%} b {% endgeneration %}c", json!([])).unwrap(), "ab c");
    }
}
