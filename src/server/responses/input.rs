//! The items of a conversation: the `input` of a request and what earlier responses hold, checked and written as chat messages.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::new_item_id;
use super::store::ResponseStore;
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// The types of items, for errors.
const TYPES: &str = "\"message\", \"function_call\", \"function_call_output\", \"reasoning\" or \"item_reference\"";

/// The types of parts, for errors.
const PARTS: &str = "\"input_text\", \"output_text\" or \"refusal\" (the model reads only text)";

/// An item, whose fields are checked.
#[derive(Debug, Clone, PartialEq)]
struct ResponseItem {
    /// The id that the request gives it.
    id: Option<String>,
    body: ItemBody,
}

#[derive(Debug, Clone, PartialEq)]
enum ItemBody {
    Message { role: String, texts: Vec<String> },
    Reasoning(String),
    Call { call_id: String, name: String, arguments: String },
    CallOutput { call_id: String, texts: Vec<String> },
}

impl ResponseItem {
    /// Reads the item at `path`.
    fn read(value: &Value, path: &str) -> Result<Self> {
        let item = Fields::of_value(value, path)?;
        let kind = match item.string("type")? {
            None if item.get("role").is_some() => "message",
            kind => item.required("type", kind, TYPES)?,
        };
        let body = match kind {
            "message" => message(&item)?,
            "reasoning" => ItemBody::Reasoning(reasoning(&item)?),
            "function_call" => call(&item)?,
            "function_call_output" => call_output(&item)?,
            other => {
                let path = item.path_of("type");
                let message = format!("`{path}`: items of the type {other:?} are not supported; the types are {TYPES}");
                return Err(Error::invalid(message).param(path).code("unsupported_value"));
            }
        };
        Ok(Self { id: item.string("id")?.map(str::to_owned), body })
    }

    /// The item as it is stored and listed: whole, with an id. Also tells whether the id is new.
    fn stored(&self) -> (Value, bool) {
        let (prefix, mut item) = match &self.body {
            ItemBody::Message { role, texts } => {
                let part = |text: &String| match role.as_str() {
                    "assistant" => json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []}),
                    _ => json!({"type": "input_text", "text": text}),
                };
                let content: Vec<Value> = texts.iter().map(part).collect();
                ("msg", json!({"type": "message", "id": null, "status": "completed", "role": role, "content": content}))
            }
            ItemBody::Reasoning(text) => {
                let content = json!([{"type": "reasoning_text", "text": text}]);
                ("rs", json!({"type": "reasoning", "id": null, "summary": [], "content": content}))
            }
            ItemBody::Call { call_id, name, arguments } => {
                let item = json!({"type": "function_call", "id": null, "status": "completed", "call_id": call_id,
                                  "name": name, "arguments": arguments});
                ("fc", item)
            }
            ItemBody::CallOutput { call_id, texts } => {
                let output: Value = match &texts[..] {
                    [text] => text.as_str().into(),
                    texts => texts.iter().map(|text| json!({"type": "input_text", "text": text})).collect(),
                };
                let item = json!({"type": "function_call_output", "id": null, "status": "completed",
                                  "call_id": call_id, "output": output});
                ("fco", item)
            }
        };
        item["id"] = self.id.clone().unwrap_or_else(|| new_item_id(prefix)).into();
        (item, self.id.is_none())
    }
}

fn message(item: &Fields) -> Result<ItemBody> {
    const ROLES: &str = "\"user\", \"assistant\", \"system\" or \"developer\"";
    // `phase` tells a client's own messages apart.
    fields::check_only(item, &["type", "id", "role", "content", "status", "phase"])?;
    let role = item.required("role", item.string("role")?, ROLES)?;
    if !["user", "assistant", "system", "developer"].contains(&role) {
        return Err(fields::wrong(&item.path_of("role"), ROLES, &role.into()));
    }
    Ok(ItemBody::Message { role: role.to_owned(), texts: texts(item, "content")? })
}

fn call(item: &Fields) -> Result<ItemBody> {
    fields::check_only(item, &["type", "id", "call_id", "name", "arguments", "status", "parsed_arguments"])?;
    let text =
        |name: &str, what: &str| -> Result<String> { Ok(item.required(name, item.string(name)?, what)?.to_owned()) };
    Ok(ItemBody::Call {
        call_id: text("call_id", "the id of the call")?,
        name: text("name", "the name of the function")?,
        arguments: text("arguments", "a JSON object, as a string")?,
    })
}

fn call_output(item: &Fields) -> Result<ItemBody> {
    fields::check_only(item, &["type", "id", "call_id", "name", "output", "status"])?;
    let call_id = item.required("call_id", item.string("call_id")?, "the `call_id` of the call")?;
    Ok(ItemBody::CallOutput { call_id: call_id.to_owned(), texts: texts(item, "output")? })
}

/// The text of a reasoning item, or the summary of it where only that is given.
fn reasoning(item: &Fields) -> Result<String> {
    fields::check_only(item, &["type", "id", "summary", "content", "encrypted_content", "status"])?;
    if item.get("encrypted_content").is_some_and(|text| *text != "") {
        let path = item.path_of("encrypted_content");
        let message = format!(
            "`{path}` cannot be read: another server encrypted it; remove the item, or give its text as `content`"
        );
        return Err(Error::invalid(message).param(path).code("unsupported_parameter"));
    }
    let part = |list: &str, kind: &str| -> Result<String> {
        let path = item.path_of(list);
        let text = |(i, value): (usize, &Value)| {
            let part = Fields::of_value(value, format!("{path}[{i}]"))?;
            fields::check_only(&part, &["type", "text"])?;
            let allowed = format!("{kind:?}");
            let found = part.required("type", part.string("type")?, &allowed)?;
            if found != kind {
                return Err(fields::wrong(&part.path_of("type"), &allowed, &found.into()));
            }
            part.required("text", part.string("text")?, "the text of the part").map(str::to_owned)
        };
        let parts = item.array(list)?.unwrap_or_default();
        Ok(parts.iter().enumerate().map(text).collect::<Result<Vec<_>>>()?.join("\n"))
    };
    let (content, summary) = (part("content", "reasoning_text")?, part("summary", "summary_text")?);
    Ok(if content.is_empty() { summary } else { content })
}

/// A field that is text: a string or an array of parts.
fn texts(item: &Fields, name: &str) -> Result<Vec<String>> {
    const ALLOWED: &str = "a string or an array of text parts";
    let path = item.path_of(name);
    match item.required(name, item.get(name), ALLOWED)? {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(parts) => {
            parts.iter().enumerate().map(|(i, part)| part_text(part, &format!("{path}[{i}]"))).collect()
        }
        other => Err(fields::wrong(&path, ALLOWED, other)),
    }
}

fn part_text(part: &Value, path: &str) -> Result<String> {
    let part = Fields::of_value(part, path)?;
    let key = match part.required("type", part.string("type")?, PARTS)? {
        "input_text" | "output_text" | "text" => "text",
        "refusal" => "refusal",
        other => {
            let path = part.path_of("type");
            let message = format!("`{path}`: parts of the type {other:?} are not supported; the types are {PARTS}");
            return Err(Error::invalid(message).param(path).code("unsupported_value"));
        }
    };
    // What a client sends back with a reply, and a hint for another server's cache, have no effect.
    fields::check_only(&part, &["type", key, "annotations", "logprobs", "parsed", "prompt_cache_breakpoint"])?;
    part.required(key, part.string(key)?, "the text of the part").map(str::to_owned)
}

/// The fields that a chat message was made of, to name them in errors.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct MessageSource {
    /// The item, or another field of the request.
    pub(super) item: String,
    /// The items of its calls.
    pub(super) calls: Vec<String>,
}

/// A conversation: its items, and the same as messages of a chat.
///
/// Successive items of the assistant make one message: reasoning, then text, then calls. Reasoning that no text and no call of the
/// assistant follows is left out. Which reasoning of earlier turns the model sees, the chat template decides.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    /// All items, the oldest first: those of earlier responses, and those of `input` in the form in which they are stored.
    pub(super) items: Vec<Value>,
    /// How many of them belong to earlier responses.
    pub(super) inherited: usize,
    /// Ids that the items of `input` have got here.
    pub(super) new_ids: Vec<String>,
    /// The messages of the chat.
    pub(super) messages: Vec<Value>,
    /// The origin of each message.
    pub(super) sources: Vec<MessageSource>,
    /// Reasoning whose message is still to come.
    reasoning: Option<String>,
    /// The last message is the assistant's, and may get calls.
    open: bool,
    /// Ids of the calls so far.
    calls: HashSet<String>,
}

impl Conversation {
    /// Reads `instructions`, `previous_response_id` and `input`. Earlier responses and items are in `store`.
    ///
    /// # Errors
    /// `Invalid`, naming the item; `NotFound` if an earlier response or an item is not in the store.
    pub(super) fn parse(body: &Fields, store: &ResponseStore) -> Result<Self> {
        const ALLOWED: &str = "a string or an array of at least one item";
        let mut conversation = Self::default();
        if let Some(text) = body.string("instructions")? {
            conversation.add_message(json!({"role": "system", "content": text}), "instructions");
        }
        if let Some(id) = body.string("previous_response_id")? {
            for item in previous_items(id, store)? {
                conversation.push(ResponseItem::read(&item, "previous_response_id")?.body, "previous_response_id")?;
                conversation.items.push(item);
            }
            conversation.inherited = conversation.items.len();
        }
        match body.required("input", body.get("input"), ALLOWED)? {
            Value::String(text) => {
                let body = ItemBody::Message { role: "user".into(), texts: vec![text.clone()] };
                conversation.push_own(ResponseItem { id: None, body }, "input")?;
            }
            Value::Array(items) if !items.is_empty() => {
                for (i, item) in items.iter().enumerate() {
                    conversation.push_input(item, &format!("input[{i}]"), store)?;
                }
            }
            other => return Err(fields::wrong("input", ALLOWED, other)),
        }
        Ok(conversation)
    }

    fn push_input(&mut self, value: &Value, path: &str, store: &ResponseStore) -> Result<()> {
        let Some(id) = reference(&Fields::of_value(value, path)?)? else {
            return self.push_own(ResponseItem::read(value, path)?, path);
        };
        let known = self.items.iter().find(|item| item["id"] == id).cloned();
        let item = match known {
            Some(item) => item,
            None => store.item(id)?.ok_or_else(|| {
                let message = format!(
                    "`{path}`: there is no stored item {id:?}; it may never have been stored, or its response was deleted \
                     or evicted: send the item itself"
                );
                Error::not_found(message).param(path).code("item_not_found")
            })?,
        };
        self.push(ResponseItem::read(&item, path)?.body, path)?;
        self.items.push(item);
        Ok(())
    }

    fn push_own(&mut self, item: ResponseItem, path: &str) -> Result<()> {
        let (stored, new) = item.stored();
        if new {
            self.new_ids.extend(stored["id"].as_str().map(str::to_owned));
        }
        self.items.push(stored);
        self.push(item.body, path)
    }

    /// Adds an item to the messages.
    fn push(&mut self, item: ItemBody, path: &str) -> Result<()> {
        match item {
            ItemBody::Message { role, texts } => {
                let content: Value = match <[String; 1]>::try_from(texts) {
                    Ok([text]) => text.into(),
                    Err(texts) => texts.iter().map(|text| json!({"type": "text", "text": text})).collect(),
                };
                let mut message = json!({"role": role, "content": content});
                let reasoning = self.reasoning.take();
                let assistant = role == "assistant";
                if let Some(reasoning) = reasoning.filter(|_| assistant) {
                    message["reasoning_content"] = reasoning.into();
                }
                self.add_message(message, path);
                self.open = assistant;
            }
            ItemBody::Reasoning(text) => {
                self.reasoning = Some(match self.reasoning.take() {
                    Some(before) => format!("{before}\n{text}"),
                    None => text,
                });
            }
            ItemBody::Call { call_id, name, arguments } => self.push_call(&call_id, &name, &arguments, path),
            ItemBody::CallOutput { call_id, texts } => {
                if !self.calls.contains(&call_id) {
                    let message = format!(
                        "`{path}` answers the call {call_id:?}, but no `function_call` before it has that `call_id`"
                    );
                    return Err(Error::invalid(message).param(format!("{path}.call_id")).code("invalid_value"));
                }
                self.reasoning = None;
                let message = json!({"role": "tool", "tool_call_id": call_id, "content": texts.join("\n")});
                self.add_message(message, path);
            }
        }
        Ok(())
    }

    fn push_call(&mut self, call_id: &str, name: &str, arguments: &str, path: &str) {
        let reasoning = self.reasoning.take();
        if !self.open || reasoning.is_some() {
            let mut message = json!({"role": "assistant", "content": null, "tool_calls": []});
            if let Some(reasoning) = reasoning {
                message["reasoning_content"] = reasoning.into();
            }
            self.add_message(message, path);
            self.open = true;
        }
        let function = json!({"name": name, "arguments": arguments});
        let call = json!({"id": call_id, "type": "function", "function": function});
        if let (Some(message), Some(source)) = (self.messages.last_mut(), self.sources.last_mut()) {
            match message["tool_calls"].as_array_mut() {
                Some(calls) => calls.push(call),
                None => message["tool_calls"] = json!([call]),
            }
            source.calls.push(path.to_owned());
        }
        self.calls.insert(call_id.to_owned());
    }

    fn add_message(&mut self, message: Value, path: &str) {
        self.messages.push(message);
        self.sources.push(MessageSource { item: path.to_owned(), calls: Vec::new() });
        self.open = false;
    }
}

/// The items of an earlier response and of all before it.
fn previous_items(id: &str, store: &ResponseStore) -> Result<Vec<Value>> {
    let stored = store.get(id).ok_or_else(|| {
        let message = format!(
            "there is no stored response {id:?}; it may have been deleted, evicted (the server keeps the responses that were \
             used last), or created with `store`: false: send the whole conversation as `input`"
        );
        Error::not_found(message).param("previous_response_id").code("previous_response_not_found")
    })?;
    stored.items()
}

/// The id of an item that is a reference to a stored one.
fn reference<'a>(item: &Fields<'a>) -> Result<Option<&'a str>> {
    let is = match item.string("type")? {
        None => item.get("role").is_none() && item.get("id").is_some(),
        Some(kind) => kind == "item_reference",
    };
    if !is {
        return Ok(None);
    }
    fields::check_only(item, &["type", "id"])?;
    item.required("id", item.string("id")?, "the id of a stored item").map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(input: Value) -> Result<Conversation> {
        let body = json!({"input": input});
        Conversation::parse(&Fields::of_body(&body)?, &ResponseStore::default())
    }

    fn messages(input: Value) -> Value {
        parse(input).unwrap_or_else(|e| panic!("{e}")).messages.into()
    }

    #[test]
    fn a_string_is_a_message_of_the_user() {
        assert_eq!(messages(json!("hi")), json!([{"role": "user", "content": "hi"}]));
        let parts = json!([{"role": "user", "content": [{"type": "input_text", "text": "a"},
                                                        {"type": "input_text", "text": "b"}]}]);
        let content = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
        assert_eq!(messages(parts), json!([{"role": "user", "content": content}]));
    }

    #[test]
    fn items_of_the_assistant_make_one_message() {
        let call = |id: &str| json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"});
        let output = |id: &str| json!({"type": "function_call_output", "call_id": id, "output": "1"});
        let thought = |text: &str| json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]});
        let tool_call = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let said = json!({"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                          "content": [{"type": "output_text", "text": "so", "annotations": []}]});
        let input = json!([{"role": "user", "content": "q"}, thought("hm"), said, call("a"), call("b"), output("a"), output("b"),
                           thought("then"), call("c"), thought("dropped"), {"role": "user", "content": "r"}]);
        let conversation = parse(input).unwrap();
        assert_eq!(
            Value::from(conversation.messages),
            json!([
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [tool_call("a"), tool_call("b")]},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
                {"role": "tool", "tool_call_id": "b", "content": "1"},
                {"role": "assistant", "content": null, "tool_calls": [tool_call("c")], "reasoning_content": "then"},
                {"role": "user", "content": "r"},
            ])
        );
        assert_eq!(
            conversation.sources[1],
            MessageSource { item: "input[2]".into(), calls: vec!["input[3]".into(), "input[4]".into()] }
        );
        // What is stored reads the same again.
        let again = parse(conversation.items.clone().into()).unwrap();
        assert_eq!((again.items, again.new_ids.len()), (conversation.items, 0));
    }

    #[test]
    fn what_is_not_text_is_refused_by_name() {
        for (input, param, what) in [
            (json!([]), "input", "an empty array"),
            (json!(1), "input", "a string or an array"),
            (json!([{"role": "user"}]), "input[0].content", "is required"),
            (json!([{"role": "tool", "content": "x"}]), "input[0].role", "\"developer\""),
            (
                json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
                "input[0].content[0].type",
                "input_image",
            ),
            (json!([{"role": "user", "content": [{"type": "input_file"}]}]), "input[0].content[0].type", "input_file"),
            (json!([{"role": "user", "content": "x", "name": "y"}]), "input[0].name", "unknown field"),
            (json!([{"type": "computer_call"}]), "input[0].type", "computer_call"),
            (json!([{"type": "function_call", "call_id": "a", "name": "f"}]), "input[0].arguments", "is required"),
            (
                json!([{"type": "function_call_output", "call_id": "a", "output": "x"}]),
                "input[0].call_id",
                "no `function_call`",
            ),
            (json!([{"type": "reasoning", "encrypted_content": "x"}]), "input[0].encrypted_content", "encrypted"),
            (
                json!([{"type": "reasoning", "content": [{"type": "text", "text": ""}]}]),
                "input[0].content[0].type",
                "reasoning_text",
            ),
            (json!([{"id": "msg_0"}]), "input[0]", "no stored item"),
            (json!([{}]), "input[0].type", "is required"),
        ] {
            let error = parse(input.clone()).err().unwrap_or_else(|| panic!("{input} was accepted"));
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
            assert!(error.message.contains(what), "{error}");
        }
    }
}
