//! Who is next: one queue per adapter tuple, and fair shares between them.
//!
//! Requests under the same adapter generations form a queue; the base is one too. Each queue counts the tokens it was
//! served, decode and prompt alike, and whoever asks "who is next" gets the queue with the fewest. These are deficit
//! round robin's counters, with the difference between queues kept instead of a quantum handed out per round, so that
//! a queue that used an idle machine owes nothing for it: a queue that becomes active starts level with the least served
//! (Sheng et al., "Fairness in Serving Large Language Models", 2024, virtual token counter).

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::sequence::Sequence;

/// Names a queue while it has requests.
pub type QueueId = u64;

/// One adapter tuple's requests and account.
pub struct AdapterQueue {
    /// Generation ids of the adapters that answer, in order; empty for the base. Weights are left out, so that a client
    /// cannot take more than a share by varying them.
    key: Vec<String>,
    /// Requests not running, in order; preempted ones go to the front.
    pub waiting: VecDeque<Sequence>,
    /// Sequences of the queue that run.
    pub running: usize,
    /// Tokens served, on a scale shared by all queues.
    pub served: u64,
    /// When it was last served or joined: decides between equals.
    last_served: u64,
    /// How its first request's way into the slots goes.
    pub slots: SlotWait,
}

impl AdapterQueue {
    /// No adapter, so no slot needed.
    pub fn is_base(&self) -> bool {
        self.key.is_empty()
    }
}

/// How a queue's first request fares at the slots, until it gets them.
#[derive(Debug, Clone, Copy, Default)]
pub struct SlotWait {
    /// The step in which it was last refused: it is not asked for again in that step.
    pub refused_in: Option<u64>,
    /// It was refused for lack of room at least once.
    pub contended: bool,
    /// Since then: requests with other adapters that were admitted, and refusals while no running sequence held a slot.
    pub bypassed: usize,
    /// Refusals in a row for lack of room while no running sequence held a slot.
    pub hopeless: usize,
}

/// All queues with a request that waits or runs.
#[derive(Default)]
pub struct FairQueues {
    queues: BTreeMap<QueueId, AdapterQueue>,
    /// Where to queue a request.
    ids: HashMap<Vec<String>, QueueId>,
    /// Counts turns and queues.
    clock: u64,
}

impl FairQueues {
    /// Queues a new request at the end of its queue.
    pub fn push(&mut self, mut sequence: Sequence) {
        let key: Vec<String> = sequence.request.adapters.iter().map(|(lease, _)| lease.id.clone()).collect();
        sequence.queue = match self.ids.get(&key) {
            Some(id) => *id,
            None => {
                self.clock += 1;
                let (served, last_served) =
                    (self.queues.values().map(|queue| queue.served).min().unwrap_or(0), self.clock);
                let (key_here, waiting, slots) = (key.clone(), VecDeque::new(), SlotWait::default());
                self.queues.insert(
                    last_served,
                    AdapterQueue { key: key_here, waiting, running: 0, served, last_served, slots },
                );
                self.ids.insert(key, last_served);
                last_served
            }
        };
        self.get(sequence.queue).waiting.push_back(sequence);
    }

    /// A queue that has requests.
    pub fn get(&mut self, id: QueueId) -> &mut AdapterQueue {
        self.queues.get_mut(&id).expect("a queue lives as long as a request of it waits or runs")
    }

    /// All queues.
    pub fn iter(&self) -> impl Iterator<Item = (QueueId, &AdapterQueue)> {
        self.queues.iter().map(|(id, queue)| (*id, queue))
    }

    /// All queues, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut AdapterQueue> {
        self.queues.values_mut()
    }

    /// Counts tokens served and moves the queue behind its equals.
    pub fn charge(&mut self, id: QueueId, tokens: usize) {
        self.clock += 1;
        let last_served = self.clock;
        let queue = self.get(id);
        queue.served += tokens as u64;
        queue.last_served = last_served;
    }

    /// The least served of the queues that `eligible` lets through.
    pub fn least_served(&self, eligible: impl Fn(QueueId, &AdapterQueue) -> bool) -> Option<QueueId> {
        let queues = self.iter().filter(|(id, queue)| eligible(*id, queue));
        queues.min_by_key(|(_, queue)| (queue.served, queue.last_served)).map(|(id, _)| id)
    }

    /// The most served queue with running sequences: it gives up memory first.
    pub fn most_served_running(&self) -> Option<QueueId> {
        let queues = self.iter().filter(|(_, queue)| queue.running > 0);
        queues.max_by_key(|(_, queue)| (queue.served, queue.last_served)).map(|(id, _)| id)
    }

    /// Limits what queues may be ahead of each other to `lead` tokens: how long one that was ahead can be kept waiting.
    pub fn limit_lead(&mut self, lead: u64) {
        let most = self.queues.values().map(|queue| queue.served).max().unwrap_or(0);
        self.iter_mut().for_each(|queue| queue.served = queue.served.max(most.saturating_sub(lead)));
    }

    /// Forgets queues without requests.
    pub fn drop_idle(&mut self) {
        self.queues.retain(|_, queue| {
            let active = queue.running > 0 || !queue.waiting.is_empty();
            if !active {
                self.ids.remove(&queue.key);
            }
            active
        });
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.queues.values().map(|queue| queue.waiting.len()).sum()
    }
}
