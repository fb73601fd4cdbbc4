//! The decoder: weights from files, the paged KV cache, the decoder block, and the forward pass over a flat batch.

pub mod block;
pub mod decoder;
pub mod kv;
pub mod weights;
