//! The fields of a chat beyond those of every request: messages, tools, the template's variables, and how the answer is read.

use std::sync::Arc;

use super::stream::AnswerFormat;
use super::structured::RequestedGrammar;
use crate::fields::{self, Fields};
use crate::text::codec::TextCodec;
use crate::text::messages::ChatPrompt;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::{ToolFormat, Tools};
use crate::{Error, Result};

/// A chat whose fields are checked. Its prompt is not rendered yet.
pub(super) struct CheckedChat {
    /// The prompt, with the tools.
    pub(super) prompt: ChatPrompt,
    /// How the answer is read. `starts_in_reasoning` is known once the prompt is rendered.
    pub(super) answer: AnswerFormat,
    /// The thinking is part of the reply.
    pub(super) include_reasoning: bool,
}

/// Reads the fields of a chat.
pub(super) fn parse(body: &Fields, codec: &TextCodec) -> Result<CheckedChat> {
    let mut prompt = ChatPrompt::parse(body)?;
    let source = codec.template_source().unwrap_or_default();
    if let Some(effort) = body.get("reasoning_effort") {
        // The template renders `none` through `enable_thinking`.
        let is_read = source.contains("reasoning_effort") || effort == "none" && source.contains("enable_thinking");
        if !is_read {
            let message = "`reasoning_effort`: this model's chat template does not read it, so omit it";
            return Err(Error::invalid(message).param("reasoning_effort").code("unsupported_parameter"));
        }
    }
    let tools = Tools::parse(body)?;
    prompt.tools = tools.as_ref().map(Tools::raw);
    prompt = codec.fit_tools(prompt);
    // The form that the system message asks for.
    let format = if codec.template_knows_tools() { ToolFormat::of(source) } else { ToolFormat::Hermes };
    let reasoning = match body.string("reasoning_format")? {
        None | Some("auto" | "deepseek") => ReasoningFormat::of(source),
        Some("none") => None,
        Some(other) => {
            let allowed = "\"auto\", \"deepseek\" or \"none\"";
            return Err(fields::wrong("reasoning_format", allowed, &other.into()));
        }
    };
    let tools = tools.map(|tools| (format, Arc::new(tools)));
    Ok(CheckedChat {
        prompt,
        answer: AnswerFormat { tools, reasoning, starts_in_reasoning: false },
        include_reasoning: body.boolean("include_reasoning")?.unwrap_or(true),
    })
}

/// The grammar of a chat's output: what the request asks for, what its tools need, and the thinking before both.
///
/// # Errors
/// `Invalid` if the request constrains the whole output and may call tools. OpenAI's `response_format` constrains only content, and goes
/// with tools.
pub(super) fn grammar(requested: Option<RequestedGrammar>, answer: &AnswerFormat) -> Result<Option<RequestedGrammar>> {
    let may_call = answer.tools.as_ref().is_some_and(|(_, tools)| tools.may_call());
    if let Some(RequestedGrammar { field, .. }) = requested.as_ref().filter(|_| may_call)
        && !field.starts_with("response_format")
    {
        let message = format!(
            "`{field}` constrains the whole output, and `tools` let the model write calls: give one of them, or `tool_choice`: \
             \"none\", or a `response_format`, which holds for content"
        );
        return Err(Error::invalid(message).param(field).code("invalid_value"));
    }
    let grammar = match &answer.tools {
        None => requested,
        Some((format, tools)) => {
            let field = requested.as_ref().map_or("tools".to_owned(), |grammar| grammar.field.clone());
            let content = requested.map(|grammar| grammar.grammar);
            tools.grammar(*format, content).map(|grammar| RequestedGrammar { field, grammar })
        }
    };
    Ok(match answer.reasoning {
        Some(format) => grammar.map(|grammar| grammar.after_reasoning(format, answer.starts_in_reasoning)),
        None => grammar,
    })
}
