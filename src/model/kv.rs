//! The paged KV cache (PagedAttention; Kwon et al., 2023).

use candle_core::{DType, Device, Tensor};

use crate::arch::{Heads, ModelConfig};
use crate::ops::attention::{self, BLOCK};
use crate::ops::batch::Batch;
use crate::ops::rope::RopeTable;
use crate::{Error, Result};

/// The keys and values of all sequences, in KV blocks of [`KvCache::BLOCK_SIZE`] tokens. A block id in a block table stands for
/// the same block in every layer.
pub struct KvCache {
    /// The heads that a KV block holds.
    heads: Heads,
    /// For each layer `[num_blocks, block_len]`, f32 on the CPU and bf16 on a GPU. New memory is zero. On the CPU it is untouched,
    /// so the system allocates pages when they are first written.
    layers: Vec<Tensor>,
}

impl KvCache {
    /// Tokens per KV block.
    pub const BLOCK_SIZE: usize = BLOCK;

    /// Bytes of one KV block in all layers on a device.
    pub fn bytes_per_block(config: &ModelConfig, device: &Device) -> usize {
        config.num_layers * attention::block_len(config.heads(), device) * dtype(device).size_in_bytes()
    }

    /// An empty cache of `num_blocks` KV blocks on a device. Errors: a number out of range, no memory.
    pub fn new(config: &ModelConfig, num_blocks: usize, device: &Device) -> Result<Self> {
        if num_blocks == 0 || u32::try_from(num_blocks * BLOCK).is_err() {
            return Err(Error::invalid(format!(
                "{num_blocks} KV blocks: allowed are 1 to {}",
                u32::MAX as usize / BLOCK
            )));
        }
        let heads = config.heads();
        let layer = || Tensor::zeros((num_blocks, attention::block_len(heads, device)), dtype(device), device);
        let layers = (0..config.num_layers).map(|_| layer()).collect::<candle_core::Result<_>>()?;
        Ok(Self { heads, layers })
    }

    /// Applies RoPE to the queries and keys of `qkv [T, (heads + 2·kv_heads)·head_dim]` in place, and writes the keys and values of
    /// `layer` to the places of the batch's `slot_mapping`.
    pub fn append(&mut self, layer: usize, qkv: &Tensor, batch: &Batch, table: &RopeTable) -> Result<()> {
        attention::append(&self.layers[layer], qkv, batch, table, self.heads)
    }

    /// The keys and values of a layer `[num_blocks, block_len]`, for [`attention::attention`].
    pub fn layer(&self, layer: usize) -> &Tensor {
        &self.layers[layer]
    }
}

fn dtype(device: &Device) -> DType {
    if device.is_cuda() { DType::BF16 } else { DType::F32 }
}
