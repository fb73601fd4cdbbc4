//! Low-rank deltas: shrink `h = x·Aᵀ`, expand `y += scale·h·Bᵀ`, per segment of a flat batch.

/// One adapter's pair for one module, as the op reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// First column of this module in the (possibly fused) output row: k comes after q in qkv.
    pub offset: usize,
    /// Output features of the module.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// Exact rank of this pair; ranks differ between modules and adapters.
    pub rank: usize,
    /// `alpha / rank`, or `alpha / sqrt(rank)` under rsLoRA.
    pub scale: f32,
    /// `A [rank, k]` row-major.
    pub a: Vec<f32>,
    /// `Bᵀ [rank, n]` row-major: expanding streams it in output order.
    pub b: Vec<f32>,
    /// `lora_B.bias [n]`, scaled like the delta.
    pub bias: Option<Vec<f32>>,
}
