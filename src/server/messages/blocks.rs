//! The content blocks of an answer in Anthropic's form, whole or as the events of a stream.

use serde_json::{Map, Value, json};

use crate::server::response::call_id;
use crate::text::tools::{OutputPart, ToolFormat};

/// Writes the parts of an output as content blocks.
///
/// White space before and after calls belongs to the form of the calls: it makes no text block.
pub(super) struct BlockWriter {
    /// The form of the calls, which decides the form of their ids.
    tools: ToolFormat,
    /// The thinking blocks have text.
    show_thinking: bool,
    /// Blocks begun so far.
    begun: usize,
    open: Option<OpenBlock>,
    /// White space at the beginning of a text block that has not begun.
    held: String,
    /// Whether there are calls.
    called: bool,
}

/// The block that is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OpenBlock {
    Thinking,
    Text,
    /// The call of this number.
    ToolUse(usize),
}

impl BlockWriter {
    /// A writer for one output.
    pub(super) fn new(tools: ToolFormat, show_thinking: bool) -> Self {
        Self { tools, show_thinking, begun: 0, open: None, held: String::new(), called: false }
    }

    /// Whether there are calls so far.
    pub(super) fn called(&self) -> bool {
        self.called
    }

    /// The events of the next parts: each has its `type`.
    pub(super) fn push(&mut self, parts: Vec<OutputPart>) -> Vec<Value> {
        let mut events = Vec::new();
        for part in parts {
            match part {
                OutputPart::Reasoning(text) => {
                    self.enter(OpenBlock::Thinking, &mut events);
                    if self.show_thinking {
                        self.delta(json!({"type": "thinking_delta", "thinking": text}), &mut events);
                    }
                }
                OutputPart::Content(text) => self.text(&text, &mut events),
                OutputPart::ToolCall { index, name } => {
                    self.called = true;
                    self.held.clear();
                    self.begin(OpenBlock::ToolUse(index), &name, &mut events);
                }
                OutputPart::Arguments { index, text } => {
                    if self.open == Some(OpenBlock::ToolUse(index)) && !text.is_empty() {
                        self.delta(json!({"type": "input_json_delta", "partial_json": text}), &mut events);
                    }
                }
            }
        }
        events
    }

    /// The events at the end of the output.
    pub(super) fn finish(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        let held = std::mem::take(&mut self.held);
        if !held.is_empty() && !self.called {
            self.enter(OpenBlock::Text, &mut events);
            self.delta(json!({"type": "text_delta", "text": held}), &mut events);
        }
        self.close(&mut events);
        events
    }

    fn text(&mut self, text: &str, events: &mut Vec<Value>) {
        if self.open != Some(OpenBlock::Text) {
            self.held.push_str(text);
            if self.held.trim().is_empty() {
                return;
            }
            self.enter(OpenBlock::Text, events);
        } else {
            self.held.push_str(text);
        }
        let text = std::mem::take(&mut self.held);
        self.delta(json!({"type": "text_delta", "text": text}), events);
    }

    /// Begins a block unless one of its kind is open.
    fn enter(&mut self, block: OpenBlock, events: &mut Vec<Value>) {
        if self.open != Some(block) {
            self.begin(block, "", events);
        }
    }

    /// Begins a block. `name` is the tool of a call.
    fn begin(&mut self, block: OpenBlock, name: &str, events: &mut Vec<Value>) {
        self.close(events);
        let content = match block {
            OpenBlock::Thinking => json!({"type": "thinking", "thinking": "", "signature": ""}),
            OpenBlock::Text => json!({"type": "text", "text": "", "citations": null}),
            OpenBlock::ToolUse(_) => {
                json!({"type": "tool_use", "id": tool_use_id(self.tools), "name": name, "input": {}})
            }
        };
        events.push(json!({"type": "content_block_start", "index": self.begun, "content_block": content}));
        self.open = Some(block);
        self.begun += 1;
    }

    fn delta(&self, delta: Value, events: &mut Vec<Value>) {
        events.push(json!({"type": "content_block_delta", "index": self.begun - 1, "delta": delta}));
    }

    fn close(&mut self, events: &mut Vec<Value>) {
        let Some(block) = self.open.take() else { return };
        if block == OpenBlock::Thinking {
            // Nothing is signed. Clients send the empty signature back.
            self.delta(json!({"type": "signature_delta", "signature": ""}), events);
        }
        events.push(json!({"type": "content_block_stop", "index": self.begun - 1}));
    }
}

/// A new id of a call: Anthropic's form, except where a model's template insists on its own.
fn tool_use_id(format: ToolFormat) -> String {
    let id = call_id(format);
    id.strip_prefix("call_").map_or(id.clone(), |rest| format!("toolu_{rest}"))
}

/// The blocks that the events of a whole stream make.
pub(super) fn whole(events: &[Value]) -> Vec<Value> {
    let mut blocks: Vec<Value> = Vec::new();
    let mut arguments = String::new();
    for event in events {
        match event["type"].as_str() {
            Some("content_block_start") => blocks.push(event["content_block"].clone()),
            Some("content_block_delta") => {
                let (Some(block), delta) = (blocks.last_mut(), &event["delta"]) else { continue };
                for key in ["text", "thinking"] {
                    if let (Some(more), Some(Value::String(text))) = (delta[key].as_str(), block.get_mut(key)) {
                        text.push_str(more);
                    }
                }
                arguments.push_str(delta["partial_json"].as_str().unwrap_or_default());
            }
            _ => {
                if let Some(input) = blocks.last_mut().and_then(|block| block.get_mut("input")) {
                    *input = input_of(&std::mem::take(&mut arguments)).into();
                }
            }
        }
    }
    blocks
}

/// The arguments of a call. Those that `max_tokens` cut are no JSON: their text is under the key that Anthropic's documentation
/// gives to invalid JSON.
fn input_of(arguments: &str) -> Map<String, Value> {
    let text = if arguments.trim().is_empty() { "{}" } else { arguments };
    match serde_json::from_str(text) {
        Ok(Value::Object(input)) => input,
        _ => Map::from_iter([("INVALID_JSON".to_owned(), text.into())]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(text: &str) -> OutputPart {
        OutputPart::Content(text.into())
    }

    fn call(index: usize, name: &str) -> OutputPart {
        OutputPart::ToolCall { index, name: name.into() }
    }

    fn arguments(index: usize, text: &str) -> OutputPart {
        OutputPart::Arguments { index, text: text.into() }
    }

    /// The events of parts that come one by one.
    fn events(show_thinking: bool, parts: Vec<OutputPart>) -> Vec<Value> {
        let mut writer = BlockWriter::new(ToolFormat::Hermes, show_thinking);
        let mut events: Vec<Value> = parts.into_iter().flat_map(|part| writer.push(vec![part])).collect();
        events.extend(writer.finish());
        events
    }

    #[test]
    fn a_stream_of_thinking_text_and_calls() {
        let parts = vec![
            OutputPart::Reasoning("hm".into()),
            OutputPart::Reasoning("m".into()),
            content("\n"),
            content("I look."),
            call(0, "look"),
            arguments(0, "{\"at\""),
            arguments(0, ": 1}"),
            content("\n"),
            call(1, "now"),
            arguments(1, "{}"),
            content("\n"),
        ];
        let events = events(true, parts);
        let told: Vec<String> = events
            .iter()
            .map(|event| {
                let kind = event["type"].as_str().unwrap().strip_prefix("content_block_").unwrap();
                let detail = event["delta"]["type"].as_str().or(event["content_block"]["type"].as_str());
                format!("{} {kind} {}", event["index"], detail.unwrap_or_default())
            })
            .collect();
        let want = [
            "0 start thinking",
            "0 delta thinking_delta",
            "0 delta thinking_delta",
            "0 delta signature_delta",
            "0 stop ",
            "1 start text",
            "1 delta text_delta",
            "1 stop ",
            "2 start tool_use",
            "2 delta input_json_delta",
            "2 delta input_json_delta",
            "2 stop ",
            "3 start tool_use",
            "3 delta input_json_delta",
            "3 stop ",
        ];
        assert_eq!(told, want);
        let mut blocks = whole(&events);
        for block in &mut blocks[2..] {
            let id = block["id"].take();
            assert!(id.as_str().unwrap().starts_with("toolu_"), "{id}");
        }
        let want = json!([
            {"type": "thinking", "thinking": "hmm", "signature": ""},
            {"type": "text", "text": "\nI look.", "citations": null},
            {"type": "tool_use", "id": null, "name": "look", "input": {"at": 1}},
            {"type": "tool_use", "id": null, "name": "now", "input": {}},
        ]);
        assert_eq!(Value::from(blocks), want);
    }

    #[test]
    fn white_space_alone_is_text_without_calls() {
        assert_eq!(whole(&events(true, vec![content(" "), content("\n")]))[0]["text"], " \n");
        assert_eq!(whole(&events(true, vec![])), Vec::<Value>::new());
    }

    #[test]
    fn omitted_thinking_is_an_empty_block() {
        let blocks = whole(&events(false, vec![OutputPart::Reasoning("secret".into()), content("x")]));
        assert_eq!(blocks[0], json!({"type": "thinking", "thinking": "", "signature": ""}));
        assert_eq!(blocks[1]["text"], "x");
    }

    #[test]
    fn arguments_that_are_cut_are_told_as_such() {
        let blocks = whole(&events(true, vec![call(0, "f"), arguments(0, "{\"a\": \"b")]));
        assert_eq!(blocks[0]["input"], json!({"INVALID_JSON": "{\"a\": \"b"}));
        assert_eq!(whole(&events(true, vec![call(0, "f")]))[0]["input"], json!({}));
    }
}
