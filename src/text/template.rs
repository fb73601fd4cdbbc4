//! Chat templates: the model's Jinja source, rendered as in transformers.

mod jinja;
mod needs;
mod python_json;

use std::collections::{BTreeMap, HashSet};

use minijinja::value::{Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind, context};
use serde_json::{Map, Value, json};

pub(super) use self::python_json::to_json;
use super::messages::ChatPrompt;
use crate::{Error, Result};

/// Special tokens by the names that templates use, such as `bos_token`.
pub(super) type SpecialTokens = BTreeMap<String, String>;

/// A compiled template.
pub(super) struct ChatTemplate {
    /// As the model's files have it.
    source: String,
    environment: Environment<'static>,
    special: SpecialTokens,
    /// The words of the source: what is not among them, the template does not read.
    words: HashSet<String>,
    /// It takes the arguments of tool calls as JSON text, as DeepSeek's do, not as objects.
    arguments_as_text: bool,
}

const NAME: &str = "chat_template";

/// Work that the model's own template may do for one prompt, in minijinja's fuel: about an instruction or 64 bytes a unit.
const FUEL: u64 = 20_000_000;

/// Limit on a rendered prompt, in bytes.
const MAX_PROMPT: usize = 16 << 20;

/// What stands at the end of a begun answer while it is rendered. The space tells whether the template keeps spaces there.
const END_OF_BEGUN: &str = "END_OF_BEGUN_ANSWER ";

impl ChatTemplate {
    /// Compiles the model's template.
    ///
    /// # Errors
    /// `Invalid` with the line for a syntax error, or with the names of the filters, tests, functions and methods that it uses and
    /// that do not exist here.
    pub(super) fn new(source: &str, special: SpecialTokens) -> Result<Self> {
        let wrong = |why: String| Error::invalid(format!("the model's chat template: {why}"));
        let mut environment = jinja::environment()?;
        environment.set_fuel(Some(FUEL));
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(|e| wrong(e.to_string()))?;
        needs::check(&environment, NAME).map_err(|e| wrong(e.message))?;
        let mut template =
            Self { source: source.to_owned(), environment, special, words: words(source), arguments_as_text: false };
        if template.reads("tool_calls") && template.render(&called()).is_err() {
            template.arguments_as_text = true;
            template.arguments_as_text = template.render(&called()).is_ok();
        }
        Ok(template)
    }

    /// The source of the template, as the model's files have it.
    pub(super) fn source(&self) -> &str {
        &self.source
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
            return Err(Error::invalid(message).param("messages"));
        }
        if prompt.continue_final_message { self.without_end_of_turn(text) } else { Ok(text) }
    }

    fn refusal(&self, error: &minijinja::Error) -> Error {
        let why = match error.kind() {
            ErrorKind::OutOfFuel => "it does more work than a prompt may take".to_owned(),
            _ => error.detail().map_or_else(|| error.to_string(), str::to_string),
        };
        Error::invalid(format!("the model's chat template refuses these messages: {why}")).param("messages")
    }

    fn no_place(&self, path: String) -> Error {
        Error::invalid(format!("`{path}` is not supported: the model's chat template has no place for it"))
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
        if self.arguments_as_text
            && let Some(Value::Array(calls)) = map.get_mut("tool_calls")
        {
            for call in calls {
                let arguments = to_json(&call["function"]["arguments"]);
                call["function"]["arguments"] = arguments.into();
            }
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
                let message =
                    format!("`{path}` has no effect: the model's chat template does not read a variable of this name");
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
            let message =
                "`continue_final_message`: the model's chat template does not write the last message's content";
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

/// A conversation with a tool call, to try a template with.
fn called() -> ChatPrompt {
    let function = json!({"name": "look_up", "arguments": {"word": "lantern"}});
    let call = json!({"id": "call00000", "type": "function", "function": function});
    let messages = vec![
        json!({"role": "user", "content": "Look it up."}),
        json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        json!({"role": "tool", "name": "look_up", "tool_call_id": "call00000", "content": "A light."}),
    ];
    ChatPrompt::of(messages, true)
}

/// The identifiers in a source.
fn words(source: &str) -> HashSet<String> {
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

#[cfg(test)]
mod tests;
