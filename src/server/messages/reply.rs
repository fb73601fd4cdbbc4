//! Replies in Anthropic's form: whole messages and the events of a stream.

use axum::response::sse::Event as SseEvent;
use serde_json::{Value, json};

use super::blocks::{self, BlockWriter};
use crate::engine::request::FinishReason;
use crate::server::generate::ReplyFormat;
use crate::server::response::{CompletionOutput, ReplyContext, UsageInfo};
use crate::server::stream::{FinishDetails, OutputDelta, StopReason};
use crate::text::tools::ToolFormat;
use crate::{Error, Result};

/// Writes the reply to one request.
pub(super) struct MessagesFormat {
    context: ReplyContext,
    blocks: BlockWriter,
    /// How the output ended.
    end: Option<StoppedBy>,
}

/// `stop_reason` and `stop_sequence`.
#[derive(Debug, PartialEq)]
struct StoppedBy {
    reason: &'static str,
    sequence: Option<String>,
}

impl StoppedBy {
    /// `called`: the output has calls.
    fn new(finish: FinishDetails, called: bool) -> Self {
        match (finish.reason, finish.stop) {
            (FinishReason::Length, _) => Self { reason: "max_tokens", sequence: None },
            (FinishReason::Stop, Some(StopReason::Text(text))) => {
                Self { reason: "stop_sequence", sequence: Some(text) }
            }
            (FinishReason::Stop, _) => Self { reason: if called { "tool_use" } else { "end_turn" }, sequence: None },
        }
    }
}

impl MessagesFormat {
    /// A writer for the reply to one request. `show_thinking`: the thinking blocks have text.
    pub(super) fn new(context: ReplyContext, show_thinking: bool) -> Self {
        let tools = context.tools.as_ref().map_or(ToolFormat::Json, |(format, _)| *format);
        Self { context, blocks: BlockWriter::new(tools, show_thinking), end: None }
    }

    /// A message.
    fn object(&self, content: Vec<Value>, end: Option<&StoppedBy>, usage: &UsageInfo) -> Value {
        let context = &self.context;
        json!({
            "id": context.id,
            "type": "message",
            "role": "assistant",
            "model": context.model,
            "content": content,
            "stop_reason": end.map(|end| end.reason),
            "stop_sequence": end.and_then(|end| end.sequence.as_ref()),
            "usage": usage_object(usage),
            "adapter": context.adapter,
            "adapter_generation": context.generation,
        })
    }
}

/// Anthropic's `usage`, whose `input_tokens` are those that were not cached.
fn usage_object(usage: &UsageInfo) -> Value {
    json!({
        "input_tokens": usage.prompt - usage.cached.min(usage.prompt),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
        "output_tokens_details": {"thinking_tokens": usage.reasoning},
    })
}

/// An event with its name.
fn event(data: &Value) -> SseEvent {
    SseEvent::default().event(data["type"].as_str().unwrap_or_default()).data(data.to_string())
}

/// An error in Anthropic's form.
pub(super) fn error(kind: &str, message: &str, request_id: &str) -> Value {
    json!({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})
}

impl ReplyFormat for MessagesFormat {
    fn whole(&mut self, outputs: Vec<CompletionOutput>, usage: &UsageInfo) -> Result<Value> {
        let output = outputs.into_iter().next().ok_or_else(|| Error::internal("a reply has no output"))?;
        let finish = output.finish.ok_or_else(|| Error::internal("an output has no end"))?;
        let mut events = self.blocks.push(output.parts);
        events.extend(self.blocks.finish());
        let end = StoppedBy::new(finish, self.blocks.called());
        Ok(self.object(blocks::whole(&events), Some(&end), usage))
    }

    fn opening(&mut self, _choices: usize) -> Vec<SseEvent> {
        let prompt = self.context.prompt_tokens();
        let message = self.object(Vec::new(), None, &UsageInfo { prompt, ..UsageInfo::default() });
        vec![event(&json!({"type": "message_start", "message": message})), event(&json!({"type": "ping"}))]
    }

    fn delta(&mut self, _index: usize, delta: OutputDelta) -> Vec<SseEvent> {
        let mut events = self.blocks.push(delta.parts);
        if let Some(finish) = delta.finish {
            events.extend(self.blocks.finish());
            self.end = Some(StoppedBy::new(finish, self.blocks.called()));
        }
        events.iter().map(event).collect()
    }

    fn ending(&mut self, usage: &UsageInfo) -> Vec<SseEvent> {
        let end = self.end.as_ref();
        let delta = json!({
            "stop_reason": end.map(|end| end.reason),
            "stop_sequence": end.and_then(|end| end.sequence.as_ref()),
        });
        vec![
            event(&json!({"type": "message_delta", "delta": delta, "usage": usage_object(usage)})),
            event(&json!({"type": "message_stop"})),
        ]
    }

    fn failure(&mut self, error: &Error, request_id: &str) -> Vec<SseEvent> {
        vec![event(&super::error(error, request_id).1)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_an_output_ended() {
        let finish = |reason, stop| FinishDetails {
            reason,
            stop,
            end_token: None,
            end_logprobs: None,
            completion_tokens: 1,
            reasoning_tokens: 0,
            cached_tokens: 0,
        };
        let text = || Some(StopReason::Text("x".into()));
        for (reason, stop, called, want, sequence) in [
            (FinishReason::Length, None, true, "max_tokens", None),
            (FinishReason::Stop, None, true, "tool_use", None),
            (FinishReason::Stop, None, false, "end_turn", None),
            (FinishReason::Stop, Some(StopReason::Token(7)), false, "end_turn", None),
            (FinishReason::Stop, text(), true, "stop_sequence", Some("x".to_owned())),
        ] {
            let end = StoppedBy::new(finish(reason, stop), called);
            assert_eq!(end, StoppedBy { reason: want, sequence });
        }
    }

    #[test]
    fn cached_tokens_are_not_input_tokens() {
        let usage = usage_object(&UsageInfo { prompt: 20, completion: 5, reasoning: 2, cached: 16 });
        assert_eq!((&usage["input_tokens"], &usage["cache_read_input_tokens"]), (&json!(4), &json!(16)));
    }
}
