//! quiver: one 4-bit base model stays resident, and each request picks its own LoRA adapter.
//!
//! The modules are listed in the order in which a request meets them: [`server`] parses it, resolves its adapter and
//! turns text into tokens; [`engine`] schedules it beside the others and builds flat batches; [`model`] runs a batch
//! through the decoder, whose arithmetic lives in [`ops`]; [`adapter`] keeps the adapters and their memory. [`train`] makes
//! new ones on the same weights, [`eval`] says how good they are, [`merge`] writes one into its base, and [`mod@bench`] loads
//! any server.

// The reader of these docs is a developer of this program, who has the private items too.
#![allow(rustdoc::private_intra_doc_links)]

pub mod adapter;
pub mod arch;
pub mod bench;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod eval;
mod fields;
mod files;
pub mod finetune;
pub mod gpu;
pub mod hub;
pub mod lora;
pub mod merge;
pub mod model;
pub mod ops;
pub mod plot;
pub mod runtime;
pub mod server;
pub mod text;
mod time;
pub mod train;

pub use error::{Error, Result};
