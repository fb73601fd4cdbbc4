//! Stand-ins for `cuda` in builds without the feature: uninhabited types.

pub mod slots {
    //! Slots in a GPU's memory.

    use std::ops::Range;
    use std::sync::Arc;

    use candle_core::Device;

    use crate::Result;
    use crate::arch::ModelConfig;
    use crate::lora::BaseMatrices;
    use crate::lora::weights::AdapterWeights;

    /// Uninhabited.
    pub enum DeviceSlots {}

    /// Uninhabited.
    pub enum AdapterImage {}

    /// Uninhabited.
    pub enum PinnedStaging {}

    /// There is no table.
    pub const SLOTS: usize = 0;

    /// The CPU has slots of its own.
    pub fn open(_: &Device, _: &ModelConfig, _: usize) -> Result<Option<DeviceSlots>> {
        Ok(None)
    }

    /// The CPU lays adapters out differently.
    pub fn image_bytes(_: &Device, _: &AdapterWeights, _: &ModelConfig) -> Result<Option<usize>> {
        Ok(None)
    }

    impl AdapterImage {
        /// Never called.
        pub fn bytes(&self) -> usize {
            match *self {}
        }
    }

    impl DeviceSlots {
        /// Never called.
        pub fn staging(&self) -> &Arc<PinnedStaging> {
            match *self {}
        }

        /// Never called.
        pub fn put(&mut self, _: u32, _: Range<usize>, _: AdapterImage) -> Result<()> {
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

    impl PinnedStaging {
        /// Never called.
        pub fn image(&self, _: &AdapterWeights, _: &ModelConfig) -> Result<AdapterImage> {
            match *self {}
        }
    }
}
