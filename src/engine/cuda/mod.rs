//! How steps run on a GPU: their metadata in device memory, and decode steps as recorded CUDA graphs.

mod graph;
mod step_buffers;
mod steps;

pub use step_buffers::{Bucket, StepBuffers};
pub use steps::Steps;
