//! OpenAI's response objects, whole or as the chunks of a stream.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::stream::{FinishDetails, OutputDelta, OutputToken, StopReason};
use crate::engine::request::Logprobs;
use crate::text::codec::TextCodec;
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

/// Builds the JSON objects of one response.
pub(super) struct ResponseBuilder {
    /// The endpoint.
    pub(super) endpoint: Endpoint,
    /// `id` of the object.
    pub(super) id: String,
    /// `model` as the request named it, or the base's name.
    pub(super) model: String,
    /// `adapter`: null, a name, or a list for a weighted sum.
    pub(super) adapter: Value,
    /// `adapter_generation`, in the same form.
    pub(super) generation: Value,
    /// Unix time, seconds.
    pub(super) created: u64,
    /// Log-probabilities were asked for, with this many alternatives.
    pub(super) logprobs: Option<usize>,
    /// One for each prompt; empty without `echo`.
    pub(super) echo: Vec<EchoedPrompt>,
    /// Choices for each prompt.
    pub(super) n: usize,
    /// For the text and bytes of single tokens.
    pub(super) codec: Arc<TextCodec>,
}

/// Token counts of a response.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct UsageInfo {
    /// Prompt tokens, each prompt once.
    pub(super) prompt: usize,
    /// Tokens generated for all choices.
    pub(super) completion: usize,
    /// Prompt tokens found in the prefix cache.
    pub(super) cached: usize,
}

impl UsageInfo {
    /// Adds the counts of sequence `index`, where each prompt has `per_prompt` sequences.
    pub(super) fn add(&mut self, finish: &FinishDetails, index: usize, per_prompt: usize) {
        self.completion += finish.completion_tokens;
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
        self.tokens.extend(delta.tokens);
        self.finish = delta.finish.or(self.finish.take());
    }

    /// Mean log-probability of its tokens, by which `best_of` ranks.
    pub(super) fn score(&self) -> f32 {
        let sum: f32 = self.tokens.iter().filter_map(|t| t.logprobs.as_ref()).map(|l| l.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

impl ResponseBuilder {
    /// The object around choices: a whole response, or a chunk of a stream.
    pub(super) fn object(&self, choices: Vec<Value>, chunk: bool) -> Value {
        let object = match (self.endpoint, chunk) {
            (Endpoint::Completion, _) => "text_completion",
            (Endpoint::Chat, false) => "chat.completion",
            (Endpoint::Chat, true) => "chat.completion.chunk",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "adapter": self.adapter,
            "adapter_generation": self.generation,
            "choices": choices,
        })
    }

    /// A choice of a whole response.
    pub(super) fn choice(&self, index: usize, mut output: CompletionOutput) -> Result<Value> {
        let finish = output.finish.take().ok_or_else(|| Error::internal("a choice has no end"))?;
        let mut choice = json!({"index": index});
        match self.endpoint {
            Endpoint::Completion => {
                let (mut text, mut tokens) = self.echo_of(index, output.prompt);
                let before = text.chars().count();
                text.push_str(&output.text);
                tokens.extend(output.tokens.into_iter().map(|t| OutputToken { offset: t.offset + before, ..t }));
                choice["text"] = text.into();
                choice["logprobs"] = self.logprobs_of(&tokens);
            }
            Endpoint::Chat => {
                choice["message"] = json!({"role": "assistant", "content": output.text, "refusal": null});
                choice["logprobs"] = self.logprobs_of(&output.tokens);
            }
        }
        self.end(&mut choice, &finish);
        Ok(choice)
    }

    /// The first chunks of a stream of `choices` choices: for chats, the role of each.
    pub(super) fn opening(&self, choices: usize) -> Vec<Value> {
        match self.endpoint {
            Endpoint::Completion => Vec::new(),
            Endpoint::Chat => (0..choices)
                .map(|index| {
                    let delta = json!({"role": "assistant", "content": ""});
                    let choice =
                        json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null, "stop_reason": null});
                    self.object(vec![choice], true)
                })
                .collect(),
        }
    }

    /// The chunks of one delta. Updates `sent`, which belongs to this choice.
    pub(super) fn chunks(&self, index: usize, delta: OutputDelta, sent: &mut StreamedChoice) -> Vec<Value> {
        let mut chunks = Vec::new();
        let mut text = String::new();
        let mut tokens = Vec::new();
        if self.endpoint == Endpoint::Completion && !sent.opened && !self.echo.is_empty() {
            (text, tokens) = self.echo_of(index, delta.prompt.unwrap_or_default());
            sent.echo_characters = text.chars().count();
        }
        sent.opened = true;
        text.push_str(&delta.text);
        tokens.extend(delta.tokens.into_iter().map(|t| OutputToken { offset: t.offset + sent.echo_characters, ..t }));
        let news = !text.is_empty() || (self.logprobs.is_some() && !tokens.is_empty());
        if news || (delta.finish.is_some() && self.endpoint == Endpoint::Completion) {
            let mut choice = json!({"index": index});
            match self.endpoint {
                Endpoint::Completion => choice["text"] = text.into(),
                Endpoint::Chat => choice["delta"] = json!({"content": text}),
            }
            choice["logprobs"] = self.logprobs_of(&tokens);
            match (&delta.finish, self.endpoint) {
                (Some(finish), Endpoint::Completion) => self.end(&mut choice, finish),
                _ => choice["finish_reason"] = Value::Null,
            }
            chunks.push(self.object(vec![choice], true));
        }
        if let (Some(finish), Endpoint::Chat) = (&delta.finish, self.endpoint) {
            let mut choice = json!({"index": index, "delta": {}, "logprobs": null});
            self.end(&mut choice, finish);
            chunks.push(self.object(vec![choice], true));
        }
        chunks
    }

    fn end(&self, choice: &mut Value, finish: &FinishDetails) {
        choice["finish_reason"] = finish.reason.word().into();
        choice["stop_reason"] = match &finish.stop {
            None => Value::Null,
            Some(StopReason::Text(text)) => text.as_str().into(),
            Some(StopReason::Token(id)) => (*id).into(),
        };
    }

    fn echo_of(&self, index: usize, logprobs: Vec<Option<Logprobs>>) -> (String, Vec<OutputToken>) {
        let Some(echo) = self.echo.get(index / self.n) else { return (String::new(), Vec::new()) };
        let mut tokens = echo.tokens.clone();
        tokens.iter_mut().zip(logprobs).for_each(|(token, logprobs)| token.logprobs = logprobs);
        (echo.text.clone(), tokens)
    }

    fn logprobs_of(&self, tokens: &[OutputToken]) -> Value {
        let Some(alternatives) = self.logprobs else { return Value::Null };
        match self.endpoint {
            Endpoint::Completion => self.completion_logprobs(tokens),
            Endpoint::Chat => self.chat_logprobs(tokens, alternatives),
        }
    }

    /// Four parallel lists. Each entry of `top_logprobs` has the alternatives and the token itself.
    fn completion_logprobs(&self, tokens: &[OutputToken]) -> Value {
        let mut top = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(logprobs) = &token.logprobs else {
                top.push(Value::Null);
                continue;
            };
            let mut entry = Map::new();
            for &(id, logprob) in logprobs.top.iter().chain([&(token.id, logprobs.logprob)]) {
                // Two ids may have the same text, such as U+FFFD: the likelier one comes first and stays.
                entry.entry(self.codec.token_string(id)).or_insert_with(|| finite(logprob));
            }
            top.push(entry.into());
        }
        json!({
            "tokens": tokens.iter().map(|t| self.codec.token_string(t.id)).collect::<Vec<_>>(),
            "token_logprobs":
                tokens.iter().map(|t| t.logprobs.as_ref().map_or(Value::Null, |l| finite(l.logprob))).collect::<Value>(),
            "top_logprobs": top,
            "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
        })
    }

    fn chat_logprobs(&self, tokens: &[OutputToken], alternatives: usize) -> Value {
        let entry = |id: u32, logprob: f32| {
            json!({
                "token": self.codec.token_string(id),
                "logprob": finite(logprob),
                "bytes": self.codec.token_bytes(id),
            })
        };
        let mut content = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(logprobs) = &token.logprobs else { continue };
            let mut item = entry(token.id, logprobs.logprob);
            let top = logprobs.top.iter().take(alternatives);
            item["top_logprobs"] = top.map(|&(id, logprob)| entry(id, logprob)).collect::<Vec<_>>().into();
            content.push(item);
        }
        json!({"content": content, "refusal": null})
    }
}

/// The parts of a streamed choice that have been sent.
#[derive(Debug, Default, Clone)]
pub(super) struct StreamedChoice {
    /// Its first chunk has been sent.
    opened: bool,
    /// Characters of the echoed prompt, which shift the offsets of all tokens after it.
    echo_characters: usize,
}

/// JSON has no infinity: OpenAI and vLLM write -9999 for a token that cannot come.
fn finite(logprob: f32) -> Value {
    // The shortest decimal that is this f32, not the 17 digits of its f64.
    let logprob = logprob.max(-9999.0);
    logprob.to_string().parse::<f64>().unwrap_or(-9999.0).into()
}
