//! The CUDA halves of the ops, and the model on a GPU: one binary, since each has the size of all kernels. Needs a GPU.

mod attention;
mod common;
mod dora;
mod heads;
mod jobs;
mod lora;
mod model;
mod quant;
mod sample;
#[path = "../common/smollm2.rs"]
mod smollm2;
mod training;
