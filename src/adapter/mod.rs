//! Adapters: what one is, and the lease that keeps a generation alive while a request uses it.

pub mod registry;
pub mod slots;

use std::sync::Arc;

/// A linear layer of the decoder that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
    LmHead,
}

/// Where modules that share an input are fused into one matrix product, in the order of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// q, k, v stacked.
    Qkv = 0,
    O = 1,
    /// gate, up stacked.
    GateUp = 2,
    Down = 3,
    /// The output head, once per model.
    Head = 4,
}

/// One immutable version of an adapter, named by the hash of its content.
pub struct Generation {
    /// The name it was loaded under.
    pub name: String,
    /// First 16 hex digits of the SHA-256 over its config and tensors.
    pub id: String,
}

/// Keeps a generation alive: replace and unload never disturb the request that holds it.
#[derive(Clone)]
pub struct Lease(Arc<Generation>);

impl std::ops::Deref for Lease {
    type Target = Generation;

    fn deref(&self) -> &Generation {
        &self.0
    }
}
