//! Checks messages, and writes them in the form that chat templates expect.

use serde_json::{Map, Value, json};

use crate::fields::{self, Fields};
use crate::{Error, Result};

/// The fields of a message that are read here. Others are handed on, for templates that read them.
const KNOWN: &[&str] = &[
    "role",
    "content",
    "name",
    "tool_calls",
    "tool_call_id",
    "function_call",
    "reasoning_content",
    "reasoning",
    "refusal",
    // No effect: a client sends back what it got, or a hint for another server's cache.
    "annotations",
    "cache_control",
    "audio",
];

/// What a role is, in errors. Which there are, only the template knows.
const ROLES: &str = "a name such as system, user, assistant or tool";

/// Checks the `messages` of a request or a training record, and returns them in the form that templates expect: `content` is a
/// string, `tool_calls` have objects as arguments, the model's reasoning is `reasoning_content`, and the legacy `function_call`
/// and role `function` are tool calls and their results. The fields `more` are left to the caller.
///
/// # Errors
/// `Invalid`, naming the field.
pub(crate) fn read_messages(list: &[Value], more: &[&str]) -> Result<Vec<Value>> {
    let known = [KNOWN, more].concat();
    let mut legacy_call = None;
    let read = |(i, value): (usize, &Value)| {
        let message = Fields::of_value(value, format!("messages[{i}]"))?;
        fields::check_unknown(&message, &known)?;
        if message.get("function_call").is_some() {
            // Nine letters and digits: some templates insist on this length.
            legacy_call = Some(format!("call{i:05}"));
        }
        let mut read = read_message(&message, legacy_call.as_deref())?;
        for name in message.names().filter(|name| !known.contains(name)) {
            read.insert(name.to_owned(), value[name].clone());
        }
        Ok(Value::Object(read))
    };
    list.iter().enumerate().map(read).collect()
}

/// One message. `legacy_call` is the id of the last `function_call`.
fn read_message(message: &Fields, legacy_call: Option<&str>) -> Result<Map<String, Value>> {
    let role = message.required("role", message.string("role")?, ROLES)?;
    if role.trim().is_empty() {
        return Err(fields::wrong(&message.path_of("role"), ROLES, &role.into()));
    }
    if message.get("audio").is_some() {
        return Err(fields::unsupported(message.path_of("audio"), "the model reads only text"));
    }
    let calls = tool_calls(message, legacy_call)?;
    if !calls.is_empty() && role != "assistant" {
        let field = if message.get("tool_calls").is_some() { "tool_calls" } else { "function_call" };
        return Err(fields::unsupported(message.path_of(field), "only a message with the role assistant calls tools"));
    }
    let mut read = Map::new();
    read.insert("role".into(), if role == "function" { "tool" } else { role }.into());
    read.insert("content".into(), content(message, role == "assistant" && !calls.is_empty())?.into());
    if let Some(name) = message.string("name")? {
        read.insert("name".into(), name.into());
    }
    let answered = message.string("tool_call_id")?.or(legacy_call.filter(|_| role == "function"));
    if let Some(id) = answered {
        read.insert("tool_call_id".into(), id.into());
    }
    let reasoning = match (message.string("reasoning_content")?, message.string("reasoning")?) {
        (Some(one), Some(other)) if one != other => {
            let path = message.path_of("reasoning");
            let message = format!("`{path}` and `reasoning_content` differ: give one of them");
            return Err(Error::invalid(message).param(path).code("invalid_value"));
        }
        (one, other) => one.or(other),
    };
    if let Some(reasoning) = reasoning {
        read.insert("reasoning_content".into(), reasoning.into());
    }
    if !calls.is_empty() {
        read.insert("tool_calls".into(), calls.into());
    }
    Ok(read)
}

/// The text of a message: its content, or the refusal that stands for it. An answer that calls tools may have none.
fn content(message: &Fields, optional: bool) -> Result<String> {
    const ALLOWED: &str = "a string or an array of text parts";
    let path = message.path_of("content");
    let text = match message.get("content") {
        None => None,
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| text_part(part, &format!("{path}[{i}]")));
            Some(texts.collect::<Result<Vec<_>>>()?.join("\n"))
        }
        Some(other) => return Err(fields::wrong(&path, ALLOWED, other)),
    };
    match (text, message.string("refusal")?) {
        (Some(_), Some(refusal)) if !refusal.is_empty() => {
            Err(fields::unsupported(message.path_of("refusal"), "the message has `content` too; give one of them"))
        }
        (Some(text), _) => Ok(text),
        (None, Some(refusal)) => Ok(refusal.to_owned()),
        (None, None) if optional => Ok(String::new()),
        (None, None) => message.required("content", None, ALLOWED),
    }
}

fn text_part<'a>(part: &'a Value, path: &str) -> Result<&'a str> {
    if let Value::String(text) = part {
        return Ok(text);
    }
    let part = Fields::of_value(part, path)?;
    let key = match part.required("type", part.string("type")?, "\"text\"")? {
        "text" | "input_text" | "output_text" => "text",
        "refusal" => "refusal",
        other => {
            let allowed = "\"text\", \"input_text\", \"output_text\" or \"refusal\" (the model reads only text)";
            return Err(fields::wrong(&part.path_of("type"), allowed, &other.into()));
        }
    };
    fields::check_only(&part, &["type", key, "annotations", "logprobs", "cache_control"])?;
    part.required(key, part.string(key)?, "the text of the part")
}

/// The tool calls of a message, or its `function_call` as one of the id `legacy_call`.
fn tool_calls(message: &Fields, legacy_call: Option<&str>) -> Result<Vec<Value>> {
    let calls = message.array("tool_calls")?.unwrap_or_default();
    let Some(function) = message.object("function_call")? else {
        let path = message.path_of("tool_calls");
        return calls.iter().enumerate().map(|(i, call)| tool_call(call, format!("{path}[{i}]"))).collect();
    };
    if !calls.is_empty() {
        return Err(fields::unsupported(
            message.path_of("function_call"),
            "the message has `tool_calls` too; give one of them",
        ));
    }
    Ok(vec![json!({"id": legacy_call, "type": "function", "function": called_function(&function)?})])
}

fn tool_call(call: &Value, path: String) -> Result<Value> {
    let call = Fields::of_value(call, path)?;
    // `index` is left over from a stream.
    fields::check_only(&call, &["id", "type", "function", "index"])?;
    match call.string("type")? {
        None | Some("function") => {}
        Some(other) => return Err(fields::wrong(&call.path_of("type"), "\"function\"", &other.into())),
    }
    let function = call.required("function", call.object("function")?, "an object with `name` and `arguments`")?;
    let mut read = Map::new();
    if let Some(id) = call.string("id")? {
        read.insert("id".into(), id.into());
    }
    read.insert("type".into(), "function".into());
    read.insert("function".into(), called_function(&function)?);
    Ok(Value::Object(read))
}

/// The function of a call with its arguments as an object, which templates expect. Clients send them as JSON in a string.
fn called_function(function: &Fields) -> Result<Value> {
    const ALLOWED: &str = "a JSON object, as a string";
    // The openai client adds `parsed_arguments` to what its `parse` returns.
    fields::check_only(function, &["name", "arguments", "parsed_arguments"])?;
    let name = function.required("name", function.string("name")?, "the name of the function")?;
    let path = function.path_of("arguments");
    let arguments = match function.get("arguments") {
        None => json!({}),
        Some(Value::String(text)) if text.trim().is_empty() => json!({}),
        Some(Value::String(text)) => serde_json::from_str(text).map_err(|e| {
            Error::invalid(format!("`{path}` must be {ALLOWED}: {e}")).param(path.as_str()).code("invalid_value")
        })?,
        Some(value) => value.clone(),
    };
    match arguments {
        Value::Object(_) => Ok(json!({"name": name, "arguments": arguments})),
        other => Err(fields::wrong(&path, ALLOWED, &other)),
    }
}
