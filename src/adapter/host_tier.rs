//! The host tier: weights of adapters in host memory, in the precision of their files, under a byte budget.

use std::collections::HashMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Generation;
use super::generation::GenerationState;
use super::tiers::TierStats;
use crate::lora::weights::AdapterWeights;

/// Weights of adapters in host memory, under a byte budget.
pub struct HostTier {
    budget: usize,
    pub(super) stats: Arc<TierStats>,
    entries: Mutex<HostEntries>,
}

#[derive(Default)]
struct HostEntries {
    map: HashMap<u64, HostEntry>,
    /// Counts uses, to find the least recently used entry.
    clock: u64,
    bytes: usize,
}

struct HostEntry {
    state: Arc<GenerationState>,
    weights: Arc<AdapterWeights>,
    bytes: usize,
    last_used: u64,
}

impl HostEntry {
    /// A retired generation that still has leases stays: its files may be gone.
    fn evictable(&self) -> bool {
        !self.state.pinned() && !self.state.retired()
    }
}

impl HostEntries {
    /// Removes an entry, if it is there.
    fn remove(&mut self, key: u64) -> bool {
        let removed = self.map.remove(&key);
        self.bytes -= removed.as_ref().map_or(0, |entry| entry.bytes);
        removed.is_some()
    }

    fn least_recently_used(&self) -> Option<u64> {
        let evictable = self.map.iter().filter(|(_, entry)| entry.evictable());
        evictable.min_by_key(|(_, entry)| entry.last_used).map(|(key, _)| *key)
    }
}

impl HostTier {
    /// An empty tier for `budget` bytes.
    pub fn new(budget: usize, stats: Arc<TierStats>) -> Self {
        Self { budget, stats, entries: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HostEntries> {
        // The map is consistent after each statement, so a poisoned lock can be used.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights of a generation, if they are here.
    pub(super) fn get(&self, key: u64) -> Option<Arc<AdapterWeights>> {
        let mut entries = self.lock();
        entries.clock += 1;
        let clock = entries.clock;
        let entry = entries.map.get_mut(&key)?;
        entry.last_used = clock;
        Some(entry.weights.clone())
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.lock().map.contains_key(&key)
    }

    /// Stores the weights of a generation, and evicts the least recently used ones while the tier is over its budget. That may
    /// be the new ones, if they exceed the budget alone: they are then read from disk on demand.
    pub(super) fn put(&self, generation: &Generation, weights: Arc<AdapterWeights>) {
        let mut entries = self.lock();
        entries.clock += 1;
        let (bytes, last_used) = (generation.bytes, entries.clock);
        entries.remove(generation.key());
        entries.map.insert(generation.key(), HostEntry { state: generation.state.clone(), weights, bytes, last_used });
        entries.bytes += bytes;
        while entries.bytes > self.budget {
            let Some(key) = entries.least_recently_used() else { break };
            entries.remove(key);
            self.stats.host_evictions.fetch_add(1, Relaxed);
        }
        self.stats.host_bytes.store(entries.bytes as u64, Relaxed);
    }

    pub(super) fn remove(&self, key: u64) {
        let mut entries = self.lock();
        if entries.remove(key) {
            self.stats.host_bytes.store(entries.bytes as u64, Relaxed);
        }
    }

    /// Notifies the tiers that a generation has been retired or dropped.
    pub(super) fn count_retirement(&self) {
        self.stats.retirements.fetch_add(1, SeqCst);
    }
}
