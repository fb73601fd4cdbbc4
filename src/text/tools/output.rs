//! [`OutputParser`] separates a model's output into thinking, tool calls and content, as the text comes.

use super::calls::CallParser;
use super::{ToolFormat, Tools};
use crate::text::reasoning::{ReasoningFormat, ReasoningSplitter, SplitText};

/// A piece of an output. Pieces of one kind that follow each other belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputPart {
    /// Text of the answer.
    Content(String),
    /// Text of the thinking before the answer.
    Reasoning(String),
    /// A call begins.
    ToolCall {
        /// Its number in this output, from 0.
        index: usize,
        /// The tool, which is one of the request's.
        name: String,
    },
    /// The next text of a call's arguments. All of it together is the JSON that the model wrote.
    Arguments {
        /// The call's number.
        index: usize,
        /// A part of the JSON.
        text: String,
    },
}

/// Separates one output into its parts. The parts, joined, do not depend on how the text was cut.
///
/// Text that may still become a call is held back. A call is told once the name of a known tool and the beginning of its arguments
/// are there; what follows streams. Text that turns out to be no call is content, with its markers.
pub struct OutputParser {
    reasoning: Option<ReasoningSplitter>,
    calls: Option<CallParser>,
    markers: Vec<&'static str>,
}

impl OutputParser {
    /// A parser for an output of a request with these tools. Without tools (or with the choice `none`), nothing is a call; without a
    /// format of thinking, nothing is reasoning. `starts_in_reasoning`: the prompt has opened the thinking
    /// ([`ReasoningFormat::opened_by`]).
    pub fn new(
        tools: Option<(ToolFormat, &Tools)>,
        reasoning: Option<ReasoningFormat>,
        starts_in_reasoning: bool,
    ) -> Self {
        let tools = tools.filter(|(_, tools)| tools.may_call());
        let markers = tools.iter().flat_map(|(format, _)| format.markers()).copied();
        let markers = markers.chain(reasoning.iter().flat_map(ReasoningFormat::markers)).collect();
        Self {
            reasoning: reasoning.map(|format| ReasoningSplitter::new(format, starts_in_reasoning)),
            calls: tools.map(|(format, tools)| CallParser::new(format, tools)),
            markers,
        }
    }

    /// The texts by which the parser finds the parts. Decoding must keep them, also where they are special tokens.
    pub fn markers(&self) -> &[&'static str] {
        &self.markers
    }

    /// Takes the next text, and returns the parts that are now certain.
    pub fn push(&mut self, text: &str) -> Vec<OutputPart> {
        let mut parts = Parts::default();
        match &mut self.reasoning {
            Some(splitter) => {
                let split = splitter.push(text);
                self.split(&split, &mut parts);
            }
            None => self.body(text, &mut parts),
        }
        parts.into_vec()
    }

    /// The parts held back, when the output ends.
    pub fn finish(&mut self) -> Vec<OutputPart> {
        let mut parts = Parts::default();
        if let Some(splitter) = &mut self.reasoning {
            let split = splitter.finish();
            self.split(&split, &mut parts);
        }
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut parts);
        }
        parts.into_vec()
    }

    fn split(&mut self, split: &SplitText, parts: &mut Parts) {
        parts.reasoning(&split.reasoning);
        self.body(&split.body, parts);
    }

    fn body(&mut self, text: &str, parts: &mut Parts) {
        match &mut self.calls {
            Some(calls) => calls.push(text, parts),
            None => parts.content(text),
        }
    }
}

/// Parts in their order. Neighbours of one kind are joined.
#[derive(Default)]
pub(super) struct Parts(Vec<OutputPart>);

impl Parts {
    pub(super) fn into_vec(self) -> Vec<OutputPart> {
        self.0
    }

    pub(super) fn content(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(OutputPart::Content(last)) => last.push_str(text),
            _ => self.0.push(OutputPart::Content(text.into())),
        }
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(OutputPart::Reasoning(last)) => last.push_str(text),
            _ => self.0.push(OutputPart::Reasoning(text.into())),
        }
    }

    pub(super) fn call(&mut self, index: usize, name: &str) {
        self.0.push(OutputPart::ToolCall { index, name: name.into() });
    }

    pub(super) fn arguments(&mut self, index: usize, text: &str) {
        match self.0.last_mut() {
            _ if text.is_empty() => {}
            Some(OutputPart::Arguments { index: last, text: before }) if *last == index => before.push_str(text),
            _ => self.0.push(OutputPart::Arguments { index, text: text.into() }),
        }
    }
}
