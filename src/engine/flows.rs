//! Who is next: one queue per adapter tuple, and fair shares between them.
//!
//! Requests under the same adapter generations form a flow; the base is one too. Each flow counts the tokens it was
//! served, decode and prompt alike, and whoever asks "who is next" gets the flow with the fewest. These are deficit
//! round robin's counters, with the difference between flows kept instead of a quantum handed out per round, so that
//! a flow that used an idle machine owes nothing for it: a flow that becomes active starts level with the least served
//! (Sheng et al., "Fairness in Serving Large Language Models", 2024, virtual token counter).

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::sequence::Sequence;

/// Names a flow while it has requests.
pub type FlowId = u64;

/// One adapter tuple's requests and account.
pub struct Flow {
    /// Generation ids of the adapters that answer, in order; empty for the base. Weights are left out, so that a client
    /// cannot take more than a share by varying them.
    key: Vec<String>,
    /// Requests not running, in order; preempted ones go to the front.
    pub waiting: VecDeque<Sequence>,
    /// Sequences of the flow that run.
    pub running: usize,
    /// Tokens served, on a scale shared by all flows.
    pub served: u64,
    /// When it was last served or joined: decides between equals.
    turn: u64,
    /// How its first request's way into the slots goes.
    pub slots: SlotWait,
}

impl Flow {
    /// No adapter, so no slot needed.
    pub fn is_base(&self) -> bool {
        self.key.is_empty()
    }
}

/// How a flow's first request fares at the slots, until it gets them.
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

/// All flows with a request that waits or runs.
#[derive(Default)]
pub struct Flows {
    flows: BTreeMap<FlowId, Flow>,
    /// Where to queue a request.
    ids: HashMap<Vec<String>, FlowId>,
    /// Counts turns and flows.
    clock: u64,
}

impl Flows {
    /// Queues a new request at the end of its flow.
    pub fn push(&mut self, mut sequence: Sequence) {
        let key: Vec<String> = sequence.request.adapters.iter().map(|(lease, _)| lease.id.clone()).collect();
        sequence.flow = match self.ids.get(&key) {
            Some(id) => *id,
            None => {
                self.clock += 1;
                let (served, turn) = (self.flows.values().map(|flow| flow.served).min().unwrap_or(0), self.clock);
                let (key_here, waiting, slots) = (key.clone(), VecDeque::new(), SlotWait::default());
                self.flows.insert(turn, Flow { key: key_here, waiting, running: 0, served, turn, slots });
                self.ids.insert(key, turn);
                turn
            }
        };
        self.get(sequence.flow).waiting.push_back(sequence);
    }

    /// A flow that has requests.
    pub fn get(&mut self, id: FlowId) -> &mut Flow {
        self.flows.get_mut(&id).expect("a flow lives as long as a request of it waits or runs")
    }

    /// All flows.
    pub fn iter(&self) -> impl Iterator<Item = (FlowId, &Flow)> {
        self.flows.iter().map(|(id, flow)| (*id, flow))
    }

    /// All flows, to change.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Flow> {
        self.flows.values_mut()
    }

    /// Counts tokens served and moves the flow behind its equals.
    pub fn charge(&mut self, id: FlowId, tokens: usize) {
        self.clock += 1;
        let turn = self.clock;
        let flow = self.get(id);
        flow.served += tokens as u64;
        flow.turn = turn;
    }

    /// The least served of the flows that `eligible` lets through.
    pub fn least_served(&self, eligible: impl Fn(FlowId, &Flow) -> bool) -> Option<FlowId> {
        let flows = self.iter().filter(|(id, flow)| eligible(*id, flow));
        flows.min_by_key(|(_, flow)| (flow.served, flow.turn)).map(|(id, _)| id)
    }

    /// The most served flow with running sequences: it gives up memory first.
    pub fn most_served_running(&self) -> Option<FlowId> {
        let flows = self.iter().filter(|(_, flow)| flow.running > 0);
        flows.max_by_key(|(_, flow)| (flow.served, flow.turn)).map(|(id, _)| id)
    }

    /// Limits what flows may be ahead of each other to `lead` tokens: how long one that was ahead can be kept waiting.
    pub fn limit_lead(&mut self, lead: u64) {
        let most = self.flows.values().map(|flow| flow.served).max().unwrap_or(0);
        self.iter_mut().for_each(|flow| flow.served = flow.served.max(most.saturating_sub(lead)));
    }

    /// Forgets flows without requests.
    pub fn drop_idle(&mut self) {
        self.flows.retain(|_, flow| {
            let active = flow.running > 0 || !flow.waiting.is_empty();
            if !active {
                self.ids.remove(&flow.key);
            }
            active
        });
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.flows.values().map(|flow| flow.waiting.len()).sum()
    }
}
