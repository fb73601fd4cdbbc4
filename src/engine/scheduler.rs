//! The scheduler: which sequences run, and which of their rows the next step computes.
//!
//! * **Steps.** A step has at most `max_batch_tokens` rows. Each decoding sequence gets one row. The rest goes in chunks to
//!   prompts (chunked prefill). The least served queue is next (see [`super::fair_queue`]): a running prompt of the queue gets
//!   a chunk, or else its first waiting request is admitted.
//! * **Admission.** A request is admitted with the KV blocks of its whole prompt, so that only decoding can run out of blocks,
//!   and with a use of each adapter's slot. If blocks or sequences are at their limit, no request is admitted until the least
//!   served queue's fits. If an adapter is not in a slot, other queues may go first; if the slots are full, at most
//!   [`MAX_BYPASS`] times.
//! * **Preemption.** When decoding runs out of blocks, the newest sequence of the most served queue gives up its blocks and
//!   returns to the front of its queue with all its tokens, which are computed again later. Preemption does not change
//!   the output where a row's bits do not depend on the batch: on the CPU, and on a GPU in deterministic mode.

use super::block_pool::BlockPool;
use super::fair_queue::{AdapterQueue, FairQueues, QueueId, SlotWait};
use super::request::Event;
use super::sequence::Sequence;
use super::{EngineConfig, Runner};
use crate::Error;
use crate::adapter::tiers::Residency;
use crate::error::ErrorKind;

/// Most rows of a step whose logits give prompt log-probabilities, in addition to one row per sequence. It bounds the memory of
/// the logits: 64 rows of a vocabulary of 128k take 32 MiB.
const MAX_SCORED_ROWS: usize = 64;

/// Most requests that are admitted before one that waits for room in the slots. After that, requests with other adapters wait
/// until it is admitted. Refusals while no slot is in use count too: otherwise, requests with several adapters could take the
/// slots from each other forever, without any of them getting all the slots that it needs.
const MAX_BYPASS: usize = 64;

/// Most queues without a running sequence that are refused in one step. More attempts would only make their adapters evict each
/// other.
const MAX_REFUSALS: usize = 16;

/// Refusals in a row, with all slots unused, after which a request's adapters are considered not to fit together.
const MAX_FULL_REFUSALS: usize = 1024;

/// Largest lead of one queue over another, in full steps.
const MAX_LEAD_STEPS: usize = 16;

/// The rows of one running sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ScheduledRows {
    /// Index in [`Scheduler::running`].
    pub(super) sequence: usize,
    /// Number of rows: the sequence's next `rows` tokens.
    pub(super) rows: usize,
}

/// The waiting and the running sequences, and the KV blocks that they share.
pub(super) struct Scheduler {
    config: EngineConfig,
    /// Running sequences in order of admission.
    pub(super) running: Vec<Sequence>,
    /// Waiting requests by adapter.
    queues: FairQueues,
    pub(super) blocks: BlockPool,
    /// Counts calls of `schedule`.
    step: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub(super) prefix_queries: u64,
    /// Prompt tokens found in the prefix cache.
    pub(super) prefix_hits: u64,
    /// Number of preemptions.
    pub(super) preemptions: u64,
}

/// The result of an attempt to admit a queue's first request.
enum Admission {
    /// The request runs, or it has failed and left the queue.
    Moved,
    /// Its adapters are not in slots: skip the queue in this step.
    NoSlot,
    /// Too many sequences or too few blocks: admit no request in this step.
    NoRoom,
}

/// Why a sequence's adapters cannot be used by the next step.
enum SlotRefusal {
    /// At least one is being loaded.
    Loading,
    /// The slots are full.
    Full,
    /// At least one cannot be loaded.
    Failed(Error),
}

/// The leading tokens of a sequence that the prefix cache holds.
struct CachedPrefix {
    /// The cached blocks.
    blocks: Vec<u32>,
    /// Number of further blocks for the rest of the tokens.
    missing: usize,
    /// Whether the prefix cache was looked up.
    looked_up: bool,
}

impl CachedPrefix {
    fn find(sequence: &mut Sequence, blocks: &BlockPool, config: &EngineConfig) -> Self {
        let skippable = sequence.skippable();
        let looked_up = config.prefix_cache && skippable > 0;
        let most = if looked_up { skippable / config.block_size } else { 0 };
        let cached = blocks.find_cached(sequence.block_hashes(most, config.block_size));
        let missing = sequence.tokens.len().div_ceil(config.block_size) - cached.len();
        Self { blocks: cached, missing, looked_up }
    }
}

impl Scheduler {
    /// A scheduler without requests, with all blocks free.
    pub(super) fn new(config: EngineConfig) -> Self {
        Self {
            blocks: BlockPool::new(config.num_blocks),
            config,
            running: Vec::new(),
            queues: FairQueues::default(),
            step: 0,
            prefix_queries: 0,
            prefix_hits: 0,
            preemptions: 0,
        }
    }

    /// Queues a request.
    pub(super) fn push(&mut self, sequence: Sequence) {
        self.queues.push(sequence);
    }

    /// Number of requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.queues.waiting()
    }

    /// Schedules a step. Empty if nothing can run now, though requests may wait for an adapter. Sequences with the same adapters
    /// are adjacent, so that they share one pass over the adapters' weights.
    pub(super) fn schedule(&mut self, runner: &mut impl Runner) -> Vec<ScheduledRows> {
        self.step += 1;
        self.running.iter_mut().for_each(|sequence| sequence.planned = 0);
        self.drop_cancelled(runner);
        self.plan_decodes(runner);
        self.plan_prompts(runner);
        self.queues.limit_lead((MAX_LEAD_STEPS * self.config.max_batch_tokens) as u64);
        let mut planned: Vec<_> = self.running.iter().enumerate().filter(|(_, s)| s.planned > 0).collect();
        planned.sort_by_cached_key(|(_, s)| s.slots.iter().map(|(slot, w)| (*slot, w.to_bits())).collect::<Vec<_>>());
        planned.into_iter().map(|(sequence, s)| ScheduledRows { sequence, rows: s.planned }).collect()
    }

    /// Counts `rows` of a sequence as computed, and puts the blocks that they complete into the prefix cache.
    pub(super) fn advance(&mut self, index: usize, rows: usize) {
        let sequence = &mut self.running[index];
        sequence.computed += rows;
        if self.config.prefix_cache {
            let full = sequence.computed / self.config.block_size;
            sequence.block_hashes(full, self.config.block_size);
            for i in sequence.cached_blocks..full {
                self.blocks.cache(sequence.blocks[i], sequence.hashes[i]);
            }
            sequence.cached_blocks = full;
        }
    }

    /// Removes a running sequence, and releases its blocks and slots.
    pub(super) fn remove(&mut self, index: usize, runner: &mut impl Runner) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.blocks.release(&std::mem::take(&mut sequence.blocks));
        sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
        self.queues.get(sequence.queue).running -= 1;
        (sequence.computed, sequence.planned, sequence.cached_blocks) = (0, 0, 0);
        sequence
    }

    fn drop_cancelled(&mut self, runner: &mut impl Runner) {
        for index in (0..self.running.len()).rev() {
            if self.running[index].cancelled() {
                self.remove(index, runner);
            }
        }
        for queue in self.queues.iter_mut() {
            queue.waiting.retain(|sequence| !sequence.cancelled());
            if queue.waiting.is_empty() {
                queue.slots = SlotWait::default();
            }
        }
        self.queues.remove_empty();
    }

    /// Plans one row for each decoding sequence, and preempts sequences while there are too few blocks.
    fn plan_decodes(&mut self, runner: &mut impl Runner) {
        let block_size = self.config.block_size;
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            if sequence.remaining() != 1 {
                index += 1;
            } else if sequence.computed < sequence.blocks.len() * block_size {
                sequence.planned = 1;
                index += 1;
            } else if let Some(block) = self.blocks.allocate() {
                sequence.blocks.push(block);
            } else if self.preempt(runner) < index {
                index -= 1;
            }
        }
        for sequence in self.running.iter().filter(|s| s.planned > 0) {
            self.queues.charge(sequence.queue, sequence.planned);
        }
    }

    /// Returns the newest running sequence of the most served queue to the front of its queue. Returns the index that it had.
    fn preempt(&mut self, runner: &mut impl Runner) -> usize {
        let queue = self.queues.most_served_running().expect("blocks run out only while sequences hold them");
        let newest = self.running.iter().rposition(|s| s.queue == queue).expect("the queue has running sequences");
        let sequence = self.remove(newest, runner);
        tracing::debug!(request = sequence.request.id, tokens = sequence.tokens.len(), "preempted");
        self.queues.get(queue).waiting.push_front(sequence);
        self.preemptions += 1;
        newest
    }

    /// Fills the step with chunks of prompts, and admits requests whose turn it is.
    fn plan_prompts(&mut self, runner: &mut impl Runner) {
        let max_rows = self.config.max_batch_tokens;
        // Small enough that several queues share a step.
        let quantum = max_rows.div_ceil(4);
        let mut rows = max_rows - self.running.iter().map(|s| s.planned).sum::<usize>();
        let mut scored_rows = MAX_SCORED_ROWS;
        let mut admitting = true;
        while rows > 0 {
            let open = |s: &&mut Sequence| chunk(s, scored_rows) > 0;
            let prompts: Vec<_> = self.running.iter_mut().filter(open).map(|s| s.queue).collect();
            let next = if admitting {
                self.next_queue(&prompts)
            } else {
                self.queues.least_served(|id, _| prompts.contains(&id))
            };
            let Some(queue) = next else { break };
            match self.running.iter_mut().filter(open).find(|s| s.queue == queue) {
                Some(sequence) => {
                    let tokens = chunk(sequence, scored_rows).min(quantum).min(rows);
                    let start = sequence.computed + sequence.planned;
                    scored_rows -= sequence.scoring(start..start + tokens).len();
                    sequence.planned += tokens;
                    rows -= tokens;
                    self.queues.charge(queue, tokens);
                }
                None => match self.admit(queue, runner) {
                    Admission::Moved => {}
                    Admission::NoSlot => self.queues.get(queue).slots.refused_in = Some(self.step),
                    Admission::NoRoom => admitting = false,
                },
            }
        }
    }

    /// The least served of the queues that have a running prompt with rows to compute (`prompts`), or whose first request may be
    /// admitted now.
    fn next_queue(&self, prompts: &[QueueId]) -> Option<QueueId> {
        let refused = |queue: &AdapterQueue| queue.slots.refused_in == Some(self.step);
        let refusals = self.queues.iter().filter(|(_, queue)| refused(queue) && queue.running == 0).count();
        // The queue that was bypassed too often goes before all others that need slots.
        let starved = self.queues.iter().filter(|(_, queue)| queue.slots.bypassed >= MAX_BYPASS);
        let starved = starved.max_by_key(|(_, queue)| queue.slots.bypassed).map(|(id, _)| id);
        let may_admit = |id: QueueId, queue: &AdapterQueue| {
            let slots_likely = queue.running > 0 || refusals < MAX_REFUSALS;
            !queue.waiting.is_empty()
                && !refused(queue)
                && (queue.is_base() || slots_likely && starved.is_none_or(|starved| starved == id))
        };
        self.queues.least_served(|id, queue| prompts.contains(&id) || may_admit(id, queue))
    }

    /// Tries to admit the first waiting request of a queue.
    fn admit(&mut self, id: QueueId, runner: &mut impl Runner) -> Admission {
        if self.running.len() == self.config.max_running {
            return Admission::NoRoom;
        }
        let queue = self.queues.get(id);
        let Some(sequence) = queue.waiting.front_mut() else { return Admission::Moved };
        let prefix = CachedPrefix::find(sequence, &self.blocks, &self.config);
        // One more block for each running sequence, or their next tokens would preempt a sequence at once.
        let needed = self.blocks.unreferenced(&prefix.blocks) + prefix.missing + self.running.len();
        if self.blocks.available() < needed {
            return Admission::NoRoom;
        }

        let slots_unused = self.running.iter().all(|s| s.slots.is_empty());
        let error = match acquire_all(sequence, runner) {
            Ok(()) => {
                self.start(id, prefix);
                return Admission::Moved;
            }
            Err(SlotRefusal::Loading) => {
                queue.slots.refused_loading(slots_unused);
                return Admission::NoSlot;
            }
            Err(SlotRefusal::Full) => {
                queue.slots.refused_full(slots_unused);
                if queue.slots.consecutive_full_refusals < MAX_FULL_REFUSALS {
                    return Admission::NoSlot;
                }
                let names: Vec<_> = sequence.request.adapters.iter().map(|(lease, _)| lease.name.as_str()).collect();
                let message = format!("there is no room in the adapter slots for {} at once", names.join(", "));
                Error::new(ErrorKind::Unavailable, message).code("adapter_no_room")
            }
            Err(SlotRefusal::Failed(error)) => error,
        };
        sequence.fail(error);
        queue.slots = SlotWait::default();
        queue.waiting.pop_front();
        Admission::Moved
    }

    /// Runs the first waiting request of a queue, which has its slots and for which there are enough blocks.
    fn start(&mut self, id: QueueId, prefix: CachedPrefix) {
        let queue = self.queues.get(id);
        queue.slots = SlotWait::default();
        let Some(mut sequence) = queue.waiting.pop_front() else { return };
        queue.running += 1;
        let is_base = queue.is_base();
        prefix.blocks.iter().for_each(|block| self.blocks.share(*block));
        sequence.computed = prefix.blocks.len() * self.config.block_size;
        sequence.cached_blocks = prefix.blocks.len();
        sequence.blocks = prefix.blocks;
        for _ in 0..prefix.missing {
            sequence.blocks.push(self.blocks.allocate().expect("admission has counted the blocks"));
        }
        if !sequence.admitted {
            sequence.admitted = true;
            if prefix.looked_up {
                self.prefix_queries += sequence.tokens.len() as u64;
                self.prefix_hits += sequence.computed as u64;
            }
            // If the client has gone, the next step drops the sequence.
            let _ = sequence.request.events.send(Event::Scheduled { cached_tokens: sequence.computed });
        }
        self.running.push(sequence);
        if !is_base {
            self.queues.iter_mut().filter(|queue| queue.slots.contended).for_each(|queue| queue.slots.bypassed += 1);
        }
    }
}

/// Number of further tokens of a sequence that this step can compute, with `scored_rows` left for prompt log-probabilities.
fn chunk(sequence: &Sequence, scored_rows: usize) -> usize {
    let start = sequence.computed + sequence.planned;
    let open = sequence.remaining() - sequence.planned;
    let scoring = sequence.scoring(start..start + open);
    if scoring.len() > scored_rows { scoring.start + scored_rows - start } else { open }
}

/// Acquires a slot for each adapter of a sequence, or for none. It asks for all of them, so that they load at the same time.
fn acquire_all(sequence: &mut Sequence, runner: &mut impl Runner) -> Result<(), SlotRefusal> {
    let mut refusal = None;
    for (lease, weight) in &sequence.request.adapters {
        match (runner.acquire(lease), &refusal) {
            (Residency::Ready(slot), _) => sequence.slots.push((slot, *weight)),
            (Residency::Failed(error), _) => refusal = Some(SlotRefusal::Failed(error)),
            (Residency::Loading, None | Some(SlotRefusal::Full)) => refusal = Some(SlotRefusal::Loading),
            (Residency::Full, None) => refusal = Some(SlotRefusal::Full),
            _ => {}
        }
    }
    let Some(refusal) = refusal else { return Ok(()) };
    sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
    Err(refusal)
}
