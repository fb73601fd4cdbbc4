//! The decoder: weights from a file, and a forward pass over a flat batch.

pub mod decoder;
pub mod kv;
mod linear;
pub mod weights;
