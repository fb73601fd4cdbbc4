//! OpenAI's response objects of completions and chats, whole or as the chunks of a stream.

mod logprobs;
mod message;

use std::collections::HashMap;
use std::sync::Arc;

use axum::response::sse::Event as SseEvent;
use serde_json::{Value, json};

pub(super) use self::logprobs::finite;
use self::message::ChatMessage;
pub(super) use self::message::call_id;
use super::error_response;
use super::generate::ReplyFormat;
use super::params::{ReplyOptions, StreamUsage};
use super::stream::{FinishDetails, OutputDelta, OutputToken, StopReason};
use crate::engine::request::{FinishReason, Logprobs};
use crate::text::codec::TextCodec;
use crate::text::tools::{OutputPart, ToolFormat, Tools};
use crate::{Error, Result};

/// The endpoint of a request, which decides the form of its response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// A prompt that `echo` puts before its choices.
pub(super) struct EchoedPrompt {
    /// Its text.
    pub(super) text: String,
    /// Its tokens with their offsets in that text, not yet with log-probabilities.
    pub(super) tokens: Vec<OutputToken>,
}

impl EchoedPrompt {
    /// From the prompt's ids, and its text if the request had one.
    pub(super) fn new(codec: &TextCodec, ids: &[u32], text: Option<String>) -> Result<Self> {
        let whole = codec.decode(ids, false)?;
        // Special tokens that the tokenizer added are not part of the request's text.
        let skip_special_tokens = text.as_ref().is_some_and(|text| *text != whole);
        let mut stream = codec.stream(skip_special_tokens);
        let mut offset = 0;
        let mut tokens = Vec::with_capacity(ids.len());
        for &id in ids {
            tokens.push(OutputToken { id, offset, logprobs: None });
            offset += stream.push(id)?.chars().count();
        }
        Ok(Self { text: text.unwrap_or(whole), tokens })
    }
}

/// What the reply to a request needs, whatever its form.
pub(super) struct ReplyContext {
    /// The endpoint whose fields the request has.
    pub(super) endpoint: Endpoint,
    /// `id` of the object.
    pub(super) id: String,
    /// `model` as the request named it, or the base's name.
    pub(super) model: String,
    /// `adapter`: null, a name, or a list for a weighted sum.
    pub(super) adapter: Value,
    /// `adapter_generation`, in the same form.
    pub(super) generation: Value,
    /// Names the server's version and the base.
    pub(super) system_fingerprint: String,
    /// Unix time, seconds.
    pub(super) created: u64,
    /// The temperature.
    pub(super) temperature: f32,
    /// Nucleus sampling keeps this probability.
    pub(super) top_p: f32,
    /// Log-probabilities were asked for, with this many alternatives.
    pub(super) logprobs: Option<usize>,
    /// Log-probabilities of the prompt were asked for, with this many alternatives.
    pub(super) prompt_logprobs: Option<usize>,
    /// What the reply has besides the text.
    pub(super) options: ReplyOptions,
    /// The usage that a stream reports.
    pub(super) stream_usage: StreamUsage,
    /// The thinking is part of the reply.
    pub(super) include_reasoning: bool,
    /// The tools of a chat, and the form of the calls.
    pub(super) tools: Option<(ToolFormat, Arc<Tools>)>,
    /// One for each prompt; empty without `echo`.
    pub(super) echo: Vec<EchoedPrompt>,
    /// Token ids of each prompt.
    pub(super) prompts: Vec<Vec<u32>>,
    /// Choices for each prompt.
    pub(super) n: usize,
    /// For the text and bytes of single tokens.
    pub(super) codec: Arc<TextCodec>,
}

impl ReplyContext {
    /// Tokens of all prompts.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// How the model writes calls; irrelevant without tools.
    pub(super) fn tool_format(&self) -> ToolFormat {
        self.tools.as_ref().map_or(ToolFormat::Json, |(format, _)| *format)
    }
}

/// Token counts of a response.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UsageInfo {
    /// Prompt tokens, each prompt once.
    pub(super) prompt: usize,
    /// Tokens generated for all choices.
    pub(super) completion: usize,
    /// Those of them that belong to the thinking.
    pub(super) reasoning: usize,
    /// Prompt tokens found in the prefix cache.
    pub(super) cached: usize,
}

impl UsageInfo {
    /// Adds the counts of sequence `index`, where each prompt has `per_prompt` sequences.
    pub(super) fn add(&mut self, finish: &FinishDetails, index: usize, per_prompt: usize) {
        self.completion += finish.completion_tokens;
        self.reasoning += finish.reasoning_tokens;
        // Later sequences of a prompt find it in the cache only because the first put it there.
        if index.is_multiple_of(per_prompt) {
            self.cached += finish.cached_tokens;
        }
    }

    /// OpenAI's `usage`.
    pub(super) fn object(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        })
    }
}

/// The whole output of one sequence.
#[derive(Debug, Default)]
pub(super) struct CompletionOutput {
    /// Log-probabilities of the prompt, if asked for.
    pub(super) prompt: Vec<Option<Logprobs>>,
    /// All text.
    pub(super) text: String,
    /// The same text as parts of an assistant's message, for chats.
    pub(super) parts: Vec<OutputPart>,
    /// All tokens with text in it.
    pub(super) tokens: Vec<OutputToken>,
    /// Set by the last delta.
    pub(super) finish: Option<FinishDetails>,
}

impl CompletionOutput {
    /// Appends a delta.
    pub(super) fn push(&mut self, delta: OutputDelta) {
        self.prompt.extend(delta.prompt.into_iter().flatten());
        self.text.push_str(&delta.text);
        self.parts.extend(delta.parts);
        self.tokens.extend(delta.tokens);
        self.finish = delta.finish.or(self.finish.take());
    }

    /// Mean log-probability of its tokens, by which `best_of` ranks.
    pub(super) fn score(&self) -> f32 {
        let sum: f32 = self.tokens.iter().filter_map(|t| t.logprobs.as_ref()).map(|l| l.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

/// Builds OpenAI's objects for the reply to one request.
pub(super) struct ResponseBuilder {
    context: ReplyContext,
    /// The choices of a stream, by index.
    sent: HashMap<usize, StreamedChoice>,
}

/// The parts of a streamed choice that have been sent.
#[derive(Debug, Default)]
struct StreamedChoice {
    /// Its first chunk has been sent.
    opened: bool,
    /// Characters of the echoed prompt, which shift the offsets of all tokens after it.
    echo_characters: usize,
    /// It has tool calls.
    called: bool,
}

impl ReplyFormat for ResponseBuilder {
    fn whole(&mut self, outputs: Vec<CompletionOutput>, usage: &UsageInfo) -> Result<Value> {
        let mut object = self.object(Vec::new(), false);
        if self.context.endpoint == Endpoint::Chat {
            self.describe_prompt(&mut object, 0, outputs.first().map_or(&[], |output| &output.prompt));
        }
        let choices = outputs.into_iter().enumerate().map(|(index, output)| self.choice(index, output));
        object["choices"] = choices.collect::<Result<Vec<_>>>()?.into();
        object["usage"] = usage.object();
        Ok(object)
    }

    fn opening(&mut self, choices: usize) -> Vec<SseEvent> {
        if self.context.endpoint == Endpoint::Completion {
            return Vec::new();
        }
        let chunks = (0..choices).map(|index| {
            let delta = json!({"role": "assistant", "content": ""});
            let choice =
                json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null, "stop_reason": null});
            let mut chunk = self.object(vec![choice], true);
            if index == 0 {
                self.describe_prompt(&mut chunk, 0, &[]);
            }
            self.event(chunk, 0)
        });
        chunks.collect()
    }

    fn delta(&mut self, index: usize, delta: OutputDelta) -> Vec<SseEvent> {
        let generated = delta.generated;
        let chunks = self.chunks(index, delta);
        chunks.into_iter().map(|chunk| self.event(chunk, generated)).collect()
    }

    fn ending(&mut self, usage: &UsageInfo) -> Vec<SseEvent> {
        let mut events = Vec::new();
        if self.context.stream_usage.at_end {
            let mut chunk = self.object(Vec::new(), true);
            chunk["usage"] = usage.object();
            events.push(SseEvent::default().data(chunk.to_string()));
        }
        events.push(done());
        events
    }

    fn failure(&mut self, error: &Error, request_id: &str) -> Vec<SseEvent> {
        vec![SseEvent::default().data(error_response::body(error, request_id).to_string()), done()]
    }
}

fn done() -> SseEvent {
    SseEvent::default().data("[DONE]")
}

impl ResponseBuilder {
    /// A builder for the reply to one request.
    pub(super) fn new(context: ReplyContext) -> Self {
        Self { context, sent: HashMap::new() }
    }

    /// The object around choices: a whole response, or a chunk of a stream.
    fn object(&self, choices: Vec<Value>, chunk: bool) -> Value {
        let context = &self.context;
        let object = match (context.endpoint, chunk) {
            (Endpoint::Completion, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        let mut object = json!({
            "id": context.id,
            "object": object,
            "created": context.created,
            "model": context.model,
            "system_fingerprint": context.system_fingerprint,
            "adapter": context.adapter,
            "adapter_generation": context.generation,
            "choices": choices,
        });
        if context.options.service_tier {
            object["service_tier"] = "default".into();
        }
        object
    }

    /// A chunk as an event. `usage` is a key of chunks only if the request asks for it.
    fn event(&self, mut chunk: Value, generated: usize) -> SseEvent {
        let StreamUsage { at_end, in_chunks } = self.context.stream_usage;
        if in_chunks {
            let prompt = self.context.prompt_tokens();
            chunk["usage"] = UsageInfo { prompt, completion: generated, ..UsageInfo::default() }.object();
        } else if at_end {
            chunk["usage"] = Value::Null;
        }
        SseEvent::default().data(chunk.to_string())
    }

    /// Adds what vLLM says about prompt `prompt`: to a choice of a completion, or to the object of a chat.
    fn describe_prompt(&self, object: &mut Value, prompt: usize, logprobs: &[Option<Logprobs>]) {
        let Some(ids) = self.context.prompts.get(prompt) else { return };
        if self.context.options.token_ids {
            object["prompt_token_ids"] = json!(ids);
        }
        if let Some(alternatives) = self.context.prompt_logprobs
            && !logprobs.is_empty()
        {
            object["prompt_logprobs"] = self.context.prompt_logprobs(ids, logprobs, alternatives);
        }
    }

    /// A choice of a whole response.
    fn choice(&self, index: usize, mut output: CompletionOutput) -> Result<Value> {
        let finish = output.finish.take().ok_or_else(|| Error::internal("a choice has no end"))?;
        let mut choice = json!({"index": index});
        let mut called = false;
        let ids = self.token_ids(&output.tokens, Some(&finish));
        match self.context.endpoint {
            Endpoint::Completion => {
                let (mut text, mut tokens) = self.echo_of(index, &output.prompt);
                let before = text.chars().count();
                text.push_str(&output.text);
                tokens.extend(output.tokens.into_iter().map(|t| OutputToken { offset: t.offset + before, ..t }));
                choice["text"] = text.into();
                choice["logprobs"] = self.context.logprobs_of(&tokens);
                self.describe_prompt(&mut choice, index / self.context.n, &output.prompt);
            }
            Endpoint::Chat => {
                let message = ChatMessage::new(output.parts);
                called = message.has_calls();
                choice["message"] = message.object(&self.context);
                choice["logprobs"] = self.context.logprobs_of(&output.tokens);
            }
        }
        self.end(&mut choice, &finish, called);
        if let Some(ids) = ids {
            choice["token_ids"] = ids;
        }
        Ok(choice)
    }

    /// The chunks of one delta.
    fn chunks(&mut self, index: usize, delta: OutputDelta) -> Vec<Value> {
        let mut sent = self.sent.remove(&index).unwrap_or_default();
        let chunks = match self.context.endpoint {
            Endpoint::Completion => self.completion_chunks(index, delta, &mut sent),
            Endpoint::Chat => self.chat_chunks(index, delta, &mut sent),
        };
        self.sent.insert(index, sent);
        chunks
    }

    fn completion_chunks(&self, index: usize, delta: OutputDelta, sent: &mut StreamedChoice) -> Vec<Value> {
        let ids = self.token_ids(&delta.tokens, delta.finish.as_ref());
        let mut text = String::new();
        let mut tokens = Vec::new();
        let first = !std::mem::replace(&mut sent.opened, true);
        if first && !self.context.echo.is_empty() {
            (text, tokens) = self.echo_of(index, &delta.prompt.unwrap_or_default());
            sent.echo_characters = text.chars().count();
        }
        text.push_str(&delta.text);
        tokens.extend(delta.tokens.into_iter().map(|t| OutputToken { offset: t.offset + sent.echo_characters, ..t }));
        if text.is_empty() && delta.finish.is_none() && (tokens.is_empty() || !self.reports_tokens()) {
            // The first chunk, which has the prompt's ids, is still to come.
            sent.opened &= !first;
            return Vec::new();
        }
        let mut choice = json!({"index": index, "text": text, "logprobs": self.context.logprobs_of(&tokens)});
        if first {
            self.describe_prompt(&mut choice, index / self.context.n, &[]);
        }
        match &delta.finish {
            Some(finish) => self.end(&mut choice, finish, false),
            None => choice["finish_reason"] = Value::Null,
        }
        if let Some(ids) = ids {
            choice["token_ids"] = ids;
        }
        vec![self.object(vec![choice], true)]
    }

    fn chat_chunks(&self, index: usize, delta: OutputDelta, sent: &mut StreamedChoice) -> Vec<Value> {
        let mut chunks = Vec::new();
        let ids = self.token_ids(&delta.tokens, delta.finish.as_ref());
        let news = message::delta(&self.context, delta.parts, &mut sent.called);
        let tokens = !delta.tokens.is_empty() && self.reports_tokens();
        if news.is_some() || tokens {
            let mut choice = json!({"index": index, "delta": news.unwrap_or_else(|| json!({}))});
            choice["logprobs"] = self.context.logprobs_of(&delta.tokens);
            choice["finish_reason"] = Value::Null;
            if let Some(ids) = &ids {
                choice["token_ids"] = ids.clone();
            }
            chunks.push(self.object(vec![choice], true));
        }
        if let Some(finish) = &delta.finish {
            let mut choice = json!({"index": index, "delta": {}, "logprobs": null});
            self.end(&mut choice, finish, sent.called);
            if chunks.is_empty()
                && let Some(ids) = ids
            {
                choice["token_ids"] = ids;
            }
            chunks.push(self.object(vec![choice], true));
        }
        chunks
    }

    /// Whether chunks report tokens, even those without text.
    fn reports_tokens(&self) -> bool {
        self.context.logprobs.is_some() || self.context.options.token_ids
    }

    /// vLLM's `token_ids`, with the token that ended the output.
    fn token_ids(&self, tokens: &[OutputToken], finish: Option<&FinishDetails>) -> Option<Value> {
        let end = finish.and_then(|finish| finish.end_token);
        self.context.options.token_ids.then(|| tokens.iter().map(|token| token.id).chain(end).collect())
    }

    /// Adds how the output ended. `called`: it has tool calls.
    fn end(&self, choice: &mut Value, finish: &FinishDetails, called: bool) {
        // A stop string may cut a call, whose arguments are then no JSON: such an output has stopped, not called.
        let called = called && !matches!(finish.stop, Some(StopReason::Text(_)));
        choice["finish_reason"] = match (finish.reason, &self.context.tools) {
            (FinishReason::Stop, Some((_, tools))) if called => message::finish_reason(tools),
            (reason, _) => reason.word(),
        }
        .into();
        choice["stop_reason"] = match &finish.stop {
            None => Value::Null,
            Some(StopReason::Text(text)) => text.as_str().into(),
            Some(StopReason::Token(id)) => (*id).into(),
        };
    }

    fn echo_of(&self, index: usize, logprobs: &[Option<Logprobs>]) -> (String, Vec<OutputToken>) {
        let Some(echo) = self.context.echo.get(index / self.context.n) else { return (String::new(), Vec::new()) };
        let mut tokens = echo.tokens.clone();
        tokens.iter_mut().zip(logprobs).for_each(|(token, logprobs)| token.logprobs = logprobs.clone());
        (echo.text.clone(), tokens)
    }
}
