//! The tiers: where each generation's weights lie, and which adapters are evicted.
//!
//! A generation lies on disk, in host memory (`host_tier.rs`) in the precision of its files, or in a slot in the layout that
//! the ops read. Host memory and slots have byte budgets and evict their least recently used adapter; pinned adapters stay.
//! The engine thread owns [`Tiers`] and never waits for a load: loader threads (`loader.rs`) stage the weights, on a GPU they
//! are copied while steps run, and the engine asks again in a later step.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use candle_core::Device;

use super::Lease;
use super::generation::GenerationState;
use super::host_tier::HostTier;
use super::loader::Loaders;
use crate::arch::ModelConfig;
use crate::error::ErrorKind;
use crate::lora::slots::SlotPool;
use crate::{Error, Result};

/// Number of requests for other slots that an adapter survives after it has arrived and before it is first used. Without a
/// grace period, two requests that fit only one at a time could evict each other forever. Without a limit, an adapter that is
/// no longer asked for could block the queue.
const GRACE: u64 = 256;

/// Whether the next step can use an adapter.
#[derive(Debug, Clone)]
pub enum Residency {
    /// It is in this slot, which it keeps until it is released.
    Ready(u32),
    /// It is on its way from disk or host memory: ask again in a later step.
    Loading,
    /// Running sequences use all bytes of the slots: ask again when one has ended.
    Full,
    /// It cannot be loaded any more, because its files are gone or have changed: fail the request.
    Failed(Error),
}

/// Counters of the tiers for the metrics page.
#[derive(Debug, Default)]
pub struct TierStats {
    /// Adapters read, checked and published.
    pub loads: AtomicU64,
    /// Total time of these loads, in microseconds.
    pub load_micros: AtomicU64,
    /// Loads that were refused or failed.
    pub load_failures: AtomicU64,
    /// Adapters brought into a slot.
    pub slot_loads: AtomicU64,
    /// Of these, the ones that were read from disk again.
    pub disk_reads: AtomicU64,
    /// Evictions from slots.
    pub slot_evictions: AtomicU64,
    /// Evictions from host memory.
    pub host_evictions: AtomicU64,
    /// Bytes of adapters in host memory.
    pub host_bytes: AtomicU64,
    /// Bytes of adapters in slots or on their way into one.
    pub slot_bytes: AtomicU64,
    /// Generations retired or dropped so far. When it changes, [`Tiers::update_slots`] looks for slots to free.
    pub(super) retirements: AtomicU64,
}

/// The slots and the adapters in them. Owned by the engine thread.
pub struct Tiers {
    /// Bytes that slots may take.
    budget: usize,
    pool: SlotPool,
    loaders: Loaders,
    /// Generations in a slot or on their way into one, by key.
    residents: HashMap<u64, ResidentAdapter>,
    /// The generation in each slot.
    by_slot: HashMap<u32, u64>,
    /// Loads that failed and whose error no request has been told yet.
    failed: HashMap<u64, (Arc<GenerationState>, Error)>,
    /// Generations whose weights are being copied into their slot.
    arriving: Vec<u64>,
    /// Bytes of all residents.
    bytes: usize,
    /// Counts calls of `acquire`.
    clock: u64,
    /// The value of [`TierStats::retirements`] up to which slots have been freed.
    swept: u64,
    stats: Arc<TierStats>,
}

/// A generation in a slot, or on its way into one.
struct ResidentAdapter {
    state: Arc<GenerationState>,
    bytes: usize,
    slot: u32,
    /// Whether it has arrived in its slot.
    ready: bool,
    /// `Ready` answers that have not been released.
    uses: usize,
    /// Clock of the last use, or of the arrival.
    last_used: u64,
    /// Whether it has not been used since it arrived.
    fresh: bool,
}

impl ResidentAdapter {
    fn evictable(&self, clock: u64) -> bool {
        let awaited = self.fresh && clock - self.last_used <= GRACE && self.state.leases() > 0;
        self.ready && self.uses == 0 && !self.state.pinned() && !awaited
    }
}

impl Tiers {
    /// Empty slots of `budget` bytes in all, with loader threads that end when this is dropped. Errors: a GPU has no memory
    /// for the slots, or a thread cannot be started.
    pub(super) fn new(model: Arc<ModelConfig>, host: Arc<HostTier>, device: &Device, budget: usize) -> Result<Self> {
        let pool = SlotPool::new(device, &model, budget)?;
        let stats = host.stats.clone();
        Ok(Self {
            budget,
            loaders: Loaders::start(model, host, pool.stager())?,
            pool,
            residents: HashMap::new(),
            by_slot: HashMap::new(),
            failed: HashMap::new(),
            arriving: Vec::new(),
            bytes: 0,
            clock: 0,
            swept: 0,
            stats,
        })
    }

    /// The slots that a step reads.
    pub fn pool(&self) -> &SlotPool {
        &self.pool
    }

    /// The slots, for a step that may have to prepare them.
    pub fn pool_mut(&mut self) -> &mut SlotPool {
        &mut self.pool
    }

    /// Asks for a generation in a slot, and starts to load it if it is in none; see [`Residency`]. Never waits. Each `Ready`
    /// counts one use, which [`Tiers::release`] ends.
    pub fn acquire(&mut self, lease: &Lease) -> Residency {
        self.update_slots();
        self.clock += 1;
        let key = lease.key();
        if let Some(resident) = self.residents.get_mut(&key) {
            if !resident.ready {
                return Residency::Loading;
            }
            resident.uses += 1;
            resident.last_used = self.clock;
            resident.fresh = false;
            return Residency::Ready(resident.slot);
        }
        if let Some((_, error)) = self.failed.remove(&key) {
            return Residency::Failed(error);
        }
        self.start_load(lease, |_| true)
    }

    /// Starts to bring a generation into a slot before its request is scheduled, unless that would evict an adapter that
    /// another request waits for.
    pub fn prefetch(&mut self, lease: &Lease) {
        let key = lease.key();
        if !self.residents.contains_key(&key) && !self.failed.contains_key(&key) {
            // An error occurs again, and is reported, when the request acquires the adapter.
            self.start_load(lease, |victim| victim.state.leases() == 0);
        }
    }

    /// Ends one use of a slot.
    pub fn release(&mut self, slot: u32) {
        let Some(key) = self.by_slot.get(&slot).copied() else { return };
        let Some(resident) = self.residents.get_mut(&key) else { return };
        debug_assert!(resident.uses > 0, "slot {slot} released more often than acquired");
        resident.uses = resident.uses.saturating_sub(1);
        if resident.uses == 0 && resident.state.unreachable() {
            self.free(key);
        }
    }

    /// Puts finished loads into their slots and frees the slots of retired generations without leases. Cheap when there is
    /// nothing to do. [`Tiers::acquire`] calls it too, so the engine needs it only in steps without an acquire and while
    /// idle.
    pub fn update_slots(&mut self) {
        self.put_finished_loads();
        self.check_arrivals();
        self.free_retired();
        self.failed.retain(|_, (state, _)| state.leases() > 0);
    }

    fn put_finished_loads(&mut self) {
        while let Some((key, loaded)) = self.loaders.finished() {
            let Some(resident) = self.residents.get(&key) else { continue };
            match loaded.and_then(|staged| self.pool.upload(resident.slot, staged)) {
                Ok(()) => self.arriving.push(key),
                Err(error) => self.fail(key, error),
            }
        }
    }

    fn check_arrivals(&mut self) {
        for key in std::mem::take(&mut self.arriving) {
            let Some(resident) = self.residents.get_mut(&key) else { continue };
            match self.pool.is_ready(resident.slot) {
                Ok(false) => self.arriving.push(key),
                Ok(true) => {
                    resident.ready = true;
                    resident.last_used = self.clock;
                    resident.state.set_in_slot(true);
                    self.stats.slot_loads.fetch_add(1, Relaxed);
                    // It may have been retired on its way in.
                    if resident.state.unreachable() {
                        self.free(key);
                    }
                }
                Err(error) => self.fail(key, error),
            }
        }
    }

    fn free_retired(&mut self) {
        let retirements = self.stats.retirements.load(SeqCst);
        if retirements == self.swept {
            return;
        }
        self.swept = retirements;
        let freeable = |r: &ResidentAdapter| r.ready && r.uses == 0 && r.state.unreachable();
        let keys: Vec<_> = self.residents.iter().filter(|(_, r)| freeable(r)).map(|(key, _)| *key).collect();
        keys.into_iter().for_each(|key| self.free(key));
    }

    /// Makes room by evicting adapters that `may_evict` allows, and starts to load.
    fn start_load(&mut self, lease: &Lease, may_evict: impl Fn(&ResidentAdapter) -> bool) -> Residency {
        let victims = match self.choose_victims(lease, may_evict) {
            Ok(victims) => victims,
            Err(refusal) => return refusal,
        };
        self.stats.slot_evictions.fetch_add(victims.len() as u64, Relaxed);
        victims.into_iter().for_each(|key| self.free(key));

        let (key, state, bytes, last_used) = (lease.key(), lease.state.clone(), lease.slot_bytes, self.clock);
        let Some(slot) = self.pool.reserve(bytes) else { return Residency::Full };
        if let Err(error) = self.loaders.enqueue(lease.generation()) {
            self.pool.remove(slot);
            return Residency::Failed(error);
        }
        let resident = ResidentAdapter { state, bytes, slot, ready: false, uses: 0, last_used, fresh: true };
        self.residents.insert(key, resident);
        self.by_slot.insert(slot, key);
        self.set_bytes(self.bytes + bytes);
        Residency::Loading
    }

    /// The least recently used of the adapters that may be evicted, as many as must go until `lease`'s adapter fits. If it
    /// would not fit even then, the reason.
    fn choose_victims(
        &self,
        lease: &Lease,
        may_evict: impl Fn(&ResidentAdapter) -> bool,
    ) -> std::result::Result<Vec<u64>, Residency> {
        let need = lease.slot_bytes;
        if let Some(error) = self.never_fits(lease) {
            return Err(Residency::Failed(error));
        }
        let candidates = self.residents.iter().filter(|(_, r)| r.evictable(self.clock) && may_evict(r));
        let mut candidates: Vec<_> = candidates.collect();
        candidates.sort_by_key(|(key, r)| (r.last_used, **key));
        let Some(for_space) = self.pool.evictions(need, candidates.iter().map(|(_, r)| r.slot)) else {
            return Err(Residency::Full);
        };
        let mut excess = (self.bytes + need).saturating_sub(self.budget);
        let mut victims = Vec::new();
        for (key, resident) in candidates {
            if excess == 0 && victims.len() >= for_space {
                break;
            }
            excess = excess.saturating_sub(resident.bytes);
            victims.push(*key);
        }
        if excess > 0 { Err(Residency::Full) } else { Ok(victims) }
    }

    /// The error for an adapter that no eviction makes room for: the pinned adapters take too many bytes, or leave no
    /// contiguous range that is large enough.
    fn never_fits(&self, lease: &Lease) -> Option<Error> {
        let need = lease.slot_bytes;
        let pinned: usize = self.residents.values().filter(|r| r.state.pinned()).map(|r| r.bytes).sum();
        let others = self.residents.values().filter(|r| !r.state.pinned()).map(|r| r.slot);
        if need <= self.budget.saturating_sub(pinned) && self.pool.evictions(need, others).is_some() {
            return None;
        }
        let message = format!(
            "adapter {:?} needs {need} bytes in a slot; the slot budget is {} bytes, of which pinned adapters hold \
             {pinned}: raise the budget or unpin some",
            lease.name, self.budget
        );
        Some(Error::new(ErrorKind::Unavailable, message).code("adapter_no_room"))
    }

    /// Keeps the error of a load for the next request that asks.
    fn fail(&mut self, key: u64, error: Error) {
        if let Some(resident) = self.residents.get(&key) {
            self.failed.insert(key, (resident.state.clone(), error));
        }
        self.free(key);
    }

    fn free(&mut self, key: u64) {
        let Some(resident) = self.residents.remove(&key) else { return };
        self.pool.remove(resident.slot);
        self.by_slot.remove(&resident.slot);
        resident.state.set_in_slot(false);
        self.set_bytes(self.bytes - resident.bytes);
    }

    fn set_bytes(&mut self, bytes: usize) {
        self.bytes = bytes;
        self.stats.slot_bytes.store(bytes as u64, Relaxed);
    }
}
