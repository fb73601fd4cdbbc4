//! Stand-ins for `cuda` in builds without the feature: uninhabited types.

use candle_core::Device;

use crate::Result;
use crate::arch::ModelConfig;
use crate::lora::slots::SlotPool;
use crate::model::decoder::{Decoder, StepOutput};
use crate::model::kv::KvCache;
use crate::ops::batch::Batch;

/// Uninhabited.
pub enum Steps {}

impl Steps {
    /// The CPU needs none.
    pub fn on(_: &Device, _: &ModelConfig, _: usize, _: usize, _: usize) -> Result<Option<Self>> {
        Ok(None)
    }

    /// Never called.
    pub fn capture(&mut self, _: &Decoder, _: &mut KvCache, _: &SlotPool, _: impl Fn(f32)) -> Result<()> {
        match *self {}
    }

    /// Never called.
    pub fn run(&mut self, _: &Batch, _: &Decoder, _: &mut KvCache, _: &mut SlotPool) -> Result<StepOutput> {
        match *self {}
    }
}
