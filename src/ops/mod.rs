//! The ops: one file each, with the CPU half, the backward where training needs one, and the CUDA half in `cuda.rs` of the op's
//! folder. The kernels of an op are in `kernels/`, its GPU tests in `tests/gpu`, its benchmark in `benches/ops`, under the
//! same name. Ops do not depend on the model, the adapters or the engine. [`batch`] defines the step's
//! metadata that they read.
//!
//! Activations are contiguous tensors of shape `[T, features]`, one row per row of the batch: f32 on the CPU, mostly bf16 on a
//! GPU. An op computes a row from that row alone, in an order that depends on the weights' shapes only, so that a row's bits do
//! not depend on the rest of the batch. This holds on the CPU, and on a GPU in deterministic mode; otherwise on a GPU for decode
//! rows in steps of up to 192 rows (16 on GPUs other than Hopper). Larger products are cuBLAS's, whose bits depend on the number
//! of rows.

pub mod adamw;
pub mod attention;
pub mod batch;
pub(crate) mod cpu;
pub mod dropout;
pub mod gemm;
pub mod heads;
pub mod loss;
pub mod norm;
pub(crate) mod pool;
pub mod quant;
#[cfg(test)]
pub(crate) mod reference;
pub mod rope;
pub mod sample;
pub(crate) mod simd;
pub mod swiglu;
mod task_gemm;
