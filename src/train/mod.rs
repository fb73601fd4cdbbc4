//! Training: new adapters over the very weights that serve (QLoRA, Dettmers et al., 2023).
//!
//! A [`job::Job`] says what to learn from which examples. The [`trainer::Trainer`] runs on the engine's thread, where the
//! device is: it puts rows of every job that runs into a [`pass::Pass`], goes through it a decoder [`block`] at a time, and
//! each [`running`] job moves its [`params`] by the gradients. [`state`] makes a job survive a restart, [`export`] makes its
//! values an adapter; both are written by the [`outbox`]'s thread.

pub mod adalora;
pub mod adapter;
pub mod block;
pub mod data;
pub mod dora;
pub mod export;
mod init;
pub mod job;
pub mod optim;
pub mod order;
pub mod outbox;
pub mod params;
pub mod pass;
pub mod running;
pub mod spec;
pub mod state;
pub mod sweep;
#[cfg(test)]
mod testing;
pub mod trainer;
