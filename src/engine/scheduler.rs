//! Which sequences run, and with how many rows, in the next step.
//!
//! Running sequences keep their blocks and slots until they end. Room goes to waiting ones by deficit round robin over
//! tokens between adapters (Shreedhar and Varghese, 1995): every turn gives each waiting adapter a quantum, a sequence is
//! admitted when its adapter's deficit covers its prompt, and generated tokens are charged as they come. An adapter that has
//! had much waits more turns; with room for all, nobody waits.

use std::collections::{BTreeMap, VecDeque};

use super::blocks::BlockPool;
use super::request::Event;
use super::sequence::{AdapterKey, Sequence};
use super::{EngineConfig, Residency, Runner};

/// Tokens that one turn gives an adapter.
const QUANTUM: i64 = 256;

/// Admissions of others that a sequence without room lets pass before it holds them back.
const MAX_BYPASS: usize = 32;

/// Logit rows a step that report prompt tokens: a row is the whole vocabulary in f32.
const MAX_PROMPT_LOGIT_ROWS: usize = 64;

/// Waiting sequences of one adapter.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Sequence>,
    /// Tokens it may still be given; negative after it had more than its turns.
    deficit: i64,
    /// Tokens given in all, to choose whom to preempt.
    served: u64,
    /// Its sequences that run.
    running: usize,
}

/// Rows of one running sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Index in [`Scheduler::running`].
    pub sequence: usize,
    /// Rows: its next `rows` tokens.
    pub rows: usize,
}

/// Waiting and running sequences and the blocks they share.
pub struct Scheduler {
    config: EngineConfig,
    queues: BTreeMap<AdapterKey, Queue>,
    /// In order of admission.
    pub running: Vec<Sequence>,
    /// KV blocks.
    pub blocks: BlockPool,
    /// Prompt tokens looked up in the prefix cache, and found.
    pub prefix: (u64, u64),
    /// Sequences put back for lack of blocks.
    pub preemptions: u64,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(config: EngineConfig) -> Self {
        let blocks = BlockPool::new(config.num_blocks);
        Self { config, queues: BTreeMap::new(), running: Vec::new(), blocks, prefix: (0, 0), preemptions: 0 }
    }

    /// Adds a sequence to its adapter's queue.
    pub fn push(&mut self, sequence: Sequence) {
        self.queues.entry(sequence.key.clone()).or_default().waiting.push_back(sequence);
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.queues.values().map(|q| q.waiting.len()).sum()
    }

    /// Decides the next step: drops cancelled sequences, admits, gives out rows, preempts where blocks run out. Rows never
    /// exceed `max_batch_tokens`. Empty when nothing can run.
    pub fn schedule(&mut self, runner: &mut impl Runner) -> Vec<Share> {
        self.drop_cancelled(runner);
        self.admit(runner);
        let mut shares = self.decode_shares(runner);
        self.prefill_shares(&mut shares);
        shares
    }

    /// Frees sequence `index` of the running ones and hands it over; its adapter stays known while it has others.
    pub fn remove(&mut self, index: usize, runner: &mut impl Runner) -> Sequence {
        let mut sequence = self.running.remove(index);
        self.free(&mut sequence, runner);
        self.forget_if_empty(&sequence.key.clone());
        sequence
    }

    /// Accounts `rows` computed tokens and publishes blocks that they completed.
    pub fn advance(&mut self, index: usize, rows: usize) {
        let sequence = &mut self.running[index];
        sequence.computed += rows;
        if self.config.prefix_cache {
            let full = sequence.computed / self.config.block_size;
            sequence.block_hashes(full, self.config.block_size);
            while sequence.published < full {
                self.blocks.publish(sequence.blocks[sequence.published], sequence.hashes[sequence.published]);
                sequence.published += 1;
            }
        }
    }

    /// Charges a generated token to the sequence's adapter.
    pub fn charge_output(&mut self, index: usize) {
        let key = &self.running[index].key;
        if let Some(queue) = self.queues.get_mut(key) {
            queue.deficit -= 1;
            queue.served += 1;
        }
    }

    fn drop_cancelled(&mut self, runner: &mut impl Runner) {
        for index in (0..self.running.len()).rev() {
            if self.running[index].cancelled() {
                self.remove(index, runner);
            }
        }
        for queue in self.queues.values_mut() {
            queue.waiting.retain(|s| !s.cancelled());
        }
        self.queues.retain(|_, q| !q.waiting.is_empty() || q.running > 0);
    }

    fn free(&mut self, sequence: &mut Sequence, runner: &mut impl Runner) {
        self.blocks.release(&sequence.blocks);
        sequence.blocks.clear();
        for (slot, _) in sequence.slots.drain(..) {
            runner.release(slot);
        }
        if let Some(queue) = self.queues.get_mut(&sequence.key) {
            queue.running -= 1;
        }
    }

    /// A new burst of an adapter that had gone quiet starts even with the others.
    fn forget_if_empty(&mut self, key: &AdapterKey) {
        if self.queues.get(key).is_some_and(|q| q.waiting.is_empty() && q.running == 0) {
            self.queues.remove(key);
        }
    }

    /// Tokens that admission charges.
    fn cost(sequence: &Sequence) -> i64 {
        sequence.tokens.len() as i64
    }

    fn admit(&mut self, runner: &mut impl Runner) {
        // Adapters whose first sequence cannot start in this step.
        let mut held: Vec<AdapterKey> = Vec::new();
        while self.running.len() < self.config.max_running {
            // A sequence that has let enough others pass goes first, alone.
            let starved = self.queues.iter().find(|(_, q)| q.waiting.front().is_some_and(|s| s.bypassed >= MAX_BYPASS));
            let next = match starved {
                Some((key, _)) if held.contains(key) => return,
                Some((key, _)) => Some((key.clone(), 0)),
                None => self
                    .queues
                    .iter()
                    .filter(|(key, _)| !held.contains(key))
                    .filter_map(|(key, q)| Some((key, (Self::cost(q.waiting.front()?) - q.deficit).max(0))))
                    .map(|(key, short)| (key.clone(), (short + QUANTUM - 1) / QUANTUM))
                    .min_by_key(|(_, turns)| *turns),
            };
            let Some((key, turns)) = next else { return };
            let Some(mut sequence) = self.queues.get_mut(&key).and_then(|q| q.waiting.pop_front()) else { return };
            match self.start(&mut sequence, runner) {
                Start::Started => {
                    for queue in self.queues.values_mut().filter(|q| !q.waiting.is_empty()) {
                        queue.deficit += turns * QUANTUM;
                        if let Some(first) = queue.waiting.front_mut().filter(|s| s.bypassed > 0) {
                            first.bypassed += 1;
                        }
                    }
                    let cost = Self::cost(&sequence);
                    let queue = self.queues.entry(key).or_default();
                    // Its own turns, where the pop above emptied its queue.
                    if queue.waiting.is_empty() {
                        queue.deficit += turns * QUANTUM;
                    }
                    queue.deficit -= cost;
                    queue.served += cost as u64;
                    queue.running += 1;
                    self.running.push(sequence);
                }
                Start::NotYet => {
                    self.queues.entry(key.clone()).or_default().waiting.push_front(sequence);
                    held.push(key);
                }
                Start::NoRoom => {
                    sequence.bypassed = sequence.bypassed.max(1);
                    self.queues.entry(key.clone()).or_default().waiting.push_front(sequence);
                    held.push(key);
                }
                Start::Failed(error) => {
                    sequence.fail(error);
                    self.forget_if_empty(&key);
                }
            }
        }
    }

    /// Takes slots and blocks for a waiting sequence, or nothing at all.
    fn start(&mut self, sequence: &mut Sequence, runner: &mut impl Runner) -> Start {
        let size = self.config.block_size;
        let needed = (sequence.tokens.len() + 1).div_ceil(size);
        // Running sequences grow: one block each is left to them, or admission and preemption would chase each other.
        if needed + self.running.len() > self.blocks.free() && !self.running.is_empty() {
            return Start::NoRoom;
        }
        for (lease, weight) in &sequence.request.adapters {
            let outcome = match runner.acquire(lease) {
                Residency::Ready(slot) => {
                    sequence.slots.push((slot, *weight));
                    continue;
                }
                Residency::Loading => Start::NotYet,
                Residency::Full => Start::NoRoom,
                Residency::Failed(error) => Start::Failed(error),
            };
            sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
            return outcome;
        }
        // The last token is always computed, for its logits; prompt log-probabilities need every prompt row.
        if self.config.prefix_cache && !sequence.wants_prompt_logprobs() {
            let most = (sequence.tokens.len() - 1) / size;
            sequence.block_hashes(most, size);
            for hash in &sequence.hashes[..most] {
                let Some(block) = self.blocks.find(hash) else { break };
                sequence.blocks.push(block);
            }
            self.prefix.0 += sequence.tokens.len() as u64;
            self.prefix.1 += (sequence.blocks.len() * size) as u64;
        }
        sequence.computed = sequence.blocks.len() * size;
        sequence.published = sequence.blocks.len();
        while sequence.blocks.len() < needed {
            match self.blocks.allocate() {
                Some(block) => sequence.blocks.push(block),
                None => {
                    self.blocks.release(&sequence.blocks);
                    sequence.blocks.clear();
                    sequence.slots.drain(..).for_each(|(slot, _)| runner.release(slot));
                    return Start::NoRoom;
                }
            }
        }
        sequence.bypassed = 0;
        if !sequence.admitted {
            sequence.admitted = true;
            sequence.cached_tokens = sequence.computed;
            let _ = sequence.request.events.send(Event::Scheduled);
        }
        Start::Started
    }

    /// One row for each sequence that decodes, with a block for it.
    fn decode_shares(&mut self, runner: &mut impl Runner) -> Vec<Share> {
        let mut index = 0;
        while index < self.running.len() {
            let sequence = &mut self.running[index];
            // The token of this step and, if it completes a block, the place of the next.
            let needed = sequence.tokens.len().div_ceil(self.config.block_size);
            if sequence.blocks.len() >= needed {
                index += 1;
            } else if let Some(block) = self.blocks.allocate() {
                sequence.blocks.push(block);
            } else {
                let victim = self.victim();
                self.preempt(victim, runner);
                index = index.min(victim);
            }
        }
        let decoding = self.running.iter().enumerate().filter(|(_, s)| s.remaining() == 1);
        decoding.map(|(sequence, _)| Share { sequence, rows: 1 }).take(self.config.max_batch_tokens).collect()
    }

    /// The newest sequence of the adapter that was given most, but never the oldest of all, which so always ends.
    fn victim(&self) -> usize {
        let served = |s: &Sequence| self.queues.get(&s.key).map_or(0, |q| q.served);
        let candidates = self.running.iter().enumerate().skip(1);
        candidates.max_by_key(|(index, s)| (served(s), *index)).map_or(0, |(index, _)| index)
    }

    fn preempt(&mut self, index: usize, runner: &mut impl Runner) {
        let mut sequence = self.running.remove(index);
        self.free(&mut sequence, runner);
        self.preemptions += 1;
        sequence.computed = 0;
        // Its next admission is not to be paid twice.
        let queue = self.queues.entry(sequence.key.clone()).or_default();
        queue.deficit += Self::cost(&sequence);
        queue.waiting.push_front(sequence);
    }

    /// Deals the rest of the budget to prompts: equal parts to the adapters that have some, oldest sequence first within one.
    fn prefill_shares(&mut self, shares: &mut Vec<Share>) {
        let mut budget = self.config.max_batch_tokens - shares.len();
        let mut logit_rows = MAX_PROMPT_LOGIT_ROWS;
        let mut lines: Vec<(&AdapterKey, VecDeque<usize>)> = Vec::new();
        for (index, sequence) in self.running.iter().enumerate().filter(|(_, s)| s.remaining() > 1) {
            match lines.iter_mut().find(|(key, _)| **key == sequence.key) {
                Some((_, line)) => line.push_back(index),
                None => lines.push((&sequence.key, VecDeque::from([index]))),
            }
        }
        while budget > 0 && !lines.is_empty() {
            let part = (budget / lines.len()).max(1);
            for (_, line) in &mut lines {
                let mut part = part.min(budget);
                while part > 0
                    && let Some(&index) = line.front()
                {
                    let sequence = &self.running[index];
                    let given = shares.iter().find(|s| s.sequence == index).map_or(0, |s| s.rows);
                    let mut rows = part.min(sequence.remaining() - given);
                    if sequence.wants_prompt_logprobs() {
                        rows = rows.min(logit_rows);
                        logit_rows -= rows;
                    }
                    if rows > 0 {
                        match shares.iter_mut().find(|s| s.sequence == index) {
                            Some(share) => share.rows += rows,
                            None => shares.push(Share { sequence: index, rows }),
                        }
                    }
                    part -= rows;
                    budget -= rows;
                    if given + rows == sequence.remaining() || (rows == 0 || sequence.wants_prompt_logprobs()) {
                        line.pop_front();
                    }
                }
            }
            lines.retain(|(_, line)| !line.is_empty());
        }
    }
}

/// What came of starting a sequence.
enum Start {
    Started,
    /// Its adapter is on the way; others go on.
    NotYet,
    /// No blocks or slots; others may pass, up to a bound.
    NoRoom,
    Failed(crate::Error),
}
