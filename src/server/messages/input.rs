//! Checks a request of Anthropic's Messages API and makes the body of a chat of it.

use serde_json::{Map, Value, json};

use crate::fields::{self, Fields};
use crate::text::codec::TextCodec;
use crate::text::reasoning::ReasoningFormat;
use crate::{Error, Result};

/// The variable of chat templates that turns the thinking on and off.
const ENABLE_THINKING: &str = "enable_thinking";

/// A request as a chat.
pub(super) struct ChatRequest {
    /// The body of a chat completion.
    pub(super) chat: Value,
    /// The text of the thinking is part of the reply.
    pub(super) show_thinking: bool,
}

/// A request for an answer. The caller has checked that all fields are known.
///
/// # Errors
/// `Invalid`, naming the field.
pub(super) fn message(body: &Fields, codec: &TextCodec) -> Result<ChatRequest> {
    let most = body.integer("max_tokens", 1..=i64::MAX)?;
    body.required("max_tokens", most, "an integer of at least 1")?;
    // Twice Anthropic's highest temperature is allowed in chats.
    body.number("temperature", 0.0..=1.0)?;
    let mut request = prompt(body, codec)?;
    for (name, chat_name) in [
        ("max_tokens", "max_tokens"),
        ("stop_sequences", "stop"),
        ("stream", "stream"),
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("cache_salt", "cache_salt"),
    ] {
        if let Some(value) = body.get(name) {
            request.chat[chat_name] = value.clone();
        }
    }
    body.array("stop_sequences")?;
    Ok(request)
}

/// The fields that make the prompt.
pub(super) fn prompt(body: &Fields, codec: &TextCodec) -> Result<ChatRequest> {
    let mut chat = json!({});
    for name in ["model", "adapter"] {
        if let Some(value) = body.get(name) {
            chat[name] = value.clone();
        }
    }
    let list = body.required("messages", body.array("messages")?, "an array of {\"role\", \"content\"}")?;
    let mut messages = system(body)?;
    for (i, value) in list.iter().enumerate() {
        read_message(&Fields::of_value(value, format!("messages[{i}]"))?, i + 1 == list.len(), &mut messages)?;
    }
    if list.is_empty() {
        return Err(fields::wrong("messages", "an array of at least one message", &json!([])));
    }
    if list.last().is_some_and(|last| last["role"] == "assistant") {
        chat["continue_final_message"] = true.into();
    }
    chat["messages"] = messages.into();
    if let Some(tools) = body.array("tools")? {
        chat["tools"] = tools.iter().enumerate().map(|(i, tool)| read_tool(tool, i)).collect::<Result<_>>()?;
    }
    if let Some(choice) = body.object("tool_choice")? {
        tool_choice(&choice, &mut chat)?;
    }
    if let Some(config) = body.object("output_config")? {
        output_config(&config, &mut chat)?;
    }
    let (kwargs, show_thinking) = thinking(body, codec.template_source().unwrap_or_default())?;
    if !kwargs.is_empty() {
        chat["chat_template_kwargs"] = kwargs.into();
    }
    Ok(ChatRequest { chat, show_thinking })
}

/// `system` as the first message.
fn system(body: &Fields) -> Result<Vec<Value>> {
    let Some(value) = body.get("system") else { return Ok(Vec::new()) };
    let text = text_of(value, "system")?;
    Ok(if text.is_empty() { Vec::new() } else { vec![json!({"role": "system", "content": text})] })
}

/// A string, or the text of text blocks, joined by line ends as in the parts of a chat's message.
fn text_of(value: &Value, path: &str) -> Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Array(blocks) => {
            let texts = blocks.iter().enumerate().map(|(i, block)| {
                let block = Fields::of_value(block, format!("{path}[{i}]"))?;
                match kind(&block)? {
                    "text" => text(&block),
                    other => Err(unknown_block(&block, other, "\"text\"")),
                }
            });
            Ok(texts.collect::<Result<Vec<_>>>()?.join("\n"))
        }
        other => Err(fields::wrong(path, "a string or an array of text blocks", other)),
    }
}

fn kind<'a>(block: &Fields<'a>) -> Result<&'a str> {
    block.required("type", block.string("type")?, "the type of the block, such as \"text\"")
}

/// The text of a text block.
fn text<'a>(block: &Fields<'a>) -> Result<&'a str> {
    fields::check_only(block, &["type", "text", "cache_control", "citations"])?;
    if block.array("citations")?.is_some_and(|citations| !citations.is_empty()) {
        return Err(fields::unsupported(block.path_of("citations"), "the model does not read citations"));
    }
    block.required("text", block.string("text")?, "the text of the block")
}

fn unknown_block(block: &Fields, found: &str, allowed: &str) -> Error {
    fields::wrong(&block.path_of("type"), &format!("{allowed} (the model reads only text)"), &found.into())
}

/// Appends the messages of a chat that a message makes. `last`: it is the last one.
fn read_message(message: &Fields, last: bool, messages: &mut Vec<Value>) -> Result<()> {
    const ROLES: &str = "\"user\", \"assistant\" or \"system\"";
    fields::check_only(message, &["role", "content"])?;
    let role = message.required("role", message.string("role")?, ROLES)?;
    let content = message.required("content", message.get("content"), "a string or an array of blocks")?;
    match (role, content) {
        ("user" | "system" | "assistant", Value::String(text)) => {
            messages.push(json!({"role": role, "content": text}));
            Ok(())
        }
        ("system", _) => {
            messages.push(json!({"role": role, "content": text_of(content, &message.path_of("content"))?}));
            Ok(())
        }
        ("user", Value::Array(blocks)) => user_blocks(blocks, &message.path_of("content"), messages),
        ("assistant", Value::Array(blocks)) => {
            messages.push(assistant_blocks(blocks, &message.path_of("content"), last)?);
            Ok(())
        }
        ("user" | "assistant", other) => {
            Err(fields::wrong(&message.path_of("content"), "a string or an array of blocks", other))
        }
        _ => Err(fields::wrong(&message.path_of("role"), ROLES, &role.into())),
    }
}

/// A message of the user: its results of tools are messages of their own.
fn user_blocks(blocks: &[Value], path: &str, messages: &mut Vec<Value>) -> Result<()> {
    let mut texts: Vec<&str> = Vec::new();
    let mut flush = |texts: &mut Vec<&str>, result: Option<Value>| {
        if !texts.is_empty() {
            messages.push(json!({"role": "user", "content": texts.join("\n")}));
            texts.clear();
        }
        messages.extend(result);
    };
    for (i, block) in blocks.iter().enumerate() {
        let block = Fields::of_value(block, format!("{path}[{i}]"))?;
        match kind(&block)? {
            "text" => texts.push(text(&block)?),
            "tool_result" => flush(&mut texts, Some(tool_result(&block)?)),
            other => return Err(unknown_block(&block, other, "\"text\" or \"tool_result\"")),
        }
    }
    if blocks.is_empty() {
        texts.push("");
    }
    flush(&mut texts, None);
    Ok(())
}

/// A tool's result as a message. Chat templates have no mark for a failed call, so its text says it.
fn tool_result(block: &Fields) -> Result<Value> {
    fields::check_only(block, &["type", "tool_use_id", "content", "is_error", "cache_control"])?;
    let id = block.required("tool_use_id", block.string("tool_use_id")?, "the `id` of the tool_use block")?;
    let mut text = match block.get("content") {
        None => String::new(),
        Some(content) => text_of(content, &block.path_of("content"))?,
    };
    if block.boolean("is_error")? == Some(true) {
        text.insert_str(0, "Error: ");
    }
    Ok(json!({"role": "tool", "tool_call_id": id, "content": text}))
}

/// A message of the assistant. Its text blocks are pieces of one text.
fn assistant_blocks(blocks: &[Value], path: &str, last: bool) -> Result<Value> {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for (i, block) in blocks.iter().enumerate() {
        let block = Fields::of_value(block, format!("{path}[{i}]"))?;
        match kind(&block)? {
            "text" => content.push_str(text(&block)?),
            "thinking" => {
                fields::check_only(&block, &["type", "thinking", "signature"])?;
                block.string("signature")?;
                let thought = block.required("thinking", block.string("thinking")?, "the text of the thinking")?;
                reasoning.push_str(thought);
            }
            "tool_use" if last => {
                let path = block.path_of("type");
                let message = format!(
                    "`{path}`: the results of the last message's calls are missing: add a message of the user with a tool_result block for each"
                );
                return Err(Error::invalid(message).param(path).code("invalid_value"));
            }
            "tool_use" => calls.push(tool_use(&block)?),
            "redacted_thinking" => {
                return Err(fields::unsupported(
                    block.path_of("type"),
                    "it is encrypted for Anthropic's servers; remove the block",
                ));
            }
            other => return Err(unknown_block(&block, other, "\"text\", \"thinking\" or \"tool_use\"")),
        }
    }
    let mut message = json!({"role": "assistant", "content": content});
    if !reasoning.is_empty() {
        message["reasoning_content"] = reasoning.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    Ok(message)
}

fn tool_use(block: &Fields) -> Result<Value> {
    fields::check_only(block, &["type", "id", "name", "input", "cache_control", "caller"])?;
    direct_caller(block)?;
    let id = block.required("id", block.string("id")?, "the id of the call")?;
    let name = block.required("name", block.string("name")?, "the name of the tool")?;
    block.required("input", block.object("input")?, "an object: the arguments")?;
    Ok(json!({"id": id, "type": "function", "function": {"name": name, "arguments": block.get("input")}}))
}

/// Refuses a call that code on Anthropic's servers made.
fn direct_caller(block: &Fields) -> Result<()> {
    let Some(caller) = block.object("caller")? else { return Ok(()) };
    match caller.string("type")? {
        Some("direct") => Ok(()),
        _ => Err(fields::unsupported(
            block.path_of("caller"),
            "only the model calls tools here; its type must be \"direct\"",
        )),
    }
}

/// A tool as a chat's request has it.
fn read_tool(value: &Value, index: usize) -> Result<Value> {
    let tool = Fields::of_value(value, format!("tools[{index}]"))?;
    if let Some(other) = tool.string("type")?.filter(|kind| *kind != "custom") {
        let path = tool.path_of("type");
        let message = format!(
            "`{path}`: the server has no tool of the type {other:?}; give a tool with `name` and `input_schema`"
        );
        return Err(Error::invalid(message).param(path).code("unsupported_value"));
    }
    fields::check_only(
        &tool,
        &[
            "type",
            "name",
            "description",
            "input_schema",
            "strict",
            "cache_control",
            "input_examples",
            "allowed_callers",
            "defer_loading",
            // The arguments always stream.
            "eager_input_streaming",
        ],
    )?;
    let callers = tool.array("allowed_callers")?.unwrap_or_default();
    if callers.iter().any(|caller| caller != "direct") {
        return Err(fields::unsupported(
            tool.path_of("allowed_callers"),
            "only the model calls tools here: [\"direct\"]",
        ));
    }
    if tool.array("input_examples")?.is_some_and(|examples| !examples.is_empty()) {
        return Err(fields::unsupported(tool.path_of("input_examples"), "put the examples into `description`"));
    }
    if tool.boolean("defer_loading")? == Some(true) {
        return Err(fields::unsupported(
            tool.path_of("defer_loading"),
            "the model sees every tool: leave out what it need not see",
        ));
    }
    tool.required("input_schema", tool.object("input_schema")?, "the JSON schema of the arguments")?;
    let mut function = Map::new();
    for (name, chat_name) in
        [("name", "name"), ("description", "description"), ("input_schema", "parameters"), ("strict", "strict")]
    {
        if let Some(value) = tool.get(name) {
            function.insert(chat_name.to_owned(), value.clone());
        }
    }
    Ok(json!({"type": "function", "function": function}))
}

fn tool_choice(choice: &Fields, chat: &mut Value) -> Result<()> {
    const TYPES: &str = "\"auto\", \"any\", \"tool\" or \"none\"";
    let kind = choice.required("type", choice.string("type")?, TYPES)?;
    let named = if kind == "tool" { "name" } else { "type" };
    fields::check_only(choice, &["type", "disable_parallel_tool_use", named])?;
    chat["tool_choice"] = match kind {
        "auto" | "none" => kind.into(),
        "any" => "required".into(),
        "tool" => {
            let name = choice.required("name", choice.string("name")?, "the name of the tool")?;
            json!({"type": "function", "function": {"name": name}})
        }
        _ => return Err(fields::wrong(&choice.path_of("type"), TYPES, &kind.into())),
    };
    if let Some(disabled) = choice.boolean("disable_parallel_tool_use")? {
        chat["parallel_tool_calls"] = (!disabled).into();
    }
    Ok(())
}

fn output_config(config: &Fields, chat: &mut Value) -> Result<()> {
    fields::check_only(config, &["format", "effort"])?;
    if let Some(format) = config.object("format")? {
        fields::check_only(&format, &["type", "schema"])?;
        match format.required("type", format.string("type")?, "\"json_schema\"")? {
            "json_schema" => {}
            other => return Err(fields::wrong(&format.path_of("type"), "\"json_schema\"", &other.into())),
        }
        format.required("schema", format.object("schema")?, "a JSON schema")?;
        chat["response_format"] = json!({"type": "json_schema", "json_schema": {"schema": format.get("schema")}});
    }
    if let Some(effort) = config.string("effort")? {
        chat["reasoning_effort"] = effort.into();
    }
    Ok(())
}

/// The variables of the template with which the model thinks or does not, and whether the reply has the text of the thinking. As in
/// Anthropic's API, the model does not think unless asked. `source` is the template's.
fn thinking(body: &Fields, source: &str) -> Result<(Map<String, Value>, bool)> {
    const TYPES: &str = "\"enabled\", \"adaptive\" or \"disabled\"";
    body.object("chat_template_kwargs")?;
    let mut kwargs = body.get("chat_template_kwargs").and_then(Value::as_object).cloned().unwrap_or_default();
    let (thinks, switch) = (ReasoningFormat::of(source).is_some(), source.contains(ENABLE_THINKING));
    let config = body.object("thinking")?;
    let mode = match &config {
        None => None,
        Some(config) => {
            fields::check_only(config, &["type", "budget_tokens", "display"])?;
            Some(config.required("type", config.string("type")?, TYPES)?)
        }
    };
    let refuse = |why: &str| Err(fields::unsupported("thinking.type".to_owned(), why));
    let on = match mode {
        None | Some("adaptive") if !switch => None,
        None => Some(false),
        Some("adaptive") => Some(true),
        Some("disabled") if thinks && !switch => {
            return refuse("this model's chat template cannot turn the thinking off; omit `thinking`");
        }
        Some("disabled") => switch.then_some(false),
        Some("enabled") if !thinks => return refuse("this model's chat template knows no thinking; omit `thinking`"),
        Some("enabled") => switch.then_some(true),
        Some(other) => return Err(fields::wrong("thinking.type", TYPES, &other.into())),
    };
    match (on, kwargs.get(ENABLE_THINKING)) {
        (Some(on), None) => {
            kwargs.insert(ENABLE_THINKING.to_owned(), on.into());
        }
        (Some(on), Some(given)) if mode.is_some() && *given != on => {
            let message =
                "`thinking` and `chat_template_kwargs.enable_thinking` contradict each other: give one of them";
            return Err(Error::invalid(message).param("thinking").code("invalid_value"));
        }
        _ => {}
    }
    Ok((kwargs, config.map_or(Ok(true), |config| shows_thinking(&config, body))?))
}

/// Reads `display`, and checks `budget_tokens`, which is only a hint in Anthropic's API too.
fn shows_thinking(config: &Fields, body: &Fields) -> Result<bool> {
    let budget = config.integer("budget_tokens", 1..=i64::MAX)?;
    if let (Some(budget), Some(most)) = (budget, body.get("max_tokens").and_then(Value::as_i64))
        && budget >= most
    {
        let allowed = format!("below `max_tokens` ({most}), which limits the thinking and the answer together");
        return Err(fields::wrong(&config.path_of("budget_tokens"), &allowed, &budget.into()));
    }
    config.one_of("display", &[("summarized", true), ("omitted", false)])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The variable that turns the thinking on, and whether its text is shown; or the error.
    fn of(thinks: bool, switch: bool, body: Value) -> Result<(Value, bool), String> {
        let source = format!("{}{}", if thinks { "</think>" } else { "" }, if switch { ENABLE_THINKING } else { "" });
        let fields = Fields::of_body(&body).map_err(|e| e.message)?;
        let (kwargs, shown) = thinking(&fields, &source).map_err(|e| e.message)?;
        Ok((kwargs.get(ENABLE_THINKING).cloned().unwrap_or_default(), shown))
    }

    #[test]
    fn the_model_thinks_only_if_asked() {
        let mode = |kind: &str| json!({"thinking": {"type": kind}});
        for (thinks, switch, body, variable) in [
            (true, true, json!({}), json!(false)),
            (true, true, mode("disabled"), json!(false)),
            (true, true, mode("enabled"), json!(true)),
            (true, true, mode("adaptive"), json!(true)),
            (true, false, json!({}), Value::Null),
            (true, false, mode("enabled"), Value::Null),
            (true, false, mode("adaptive"), Value::Null),
            (false, false, mode("disabled"), Value::Null),
            (true, true, json!({"chat_template_kwargs": {"enable_thinking": true}}), json!(true)),
        ] {
            assert_eq!(of(thinks, switch, body.clone()).map(|of| of.0), Ok(variable), "{body}");
        }
        for (thinks, switch, body, says) in [
            (true, false, mode("disabled"), "cannot turn the thinking off"),
            (false, false, mode("enabled"), "knows no thinking"),
            (
                true,
                true,
                json!({"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": false}}),
                "contradict each other",
            ),
        ] {
            let error = of(thinks, switch, body.clone()).expect_err("a refusal");
            assert!(error.contains(says), "{body}: {error}");
        }
        let omitted = json!({"thinking": {"type": "enabled", "budget_tokens": 9, "display": "omitted"}});
        assert_eq!(of(true, true, omitted), Ok((json!(true), false)));
    }
}
