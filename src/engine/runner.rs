//! The real runner: model, KV cache and adapter tiers, owned by the engine thread.

use std::sync::Arc;

use candle_core::Tensor;

use super::cuda::Steps;
use super::{InFlightStep, Runner};
use crate::Result;
use crate::adapter::Lease;
use crate::adapter::tiers::Residency;
use crate::adapter::tiers::Tiers;
use crate::model::decoder::Decoder;
use crate::model::kv::KvCache;
use crate::ops::batch::Batch;

/// Joins the parts that one forward pass needs.
pub struct ModelRunner {
    /// The decoder over its resident weights, which the trainer reads too.
    pub model: Arc<Decoder>,
    /// Paged keys and values.
    pub kv: KvCache,
    /// Adapter slots and what lies below them.
    pub tiers: Tiers,
    /// How steps run on a GPU; `None` on the CPU.
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

    fn sweep(&mut self) {
        self.tiers.sweep();
    }

    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep> {
        let logits = match &mut self.steps {
            Some(steps) => steps.run(batch, &self.model, &mut self.kv, self.tiers.pool_mut()),
            None => self.model.forward(batch, &mut self.kv, self.tiers.pool()),
        };
        logits.map(InFlightStep::new)
    }

    fn collect(&mut self, step: InFlightStep) -> Result<Tensor> {
        Ok(step.into_logits())
    }
}
