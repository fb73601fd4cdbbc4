//! The part of `cuda` that slots name, in a build without it: types that are never made.

pub mod slots {
    //! Slots in a GPU's memory.

    use std::ops::Range;
    use std::sync::Arc;

    use candle_core::Device;

    use crate::Result;
    use crate::arch::ModelConfig;
    use crate::lora::BaseMatrices;
    use crate::lora::weights::AdapterWeights;

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
        pub fn prepare_gains(&mut self, _: u32, _: &dyn BaseMatrices) -> Result<()> {
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
