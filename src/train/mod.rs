//! Training: new adapters over the very weights that serve (QLoRA, Dettmers et al., 2023).

pub mod adapter;
mod block;
pub mod data;
pub mod job;
pub mod optim;
pub mod pass;
pub mod spec;
pub mod state;
pub mod sweep;
#[cfg(test)]
mod testing;
pub mod trainer;
mod training_job;
mod writer;
