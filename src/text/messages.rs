//! The prompt of a chat: its messages, and what else a request gives to the chat template.

mod fallback;
mod message;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use crate::fields::{self, Fields};
use crate::{Error, Result};

pub use fallback::with_tools_in_system_message;
pub(crate) use message::read_messages;

/// What a chat template makes a prompt of. [`TextCodec::render_chat`](super::codec::TextCodec::render_chat) renders it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatPrompt {
    /// Checked messages in the form that templates expect, as [`read_messages`] returns them.
    pub(crate) messages: Vec<Value>,
    /// Checked tools, as `{"type": "function", "function": {"name", "description", "parameters"}}`.
    pub(crate) tools: Option<Vec<Value>>,
    /// Documents to answer from: objects whose keys the template knows, such as `title` and `text`.
    pub(crate) documents: Option<Vec<Value>>,
    /// Further variables of the template.
    pub(crate) kwargs: Map<String, Value>,
    /// Whether the prompt opens the assistant's turn.
    pub(crate) add_generation_prompt: bool,
    /// Whether the prompt ends in the text of the last message, without an end of turn.
    pub(crate) continue_final_message: bool,
}

/// The fields that [`ChatPrompt::parse`] reads.
pub(crate) const CHAT_PROMPT_FIELDS: &[&str] = &[
    "messages",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "reasoning_effort",
    "add_generation_prompt",
    "continue_final_message",
];

/// Variables of templates that have a field of their own.
pub(super) const RESERVED: [&str; 6] =
    ["messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"];

impl ChatPrompt {
    /// A prompt of checked messages.
    pub(crate) fn of(messages: Vec<Value>, add_generation_prompt: bool) -> Self {
        Self { messages, add_generation_prompt, ..Self::default() }
    }

    /// The prompt of a training record: checked messages, with the record's `documents` and `chat_template_kwargs`.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub(crate) fn of_record(record: &Fields, messages: Vec<Value>) -> Result<Self> {
        Ok(Self { documents: documents(record)?, kwargs: kwargs(record)?, ..Self::of(messages, false) })
    }

    /// The same prompt of the first `count` messages.
    pub(crate) fn cut(&self, count: usize, add_generation_prompt: bool) -> Self {
        Self {
            messages: self.messages[..count].to_vec(),
            tools: self.tools.clone(),
            documents: self.documents.clone(),
            kwargs: self.kwargs.clone(),
            add_generation_prompt,
            continue_final_message: false,
        }
    }

    /// The prompt that a request body asks for: `messages`, and optionally vLLM's fields for chat templates.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub fn from_body(body: &Value) -> Result<Self> {
        Self::parse(&Fields::of_body(body)?)
    }

    /// Reads [`CHAT_PROMPT_FIELDS`] of a request body. `tools` is left to the caller.
    ///
    /// # Errors
    /// `Invalid`, naming the field.
    pub(crate) fn parse(body: &Fields) -> Result<Self> {
        let list = body.required("messages", body.array("messages")?, "an array of {\"role\", \"content\"}")?;
        if list.is_empty() {
            return Err(fields::wrong("messages", "an array of at least one message", &json!([])));
        }
        let messages = read_messages(list, &["prefix"])?;
        let continue_final_message = match (body.boolean("continue_final_message")?, begun_answer(list)?) {
            (Some(false), true) => {
                let message =
                    "`continue_final_message` is false, but the last message has `prefix`: true: give one of them";
                return Err(Error::invalid(message).param("continue_final_message").code("invalid_value"));
            }
            (asked, begun) => asked.unwrap_or(begun),
        };
        if body.string("chat_template")?.is_some() {
            return Err(Error::invalid(
                "`chat_template` is not supported in a request, because a template can take any time and memory: put it into \
                 the model's directory as chat_template.jinja, or render the prompt yourself and use /v1/completions",
            )
            .param("chat_template")
            .code("unsupported_parameter"));
        }
        let add_generation_prompt = body.boolean("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            return Err(Error::invalid(
                "`continue_final_message` and `add_generation_prompt` cannot both be true: a prompt ends either in the \
                 last message or with a new turn of the assistant",
            )
            .param("continue_final_message")
            .code("invalid_value"));
        }
        Ok(Self {
            messages,
            tools: None,
            documents: documents(body)?,
            kwargs: kwargs(body)?,
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
        })
    }
}

/// Whether the last message is marked by `prefix` as the beginning of the answer. Errors: another message is.
fn begun_answer(list: &[Value]) -> Result<bool> {
    let mut begun = false;
    for (i, value) in list.iter().enumerate() {
        let message = Fields::of_value(value, format!("messages[{i}]"))?;
        begun = message.boolean("prefix")?.unwrap_or(false);
        if begun && (i + 1 < list.len() || message.string("role")? != Some("assistant")) {
            let path = message.path_of("prefix");
            let message = format!("`{path}` is only allowed on the last message, with the role assistant");
            return Err(Error::invalid(message).param(path).code("invalid_value"));
        }
    }
    Ok(begun)
}

fn documents(body: &Fields) -> Result<Option<Vec<Value>>> {
    let Some(documents) = body.array("documents")? else { return Ok(None) };
    for (i, document) in documents.iter().enumerate() {
        Fields::of_value(document, format!("documents[{i}]"))?;
    }
    Ok(Some(documents.to_vec()))
}

/// `chat_template_kwargs`, and `reasoning_effort` among them.
fn kwargs(body: &Fields) -> Result<Map<String, Value>> {
    let mut kwargs = Map::new();
    if let Some(given) = body.object("chat_template_kwargs")? {
        if let Some(name) = given.names().find(|name| RESERVED.contains(name)) {
            let path = given.path_of(name);
            let message = format!("`{path}` is not allowed: use the field `{name}` of the request");
            return Err(Error::invalid(message).param(path).code("invalid_value"));
        }
        // `null` is a value here: templates tell it from an absent variable.
        kwargs = body.get("chat_template_kwargs").and_then(Value::as_object).cloned().unwrap_or_default();
    }
    if let Some(effort) = body.string("reasoning_effort")? {
        let effort = Value::from(effort);
        if kwargs.get("reasoning_effort").is_some_and(|other| *other != effort) {
            let message = "`reasoning_effort` and `chat_template_kwargs.reasoning_effort` differ: give one of them";
            return Err(Error::invalid(message).param("reasoning_effort").code("invalid_value"));
        }
        kwargs.insert("reasoning_effort".to_owned(), effort);
    }
    Ok(kwargs)
}
