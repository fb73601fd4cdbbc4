//! Text: the tokenizer, the chat template, the prompt of chat messages, tools and thinking in the output, and grammars.

pub mod codec;
pub mod grammar;
mod infill;
pub mod messages;
pub mod reasoning;
mod template;
pub(crate) mod tokenizer;
pub mod tools;
pub(crate) mod truncation;
