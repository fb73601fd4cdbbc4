//! One op a file: its CPU half, its CUDA half and, where training needs one, its backward. Nothing here knows a model.
//!
//! Activations are contiguous f32 tensors of shape `[tokens, features]` on the CPU. Every op computes a row from that
//! row alone, in an order fixed by the shapes of the weights, so that a row's bits never depend on the rest of the batch.

pub mod adamw;
pub mod attention;
pub mod batch;
pub(crate) mod cpu;
pub mod dropout;
pub mod gemm;
pub mod heads;
pub mod loss;
pub mod norm;
pub mod pool;
pub mod quant;
#[cfg(test)]
pub(crate) mod reference;
pub mod rope;
pub mod sample;
pub(crate) mod simd;
pub mod swiglu;
mod task_gemm;
