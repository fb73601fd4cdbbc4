//! Text: the tokenizer, the chat template, the prompt of chat messages, and grammars.

pub mod codec;
pub mod grammar;
pub(crate) mod messages;
mod template;
pub(crate) mod tokenizer;
