//! Text: the tokenizer, the chat template, and messages to a prompt.

pub mod codec;
pub mod messages;
mod template;
pub mod tokenizer;
