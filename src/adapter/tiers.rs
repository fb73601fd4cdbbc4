//! Where a generation's weights are: on disk, in host memory in the file's precision, or in a slot in the ops' form.
//!
//! Each tier has a byte budget and gives up its least recently used adapter first; pinned ones stay. The engine thread
//! owns [`Tiers`] and never waits: whatever is not in a slot is read, checked and laid out by loader threads, on a GPU it is
//! copied beside what runs there, and the engine asks again at a later step. That also holds for adapters in host memory:
//! laying out a rank-8 adapter of a 135M model for the CPU takes 2.4 ms (and reading it 8), one of rank 64 of an 8B model
//! seventy times that, and one way for both is easier to reason about than a size limit.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Device;

use super::peft;
use super::{Generation, GenerationState, Lease};
use crate::arch::ModelConfig;
use crate::error::ErrorKind;
use crate::lora::slots::{SlotPool, SlotStager, StagedWeights};
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Threads that read adapters and lay them out. Two, so that a slow disk does not hold up what is in memory already,
/// and no more, because they share the cores with the engine.
const LOADERS: usize = 2;

/// How many requests for other slots an adapter that has just arrived survives before anyone has used it. Without
/// this, two requests that fit one at a time could evict each other for ever; with no limit, an adapter that is no
/// longer asked for could block the queue.
const GRACE: u64 = 256;

/// Whether an adapter can be used by the next forward pass.
#[derive(Debug, Clone)]
pub enum Residency {
    /// It is in this slot, which stays its own until released.
    Ready(u32),
    /// It is on its way from disk or host memory: ask again at a later step.
    Loading,
    /// Every slot byte is leased by running sequences: wait for one to end.
    Full,
    /// It cannot be loaded any more (file gone or changed): fail the request.
    Failed(Error),
}

/// Counters of the adapter tiers that the metrics page reads.
#[derive(Debug, Default)]
pub struct TierStats {
    /// Adapters read, checked and published.
    pub loads: AtomicU64,
    /// Time these loads took in all, in microseconds.
    pub load_micros: AtomicU64,
    /// Loads that were refused or failed.
    pub load_failures: AtomicU64,
    /// Adapters brought into a slot.
    pub slot_loads: AtomicU64,
    /// Of these, the ones that had to be read from disk again.
    pub disk_reads: AtomicU64,
    /// Adapters that gave up their slot for another.
    pub slot_evictions: AtomicU64,
    /// Adapters whose host memory was given to others.
    pub host_evictions: AtomicU64,
    /// Bytes of adapters in host memory now.
    pub host_bytes: AtomicU64,
    /// Bytes of adapters in slots now, with those on their way in.
    pub slot_bytes: AtomicU64,
    /// Generations retired or dropped so far: when it moves, [`Tiers::sweep`] has slots to look at.
    pub(super) retirements: AtomicU64,
}

/// Adapters in host memory under a byte budget.
pub struct HostTier {
    budget: usize,
    pub(super) stats: Arc<TierStats>,
    entries: Mutex<HostEntries>,
}

#[derive(Default)]
struct HostEntries {
    map: HashMap<u64, HostEntry>,
    /// Counts uses, to tell which is the oldest.
    clock: u64,
    bytes: usize,
}

struct HostEntry {
    state: Arc<GenerationState>,
    weights: Arc<AdapterWeights>,
    bytes: usize,
    last_used: u64,
}

impl HostTier {
    /// An empty tier for `budget` bytes.
    pub fn new(budget: usize, stats: Arc<TierStats>) -> Self {
        Self { budget, stats, entries: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HostEntries> {
        // The map is consistent between statements, so a panic elsewhere does not spoil it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The weights of a generation, if they are here.
    fn get(&self, key: u64) -> Option<Arc<AdapterWeights>> {
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

    /// Takes a generation's weights in, and drops the least recently used ones over the budget; one that is alone over
    /// the budget is dropped itself and read from disk when needed. Pinned generations stay, and so do retired ones
    /// that a request still holds, whose files may be gone.
    pub fn put(&self, generation: &Generation, weights: Arc<AdapterWeights>) {
        let mut entries = self.lock();
        entries.clock += 1;
        let entry =
            HostEntry { state: generation.state.clone(), weights, bytes: generation.bytes, last_used: entries.clock };
        entries.bytes += entry.bytes;
        if let Some(old) = entries.map.insert(generation.key, entry) {
            entries.bytes -= old.bytes;
        }
        while entries.bytes > self.budget {
            let spill =
                entries.map.iter().filter(|(_, e)| !e.state.pinned.load(SeqCst) && !e.state.retired.load(SeqCst));
            let Some(key) = spill.min_by_key(|(_, e)| e.last_used).map(|(key, _)| *key) else { break };
            if let Some(old) = entries.map.remove(&key) {
                entries.bytes -= old.bytes;
                self.stats.host_evictions.fetch_add(1, Relaxed);
            }
        }
        self.stats.host_bytes.store(entries.bytes as u64, Relaxed);
    }

    pub(super) fn remove(&self, key: u64) {
        let mut entries = self.lock();
        if let Some(old) = entries.map.remove(&key) {
            entries.bytes -= old.bytes;
            self.stats.host_bytes.store(entries.bytes as u64, Relaxed);
        }
    }
}

/// The engine thread's side of the adapters: which generation is in which slot.
pub struct Tiers {
    /// Bytes that slots may take.
    budget: usize,
    pool: SlotPool,
    /// Generations in a slot or on their way, by key.
    entries: HashMap<u64, ResidentAdapter>,
    /// Which generation holds a slot.
    by_slot: HashMap<u32, u64>,
    /// Loads that failed and whose requester has not been told yet.
    failed: HashMap<u64, (Arc<GenerationState>, Error)>,
    /// Bytes of all entries.
    bytes: usize,
    /// Counts calls of `acquire`.
    clock: u64,
    /// The value of `TierStats::retirements` up to which retired generations have been freed.
    swept: u64,
    jobs: Sender<Arc<Generation>>,
    done: Receiver<(u64, Result<StagedWeights>)>,
    /// Generations that were put into their slot, but may not have arrived there.
    arriving: Vec<u64>,
    stats: Arc<TierStats>,
}

struct ResidentAdapter {
    state: Arc<GenerationState>,
    bytes: usize,
    slot: u32,
    /// Whether it has arrived in its slot.
    ready: bool,
    /// `Ready` answers not yet released.
    uses: usize,
    /// Clock of the last use, or of the arrival.
    last_used: u64,
    /// Nobody has used it since it arrived.
    fresh: bool,
}

impl ResidentAdapter {
    fn evictable(&self, clock: u64) -> bool {
        let awaited = self.fresh && clock - self.last_used <= GRACE && self.state.leases.load(SeqCst) > 0;
        self.ready && self.uses == 0 && !self.state.pinned() && !awaited
    }
}

impl Tiers {
    /// Empty slots of `budget` bytes in all, with loader threads that end when this is dropped. Errors: no thread, or no
    /// memory on a GPU.
    pub(super) fn new(model: Arc<ModelConfig>, host: Arc<HostTier>, device: &Device, budget: usize) -> Result<Self> {
        let pool = SlotPool::on(device, &model, budget)?;
        let (jobs, queue) = channel::<Arc<Generation>>();
        let (results, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let stats = host.stats.clone();
        for i in 0..LOADERS {
            let (queue, results, model, host) = (queue.clone(), results.clone(), model.clone(), host.clone());
            let stager = pool.stager();
            let run = move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(generation) = next else { return };
                    let loaded = catch_unwind(AssertUnwindSafe(|| load(&generation, &host, &model, &stager)))
                        .unwrap_or_else(|_| Err(Error::internal("the adapter loader panicked")));
                    if results.send((generation.key, loaded)).is_err() {
                        return;
                    }
                }
            };
            std::thread::Builder::new().name(format!("adapter-loader-{i}")).spawn(run)?;
        }
        Ok(Self {
            budget,
            pool,
            entries: HashMap::new(),
            by_slot: HashMap::new(),
            failed: HashMap::new(),
            bytes: 0,
            clock: 0,
            swept: 0,
            jobs,
            done,
            arriving: Vec::new(),
            stats,
        })
    }

    /// What a forward pass reads.
    pub fn pool(&self) -> &SlotPool {
        &self.pool
    }

    /// The same, for a step that may have to prepare what it reads.
    pub fn pool_mut(&mut self) -> &mut SlotPool {
        &mut self.pool
    }

    /// Asks for a generation in a slot; see [`Residency`]. Never blocks. Each `Ready` counts one use, ended by
    /// [`Tiers::release`].
    pub fn acquire(&mut self, lease: &Lease) -> Residency {
        self.sweep();
        self.clock += 1;
        let key = lease.key();
        if let Some(entry) = self.entries.get_mut(&key) {
            if !entry.ready {
                return Residency::Loading;
            }
            entry.uses += 1;
            entry.last_used = self.clock;
            entry.fresh = false;
            return Residency::Ready(entry.slot);
        }
        if let Some((_, error)) = self.failed.remove(&key) {
            return Residency::Failed(error);
        }
        self.start(lease, |_| true)
    }

    /// Starts to bring a generation into a slot before it is its request's turn. Gives up where that would evict what
    /// another request waits for.
    pub fn prefetch(&mut self, lease: &Lease) {
        let key = lease.key();
        if !self.entries.contains_key(&key) && !self.failed.contains_key(&key) {
            // What goes wrong shows again, and is told, once it is needed.
            self.start(lease, |victim| victim.state.leases.load(SeqCst) == 0);
        }
    }

    /// Makes room by evicting some that may go, and starts to load.
    fn start(&mut self, lease: &Lease, may_go: impl Fn(&ResidentAdapter) -> bool) -> Residency {
        if let Some(answer) = self.make_room(lease, may_go) {
            return answer;
        }
        let (key, state, bytes, last_used) = (lease.key(), lease.state.clone(), lease.slot_bytes, self.clock);
        let Some(slot) = self.pool.reserve(bytes) else { return Residency::Full };
        if self.jobs.send(lease.0.clone()).is_err() {
            self.pool.remove(slot);
            return Residency::Failed(Error::internal("the adapter loaders have stopped"));
        }
        self.entries.insert(key, ResidentAdapter { state, bytes, slot, ready: false, uses: 0, last_used, fresh: true });
        self.by_slot.insert(slot, key);
        self.count_bytes(self.bytes + bytes);
        Residency::Loading
    }

    /// Ends one use of a slot.
    pub fn release(&mut self, slot: u32) {
        let Some(key) = self.by_slot.get(&slot).copied() else { return };
        let Some(entry) = self.entries.get_mut(&key) else { return };
        debug_assert!(entry.uses > 0, "slot {slot} released more often than acquired");
        entry.uses = entry.uses.saturating_sub(1);
        if entry.uses == 0 && entry.state.over() {
            self.free(key);
        }
    }

    /// Puts finished loads into slots and frees the slots of retired generations that nobody holds any more. Cheap
    /// when there is nothing to do; [`Tiers::acquire`] does it too, so an engine needs it only in steps without one
    /// and while idle.
    pub fn sweep(&mut self) {
        while let Ok((key, loaded)) = self.done.try_recv() {
            let Some(entry) = self.entries.get(&key) else { continue };
            match loaded.and_then(|laid| self.pool.put(entry.slot, laid)) {
                Ok(()) => self.arriving.push(key),
                Err(error) => self.fail(key, error),
            }
        }
        for key in std::mem::take(&mut self.arriving) {
            let Some(entry) = self.entries.get_mut(&key) else { continue };
            match self.pool.arrived(entry.slot) {
                Ok(false) => self.arriving.push(key),
                Ok(true) => {
                    entry.ready = true;
                    entry.last_used = self.clock;
                    entry.state.in_slot.store(true, SeqCst);
                    self.stats.slot_loads.fetch_add(1, Relaxed);
                    // It may have been retired on its way in.
                    if entry.state.over() {
                        self.free(key);
                    }
                }
                Err(error) => self.fail(key, error),
            }
        }
        let retirements = self.stats.retirements.load(SeqCst);
        if retirements != self.swept {
            self.swept = retirements;
            let over = |(key, e): (&u64, &ResidentAdapter)| (e.ready && e.uses == 0 && e.state.over()).then_some(*key);
            for key in self.entries.iter().filter_map(over).collect::<Vec<_>>() {
                self.free(key);
            }
        }
        self.failed.retain(|_, (state, _)| state.leases.load(SeqCst) > 0);
    }

    /// Evicts least recently used adapters, of those that may go, until `lease`'s fits; on failure evicts none and says why.
    fn make_room(&mut self, lease: &Lease, may_go: impl Fn(&ResidentAdapter) -> bool) -> Option<Residency> {
        let need = lease.slot_bytes;
        let pinned: usize = self.entries.values().filter(|e| e.state.pinned()).map(|e| e.bytes).sum();
        let others = self.entries.values().filter(|e| !e.state.pinned()).map(|e| e.slot);
        // Room that no eviction can make: what is pinned takes too much, or lies so that no piece is large enough.
        if need > self.budget.saturating_sub(pinned) || self.pool.evictions(need, others).is_none() {
            let error = Error::new(
                ErrorKind::Unavailable,
                format!(
                    "adapter {:?} needs {need} bytes in a slot; the slot budget is {} bytes, of which pinned adapters hold \
                     {pinned}: raise the budget or unpin some",
                    lease.name, self.budget
                ),
            );
            return Some(Residency::Failed(error.code("adapter_no_room")));
        }
        let mut victims: Vec<_> = self.entries.iter().filter(|(_, e)| e.evictable(self.clock) && may_go(e)).collect();
        victims.sort_by_key(|(key, e)| (e.last_used, **key));
        let Some(by_place) = self.pool.evictions(need, victims.iter().map(|(_, e)| e.slot)) else {
            return Some(Residency::Full);
        };
        let mut over = (self.bytes + need).saturating_sub(self.budget);
        let mut chosen = Vec::new();
        for (key, entry) in victims {
            if over == 0 && chosen.len() >= by_place {
                break;
            }
            over = over.saturating_sub(entry.bytes);
            chosen.push(*key);
        }
        if over > 0 {
            return Some(Residency::Full);
        }
        self.stats.slot_evictions.fetch_add(chosen.len() as u64, Relaxed);
        chosen.into_iter().for_each(|key| self.free(key));
        None
    }

    /// Keeps the error of a load for whoever asks next.
    fn fail(&mut self, key: u64, error: Error) {
        if let Some(entry) = self.entries.get(&key) {
            self.failed.insert(key, (entry.state.clone(), error));
        }
        self.free(key);
    }

    fn free(&mut self, key: u64) {
        let Some(entry) = self.entries.remove(&key) else { return };
        self.pool.remove(entry.slot);
        self.by_slot.remove(&entry.slot);
        entry.state.in_slot.store(false, SeqCst);
        self.count_bytes(self.bytes - entry.bytes);
    }

    fn count_bytes(&mut self, bytes: usize) {
        self.bytes = bytes;
        self.stats.slot_bytes.store(bytes as u64, Relaxed);
    }
}

/// A loader thread's work: host memory or disk -> the layout of a slot.
fn load(generation: &Generation, host: &HostTier, model: &ModelConfig, stager: &SlotStager) -> Result<StagedWeights> {
    let weights = match host.get(generation.key) {
        Some(weights) => weights,
        None => {
            let gone = |what: String| {
                let message = format!("adapter {:?} generation {}: {what}", generation.name, generation.id);
                Error::new(ErrorKind::Unavailable, message).code("adapter_source_changed")
            };
            let (weights, id) =
                peft::read(&generation.source, model).map_err(|e| gone(format!("it cannot be read again: {e}")))?;
            if id != generation.id {
                return Err(gone(format!(
                    "{} now holds generation {id}; load the adapter again to serve it",
                    generation.source.display()
                )));
            }
            host.stats.disk_reads.fetch_add(1, Relaxed);
            let weights = Arc::new(weights);
            host.put(generation, weights.clone());
            weights
        }
    };
    stager.stage(&weights, model)
}
