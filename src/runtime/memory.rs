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
    /// Not in use, or used only to cache files.
    pub(crate) free: u64,
}

impl HostMemory {
    /// Reads the memory of this machine, or a container's limit if there is one.
    pub(crate) fn read() -> Self {
        let system = sysinfo::System::new_with_specifics(
            sysinfo::RefreshKind::nothing().with_memory(sysinfo::MemoryRefreshKind::nothing().with_ram()),
        );
        let free = system.available_memory();
        match system.cgroup_limits() {
            // Cached files count as used in a container, but make way.
            Some(limits) => {
                Self { total: limits.total_memory, free: limits.total_memory.saturating_sub(limits.rss).min(free) }
            }
            None => Self { total: system.total_memory(), free },
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
    /// Default limit of the GPU memory left for training, in bytes.
    const TRAIN_MEMORY: usize = 16 << 30;

    /// Fits the KV cache into the memory that is left. The weights and the adapter slots must be in memory already. Without
    /// `--max-model-len`, the longest sequence is the model's limit, or what fits.
    ///
    /// # Errors
    /// `Invalid`: `--max-model-len` exceeds the model's limit, `--kv-memory` exceeds the free memory of the GPU, or one
    /// sequence of the length asked for does not fit.
    pub(super) fn new(config: &ServeConfig, model: &ModelConfig, device: &Device) -> Result<Self> {
        let default_tokens = DeviceDefaults::of(device).max_batch_tokens;
        let max_running = config.max_running;
        let max_batch_tokens = config.max_batch_tokens.unwrap_or(default_tokens).max(max_running);
        let room = match (gpu::free_memory(device)?, config.kv_memory) {
            (Some(free), _) => KvRoom::Fixed(Self::gpu_budget(config, scratch(model, max_batch_tokens), free)?),
            (None, Some(bytes)) => KvRoom::Fixed(bytes),
            (None, None) => KvRoom::of_host(HostMemory::read()),
        };
        let block = KvCache::bytes_per_block(model, device);
        let (max_model_len, kv_blocks) = room.fit(config.max_model_len, model.max_position_embeddings, block)?;
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

/// What the KV cache may take, in bytes.
#[derive(Debug, Clone, Copy)]
enum KvRoom {
    /// All of these bytes.
    Fixed(usize),
    /// Enough for some sequences of full length within `usual`, and for one of them within `most`.
    Host {
        /// The usual limit.
        usual: usize,
        /// The limit for one sequence.
        most: usize,
    },
}

impl KvRoom {
    /// Sequences of full length that the KV cache holds by default.
    const FULL_SEQUENCES: usize = 8;
    /// Shortest limit on sequences, in tokens, with which a server starts without being asked for it.
    const MIN_MODEL_LEN: usize = 256;

    /// A quarter of the memory, or if this holds no sequence, up to three quarters of what is free: steps and adapters need
    /// the rest.
    fn of_host(memory: HostMemory) -> Self {
        let most = (memory.free / 4 * 3) as usize;
        Self::Host { usual: most.min((memory.total / 4) as usize), most }
    }

    /// Bytes of the cache if a sequence of full length takes `full` bytes.
    fn bytes(self, full: usize) -> usize {
        match self {
            Self::Fixed(bytes) => bytes,
            Self::Host { usual, most } => (Self::FULL_SEQUENCES * full).min(usual.max(full)).min(most),
        }
    }

    /// The longest sequence, in tokens, and the number of KV blocks of `block` bytes. `asked` is `--max-model-len`, and
    /// `supported` the model's limit. Errors: see [`MemoryPlan::new`].
    fn fit(self, asked: Option<usize>, supported: usize, block: usize) -> Result<(usize, usize)> {
        let wanted = asked.unwrap_or(supported);
        if wanted > supported {
            let message = format!("--max-model-len {wanted}: this model supports at most {supported} tokens");
            return Err(Error::invalid(message));
        }
        let full = blocks_of_full_sequence(wanted);
        // KV slots have 32-bit indices.
        let blocks = (self.bytes(full * block) / block).min(u32::MAX as usize / KvCache::BLOCK_SIZE);
        if blocks >= full {
            return Ok((wanted, blocks));
        }
        let fits = (blocks * KvCache::BLOCK_SIZE).saturating_sub(1);
        let [needed, room] = [full, blocks].map(|blocks| ByteSize((blocks * block) as u64));
        if asked.is_none() && fits >= Self::MIN_MODEL_LEN {
            tracing::warn!(
                max_model_len = fits,
                "memory is short: a sequence of {supported} tokens needs {needed} of KV cache, and there is room for {room}. \
                 Sequences are limited to {fits} tokens. To change this, give --kv-memory or --max-model-len."
            );
            return Ok((fits, blocks));
        }
        Err(Error::invalid(format!(
            "a sequence of {wanted} tokens needs {needed} of KV cache, but there is room for {room}, or {fits} tokens: lower \
             --max-model-len or raise --kv-memory"
        )))
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

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;
    /// A block of the default model: 45 KiB a token.
    const BLOCK: usize = 45 * 1024 * 16;

    fn host(total: usize, free: usize) -> KvRoom {
        KvRoom::of_host(HostMemory { total: (total * MIB) as u64, free: (free * MIB) as u64 })
    }

    fn refused(room: KvRoom, asked: Option<usize>) -> String {
        room.fit(asked, 8192, BLOCK).expect_err("it does not fit").message
    }

    #[test]
    fn a_large_machine_holds_some_full_sequences() {
        let (length, blocks) = host(32 << 10, 24 << 10).fit(None, 8192, BLOCK).unwrap();
        assert_eq!((length, blocks), (8192, 8 * 513));
        // A quarter of the memory, which is less than eight sequences.
        let (length, blocks) = host(4 << 10, 4 << 10).fit(None, 8192, BLOCK).unwrap();
        assert_eq!((length, blocks), (8192, (1 << 10) * MIB / BLOCK));
    }

    #[test]
    fn a_small_machine_gives_one_sequence_more_than_its_share() {
        // A quarter is 200 MiB, and a sequence needs 361.
        assert_eq!(host(800, 600).fit(None, 8192, BLOCK).unwrap(), (8192, 513));
        assert_eq!(host(800, 600).fit(Some(8192), 8192, BLOCK).unwrap(), (8192, 513));
    }

    #[test]
    fn a_sequence_that_does_not_fit_becomes_shorter() {
        let (length, blocks) = host(800, 200).fit(None, 8192, BLOCK).unwrap();
        assert_eq!((length, blocks), (213 * 16 - 1, 213));
        assert!(blocks * BLOCK <= 150 * MIB && (blocks + 1) * BLOCK > 150 * MIB);
        assert_eq!(blocks_of_full_sequence(length), blocks);
        let (length, blocks) = KvRoom::Fixed(100 * BLOCK).fit(None, 8192, BLOCK).unwrap();
        assert_eq!((length, blocks), (1599, 100));
        // A busy machine: the share of the total is not free.
        assert_eq!(host(4 << 10, 100).fit(None, 8192, BLOCK).unwrap().1, 75 * MIB / BLOCK);
    }

    #[test]
    fn a_length_that_was_asked_for_is_kept_or_refused() {
        let room = host(800, 200);
        assert_eq!(room.fit(Some(3407), 8192, BLOCK).unwrap().0, 3407);
        for asked in [3408, 8192] {
            let message = refused(room, Some(asked));
            assert!(message.starts_with(&format!("a sequence of {asked} tokens needs ")), "{message}");
            assert!(message.contains("or 3407 tokens: lower --max-model-len"), "{message}");
        }
        assert_eq!(room.fit(Some(100), 8192, BLOCK).unwrap().0, 100);
        assert!(refused(room, Some(8193)).contains("at most 8192 tokens"));
    }

    #[test]
    fn too_little_for_any_use_is_refused() {
        for room in [host(800, 0), host(800, 14), KvRoom::Fixed(0), KvRoom::Fixed(10 * BLOCK)] {
            assert!(refused(room, None).contains("raise --kv-memory"));
        }
        // A model with a short limit needs no more than that.
        assert_eq!(KvRoom::Fixed(9 * BLOCK).fit(None, 128, BLOCK).unwrap(), (128, 9));
    }
}
