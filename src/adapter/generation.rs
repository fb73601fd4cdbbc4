//! A generation: one immutable version of an adapter.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::SystemTime;

use super::host_tier::HostTier;
use crate::lora::weights::AdapterWeights;

/// One immutable version of an adapter, identified by the hash of its content. Its weights are held by
/// the tiers until the last lease and the registry's reference are gone.
pub struct Generation {
    /// The name under which it was loaded.
    pub name: String,
    /// First 16 hex digits of the SHA-256 over its resolved configuration and tensors.
    pub id: String,
    /// Canonical path of its directory, which is read again after an eviction from host memory.
    pub(super) source: PathBuf,
    /// Largest rank of any module.
    pub(super) rank: usize,
    /// Number of modules that it targets.
    pub(super) modules: usize,
    /// Whether it can only be used alone and at weight 1 (DoRA).
    pub exclusive: bool,
    /// Bytes of its weights in host memory.
    pub(super) bytes: usize,
    /// Bytes of its weights in a slot.
    pub(super) slot_bytes: usize,
    /// When it was loaded.
    pub(super) loaded_at: SystemTime,
    /// Faults that do not keep it from being served: another base, no effect.
    pub(super) warnings: Vec<String>,
    /// Unique in this process, also among generations of equal content. The tiers' tables are keyed by it.
    key: u64,
    pub(super) state: Arc<GenerationState>,
    /// Host memory, from which its weights are removed when the generation is dropped.
    host: Arc<HostTier>,
}

/// The tier that holds a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tier {
    Slot,
    Host,
    Disk,
}

impl Tier {
    /// The value of `level` in the admin API.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Slot => "slot",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}

impl Generation {
    /// A generation of these weights, which take `slot_bytes` in a slot. [`HostTier::put`] stores the weights in `host`.
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
            warnings: Vec::new(),
            key: NEXT_KEY.fetch_add(1, SeqCst),
            state: Arc::default(),
            host,
        }
    }

    /// A number that no other generation of this process has.
    pub fn key(&self) -> u64 {
        self.key
    }

    /// The number of leases.
    pub(super) fn leases(&self) -> usize {
        self.state.leases()
    }

    /// Whether it keeps its slot and its host memory when other adapters need room.
    pub(super) fn pinned(&self) -> bool {
        self.state.pinned()
    }

    /// The fastest tier that holds it.
    pub(super) fn tier(&self) -> Tier {
        if self.state.in_slot.load(SeqCst) {
            Tier::Slot
        } else if self.host.contains(self.key) {
            Tier::Host
        } else {
            Tier::Disk
        }
    }

    /// Takes it out of service. Its slot is freed once it has no leases left.
    pub(super) fn retire(&self) {
        self.state.retired.store(true, SeqCst);
        self.host.count_retirement();
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.retire();
        self.host.remove(self.key);
    }
}

/// The mutable part of a generation. The tiers share it, so that they know of a generation without keeping it alive.
#[derive(Default)]
pub(super) struct GenerationState {
    /// Never evicted for another adapter.
    pinned: AtomicBool,
    /// Replaced or unloaded: no new leases.
    retired: AtomicBool,
    /// Number of leases.
    leases: AtomicUsize,
    /// Whether its weights have arrived in a slot.
    in_slot: AtomicBool,
}

impl GenerationState {
    /// Whether it is pinned. A retired generation is not, whatever it was before.
    pub(super) fn pinned(&self) -> bool {
        self.pinned.load(SeqCst) && !self.retired()
    }

    pub(super) fn set_pinned(&self, pinned: bool) {
        self.pinned.store(pinned, SeqCst);
    }

    pub(super) fn retired(&self) -> bool {
        self.retired.load(SeqCst)
    }

    /// Whether the generation is retired and has no leases left.
    pub(super) fn unreachable(&self) -> bool {
        self.retired() && self.leases() == 0
    }

    pub(super) fn leases(&self) -> usize {
        self.leases.load(SeqCst)
    }

    pub(super) fn add_lease(&self) {
        self.leases.fetch_add(1, SeqCst);
    }

    pub(super) fn end_lease(&self) {
        self.leases.fetch_sub(1, SeqCst);
    }

    pub(super) fn set_in_slot(&self, in_slot: bool) {
        self.in_slot.store(in_slot, SeqCst);
    }
}
