//! Checks chat messages and renders them to a prompt.

use serde_json::{Value, json};

use super::codec::TextCodec;
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// Renders `messages` of a request body with the model's template.
pub(crate) fn chat_prompt(body: &Fields, codec: &TextCodec) -> Result<String> {
    let messages = body.required("messages", body.array("messages")?, "an array of {\"role\", \"content\"}")?;
    if messages.is_empty() {
        return Err(fields::wrong("messages", "an array of at least one message", &json!([])));
    }
    let messages = messages.iter().enumerate().map(|(i, m)| message(m, i)).collect::<Result<Vec<_>>>()?;
    codec.apply_chat_template(&messages, body.boolean("add_generation_prompt")?.unwrap_or(true))
}

/// Checks a message and returns it in the form that templates expect, with a string as `content`. `index` names it in errors.
pub(crate) fn message(value: &Value, index: usize) -> Result<Value> {
    const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];
    let message = Fields::of_value(value, format!("messages[{index}]"))?;
    let role = message.required("role", message.string("role")?, "system, developer, user or assistant")?;
    if !ROLES.contains(&role) {
        let allowed = "system, developer, user or assistant";
        return Err(fields::wrong(&message.path_of("role"), allowed, &role.into()));
    }
    if message.get("tool_calls").is_some_and(|calls| calls.as_array().is_none_or(|calls| !calls.is_empty())) {
        let path = message.path_of("tool_calls");
        return Err(Error::invalid(format!("`{path}`: tools are not supported"))
            .param(path)
            .code("unsupported_parameter"));
    }
    let path = message.path_of("content");
    let content = match message.required("content", message.get("content"), "a string or an array of text parts")? {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts = parts.iter().enumerate().map(|(i, part)| text_part(part, &format!("{path}[{i}]")));
            texts.collect::<Result<Vec<_>>>()?.join("\n")
        }
        other => return Err(fields::wrong(&path, "a string or an array of text parts", other)),
    };
    // OpenAI renamed system to developer; models know the older name.
    let role = if role == "developer" { "system" } else { role };
    Ok(json!({"role": role, "content": content}))
}

fn text_part<'a>(part: &'a Value, path: &str) -> Result<&'a str> {
    let part = Fields::of_value(part, path)?;
    match part.required("type", part.string("type")?, "\"text\"")? {
        "text" => part.required("text", part.string("text")?, "the text of the part"),
        other => Err(fields::wrong(&part.path_of("type"), "\"text\" (the model reads only text)", &other.into())),
    }
}
