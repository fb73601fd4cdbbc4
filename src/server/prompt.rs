//! Text to tokens and back: tokenizer, chat template, streaming decoder.

use serde_json::Value;

use crate::{Error, Result};

/// A model's tokenizer and chat template.
pub struct TextCodec {}

impl TextCodec {
    /// Token ids of `text`, with the model's own special tokens around it if asked (as Hugging Face's).
    pub fn encode(&self, _text: &str, _add_special_tokens: bool) -> Result<Vec<u32>> {
        Err(Error::internal("not written yet"))
    }

    /// Text of `ids`; broken UTF-8 becomes U+FFFD.
    pub fn decode(&self, _ids: &[u32], _skip_special_tokens: bool) -> Result<String> {
        Err(Error::internal("not written yet"))
    }

    /// A prompt from chat messages through the model's template (`add_generation_prompt` opens the answer).
    pub fn apply_chat_template(&self, _messages: &[Value], _add_generation_prompt: bool) -> Result<String> {
        Err(Error::internal("not written yet"))
    }

    /// A decoder for one sequence that never gives out half a character. `skip_special_tokens` as in `decode`.
    pub fn stream(&self, _skip_special_tokens: bool) -> TextStream<'_> {
        TextStream { codec: self }
    }

    /// Ids that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &[]
    }

    /// Number of ids.
    pub fn vocab_size(&self) -> usize {
        0
    }
}

/// See [`TextCodec::stream`].
pub struct TextStream<'a> {
    /// Decodes.
    codec: &'a TextCodec,
}

impl TextStream<'_> {
    /// The text that this id completes; empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.codec.decode(&[id], true)
    }

    /// What is left at the end, broken UTF-8 as U+FFFD.
    pub fn finish(&mut self) -> Result<String> {
        Ok(String::new())
    }
}
