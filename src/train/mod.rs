//! Training: new adapters over the very weights that serve (QLoRA, Dettmers et al., 2023).
//!
//! A [`job::Job`] says what to learn from which examples. The trainer runs on the engine's thread, where the device is, a
//! decoder block at a time, and reports what happens.

pub mod job;
pub mod spec;
