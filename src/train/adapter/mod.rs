//! The adapter of a training job: its parameters, and everything that is computed from them.
//!
//! - `params`: the trained values and their gradients, in flat buffers.
//! - `init`: initial values of a pair.
//! - `trainable`: the adapter as a pass uses it, with a place for each gradient.
//! - `dora`, `adalora`: what these two methods add to LoRA.
//! - `export`: the adapter as PEFT writes it to disk.

pub(super) mod adalora;
mod dora;
mod export;
mod init;
mod params;
mod trainable;

pub use adalora::RankAllocator;
pub use dora::DoraNorms;
pub(super) use export::AdapterExport;
pub use params::{ModuleParams, ParamGroup, ParamLocation, SiteParams, TrainableParams};
pub use trainable::{TrainableAdapter, TrainableMagnitude, TrainableModule, TrainableSite};
