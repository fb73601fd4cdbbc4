//! The paged cache of keys and values.

use candle_core::{DType, Device, Tensor};

use crate::arch::{Heads, ModelConfig};
use crate::ops::attention::{self, BLOCK};
use crate::ops::batch::Batch;
use crate::ops::rope::RopeTable;
use crate::{Error, Result};

/// Keys and values of all sequences, in blocks of [`KvCache::BLOCK_SIZE`] tokens that block tables name. A block id is
/// the same place in every layer.
pub struct KvCache {
    /// How a block is laid out.
    heads: Heads,
    /// Per decoder block `[num_blocks, block_len]`, f32 on the CPU and bf16 on a GPU. Fresh memory is zero, on the CPU untouched:
    /// the system gives pages when they are first written.
    layers: Vec<Tensor>,
}

impl KvCache {
    /// Tokens per block.
    pub const BLOCK_SIZE: usize = BLOCK;

    /// Bytes of one block in all layers on a device.
    pub fn bytes_per_block(config: &ModelConfig, device: &Device) -> usize {
        config.num_layers * attention::block_len(config.heads(), device) * dtype(device).size_in_bytes()
    }

    /// An empty cache on a device. Errors when there is no memory for it.
    pub fn new(config: &ModelConfig, num_blocks: usize, device: &Device) -> Result<Self> {
        if num_blocks == 0 || u32::try_from(num_blocks * BLOCK).is_err() {
            return Err(Error::invalid(format!(
                "{num_blocks} KV blocks: at least 1, at most {}",
                u32::MAX as usize / BLOCK
            )));
        }
        let heads = config.heads();
        let layer = || Tensor::zeros((num_blocks, attention::block_len(heads, device)), dtype(device), device);
        let layers = (0..config.num_layers).map(|_| layer()).collect::<candle_core::Result<_>>()?;
        Ok(Self { heads, layers })
    }

    /// Turns the queries and keys of `qkv [T, (heads + 2·kv_heads)·head_dim]` in place to their positions, and writes keys and
    /// values at the batch's slots of a layer.
    pub fn append(&mut self, layer: usize, qkv: &Tensor, batch: &Batch, table: &RopeTable) -> Result<()> {
        attention::append(&self.layers[layer], qkv, batch, table, self.heads)
    }

    /// A layer's `[num_blocks, block_len]`, as [`attention::attention`] reads it.
    pub fn layer(&self, layer: usize) -> &Tensor {
        &self.layers[layer]
    }
}

fn dtype(device: &Device) -> DType {
    if device.is_cuda() { DType::BF16 } else { DType::F32 }
}
