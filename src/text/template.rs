//! Chat templates: the model's Jinja source, rendered as in transformers.

use std::collections::{BTreeMap, HashSet};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use serde_json::{Map, Value};

use super::messages::ChatPrompt;
use crate::{Error, Result};

/// Special tokens by the names that templates use, such as `bos_token`.
pub(super) type SpecialTokens = BTreeMap<String, String>;

/// A compiled template.
pub(super) struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
    /// The words of the source: what is not among them, the template does not read.
    words: HashSet<String>,
    /// What errors call it.
    name: &'static str,
    /// The field that an error of rendering is about.
    param: &'static str,
}

const NAME: &str = "chat_template";

/// Work that the model's own template may do for one prompt, in minijinja's fuel: about an instruction or 64 bytes a unit.
const FUEL: u64 = 20_000_000;

/// The same for the template of a request: some thousand messages.
const REQUEST_FUEL: u64 = 300_000;

/// Stack for the template of a request. It can build a list nested some ten thousand levels deep, which takes as many nested
/// calls to write or to drop.
const REQUEST_STACK: usize = 256 << 20;

/// Limit on the source of a request's template, in bytes.
const MAX_REQUEST_SOURCE: usize = 128 << 10;

/// Limit on a rendered prompt, in bytes.
const MAX_PROMPT: usize = 16 << 20;

/// What stands at the end of a begun answer while it is rendered. The space tells whether the template keeps spaces there.
const END_OF_BEGUN: &str = "END_OF_BEGUN_ANSWER ";

impl ChatTemplate {
    /// Compiles the model's template.
    ///
    /// # Errors
    /// `Invalid` with the line for a syntax error.
    pub(super) fn new(source: &str, special: SpecialTokens) -> Result<Self> {
        Self::compile(source, special, FUEL, "the model's chat template", "messages")
    }

    /// Renders a prompt by the template `source` of a request, within narrower limits on work, memory and nesting.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and `Invalid` on `chat_template`: the source is too long or has a syntax error.
    pub(super) fn render_request(source: &str, special: SpecialTokens, prompt: &ChatPrompt) -> Result<String> {
        if source.len() > MAX_REQUEST_SOURCE {
            let message = format!(
                "`chat_template` has {} bytes; at most {MAX_REQUEST_SOURCE} are allowed in a request",
                source.len()
            );
            return Err(Error::invalid(message).param(NAME).code("invalid_value"));
        }
        let work = || {
            Self::compile(source, special, REQUEST_FUEL, "`chat_template`", NAME)
                .map_err(|e| e.param(NAME).code("invalid_value"))?
                .render(prompt)
        };
        let internal = |why: String| Error::internal(format!("rendering `chat_template`: {why}"));
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name(NAME.into()).stack_size(REQUEST_STACK);
            let running = thread.spawn_scoped(scope, work).map_err(|e| internal(e.to_string()).caused_by(e))?;
            running.join().map_err(|_| internal("the thread panicked".into()))?
        })
    }

    fn compile(
        source: &str,
        special: SpecialTokens,
        fuel: u64,
        name: &'static str,
        param: &'static str,
    ) -> Result<Self> {
        let mut environment = environment()?;
        environment.set_fuel(Some(fuel));
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|e| Error::invalid(format!("{name}: {e}")))?;
        Ok(Self { environment, special, words: words(source), name, param })
    }

    /// The source of the template.
    pub(super) fn source(&self) -> Result<String> {
        self.environment
            .get_template(NAME)
            .map(|t| t.source().to_owned())
            .map_err(|e| Error::internal(e.to_string()).caused_by(e))
    }

    /// Whether the source has the word `name`, such as a variable, a key or a role.
    pub(super) fn reads(&self, name: &str) -> bool {
        self.words.contains(name)
    }

    /// Renders a prompt.
    ///
    /// # Errors
    /// `Invalid`: the template raises an exception, for example for a role or an order that the model does not know; it has no
    /// place for something that the prompt has; it does more work than allowed.
    pub(super) fn render(&self, prompt: &ChatPrompt) -> Result<String> {
        let messages = self.messages(prompt)?;
        let given = |list: &Option<Vec<Value>>| list.as_ref().is_some_and(|list| !list.is_empty());
        for (field, list) in [("tools", &prompt.tools), ("documents", &prompt.documents)] {
            if given(list) && !self.reads(field) {
                return Err(self.no_place(field.to_owned()));
            }
        }
        let values = context! {
            messages => Jinja::from(Serde(&messages)),
            tools => Jinja::from(Serde(&prompt.tools)),
            documents => Jinja::from(Serde(&prompt.documents)),
            add_generation_prompt => prompt.add_generation_prompt,
            ..Jinja::from(Serde(&self.variables(prompt)?))
        };
        let text = self.environment.get_template(NAME).and_then(|t| t.render(values)).map_err(|e| self.refusal(&e))?;
        if text.len() > MAX_PROMPT {
            let message = format!("the prompt has {} bytes; at most {MAX_PROMPT} are allowed", text.len());
            return Err(Error::invalid(message).param(self.param));
        }
        if prompt.continue_final_message { self.without_end_of_turn(text) } else { Ok(text) }
    }

    fn refusal(&self, error: &minijinja::Error) -> Error {
        let why = match error.kind() {
            ErrorKind::OutOfFuel => "it does more work than a prompt may take".to_owned(),
            _ => error.detail().map_or_else(|| error.to_string(), str::to_string),
        };
        Error::invalid(format!("{} refuses these messages: {why}", self.name)).param(self.param)
    }

    fn no_place(&self, path: String) -> Error {
        Error::invalid(format!("`{path}` is not supported: {} has no place for it", self.name))
            .param(path)
            .code("unsupported_parameter")
    }

    /// The messages as this template reads them.
    fn messages(&self, prompt: &ChatPrompt) -> Result<Vec<Value>> {
        let fitted = prompt.messages.iter().enumerate().map(|(i, message)| self.fitted(message, i));
        let mut messages = fitted.collect::<Result<Vec<_>>>()?;
        if prompt.continue_final_message {
            let path = format!("messages[{}].content", messages.len().saturating_sub(1));
            let last = messages.last_mut().filter(|last| last.get("tool_calls").is_none());
            let Some(Value::String(begun)) = last.and_then(|last| last.get_mut("content")) else {
                let message =
                    format!("`continue_final_message` needs a text to continue in `{path}`, without tool calls");
                return Err(Error::invalid(message).param("continue_final_message").code("invalid_value"));
            };
            begun.push_str(END_OF_BEGUN);
        }
        Ok(messages)
    }

    /// A message with what the template has no place for put where it has one. Errors: there is none.
    fn fitted(&self, message: &Value, index: usize) -> Result<Value> {
        let mut message = message.clone();
        let Some(map) = message.as_object_mut() else { return Ok(message) };
        // OpenAI renamed system to developer; most models know the older name.
        if map.get("role").is_some_and(|role| role == "developer") && !self.reads("developer") {
            map.insert("role".into(), "system".into());
        }
        for key in map.keys().filter(|key| !ALWAYS_ACCEPTED.contains(&key.as_str())) {
            if !self.reads(key) {
                return Err(self.no_place(format!("messages[{index}].{key}")));
            }
        }
        if map.get("role").is_some_and(|role| role == "tool") && !self.reads("tools") && !self.reads("tool_calls") {
            return Err(self.no_place(format!("messages[{index}].role")));
        }
        if !self.reads("reasoning_content")
            && let Some(Value::String(reasoning)) = map.remove("reasoning_content")
        {
            if self.reads("thinking") {
                map.insert("thinking".into(), reasoning.into());
            } else if let Some(Value::String(content)) = map.get_mut("content") {
                // As models write it, and as the template finds it if it removes earlier reasoning.
                *content = format!("<think>\n{}\n</think>\n\n{content}", reasoning.trim_matches('\n'));
            }
        }
        Ok(message)
    }

    /// The special tokens, and the variables that the request sets.
    fn variables(&self, prompt: &ChatPrompt) -> Result<Map<String, Value>> {
        let special = self.special.iter().map(|(name, token)| (name.clone(), token.as_str().into()));
        let mut variables: Map<String, Value> = special.collect();
        variables.extend(prompt.kwargs.clone());
        for (name, value) in &prompt.kwargs {
            // A variable that is not set reads as false.
            let unset = value.is_null() || *value == Value::Bool(false);
            if !unset && name != EFFORT && !self.reads(name) {
                let path = format!("chat_template_kwargs.{name}");
                let message = format!("`{path}` has no effect: {} does not read a variable of this name", self.name);
                return Err(Error::invalid(message).param(path).code("unsupported_parameter"));
            }
        }
        // Models that reason or do not, without degrees, are told by `enable_thinking`.
        if prompt.kwargs.get(EFFORT).is_some_and(|effort| effort == "none") && !self.reads(EFFORT) {
            variables.entry("enable_thinking").or_insert(false.into());
        }
        Ok(variables)
    }

    /// Cuts a rendered prompt behind the begun answer.
    fn without_end_of_turn(&self, mut text: String) -> Result<String> {
        let Some(end) = text.rfind(END_OF_BEGUN.trim_end()) else {
            let message = format!("`continue_final_message`: {} does not write the last message's content", self.name);
            return Err(Error::invalid(message).param("continue_final_message").code("invalid_value"));
        };
        let spaces_kept = text[end..].starts_with(END_OF_BEGUN);
        text.truncate(end);
        if !spaces_kept {
            // The template removes spaces at the end of a message, but the mark hid them from it.
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }
}

/// The keys of a message that a template need not read: `name` and `tool_call_id` say who speaks, and the others have rules of
/// their own.
const ALWAYS_ACCEPTED: [&str; 5] = ["role", "content", "name", "tool_call_id", "reasoning_content"];

/// The variable for how much to reason.
const EFFORT: &str = "reasoning_effort";

/// What templates find in transformers.
fn environment() -> Result<Environment<'static>> {
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
    Ok(environment)
}

/// The identifiers in a source.
pub(super) fn words(source: &str) -> HashSet<String> {
    let words = source.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Neutralises `{% generation %}` in all spellings. It marks text for training and has no meaning in a prompt.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag);
        let word = inner.trim_start();
        let marks = [("generation", " if true "), ("endgeneration", " endif ")];
        let found = marks.into_iter().find_map(|(mark, neutral)| {
            let after = word.strip_prefix(mark)?.trim_start();
            let closes = after.strip_prefix(['-', '+']).unwrap_or(after).starts_with("%}");
            closes.then_some((neutral, after))
        });
        rest = tag;
        if let Some((neutral, after)) = found {
            out.push_str(&tag[..tag.len() - inner.len()]);
            out.push_str(neutral);
            rest = after;
        }
    }
    out.push_str(rest);
    out
}

/// A value as Python's `json.dumps(value, ensure_ascii=False)`, as templates write it.
pub(super) fn to_json(value: &Value) -> String {
    let mut out = Vec::new();
    match value.serialize(&mut Serializer::with_formatter(&mut out, PythonFormatter)) {
        Ok(()) => String::from_utf8_lossy(&out).into_owned(),
        Err(_) => value.to_string(),
    }
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
mod tests;
