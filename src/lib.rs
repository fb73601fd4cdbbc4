//! quiver: one 4-bit base model stays resident, and each request picks its own LoRA adapter.
//!
//! A request passes through the modules in this order: [`server`] parses it, resolves its adapter and turns text into tokens;
//! [`engine`] schedules it with the other requests and builds flat batches; [`model`] runs a batch through the decoder, whose
//! arithmetic is in [`ops`] and, for adapters, in [`lora`]. [`adapter`] loads adapters and moves them between disk, host memory
//! and slots. [`train`] computes new adapters on the same weights, and [`finetune`] runs jobs from a file of examples to a
//! published model. [`runtime`] loads the model and starts the engine, which all commands share. [`eval`] measures quality,
//! [`merge`] merges an adapter into its base, and [`mod@bench`] loads any server.
//!
//! Imports go only down: `tests/layers.rs` holds the order of the modules.

// The readers of these docs are developers of this program, who see private items too.
#![allow(rustdoc::private_intra_doc_links)]

pub mod adapter;
pub mod arch;
pub mod bench;
pub mod cli;
mod config;
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
mod plot;
pub mod runtime;
pub mod server;
pub mod text;
mod time;
pub mod train;

pub use error::{Error, Result};
