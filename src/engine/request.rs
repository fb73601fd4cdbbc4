//! What the server sends to the engine, and what comes back.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::Error;
use crate::adapter::Lease;

/// How to choose tokens. Ranges are checked by the server before a request is built.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens below this share of the best token's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output (CTRL); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from logits of generated tokens (OpenAI).
    pub presence_penalty: f32,
    /// Subtracted once for each time a token was generated (OpenAI).
    pub frequency_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Same seed, prompt and parameters give the same tokens whatever the load; without one, the engine draws it.
    pub seed: Option<u64>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Stop ids are masked until this many tokens are out.
    pub min_tokens: usize,
    /// Ids that end the sequence, besides the model's own end-of-sequence ids.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence ids.
    pub ignore_eos: bool,
    /// Report each token's log-probability and this many alternatives (0: the token's alone).
    pub logprobs: Option<usize>,
    /// The same for prompt tokens, each given those before it; the first has none.
    pub prompt_logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A sequence to generate.
pub struct Request {
    /// For logs.
    pub id: String,
    /// Prompt token ids, not empty.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// Adapters and weights whose sum answers; empty is the base.
    pub adapters: Vec<(Lease, f32)>,
    /// When it entered the server, for queue time.
    pub arrived: Instant,
    /// Where events go. The engine drops the sequence once the receiver is gone.
    pub events: UnboundedSender<Event>,
}

/// A token's log-probability under the distribution before temperature and truncation (after penalties and bias), with
/// the most likely alternatives, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token itself.
    pub logprob: f32,
    /// 1 is the most likely token.
    pub rank: u32,
    /// Token id and log-probability.
    pub top: Vec<(u32, f32)>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence or stop id.
    Stop,
    /// `max_tokens` or the model's context length.
    Length,
}

impl FinishReason {
    /// OpenAI's `finish_reason`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What the engine tells about a sequence, in order: at most one `Scheduled`, at most one `Prompt`, `Token`s, then
/// `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// It has left the queue for the first time: queue time ends here.
    Scheduled,
    /// Prompt log-probabilities, one a prompt token (the first is `None`), when asked for.
    Prompt(Vec<Option<Logprobs>>),
    /// The next token. A stop id is not sent.
    Token {
        /// Its id.
        id: u32,
        /// When asked for.
        logprobs: Option<Logprobs>,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
        /// The stop id of the request that ended it, where one did (not the model's own end ids).
        stop_token: Option<u32>,
    },
    /// It could not be served; nothing else was disturbed.
    Failed(Error),
}
