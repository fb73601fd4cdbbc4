//! The CUDA halves of the ops, and the model on a GPU. Needs a GPU. It is one binary, since each binary contains all kernels.

mod adamw;
mod attention;
mod attention_causal;
mod common;
mod deterministic;
mod dora;
mod dropout;
mod gemm;
mod heads;
mod jobs;
mod lora;
mod loss;
mod model;
mod norm;
mod quant;
mod rope;
mod sample;
#[path = "../common/smollm2.rs"]
mod smollm2;
mod step_buffers;
mod swiglu;
