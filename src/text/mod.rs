//! Text: the tokenizer, the chat template, and messages to a prompt.

pub mod messages;
pub mod prompt;
mod template;
pub mod tokenizer;
