//! The CUDA half of the engine: step metadata in device memory, and decode steps as captured CUDA graphs.

mod step_buffers;
mod steps;

pub use step_buffers::{Bucket, StepBuffers};
pub use steps::Steps;
