//! Text: the tokenizer, the chat template, and the prompt of chat messages.

pub mod codec;
pub(crate) mod messages;
mod template;
pub(crate) mod tokenizer;
