//! An assistant's message in OpenAI's form, whole or as deltas.

use serde_json::{Value, json};

use super::ReplyContext;
use crate::text::tools::{OutputPart, ToolChoice, ToolFormat, Tools};

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::server) struct ToolCall {
    /// The tool.
    pub(in crate::server) name: String,
    /// Its arguments, as the JSON that the model wrote.
    pub(in crate::server) arguments: String,
}

/// A whole message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::server) struct ChatMessage {
    /// The text of the answer.
    pub(in crate::server) content: String,
    /// The thinking before it.
    pub(in crate::server) reasoning: String,
    /// The calls.
    pub(in crate::server) calls: Vec<ToolCall>,
}

impl ChatMessage {
    /// The message that an output's parts make.
    pub(in crate::server) fn new(parts: Vec<OutputPart>) -> Self {
        let mut message = Self::default();
        for part in parts {
            match part {
                OutputPart::Content(text) => message.content.push_str(&text),
                OutputPart::Reasoning(text) => message.reasoning.push_str(&text),
                OutputPart::ToolCall { name, .. } => message.calls.push(ToolCall { name, arguments: String::new() }),
                OutputPart::Arguments { index, text } => {
                    message.calls.get_mut(index).into_iter().for_each(|call| call.arguments.push_str(&text));
                }
            }
        }
        message
    }

    /// Whether it calls tools.
    pub(super) fn has_calls(&self) -> bool {
        !self.calls.is_empty()
    }

    /// OpenAI's `message`. The content of a message that only calls tools is null.
    pub(super) fn object(self, context: &ReplyContext) -> Value {
        let called = self.has_calls();
        let content = if self.content.is_empty() && called { Value::Null } else { self.content.into() };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if context.include_reasoning && !self.reasoning.is_empty() {
            add_reasoning(&mut message, &self.reasoning);
        }
        let Some((format, tools)) = &context.tools else { return message };
        let call = |call: ToolCall| json!({"name": call.name, "arguments": call.arguments});
        if tools.legacy {
            if let Some(function) = self.calls.into_iter().next() {
                message["function_call"] = call(function);
            }
        } else if called {
            let calls = self
                .calls
                .into_iter()
                .map(|function| json!({"id": call_id(*format), "type": "function", "function": call(function)}));
            message["tool_calls"] = calls.collect();
        }
        message
    }
}

/// The `delta` of a chunk, or `None` if the parts have nothing that is sent. Sets `called` if a call begins.
pub(super) fn delta(context: &ReplyContext, parts: Vec<OutputPart>, called: &mut bool) -> Option<Value> {
    let mut delta = json!({});
    let mut content = String::new();
    let mut reasoning = String::new();
    let mut changes: Vec<Value> = Vec::new();
    for part in parts {
        match part {
            OutputPart::Content(text) => content.push_str(&text),
            OutputPart::Reasoning(text) => reasoning.push_str(&text),
            OutputPart::ToolCall { index, name } => {
                let function = json!({"name": name, "arguments": ""});
                changes.push(json!({"index": index, "id": call_id(context.tool_format()), "type": "function", "function": function}));
                *called = true;
            }
            OutputPart::Arguments { index, text } => match changes.last_mut() {
                Some(change) if change["index"] == index => {
                    let so_far = change["function"]["arguments"].as_str().unwrap_or_default();
                    change["function"]["arguments"] = format!("{so_far}{text}").into();
                }
                _ => changes.push(json!({"index": index, "function": {"arguments": text}})),
            },
        }
    }
    if !content.is_empty() {
        delta["content"] = content.into();
    }
    if context.include_reasoning && !reasoning.is_empty() {
        add_reasoning(&mut delta, &reasoning);
    }
    let legacy = context.tools.as_ref().is_some_and(|(_, tools)| tools.legacy);
    if legacy {
        if let Some(change) = changes.first() {
            delta["function_call"] = change["function"].clone();
        }
    } else if !changes.is_empty() {
        delta["tool_calls"] = changes.into();
    }
    delta.as_object().is_some_and(|delta| !delta.is_empty()).then_some(delta)
}

/// Under DeepSeek's name, which most clients read, and under vLLM's newer one.
fn add_reasoning(message: &mut Value, text: &str) {
    message["reasoning_content"] = text.into();
    message["reasoning"] = text.into();
}

/// The finish reason of an output that calls tools. For a named tool it is `stop`, as in OpenAI's API.
pub(super) fn finish_reason(tools: &Tools) -> &'static str {
    match tools.choice {
        ToolChoice::Named(_) => "stop",
        _ if tools.legacy => "function_call",
        _ => "tool_calls",
    }
}

/// A new id of a call. Mistral's templates accept only nine letters and digits.
pub(in crate::server) fn call_id(format: ToolFormat) -> String {
    let id = uuid::Uuid::new_v4().simple().to_string();
    match format {
        ToolFormat::Mistral | ToolFormat::MistralNamed => id[..9].to_owned(),
        _ => format!("call_{}", &id[..24]),
    }
}
