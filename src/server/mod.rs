//! HTTP: router, limits, shutdown.

pub mod prompt;
mod template;
mod tokenizer;
