//! The runner: it runs the steps that the engine thread schedules.

use std::sync::Arc;

use super::cuda::Steps;
use crate::Result;
use crate::adapter::Lease;
use crate::adapter::tiers::{Residency, Tiers};
use crate::model::decoder::{Decoder, StepOutput};
use crate::model::kv::KvCache;
use crate::ops::batch::Batch;

/// Runs steps for the engine thread: the model with its KV cache and adapter slots, or a fake in tests of the scheduler.
///
/// A step runs in two halves, [`Runner::launch`] and [`Runner::collect`], so that the engine can prepare the next step while a
/// GPU runs this one. Between the two, the engine may acquire and prefetch adapters, update the slots and build the next batch. It must
/// not release a slot or free a KV block that the step in flight uses. At most one step is in flight: the next launch must come
/// after the output of this step has been collected and read, because it overwrites the step's buffers.
pub trait Runner: Send + 'static {
    /// Asks for an adapter in a slot. Each [`Residency::Ready`] counts one use, which [`Runner::release`] ends.
    fn acquire(&mut self, lease: &Lease) -> Residency;

    /// Starts to bring an adapter into a slot: a request that needs it has been queued.
    fn prefetch(&mut self, _: &Lease) {}

    /// Ends one use of a slot.
    fn release(&mut self, slot: u32);

    /// Puts loaded adapters into their slots and frees the slots of retired ones. Called after every step and at intervals
    /// while idle.
    fn update_slots(&mut self) {}

    /// Enqueues a step, which writes the batch's keys and values to the KV cache. On a GPU it may return before the step has
    /// run, and nothing is synchronised.
    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep>;

    /// The output of a launched step. On a GPU it stays on the device: work that reads it is enqueued behind the step.
    fn collect(&mut self, step: InFlightStep) -> Result<StepOutput>;
}

/// A launched step whose output has not been collected.
#[must_use = "the output of a launched step must be collected"]
pub struct InFlightStep {
    /// Where the step writes its output, in the order of its device's stream.
    output: StepOutput,
}

impl InFlightStep {
    /// A step that writes, or has written, this output.
    pub fn new(output: StepOutput) -> Self {
        Self { output }
    }

    /// The output, to be read behind the step.
    pub fn into_output(self) -> StepOutput {
        self.output
    }
}

/// The runner of the server: model, KV cache and adapter tiers.
pub struct ModelRunner {
    /// The decoder, whose weights the trainer shares.
    pub model: Arc<Decoder>,
    /// The KV cache.
    pub kv: KvCache,
    /// The adapter slots and the tiers below them.
    pub tiers: Tiers,
    /// Runs steps on a GPU; `None` on the CPU.
    pub steps: Option<Steps>,
}

impl Runner for ModelRunner {
    fn acquire(&mut self, lease: &Lease) -> Residency {
        self.tiers.acquire(lease)
    }

    fn prefetch(&mut self, lease: &Lease) {
        self.tiers.prefetch(lease);
    }

    fn release(&mut self, slot: u32) {
        self.tiers.release(slot);
    }

    fn update_slots(&mut self) {
        self.tiers.update_slots();
    }

    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep> {
        let output = match &mut self.steps {
            Some(steps) => steps.run(batch, &self.model, &mut self.kv, self.tiers.pool_mut()),
            None => self.model.forward(batch, &mut self.kv, self.tiers.pool()),
        };
        output.map(InFlightStep::new)
    }

    fn collect(&mut self, step: InFlightStep) -> Result<StepOutput> {
        Ok(step.into_output())
    }
}
