//! Fair queueing between adapters: one queue per combination of adapters, served by least service received.
//!
//! Requests with the same adapter generations share a queue; requests to the base have one too. Each queue counts the tokens
//! it was served, prompt and decode alike, and the queue with the fewest tokens is next. This is the virtual token counter of
//! Sheng et al., "Fairness in Serving Large Language Models" (2024): a queue that becomes active starts level with the least
//! served one, so that it has neither credit for time without requests nor debt for tokens that it was served while the machine
//! was idle.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::sequence::Sequence;

/// Identifies a queue while it has requests.
pub(super) type QueueId = u64;

/// The requests with one combination of adapters.
pub(super) struct AdapterQueue {
    /// Generation ids of the adapters, in order; empty for the base. Weights are not part of the key, so that a client cannot
    /// get more than its share by varying them.
    key: Vec<String>,
    /// Requests that wait, in order. Preempted ones return to the front.
    pub(super) waiting: VecDeque<Sequence>,
    /// Number of sequences of the queue that run.
    pub(super) running: usize,
    /// The virtual token counter: tokens served, on a scale that all queues share.
    served: u64,
    /// When it was last served, or else created. Decides between equal counters.
    last_served: u64,
    /// The attempts of its first request to get slots.
    pub(super) slots: SlotWait,
}

impl AdapterQueue {
    /// Whether it is the base's queue, whose requests need no slot.
    pub(super) fn is_base(&self) -> bool {
        self.key.is_empty()
    }
}

/// The attempts of a queue's first request to get slots for its adapters.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SlotWait {
    /// The step of the last refusal. There is no second attempt in the same step.
    pub(super) refused_in: Option<u64>,
    /// Whether it was refused at least once because the slots were full.
    pub(super) contended: bool,
    /// Since `contended` was set: requests with other adapters that were admitted, plus refusals while no running sequence used a
    /// slot.
    pub(super) bypassed: usize,
    /// Refusals in a row because the slots were full, while no running sequence used a slot.
    pub(super) consecutive_full_refusals: usize,
}

impl SlotWait {
    /// Notes a refusal because adapters are being loaded. `slots_unused`: no running sequence uses a slot.
    pub(super) fn refused_loading(&mut self, slots_unused: bool) {
        self.consecutive_full_refusals = 0;
        self.bypassed += usize::from(self.contended && slots_unused);
    }

    /// Notes a refusal because the slots are full.
    pub(super) fn refused_full(&mut self, slots_unused: bool) {
        self.contended = true;
        self.consecutive_full_refusals = if slots_unused { self.consecutive_full_refusals + 1 } else { 0 };
        self.bypassed += usize::from(slots_unused);
    }
}

/// All queues with a request that waits or runs.
#[derive(Default)]
pub(super) struct FairQueues {
    queues: BTreeMap<QueueId, AdapterQueue>,
    /// The queue of each key.
    ids: HashMap<Vec<String>, QueueId>,
    /// Counts charges and new queues.
    clock: u64,
}

impl FairQueues {
    /// Adds a new request to its queue, behind the waiting ones whose priority is as urgent. Priorities order only the requests of one
    /// queue, so that a client cannot get more than its share.
    pub(super) fn push(&mut self, mut sequence: Sequence) {
        let key: Vec<String> = sequence.request.adapters.iter().map(|(lease, _)| lease.id.clone()).collect();
        sequence.queue = match self.ids.get(&key) {
            Some(id) => *id,
            None => self.add(key),
        };
        let waiting = &mut self.get(sequence.queue).waiting;
        let before = waiting.iter().rposition(|other| other.request.priority <= sequence.request.priority);
        waiting.insert(before.map_or(0, |at| at + 1), sequence);
    }

    /// Adds an empty queue, level with the least served one.
    fn add(&mut self, key: Vec<String>) -> QueueId {
        self.clock += 1;
        let id = self.clock;
        let queue = AdapterQueue {
            key: key.clone(),
            waiting: VecDeque::new(),
            running: 0,
            served: self.queues.values().map(|queue| queue.served).min().unwrap_or(0),
            last_served: self.clock,
            slots: SlotWait::default(),
        };
        self.queues.insert(id, queue);
        self.ids.insert(key, id);
        id
    }

    /// A queue that has requests.
    pub(super) fn get(&mut self, id: QueueId) -> &mut AdapterQueue {
        self.queues.get_mut(&id).expect("a queue exists as long as one of its requests waits or runs")
    }

    /// All queues.
    pub(super) fn iter(&self) -> impl Iterator<Item = (QueueId, &AdapterQueue)> {
        self.queues.iter().map(|(id, queue)| (*id, queue))
    }

    /// All queues, mutably.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut AdapterQueue> {
        self.queues.values_mut()
    }

    /// Charges a queue for tokens that it was served, which also moves it behind queues with the same counter.
    pub(super) fn charge(&mut self, id: QueueId, tokens: usize) {
        self.clock += 1;
        let now = self.clock;
        let queue = self.get(id);
        queue.served += tokens as u64;
        queue.last_served = now;
    }

    /// The least served of the queues that satisfy `eligible`.
    pub(super) fn least_served(&self, eligible: impl Fn(QueueId, &AdapterQueue) -> bool) -> Option<QueueId> {
        let queues = self.iter().filter(|(id, queue)| eligible(*id, queue));
        queues.min_by_key(|(_, queue)| (queue.served, queue.last_served)).map(|(id, _)| id)
    }

    /// The most served queue with running sequences, which is preempted first.
    pub(super) fn most_served_running(&self) -> Option<QueueId> {
        let queues = self.iter().filter(|(_, queue)| queue.running > 0);
        queues.max_by_key(|(_, queue)| (queue.served, queue.last_served)).map(|(id, _)| id)
    }

    /// Limits the lead of one queue over another to `lead` tokens, and thereby how long the leading one can be kept waiting.
    pub(super) fn limit_lead(&mut self, lead: u64) {
        let most = self.queues.values().map(|queue| queue.served).max().unwrap_or(0);
        self.iter_mut().for_each(|queue| queue.served = queue.served.max(most.saturating_sub(lead)));
    }

    /// Removes queues without requests.
    pub(super) fn remove_empty(&mut self) {
        self.queues.retain(|_, queue| {
            let active = queue.running > 0 || !queue.waiting.is_empty();
            if !active {
                self.ids.remove(&queue.key);
            }
            active
        });
    }

    /// Number of requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.queues.values().map(|queue| queue.waiting.len()).sum()
    }
}
