//! The grammar of an output that must call a tool, or whose calls must match the schemas of strict tools.

use serde_json::Value;

use super::{ToolChoice, ToolDefinition, ToolFormat, Tools};
use crate::text::grammar::Grammar;

impl Tools {
    /// What the body of an output must match, in the model's form of calls. `content` is what text instead of calls must match, if
    /// the request says so. `None`: the output is free.
    ///
    /// With the choice `required` or a named tool, the output is calls alone, whose arguments match the schemas. With `auto`, it
    /// is constrained if a tool is strict: the text is free, but what begins as a call must become one. In the forms without a
    /// marker, `Llama3` and `Json`, an output that begins as JSON is then a call. Qwen3-Coder is held to the JSON form of `Hermes`,
    /// because its own form cannot carry a schema's types.
    pub fn grammar(&self, format: ToolFormat, content: Option<Grammar>) -> Option<Grammar> {
        let form = CallForm { format, tools: self };
        match (&self.choice, content) {
            (ToolChoice::None, content) => content,
            (ToolChoice::Required | ToolChoice::Named(_), _) => Some(form.calls()),
            (ToolChoice::Auto, Some(content)) => Some(Grammar::AnyOf(vec![form.calls(), content])),
            (ToolChoice::Auto, None) => self.definitions.iter().any(|tool| tool.strict).then(|| form.text_with_calls()),
        }
    }
}

/// The tools of a request in a model's form.
struct CallForm<'a> {
    format: ToolFormat,
    tools: &'a Tools,
}

impl CallForm<'_> {
    /// One call, or several where the request allows them.
    fn calls(&self) -> Grammar {
        match self.format {
            ToolFormat::Hermes => {
                let call = sequence([Grammar::Marker("<tool_call>".into()), self.hermes_rest()]);
                self.several(call, "\n")
            }
            ToolFormat::Llama3 => self.several(self.any_call(), "; "),
            ToolFormat::Mistral => sequence([Grammar::Marker("[TOOL_CALLS]".into()), self.array()]),
            ToolFormat::MistralNamed => {
                self.several(sequence([Grammar::Marker("[TOOL_CALLS]".into()), self.any_call()]), "")
            }
            ToolFormat::Json if self.is_single() => self.any_call(),
            ToolFormat::Json => Grammar::AnyOf(vec![self.any_call(), self.array()]),
        }
    }

    /// Free text with any number of calls.
    fn text_with_calls(&self) -> Grammar {
        let after_marker = match self.format {
            ToolFormat::Hermes => self.hermes_rest(),
            ToolFormat::Mistral => self.array(),
            ToolFormat::MistralNamed => self.any_call(),
            ToolFormat::Llama3 => {
                let tagged = sequence([Grammar::Marker("<|python_tag|>".into()), self.calls()]);
                let text = Grammar::TextUnlike(format!(r"{BARE_CALL}|(.|\n)*<\|python_tag\|>(.|\n)*"));
                return Grammar::AnyOf(vec![self.calls(), tagged, text]);
            }
            ToolFormat::Json => {
                return Grammar::AnyOf(vec![self.calls(), Grammar::TextUnlike(BARE_CALL.into())]);
            }
        };
        let opener = self.format.opener().unwrap_or_default();
        let call = sequence([Grammar::Until(opener.into()), after_marker]);
        if self.is_single() {
            return Grammar::AnyOf(vec![call, Grammar::AnyText]);
        }
        sequence([Grammar::Repeated(Box::new(call)), Grammar::AnyText])
    }

    fn is_single(&self) -> bool {
        !self.tools.parallel || matches!(self.tools.choice, ToolChoice::Named(_))
    }

    fn several(&self, call: Grammar, separator: &str) -> Grammar {
        if self.is_single() {
            return call;
        }
        let more = sequence([Grammar::literal(separator), call.clone()]);
        sequence([call, Grammar::Repeated(Box::new(more))])
    }

    /// An array of calls. Mistral's older tokenizers put a space before it.
    fn array(&self) -> Grammar {
        let open = if self.format == ToolFormat::Mistral { vec![" [".into(), "[".into()] } else { vec!["[".into()] };
        sequence([Grammar::Choice(open), self.several(self.any_call(), ", "), Grammar::literal("]")])
    }

    /// What follows `<tool_call>`.
    fn hermes_rest(&self) -> Grammar {
        let close = Grammar::Marker("</tool_call>".into());
        sequence([Grammar::literal("\n"), self.any_call(), Grammar::literal("\n"), close])
    }

    /// A call of one of the tools, without markers.
    fn any_call(&self) -> Grammar {
        let chosen = |tool: &&ToolDefinition| match &self.tools.choice {
            ToolChoice::Named(name) => tool.name == *name,
            _ => true,
        };
        let calls = self.tools.definitions.iter().filter(chosen).map(|tool| self.call(tool));
        Grammar::AnyOf(calls.collect())
    }

    fn call(&self, tool: &ToolDefinition) -> Grammar {
        let grammar = Box::new(Grammar::json(tool.parameters.clone()));
        let arguments = Grammar::Placed { path: tool.parameters_path(), grammar };
        if self.format == ToolFormat::MistralNamed {
            return sequence([Grammar::literal(&tool.name), Grammar::Marker("[ARGS]".into()), arguments]);
        }
        let key = if self.format == ToolFormat::Llama3 { "parameters" } else { "arguments" };
        let name = Value::from(tool.name.as_str());
        let begin = Grammar::literal(format!("{{\"name\": {name}, \"{key}\": "));
        sequence([begin, arguments, Grammar::literal("}")])
    }
}

/// What [`super::OutputParser`] takes for the beginning of a call without a marker.
const BARE_CALL: &str = r"\s*(```(json)?\s*)?[\[{](.|\n)*";

fn sequence(parts: impl IntoIterator<Item = Grammar>) -> Grammar {
    Grammar::Sequence(parts.into_iter().collect())
}
