//! OpenAI's response objects, whole and in chunks.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::stream::{Finish, Piece, StopReason, Token};
use crate::engine::request::Logprobs;
use crate::text::codec::TextCodec;
use crate::{Error, Result};

/// Which endpoint's objects to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `/v1/completions`.
    Completion,
    /// `/v1/chat/completions`.
    Chat,
}

/// A prompt as `echo` gives it back.
pub(super) struct Echo {
    /// Its text.
    pub(super) text: String,
    /// Its tokens with their places in that text, without log-probabilities yet.
    pub(super) tokens: Vec<Token>,
}

impl Echo {
    /// From the prompt's ids, and its text where the request had one.
    pub(super) fn new(codec: &TextCodec, ids: &[u32], text: Option<String>) -> Result<Self> {
        let whole = codec.decode(ids, false)?;
        // Special tokens that the tokenizer added stand in no text.
        let skip_special_tokens = text.as_ref().is_some_and(|text| *text != whole);
        let mut stream = codec.stream(skip_special_tokens);
        let mut offset = 0;
        let mut tokens = Vec::with_capacity(ids.len());
        for &id in ids {
            tokens.push(Token { id, offset, logprobs: None });
            offset += stream.push(id)?.chars().count();
        }
        Ok(Self { text: text.unwrap_or(whole), tokens })
    }
}

/// What the objects of one response have in common.
pub(super) struct Form {
    /// Which endpoint.
    pub(super) kind: Kind,
    /// `id` of the object.
    pub(super) id: String,
    /// `model` as the request named it, or the base's name.
    pub(super) model: String,
    /// `adapter`: null, a name, or a list for a sum.
    pub(super) adapter: Value,
    /// `adapter_generation`, in the same form.
    pub(super) generation: Value,
    /// Unix seconds.
    pub(super) created: u64,
    /// Log-probabilities were asked for, with this many alternatives.
    pub(super) logprobs: Option<usize>,
    /// What `echo` puts before each prompt's choices, one a prompt; empty without `echo`.
    pub(super) echo: Vec<Echo>,
    /// Choices of a prompt.
    pub(super) n: usize,
    /// For the text and bytes of single tokens.
    pub(super) codec: Arc<TextCodec>,
}

/// Tokens that a response cost.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Usage {
    /// Prompt tokens, each prompt once.
    pub(super) prompt: usize,
    /// Tokens generated for all choices.
    pub(super) completion: usize,
    /// Prompt tokens found in the prefix cache.
    pub(super) cached: usize,
}

impl Usage {
    /// Adds the end of sequence `index` of `per_prompt` a prompt.
    pub(super) fn add(&mut self, finish: &Finish, index: usize, per_prompt: usize) {
        self.completion += finish.completion_tokens;
        // Later choices of a prompt find it in the cache because the first put it there: that saved nobody a prompt.
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

/// A sequence's pieces put together.
#[derive(Debug, Default)]
pub(super) struct Whole {
    /// Prompt log-probabilities, if asked for.
    pub(super) prompt: Vec<Option<Logprobs>>,
    /// All text.
    pub(super) text: String,
    /// All tokens whose text is in it.
    pub(super) tokens: Vec<Token>,
    /// Set by the last piece.
    pub(super) finish: Option<Finish>,
}

impl Whole {
    /// Appends a piece.
    pub(super) fn push(&mut self, piece: Piece) {
        self.prompt.extend(piece.prompt.into_iter().flatten());
        self.text.push_str(&piece.text);
        self.tokens.extend(piece.tokens);
        self.finish = piece.finish.or(self.finish.take());
    }

    /// Mean log-probability of its tokens, by which `best_of` chooses.
    pub(super) fn score(&self) -> f32 {
        let sum: f32 = self.tokens.iter().filter_map(|t| t.logprobs.as_ref()).map(|l| l.logprob).sum();
        sum / self.tokens.len().max(1) as f32
    }
}

impl Form {
    /// The object around choices, whole or a chunk of a stream.
    pub(super) fn object(&self, choices: Vec<Value>, chunk: bool) -> Value {
        let object = match (self.kind, chunk) {
            (Kind::Completion, _) => "text_completion",
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
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

    /// A choice with all of its text.
    pub(super) fn choice(&self, index: usize, mut whole: Whole) -> Result<Value> {
        let finish = whole.finish.take().ok_or_else(|| Error::internal("a choice has no end"))?;
        let mut choice = json!({"index": index});
        match self.kind {
            Kind::Completion => {
                let (mut text, mut tokens) = self.echo_of(index, whole.prompt);
                let before = text.chars().count();
                text.push_str(&whole.text);
                tokens.extend(whole.tokens.into_iter().map(|t| Token { offset: t.offset + before, ..t }));
                choice["text"] = text.into();
                choice["logprobs"] = self.logprobs_of(&tokens);
            }
            Kind::Chat => {
                choice["message"] = json!({"role": "assistant", "content": whole.text, "refusal": null});
                choice["logprobs"] = self.logprobs_of(&whole.tokens);
            }
        }
        self.end(&mut choice, &finish);
        Ok(choice)
    }

    /// The chunks that open a stream of `choices` choices: a chat names the role of each.
    pub(super) fn opening(&self, choices: usize) -> Vec<Value> {
        match self.kind {
            Kind::Completion => Vec::new(),
            Kind::Chat => (0..choices)
                .map(|index| {
                    let delta = json!({"role": "assistant", "content": ""});
                    let choice =
                        json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null, "stop_reason": null});
                    self.object(vec![choice], true)
                })
                .collect(),
        }
    }

    /// The chunks of one piece. `sent` counts the characters of this choice that are out, and is moved on.
    pub(super) fn chunks(&self, index: usize, piece: Piece, sent: &mut Sent) -> Vec<Value> {
        let mut chunks = Vec::new();
        let mut text = String::new();
        let mut tokens = Vec::new();
        if self.kind == Kind::Completion && !sent.opened && !self.echo.is_empty() {
            (text, tokens) = self.echo_of(index, piece.prompt.unwrap_or_default());
            sent.echo_characters = text.chars().count();
        }
        sent.opened = true;
        text.push_str(&piece.text);
        tokens.extend(piece.tokens.into_iter().map(|t| Token { offset: t.offset + sent.echo_characters, ..t }));
        let news = !text.is_empty() || (self.logprobs.is_some() && !tokens.is_empty());
        if news || (piece.finish.is_some() && self.kind == Kind::Completion) {
            let mut choice = json!({"index": index});
            match self.kind {
                Kind::Completion => choice["text"] = text.into(),
                Kind::Chat => choice["delta"] = json!({"content": text}),
            }
            choice["logprobs"] = self.logprobs_of(&tokens);
            match (&piece.finish, self.kind) {
                (Some(finish), Kind::Completion) => self.end(&mut choice, finish),
                _ => choice["finish_reason"] = Value::Null,
            }
            chunks.push(self.object(vec![choice], true));
        }
        if let (Some(finish), Kind::Chat) = (&piece.finish, self.kind) {
            let mut choice = json!({"index": index, "delta": {}, "logprobs": null});
            self.end(&mut choice, finish);
            chunks.push(self.object(vec![choice], true));
        }
        chunks
    }

    fn end(&self, choice: &mut Value, finish: &Finish) {
        choice["finish_reason"] = finish.reason.word().into();
        choice["stop_reason"] = match &finish.stop {
            None => Value::Null,
            Some(StopReason::Text(text)) => text.as_str().into(),
            Some(StopReason::Token(id)) => (*id).into(),
        };
    }

    fn echo_of(&self, index: usize, logprobs: Vec<Option<Logprobs>>) -> (String, Vec<Token>) {
        let Some(echo) = self.echo.get(index / self.n) else { return (String::new(), Vec::new()) };
        let mut tokens = echo.tokens.clone();
        tokens.iter_mut().zip(logprobs).for_each(|(token, logprobs)| token.logprobs = logprobs);
        (echo.text.clone(), tokens)
    }

    fn logprobs_of(&self, tokens: &[Token]) -> Value {
        let Some(alternatives) = self.logprobs else { return Value::Null };
        match self.kind {
            Kind::Completion => self.completion_logprobs(tokens),
            Kind::Chat => self.chat_logprobs(tokens, alternatives),
        }
    }

    /// Four parallel lists; each entry of `top_logprobs` has the alternatives and the token itself.
    fn completion_logprobs(&self, tokens: &[Token]) -> Value {
        let mut top = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(logprobs) = &token.logprobs else {
                top.push(Value::Null);
                continue;
            };
            let mut entry = Map::new();
            for &(id, logprob) in logprobs.top.iter().chain([&(token.id, logprobs.logprob)]) {
                // Two ids may read the same (broken characters): the likelier one stands.
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

    fn chat_logprobs(&self, tokens: &[Token], alternatives: usize) -> Value {
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

/// What of a streamed choice is out.
#[derive(Debug, Default, Clone)]
pub(super) struct Sent {
    /// Its first chunk is.
    opened: bool,
    /// Characters of the echoed prompt, before all offsets of the answer.
    echo_characters: usize,
}

/// JSON has no infinity: OpenAI and vLLM write -9999 for a token that cannot come.
fn finite(logprob: f32) -> Value {
    // The shortest decimal that is this f32, not the 17 digits of its f64.
    let logprob = logprob.max(-9999.0);
    logprob.to_string().parse::<f64>().unwrap_or(-9999.0).into()
}
