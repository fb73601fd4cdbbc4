//! The memory plan: the size of the host's memory, and the size of the KV cache next to weights, adapters and training.

use bytesize::ByteSize;
use candle_core::Device;

use super::DeviceDefaults;
use crate::arch::ModelConfig;
use crate::config::ServeConfig;
use crate::model::kv::KvCache;
use crate::{Error, Result, gpu};

/// Bytes of host memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostMemory {
    /// In total.
    pub(crate) total: u64,
    /// Not in use.
    pub(crate) free: u64,
}

impl HostMemory {
    /// Reads the memory of this machine, or a container's limit if there is one.
    pub(crate) fn read() -> Self {
        let system = sysinfo::System::new_with_specifics(
            sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
        );
        match system.cgroup_limits() {
            Some(limits) => Self { total: limits.total_memory, free: limits.free_memory },
            None => Self { total: system.total_memory(), free: system.available_memory() },
        }
    }
}

/// Size of the KV cache and of a step.
#[derive(Debug, Clone)]
pub(crate) struct MemoryPlan {
    /// Longest sequence, prompt and output, in tokens.
    pub(crate) max_model_len: usize,
    /// Rows of a step.
    pub(crate) max_batch_tokens: usize,
    /// Sequences that run at once.
    pub(crate) max_running: usize,
    /// Blocks of the KV cache.
    pub(crate) kv_blocks: usize,
    /// Bytes of these blocks.
    pub(crate) kv_bytes: usize,
}

impl MemoryPlan {
    /// Sequences of full length that the KV cache holds by default.
    const FULL_SEQUENCES: usize = 8;
    /// Default limit of the GPU memory left for training, in bytes.
    const TRAIN_MEMORY: usize = 16 << 30;

    /// Fits the KV cache into the memory that is left. The weights and the adapter slots must be in memory already.
    ///
    /// # Errors
    /// `Invalid`: `--max-model-len` exceeds the model's limit, `--kv-memory` exceeds the free memory of the GPU, or one
    /// sequence of full length does not fit.
    pub(super) fn new(config: &ServeConfig, model: &ModelConfig, device: &Device) -> Result<Self> {
        let max_model_len = config.max_model_len.unwrap_or(model.max_position_embeddings);
        if max_model_len > model.max_position_embeddings {
            return Err(Error::invalid(format!(
                "--max-model-len {max_model_len}: this model supports at most {} tokens",
                model.max_position_embeddings
            )));
        }
        let default_tokens = DeviceDefaults::of(device).max_batch_tokens;
        let max_running = config.max_running;
        let max_batch_tokens = config.max_batch_tokens.unwrap_or(default_tokens).max(max_running);
        let block = KvCache::bytes_per_block(model, device);
        let full = blocks_of_full_sequence(max_model_len);
        let budget = match gpu::free_memory(device)? {
            Some(free) => Self::gpu_budget(config, scratch(model, max_batch_tokens), free)?,
            None => config
                .kv_memory
                .unwrap_or_else(|| (Self::FULL_SEQUENCES * full * block).min(HostMemory::read().total as usize / 4)),
        };
        // KV slots have 32-bit indices.
        let kv_blocks = (budget / block).min(u32::MAX as usize / KvCache::BLOCK_SIZE);
        if kv_blocks < full {
            return Err(Error::invalid(format!(
                "a sequence of {max_model_len} tokens needs {} of KV cache, but only {} are reserved: raise --kv-memory or \
                 lower --max-model-len",
                ByteSize((full * block) as u64),
                ByteSize((kv_blocks * block) as u64)
            )));
        }
        Ok(Self { max_model_len, max_batch_tokens, max_running, kv_blocks, kv_bytes: kv_blocks * block })
    }

    /// Bytes for the KV cache on a GPU with `free` bytes, of which a step needs `scratch`.
    fn gpu_budget(config: &ServeConfig, scratch: usize, free: usize) -> Result<usize> {
        let training = config.train_memory.unwrap_or((free / 4).min(Self::TRAIN_MEMORY));
        let left = free.saturating_sub(scratch + training);
        match config.kv_memory {
            Some(asked) if asked > left => Err(Error::invalid(format!(
                "--kv-memory {}: the GPU has only {} left for the KV cache",
                ByteSize(asked as u64),
                ByteSize(left as u64)
            ))),
            asked => Ok(asked.unwrap_or(left)),
        }
    }

    /// KV blocks of `max_running` sequences of full length.
    pub(super) fn max_running_blocks(&self) -> usize {
        self.max_running * blocks_of_full_sequence(self.max_model_len)
    }
}

/// KV blocks of the longest sequence, with room for one more token, where the next one would go.
fn blocks_of_full_sequence(max_model_len: usize) -> usize {
    (max_model_len + 1).div_ceil(KvCache::BLOCK_SIZE)
}

/// Bytes of a GPU that a step's own tensors may take: the largest matrix as bf16, the activations of all rows, and a margin
/// for CUDA graphs and libraries.
fn scratch(model: &ModelConfig, rows: usize) -> usize {
    let widest = (2 * model.intermediate_size).max(model.heads().qkv_width());
    let matrix = 2 * widest * model.hidden_size;
    let activations = rows * (4 * 2 * widest + 8 * 4 * model.hidden_size);
    let logits = 4 * 512 * model.vocab_size;
    matrix + activations + logits + (2 << 30)
}
