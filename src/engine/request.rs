//! Requests to the engine, and the events that it sends back.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::constraint::TokenConstraint;
use crate::Error;
use crate::adapter::Lease;

/// How to sample tokens. The server checks the ranges before it builds a request.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: usize,
    /// Drop tokens below this fraction of the most likely token's probability; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or output (CTRL); 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from the logits of generated tokens (OpenAI).
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time it was generated (OpenAI).
    pub frequency_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// Only these ids may be generated; empty allows all (vLLM).
    pub allowed_token_ids: Vec<u32>,
    /// Sequences of ids that are not generated: the last id is masked while the ids before it are the end of the output (vLLM).
    pub bad_words: Vec<Vec<u32>>,
    /// The same seed, prompt and parameters give the same tokens under any load, where a row's bits do not depend on the batch
    /// (see [`crate::ops`]). Without a seed, the engine draws one.
    pub seed: Option<u64>,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Number of generated tokens before which stop ids are masked. A constraint that allows nothing else ends the output earlier.
    pub min_tokens: usize,
    /// Ids that end the sequence, in addition to the model's end-of-sequence ids.
    pub stop_token_ids: Vec<u32>,
    /// Whether to continue after the model's end-of-sequence ids.
    pub ignore_eos: bool,
    /// Report each token's log-probability and this many alternatives (0: only the token's own).
    pub logprobs: Option<usize>,
    /// Ids whose log-probabilities are reported with each token's (vLLM). Has an effect only with `logprobs`.
    pub logprob_token_ids: Vec<u32>,
    /// The same as `logprobs` for prompt tokens, each given the tokens before it. The first token has none.
    pub prompt_logprobs: Option<usize>,
    /// Report the hidden states of the prompt, pooled: an embedding. With `max_tokens` 0, the request asks for nothing else.
    pub pooling: Option<Pooling>,
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
            allowed_token_ids: Vec::new(),
            bad_words: Vec::new(),
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            logprob_token_ids: Vec::new(),
            prompt_logprobs: None,
            pooling: None,
        }
    }
}

/// How the hidden states of a prompt become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The mean over all tokens.
    Mean,
    /// That of the last token.
    Last,
}

/// A request to generate one sequence.
pub struct Request {
    /// For logs.
    pub id: String,
    /// Token ids of the prompt; not empty.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// Adapters and their weights, whose deltas are summed; empty for the base.
    pub adapters: Vec<(Lease, f32)>,
    /// Decides which tokens may be generated.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// When it arrived at the server, for queue time.
    pub arrived: Instant,
    /// Orders the waiting requests of the same adapters: the lowest is first (vLLM).
    pub priority: i64,
    /// Requests share KV blocks of the prefix cache only if they have the same salt (vLLM).
    pub cache_salt: Option<String>,
    /// Receives the events. The engine drops the sequence once the receiver has been dropped.
    pub events: UnboundedSender<Event>,
}

impl Request {
    /// A request to the base that arrives now, without a constraint, of priority 0.
    pub fn new(
        id: impl Into<String>,
        prompt: Vec<u32>,
        params: SamplingParams,
        events: UnboundedSender<Event>,
    ) -> Self {
        Self {
            id: id.into(),
            prompt,
            params,
            adapters: Vec::new(),
            constraint: None,
            arrived: Instant::now(),
            priority: 0,
            cache_salt: None,
            events,
        }
    }
}

/// A token's log-probability, with the most likely tokens, best first. The distribution is the one after masks, penalties and
/// bias, and before temperature and truncation.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Log-probability of the token itself.
    pub logprob: f32,
    /// Rank of the token; 1 is the most likely one.
    pub rank: u32,
    /// Ids and log-probabilities of the most likely tokens.
    pub top: Vec<(u32, f32)>,
    /// The log-probabilities of `logprob_token_ids`, in their order.
    pub chosen: Vec<(u32, f32)>,
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

/// An event of a sequence. The order is: at most one `Scheduled`, at most one `Prompt`, at most one `Pooled`, any number of `Token`s,
/// then `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// The sequence was admitted for the first time: its queue time has ended.
    Scheduled {
        /// Number of prompt tokens that were found in the prefix cache.
        cached_tokens: usize,
    },
    /// The requested prompt log-probabilities, one for each prompt token; the first is `None`.
    Prompt(Vec<Option<Logprobs>>),
    /// The prompt's pooled hidden states `[hidden]`, not normalised. A hidden state is the output of the final norm.
    Pooled(Vec<f32>),
    /// The next token. A stop id is not sent.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probabilities, if they were requested.
        logprobs: Option<Logprobs>,
    },
    /// The sequence has ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// The token that ended it: a stop id of the request or an end-of-sequence id of the model. It is not sent as a `Token`.
        end_token: Option<u32>,
        /// The log-probabilities of that token, if they were requested.
        end_logprobs: Option<Logprobs>,
        /// Whether that is a stop id of the request.
        requested_stop: bool,
    },
    /// The sequence has failed. Other sequences are not affected.
    Failed(Error),
}
