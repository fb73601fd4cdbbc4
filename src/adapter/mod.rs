//! Adapters: what one is, and the lease that keeps a generation alive while a request uses it.
//!
//! A directory written by PEFT becomes [`peft::AdapterWeights`] ([`peft_config`] reads its options). The [`registry`]
//! gives it a name and makes it a [`Generation`]; a request takes a [`Lease`] on it. The engine thread owns
//! [`tiers::Tiers`], which moves generations between disk, host memory and the [`slots`] that a forward pass reads.

pub mod dummy;
mod manifest;
pub mod peft;
pub mod peft_config;
pub mod registry;
pub mod tiers;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::SystemTime;

use crate::lora::weights::AdapterWeights;
use tiers::HostTier;

/// One immutable version of an adapter, named by the hash of its content. Its weights live in the tiers and go when
/// the last lease and the registry's own reference are gone.
pub struct Generation {
    /// The name it was loaded under.
    pub name: String,
    /// First 16 hex digits of the SHA-256 over its resolved configuration and tensors.
    pub id: String,
    /// Where it was read from, canonical; read again when host memory was given to others.
    pub source: PathBuf,
    /// Largest rank of any module.
    pub rank: usize,
    /// Number of modules it changes.
    pub modules: usize,
    /// Whether it is used alone and at weight 1 (DoRA).
    pub exclusive: bool,
    /// Bytes of its weights in host memory.
    pub bytes: usize,
    /// Bytes of its weights in a slot.
    pub slot_bytes: usize,
    /// When it was loaded.
    pub loaded_at: SystemTime,
    /// Unique in this process, also among generations of equal content: what tables are keyed by.
    key: u64,
    /// What the tiers need to know of it without keeping it alive.
    state: Arc<GenerationState>,
    /// Holds its weights, and drops them with it.
    host: Arc<HostTier>,
}

/// The changing part of a generation.
#[derive(Default)]
struct GenerationState {
    /// Never evicted for another adapter.
    pinned: AtomicBool,
    /// Replaced or unloaded: it goes with its last lease.
    retired: AtomicBool,
    /// Leases out.
    leases: AtomicUsize,
    /// Whether a slot holds it.
    in_slot: AtomicBool,
}

impl GenerationState {
    fn pinned(&self) -> bool {
        self.pinned.load(SeqCst) && !self.retired.load(SeqCst)
    }

    /// Nobody will ask for it again.
    fn over(&self) -> bool {
        self.retired.load(SeqCst) && self.leases.load(SeqCst) == 0
    }
}

impl Generation {
    /// A generation of the given weights, which take `slot_bytes` in a slot. The weights themselves go to `host` by
    /// [`HostTier::put`].
    pub fn new(
        name: &str,
        id: String,
        source: PathBuf,
        weights: &AdapterWeights,
        slot_bytes: usize,
        host: Arc<HostTier>,
    ) -> Self {
        static NEXT_KEY: AtomicU64 = AtomicU64::new(1);
        Self {
            name: name.to_owned(),
            id,
            source,
            rank: weights.modules.iter().map(|m| m.rank).max().unwrap_or(0),
            modules: weights.modules.len(),
            exclusive: weights.has_magnitudes(),
            bytes: weights.bytes(),
            slot_bytes,
            loaded_at: SystemTime::now(),
            key: NEXT_KEY.fetch_add(1, SeqCst),
            state: Arc::default(),
            host,
        }
    }

    /// A number that no other generation of this process has.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// Requests that hold it now.
    pub fn leases(&self) -> usize {
        self.state.leases.load(SeqCst)
    }

    /// Whether it keeps its slot and host memory against other adapters.
    pub fn pinned(&self) -> bool {
        self.state.pinned()
    }

    /// The nearest tier that holds it: `slot`, `host` or `disk`.
    pub fn level(&self) -> &'static str {
        if self.state.in_slot.load(SeqCst) {
            "slot"
        } else if self.host.contains(self.key) {
            "host"
        } else {
            "disk"
        }
    }

    /// Takes it out of service: its slot is freed once no lease is left.
    fn retire(&self) {
        self.state.retired.store(true, SeqCst);
        self.host.stats.retirements.fetch_add(1, SeqCst);
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.retire();
        self.host.remove(self.key);
    }
}

/// Keeps a generation alive: replace and unload never disturb the request that holds it. A clone is one more lease.
pub struct Lease(Arc<Generation>);

impl Lease {
    /// One more lease on `generation`.
    pub fn new(generation: Arc<Generation>) -> Self {
        generation.state.leases.fetch_add(1, SeqCst);
        Self(generation)
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // The last one drops the generation too, which tells the tiers.
        self.0.state.leases.fetch_sub(1, SeqCst);
    }
}

impl std::ops::Deref for Lease {
    type Target = Generation;

    fn deref(&self) -> &Generation {
        &self.0
    }
}
