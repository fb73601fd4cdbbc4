//! What the next step computes: decode rows of all that run, then prompt chunks, least served adapters first; and who
//! runs at all.
//!
//! * A step has at most `max_batch_tokens` rows. Every running sequence whose prompt is computed gets one. The rest goes
//!   in chunks to the queue that was served the fewest tokens (see [`super::fair_queue`]): to a prompt of it that runs, else
//!   its first waiting request is admitted.
//! * Admission takes the blocks of the whole prompt at once, so that only decoding can run out of them, and a use of
//!   each adapter's slot. If blocks or seats lack, nobody is admitted until the queue whose turn it is fits. If an
//!   adapter is not in a slot yet, the queue is passed over, but for lack of slot room only [`MAX_BYPASS`] times.
//! * When decoding runs out of blocks, the newest sequence of the most served queue is preempted: it gives up its blocks
//!   and goes to the front of its queue with all its tokens, to be computed again. Since a row's logits do not depend
//!   on the batch, it goes on as if nothing had happened.

use super::block_pool::BlockPool;
use super::fair_queue::{AdapterQueue, FairQueues, QueueId, SlotWait};
use super::request::Event;
use super::sequence::Sequence;
use super::{EngineConfig, Residency, Runner};
use crate::Error;
use crate::error::ErrorKind;

/// Rows a step whose logits serve prompt log-probabilities, besides one for each sequence: bounds the memory of logits
/// (64 rows of a vocabulary of 128k are 32 MiB).
pub const MAX_SCORED_ROWS: usize = 64;

/// Requests that may be admitted past one that waits for room in the slots; then requests with other adapters wait
/// until it has it. Refusals while no slot is in use count too: requests for several adapters could otherwise take the
/// slots from each other for ever, without one of them ever having all it needs.
pub const MAX_BYPASS: usize = 64;

/// Queues without a slot that are asked for in one step. Asking for more at once would only make their adapters evict
/// each other.
const MAX_REFUSALS: usize = 16;

/// Refusals in a row, with every slot unused, after which a request's adapters cannot fit together.
const MAX_HOPELESS: usize = 1024;

/// Steps' worth of tokens that a queue's account may be ahead of another's.
const MAX_LEAD_STEPS: usize = 16;

/// Rows of one running sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledRows {
    /// Index in [`Scheduler::running`].
    pub sequence: usize,
    /// Rows: its next `rows` tokens.
    pub rows: usize,
}

/// Waiting and running sequences and the blocks they share.
pub struct Scheduler {
    config: EngineConfig,
    /// In order of admission.
    pub running: Vec<Sequence>,
    /// Everyone else, by adapter.
    queues: FairQueues,
    /// KV blocks.
    pub blocks: BlockPool,
    /// Counts calls of `schedule`.
    step: u64,
    /// Prompt tokens looked up in the prefix cache, and found.
    pub prefix: (u64, u64),
    /// Sequences put back for lack of blocks.
    pub preemptions: u64,
}

/// What came of an attempt to admit a queue's first request.
enum Admission {
    /// It runs, or it failed and is gone: go on.
    Moved,
    /// Its adapters are not in slots: pass over the queue in this step.
    NoSlot,
    /// No seat or not enough blocks: nobody is admitted in this step.
    NoRoom,
}

impl Scheduler {
    /// No requests, all blocks free.
    pub fn new(config: EngineConfig) -> Self {
        let blocks = BlockPool::new(config.num_blocks);
        let (running, queues) = (Vec::new(), FairQueues::default());
        Self { config, running, queues, blocks, step: 0, prefix: (0, 0), preemptions: 0 }
    }

    /// Queues a request.
    pub fn push(&mut self, sequence: Sequence) {
        self.queues.push(sequence);
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.queues.waiting()
    }

    /// Plans a step. Empty when there is nothing to run now (though requests may wait for an adapter). Sequences under the
    /// same adapters are side by side, so that they share a pass over the adapter's weights.
    pub fn schedule(&mut self, runner: &mut impl Runner) -> Vec<ScheduledRows> {
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

    /// Accounts `rows` computed tokens and publishes the blocks that they completed.
    pub fn advance(&mut self, index: usize, rows: usize) {
        let sequence = &mut self.running[index];
        sequence.computed += rows;
        if self.config.prefix_cache {
            let full = sequence.computed / self.config.block_size;
            sequence.block_hashes(full, self.config.block_size);
            for i in sequence.published..full {
                self.blocks.publish(sequence.blocks[i], sequence.hashes[i]);
            }
            sequence.published = full;
        }
    }

    /// Takes running sequence `index` out, with what it holds.
    pub fn remove(&mut self, index: usize, runner: &mut impl Runner) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.blocks.release(&std::mem::take(&mut sequence.blocks));
        sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
        self.queues.get(sequence.queue).running -= 1;
        (sequence.computed, sequence.planned, sequence.published) = (0, 0, 0);
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
        self.queues.drop_idle();
    }

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

    /// Puts the newest running sequence of the most served queue back in its queue; returns the index it had.
    fn preempt(&mut self, runner: &mut impl Runner) -> usize {
        let queue = self.queues.most_served_running().expect("blocks run out only while sequences hold them");
        let newest = self.running.iter().rposition(|s| s.queue == queue).expect("the queue has running sequences");
        let sequence = self.remove(newest, runner);
        tracing::debug!(request = sequence.request.id, tokens = sequence.tokens.len(), "preempted");
        self.queues.get(queue).waiting.push_front(sequence);
        self.preemptions += 1;
        newest
    }

    fn plan_prompts(&mut self, runner: &mut impl Runner) {
        let max_rows = self.config.max_batch_tokens;
        // Small enough that a few queues share a step.
        let quantum = max_rows.div_ceil(4);
        let mut rows = max_rows - self.running.iter().map(|s| s.planned).sum::<usize>();
        let mut scored_rows = MAX_SCORED_ROWS;
        let mut admitting = true;
        while rows > 0 {
            let open = |s: &&mut Sequence| chunk(s, scored_rows) > 0;
            let prompts: Vec<_> = self.running.iter_mut().filter(open).map(|s| s.queue).collect();
            let next = if admitting {
                self.next_with(&prompts)
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

    /// The least served of the queues that have an open prompt or whose first request may be tried now.
    fn next_with(&self, prompts: &[QueueId]) -> Option<QueueId> {
        let refused = |queue: &AdapterQueue| queue.slots.refused_in == Some(self.step);
        let asked = self.queues.iter().filter(|(_, queue)| refused(queue) && queue.running == 0).count();
        // Who has been passed over too often goes before all others that need slots.
        let starved = self.queues.iter().filter(|(_, queue)| queue.slots.bypassed >= MAX_BYPASS);
        let starved = starved.max_by_key(|(_, queue)| queue.slots.bypassed).map(|(id, _)| id);
        let may_try = |id: QueueId, queue: &AdapterQueue| {
            let slots_likely = queue.running > 0 || asked < MAX_REFUSALS;
            !queue.waiting.is_empty()
                && !refused(queue)
                && (queue.is_base() || slots_likely && starved.is_none_or(|starved| starved == id))
        };
        self.queues.least_served(|id, queue| prompts.contains(&id) || may_try(id, queue))
    }

    /// Tries to run the first waiting request of a queue.
    fn admit(&mut self, id: QueueId, runner: &mut impl Runner) -> Admission {
        if self.running.len() == self.config.max_running {
            return Admission::NoRoom;
        }
        let block_size = self.config.block_size;
        let queue = self.queues.get(id);
        let Some(sequence) = queue.waiting.front_mut() else { return Admission::Moved };

        // The last token is always computed, for its logits; prompt log-probabilities need every prompt row.
        let looked_up = self.config.prefix_cache && !sequence.wants_prompt_logprobs();
        let most = if looked_up { (sequence.tokens.len() - 1) / block_size } else { 0 };
        let cached = self.blocks.find(sequence.block_hashes(most, block_size));
        // One block more for each that runs, or its next tokens would preempt somebody at once.
        let fresh = sequence.tokens.len().div_ceil(block_size) - cached.len();
        if self.blocks.free() < self.blocks.unreferenced(&cached) + fresh + self.running.len() {
            return Admission::NoRoom;
        }

        let unused = self.running.iter().all(|s| s.slots.is_empty());
        let wait = &mut queue.slots;
        let refusal = match acquire_all(sequence, runner) {
            Residency::Ready(_) => None,
            Residency::Loading => {
                wait.hopeless = 0;
                wait.bypassed += usize::from(wait.contended && unused);
                return Admission::NoSlot;
            }
            Residency::Full => {
                wait.contended = true;
                wait.hopeless = if unused { wait.hopeless + 1 } else { 0 };
                wait.bypassed += usize::from(unused);
                if wait.hopeless < MAX_HOPELESS {
                    return Admission::NoSlot;
                }
                let names: Vec<_> = sequence.request.adapters.iter().map(|(lease, _)| lease.name.as_str()).collect();
                let message = format!("there is no room in the adapter slots for {} at once", names.join(", "));
                Some(Error::new(ErrorKind::Unavailable, message).code("adapter_no_room"))
            }
            Residency::Failed(error) => Some(error),
        };
        queue.slots = SlotWait::default();
        if let Some(error) = refusal {
            sequence.fail(error);
            queue.waiting.pop_front();
            return Admission::Moved;
        }

        let Some(mut sequence) = queue.waiting.pop_front() else { return Admission::Moved };
        queue.running += 1;
        cached.iter().for_each(|block| self.blocks.share(*block));
        sequence.computed = cached.len() * block_size;
        sequence.published = cached.len();
        sequence.blocks = cached;
        for _ in 0..fresh {
            sequence.blocks.push(self.blocks.allocate().expect("the blocks were counted above"));
        }
        if !sequence.admitted {
            sequence.admitted = true;
            sequence.cached_tokens = sequence.computed;
            if looked_up {
                self.prefix.0 += sequence.tokens.len() as u64;
                self.prefix.1 += sequence.computed as u64;
            }
            // A client that has gone is noticed before the next step.
            let _ = sequence.request.events.send(Event::Scheduled);
        }
        self.running.push(sequence);
        if !self.queues.get(id).is_base() {
            self.queues.iter_mut().filter(|queue| queue.slots.contended).for_each(|queue| queue.slots.bypassed += 1);
        }
        Admission::Moved
    }
}

/// How many more tokens of a sequence this step can take, with `scored_rows` left for prompt log-probabilities.
fn chunk(sequence: &Sequence, scored_rows: usize) -> usize {
    let start = sequence.computed + sequence.planned;
    let open = sequence.remaining() - sequence.planned;
    let scoring = sequence.scoring(start..start + open);
    if scoring.len() > scored_rows { scoring.start + scored_rows - start } else { open }
}

/// Acquires a slot for each adapter of a sequence, or none. All are asked for, so that they load at the same time.
fn acquire_all(sequence: &mut Sequence, runner: &mut impl Runner) -> Residency {
    let mut refusal = None;
    for (lease, weight) in &sequence.request.adapters {
        match (runner.acquire(lease), &refusal) {
            (Residency::Ready(slot), _) => sequence.slots.push((slot, *weight)),
            (failed @ Residency::Failed(_), _) => refusal = Some(failed),
            (Residency::Loading, None | Some(Residency::Full)) => refusal = Some(Residency::Loading),
            (Residency::Full, None) => refusal = Some(Residency::Full),
            _ => {}
        }
    }
    match refusal {
        None => Residency::Ready(0),
        Some(refusal) => {
            sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
            refusal
        }
    }
}
