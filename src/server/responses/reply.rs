//! The `response` object and the events of a stream.

use std::collections::VecDeque;
use std::sync::Arc;

use axum::response::sse::Event as SseEvent;
use serde_json::{Map, Value, json};

use super::input::Conversation;
use super::new_item_id;
use super::store::{ResponseStore, StoredResponse};
use crate::engine::request::FinishReason;
use crate::server::error_response;
use crate::server::generate::ReplyFormat;
use crate::server::response::{CompletionOutput, ReplyContext, UsageInfo, call_id, finite};
use crate::server::stream::{OutputDelta, OutputToken};
use crate::text::tools::OutputPart;
use crate::{Error, Result};

/// Writes the reply to one request.
pub(super) struct ResponsesFormat {
    context: ReplyContext,
    /// Fields of the request that the reply repeats.
    repeated: Map<String, Value>,
    conversation: Conversation,
    /// Where the reply is kept, if it is.
    store: Option<Arc<ResponseStore>>,
    /// The finished items of the output.
    output: Vec<Value>,
    /// The item that the output is in.
    open: Option<OpenItem>,
    tokens: ContentTokens,
    finish: Option<FinishReason>,
    /// Set in a stream.
    events: Option<EventLog>,
}

/// The events of a stream.
#[derive(Default)]
struct EventLog {
    /// Events so far.
    sequence: u64,
    /// Those that are to be sent.
    pending: Vec<Value>,
}

/// An item of the output, until it is finished.
struct OpenItem {
    id: String,
    kind: ItemKind,
    /// Its text so far, or the arguments of a call.
    text: String,
    logprobs: Vec<Value>,
}

#[derive(PartialEq, Eq)]
enum ItemKind {
    Reasoning,
    Message,
    Call { call_id: String, name: String },
}

impl OpenItem {
    fn new(kind: ItemKind) -> Self {
        let prefix = match kind {
            ItemKind::Reasoning => "rs",
            ItemKind::Message => "msg",
            ItemKind::Call { .. } => "fc",
        };
        Self { id: new_item_id(prefix), kind, text: String::new(), logprobs: Vec::new() }
    }

    /// The item in the API's form. Its content is empty until it is finished.
    fn object(&self, status: &str) -> Value {
        let begun = status == "in_progress";
        let content: Vec<Value> = self.part().into_iter().filter(|_| !begun).collect();
        match &self.kind {
            ItemKind::Reasoning => {
                json!({"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status})
            }
            ItemKind::Message => {
                json!({"id": self.id, "type": "message", "role": "assistant", "content": content, "status": status})
            }
            ItemKind::Call { call_id, name } => {
                json!({"id": self.id, "type": "function_call", "call_id": call_id, "name": name, "arguments": self.text,
                       "status": status})
            }
        }
    }

    /// Its content part, which calls do not have.
    fn part(&self) -> Option<Value> {
        match self.kind {
            ItemKind::Reasoning => Some(json!({"type": "reasoning_text", "text": self.text})),
            ItemKind::Message => {
                Some(json!({"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}))
            }
            ItemKind::Call { .. } => None,
        }
    }

    /// The event of new text, or that of the whole text.
    fn event(&self, done: bool) -> &'static str {
        match (&self.kind, done) {
            (ItemKind::Reasoning, false) => "response.reasoning_text.delta",
            (ItemKind::Reasoning, true) => "response.reasoning_text.done",
            (ItemKind::Message, false) => "response.output_text.delta",
            (ItemKind::Message, true) => "response.output_text.done",
            (ItemKind::Call { .. }, false) => "response.function_call_arguments.delta",
            (ItemKind::Call { .. }, true) => "response.function_call_arguments.done",
        }
    }
}

impl ReplyFormat for ResponsesFormat {
    fn whole(&mut self, outputs: Vec<CompletionOutput>, usage: &UsageInfo) -> Result<Value> {
        let output = outputs.into_iter().next().unwrap_or_default();
        let finish = output.finish.ok_or_else(|| Error::internal("a response has no end"))?;
        self.push(&output.text, output.tokens, joined(output.parts));
        self.end(finish.reason);
        Ok(self.ended(usage))
    }

    fn opening(&mut self, _choices: usize) -> Vec<SseEvent> {
        self.events = Some(EventLog::default());
        for name in ["response.created", "response.in_progress"] {
            let response = self.object("in_progress");
            self.emit(name, json!({"response": response}));
        }
        self.pending()
    }

    fn delta(&mut self, _index: usize, delta: OutputDelta) -> Vec<SseEvent> {
        self.push(&delta.text, delta.tokens, delta.parts);
        if let Some(finish) = delta.finish {
            self.end(finish.reason);
        }
        self.pending()
    }

    fn ending(&mut self, usage: &UsageInfo) -> Vec<SseEvent> {
        let response = self.ended(usage);
        let name = if response["status"] == "incomplete" { "response.incomplete" } else { "response.completed" };
        self.emit(name, json!({"response": response}));
        self.pending()
    }

    fn failure(&mut self, error: &Error, request_id: &str) -> Vec<SseEvent> {
        let error = &error_response::body(error, request_id)["error"];
        // Nothing is kept of it.
        self.store = None;
        self.output.extend(self.open.take().map(|item| item.object("incomplete")));
        self.emit("error", json!({"code": error["code"], "message": error["message"], "param": error["param"]}));
        let mut response = self.object("failed");
        // OpenAI's words for the codes of a failed response.
        let code = match error["type"].as_str() {
            Some("invalid_request_error") => "invalid_prompt",
            Some("rate_limit_error") => "rate_limit_exceeded",
            _ => "server_error",
        };
        response["error"] = json!({"code": code, "message": error["message"]});
        self.emit("response.failed", json!({"response": response}));
        self.pending()
    }
}

impl ResponsesFormat {
    /// A writer of the reply to one request: `repeated` are the fields of the request that the reply has too. The reply is kept in
    /// `store`.
    pub(super) fn new(
        context: ReplyContext,
        repeated: Map<String, Value>,
        conversation: Conversation,
        store: Option<Arc<ResponseStore>>,
    ) -> Self {
        Self {
            context,
            repeated,
            conversation,
            store,
            output: Vec::new(),
            open: None,
            tokens: ContentTokens::default(),
            finish: None,
            events: None,
        }
    }

    /// The response object.
    fn object(&self, status: &str) -> Value {
        let context = &self.context;
        let mut response = json!({
            "id": context.id,
            "object": "response",
            "created_at": context.created,
            "completed_at": null,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": null,
            "model": context.model,
            "adapter": context.adapter,
            "adapter_generation": context.generation,
            "output": self.output,
            "temperature": finite(context.temperature),
            "top_p": finite(context.top_p),
            "store": self.store.is_some(),
            "usage": null,
        });
        if context.options.service_tier {
            response["service_tier"] = "default".into();
        }
        if let Some(object) = response.as_object_mut() {
            object.extend(self.repeated.clone());
        }
        response
    }

    /// The response of an output that has ended. It is kept if the request wants that and it is not too large.
    fn ended(&mut self, usage: &UsageInfo) -> Value {
        let cut = self.finish == Some(FinishReason::Length);
        let mut response = self.object(if cut { "incomplete" } else { "completed" });
        if cut {
            response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        } else {
            response["completed_at"] = crate::time::unix_seconds(std::time::SystemTime::now()).into();
        }
        response["usage"] = json!({
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        });
        if let Some(store) = self.store.take() {
            let Conversation { mut items, inherited, new_ids: mut ids, .. } = std::mem::take(&mut self.conversation);
            let own = inherited..items.len();
            ids.extend(self.output.iter().filter_map(|item| item["id"].as_str()).map(str::to_owned));
            items.append(&mut self.output);
            match StoredResponse::new(&response, items, own, ids) {
                Some(stored) => store.insert(&self.context.id, stored),
                None => response["store"] = false.into(),
            }
        }
        response
    }

    /// Takes the next text, its tokens, and the parts that are now certain.
    fn push(&mut self, text: &str, tokens: Vec<OutputToken>, parts: Vec<OutputPart>) {
        if self.context.logprobs.is_some() {
            self.tokens.push(text, tokens);
        }
        for part in parts {
            match part {
                OutputPart::Content(text) => {
                    self.begin(ItemKind::Message);
                    let tokens = self.tokens.take(&text, true);
                    self.append(&text, &tokens);
                }
                OutputPart::Reasoning(text) => {
                    self.tokens.take(&text, false);
                    if self.context.include_reasoning {
                        self.begin(ItemKind::Reasoning);
                        self.append(&text, &[]);
                    }
                }
                OutputPart::ToolCall { name, .. } => {
                    self.begin(ItemKind::Call { call_id: call_id(self.context.tool_format()), name });
                }
                OutputPart::Arguments { text, .. } => self.append(&text, &[]),
            }
        }
    }

    /// Opens an item, unless the open one goes on.
    fn begin(&mut self, kind: ItemKind) {
        if self.open.as_ref().is_some_and(|open| open.kind == kind) {
            return;
        }
        self.close("completed");
        let item = OpenItem::new(kind);
        self.emit(
            "response.output_item.added",
            json!({"output_index": self.output.len(), "item": item.object("in_progress")}),
        );
        if let Some(part) = item.part() {
            self.emit(
                "response.content_part.added",
                json!({
                    "item_id": item.id, "output_index": self.output.len(), "content_index": 0, "part": part,
                }),
            );
        }
        self.open = Some(item);
    }

    /// Appends text to the open item.
    fn append(&mut self, text: &str, tokens: &[OutputToken]) {
        let logprobs = match self.context.logprobs {
            Some(alternatives) => self.context.token_logprobs(tokens, alternatives),
            None => Vec::new(),
        };
        let Some(item) = &mut self.open else { return };
        item.text.push_str(text);
        let mut event = json!({"item_id": item.id, "output_index": self.output.len(), "delta": text});
        if item.kind == ItemKind::Message {
            event["logprobs"] = logprobs.clone().into();
        }
        item.logprobs.extend(logprobs);
        if !matches!(item.kind, ItemKind::Call { .. }) {
            event["content_index"] = 0.into();
        }
        let name = item.event(false);
        self.emit(name, event);
    }

    /// Finishes the open item.
    fn close(&mut self, status: &str) {
        let Some(item) = self.open.take() else { return };
        let index = self.output.len();
        let mut event = json!({"item_id": item.id, "output_index": index});
        match &item.kind {
            ItemKind::Call { name, .. } => {
                event["name"] = name.as_str().into();
                event["arguments"] = item.text.as_str().into();
            }
            kind => {
                event["content_index"] = 0.into();
                event["text"] = item.text.as_str().into();
                if *kind == ItemKind::Message {
                    event["logprobs"] = item.logprobs.clone().into();
                }
            }
        }
        self.emit(item.event(true), event);
        if let Some(part) = item.part() {
            let event = json!({"item_id": item.id, "output_index": index, "content_index": 0, "part": part});
            self.emit("response.content_part.done", event);
        }
        let object = item.object(status);
        self.emit("response.output_item.done", json!({"output_index": index, "item": object}));
        self.output.push(object);
    }

    /// Finishes the output.
    fn end(&mut self, reason: FinishReason) {
        self.finish = Some(reason);
        let answered = |kind: &ItemKind| *kind != ItemKind::Reasoning;
        let open = self.open.as_ref().is_some_and(|item| answered(&item.kind));
        let answer = open || self.output.iter().any(|item| item["type"] != "reasoning");
        if reason == FinishReason::Length {
            return self.close("incomplete");
        }
        if !answer {
            // An empty answer is an answer.
            self.begin(ItemKind::Message);
        }
        self.close("completed");
    }

    fn emit(&mut self, name: &str, event: Value) {
        let Some(log) = &mut self.events else { return };
        let mut object = json!({"type": name, "sequence_number": log.sequence});
        if let (Some(object), Value::Object(event)) = (object.as_object_mut(), event) {
            object.extend(event);
        }
        log.sequence += 1;
        log.pending.push(object);
    }

    fn pending(&mut self) -> Vec<SseEvent> {
        let event = |event: Value| {
            let name = event["type"].as_str().unwrap_or_default();
            SseEvent::default().event(name).data(event.to_string())
        };
        self.events.iter_mut().flat_map(|log| log.pending.drain(..)).map(event).collect()
    }
}

/// Parts of a whole output, with neighbours of one kind joined.
fn joined(parts: Vec<OutputPart>) -> Vec<OutputPart> {
    let mut joined: Vec<OutputPart> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(OutputPart::Content(before)), OutputPart::Content(text))
            | (Some(OutputPart::Reasoning(before)), OutputPart::Reasoning(text)) => before.push_str(&text),
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// Finds the tokens of the answer among all: those of the thinking and of calls are not part of a message.
#[derive(Default)]
struct ContentTokens {
    /// Text that no part has covered yet.
    text: String,
    /// Characters before it.
    offset: usize,
    /// Tokens that begin in it.
    tokens: VecDeque<OutputToken>,
    /// The part before was content.
    in_content: bool,
}

impl ContentTokens {
    /// Takes the next text with its tokens.
    fn push(&mut self, text: &str, tokens: Vec<OutputToken>) {
        self.text.push_str(text);
        self.tokens.extend(tokens);
    }

    /// Takes the next part, and returns its tokens if it is content.
    fn take(&mut self, part: &str, content: bool) -> Vec<OutputToken> {
        // Between two parts there may be a marker, which belongs to neither.
        let (from, to) = self.text.find(part).map_or((0, self.text.len()), |at| (at, at + part.len()));
        let skipped = if content && self.in_content { 0 } else { self.text[..from].chars().count() };
        let start = self.offset + skipped;
        self.offset += self.text[..to].chars().count();
        self.text.drain(..to);
        self.in_content = content;
        let covered = self.tokens.iter().take_while(|token| token.offset < self.offset).count();
        self.tokens.drain(..covered).filter(|token| content && token.offset >= start).collect()
    }
}

#[cfg(test)]
mod tests;
