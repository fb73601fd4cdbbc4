//! What the rest of the program names of the GPU, in a build without CUDA: types that are never made.

pub mod step {
    //! Metadata of a step on the device.

    /// Never made.
    #[derive(Debug, Clone)]
    pub enum Step {}

    impl Step {
        /// Never called.
        pub fn rows(&self) -> usize {
            match *self {}
        }

        /// Never called.
        pub fn fixed(&self) -> bool {
            match *self {}
        }
    }
}

pub mod steps {
    //! How steps run on a GPU.

    use candle_core::{Device, Tensor};

    use crate::Result;
    use crate::adapter::slots::SlotPool;
    use crate::engine::batch::Batch;
    use crate::model::ModelConfig;
    use crate::model::kv::KvCache;
    use crate::model::llama::Llama;

    /// Never made.
    pub enum Steps {}

    impl Steps {
        /// The CPU needs none.
        pub fn on(_: &Device, _: &ModelConfig, _: usize, _: usize, _: usize) -> Result<Option<Self>> {
            Ok(None)
        }

        /// Never called.
        pub fn record(&mut self, _: &Llama, _: &mut KvCache, _: &SlotPool, _: impl Fn(f32)) -> Result<()> {
            match *self {}
        }

        /// Never called.
        pub fn run(&mut self, _: &Batch, _: &Llama, _: &mut KvCache, _: &mut SlotPool) -> Result<Tensor> {
            match *self {}
        }
    }
}

pub mod slots {
    //! Slots in a GPU's memory.

    use std::ops::Range;
    use std::sync::Arc;

    use candle_core::Device;

    use crate::Result;
    use crate::adapter::peft::AdapterWeights;
    use crate::model::ModelConfig;
    use crate::model::weights::Weights;

    /// Never made.
    pub enum DeviceSlots {}

    /// Never made.
    pub enum Image {}

    /// Never made.
    pub enum Staging {}

    /// There is no table.
    pub const SLOTS: usize = 0;

    /// The CPU has its own slots.
    pub fn open(_: &Device, _: &ModelConfig, _: usize) -> Result<Option<DeviceSlots>> {
        Ok(None)
    }

    /// The CPU's slots have another form.
    pub fn image_bytes(_: &Device, _: &AdapterWeights, _: &ModelConfig) -> Result<Option<usize>> {
        Ok(None)
    }

    impl Image {
        /// Never called.
        pub fn bytes(&self) -> usize {
            match *self {}
        }
    }

    impl DeviceSlots {
        /// Never called.
        pub fn staging(&self) -> &Arc<Staging> {
            match *self {}
        }

        /// Never called.
        pub fn put(&mut self, _: u32, _: Range<usize>, _: Image) -> Result<()> {
            match *self {}
        }

        /// Never called.
        pub fn arrived(&mut self, _: u32) -> Result<bool> {
            match *self {}
        }

        /// Never called.
        pub fn prepare_gains(&mut self, _: u32, _: &Weights) -> Result<()> {
            match *self {}
        }

        /// Never called.
        pub fn remove(&mut self, _: u32) {
            match *self {}
        }
    }

    impl Staging {
        /// Never called.
        pub fn image(&self, _: &AdapterWeights, _: &ModelConfig) -> Result<Image> {
            match *self {}
        }
    }
}
