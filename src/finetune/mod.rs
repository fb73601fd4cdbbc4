//! The life of a fine-tuning job: validated, queued, run by the trainer, published.

pub mod context;
pub mod jobs;
pub mod monitor;
pub mod prepare;
mod publish;
pub mod record;
pub mod settings;
pub mod store;
