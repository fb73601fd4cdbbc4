//! KV blocks: allocation, reference counts, and the prefix cache.
//!
//! A full block is cached under a hash of everything that determines its keys and values: the adapter generations and weights
//! of the sequence, and all tokens up to the end of the block. The hashes are a SHA-256 chain, so equal hashes mean equal
//! content for all practical purposes. A cached block that no sequence uses can be found until its memory is needed; the least
//! recently used one is evicted first.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

/// Hash of a full block's content and of everything before it.
pub(super) type BlockHash = [u8; 32];

/// The parent hash of a sequence's first block. `adapters`: generation ids and the bits of their weights.
pub(super) fn root_hash(adapters: &[(String, u32)]) -> BlockHash {
    let mut hash = Sha256::new();
    for (generation, weight) in adapters {
        hash.update((generation.len() as u64).to_le_bytes());
        hash.update(generation);
        hash.update(weight.to_le_bytes());
    }
    hash.finalize().into()
}

/// The hash of a block of `tokens` after the block with the hash `parent`.
pub(super) fn chain_hash(parent: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hash = Sha256::new();
    hash.update(parent);
    for token in tokens {
        hash.update(token.to_le_bytes());
    }
    hash.finalize().into()
}

/// The state of one block.
#[derive(Debug, Clone, Default)]
struct KvBlock {
    /// Number of sequences that use it.
    ref_count: u32,
    /// Its hash, if it is cached.
    hash: Option<BlockHash>,
    /// Its key in [`BlockPool::evictable`] while it is cached and unused.
    unused_since: u64,
}

/// All KV blocks.
pub(super) struct BlockPool {
    blocks: Vec<KvBlock>,
    /// Blocks that are neither used nor cached.
    free: Vec<u32>,
    /// Cached blocks that no sequence uses, least recently used first.
    evictable: BTreeMap<u64, u32>,
    /// All cached blocks, used or not.
    cached: HashMap<BlockHash, u32>,
    /// Counts releases, to order `evictable`.
    clock: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub(super) fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![KvBlock::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            evictable: BTreeMap::new(),
            cached: HashMap::new(),
            clock: 0,
        }
    }

    /// Number of blocks.
    pub(super) fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Number of blocks that can be allocated, including the evictable ones.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// A block for new content, or `None` if all are in use.
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let id = self.free.pop().or_else(|| {
            let (_, id) = self.evictable.pop_first()?;
            let hash = self.blocks[id as usize].hash.take();
            self.cached.remove(&hash.expect("evictable blocks are cached"));
            Some(id)
        })?;
        self.blocks[id as usize].ref_count = 1;
        Some(id)
    }

    /// The blocks of the longest prefix of `hashes` that is cached.
    pub(super) fn find_cached(&self, hashes: &[BlockHash]) -> Vec<u32> {
        hashes.iter().map_while(|hash| self.cached.get(hash).copied()).collect()
    }

    /// How many of `ids` no sequence uses: sharing `ids` reduces [`BlockPool::available`] by this number.
    pub(super) fn unreferenced(&self, ids: &[u32]) -> usize {
        ids.iter().filter(|id| self.blocks[**id as usize].ref_count == 0).count()
    }

    /// Adds a use of a block that [`BlockPool::find_cached`] returned.
    pub(super) fn share(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if block.ref_count == 0 {
            self.evictable.remove(&block.unused_since);
        }
        block.ref_count += 1;
    }

    /// Caches a block whose keys and values are all written. Does nothing if a block with the hash is cached already.
    pub(super) fn cache(&mut self, id: u32, hash: BlockHash) {
        if self.blocks[id as usize].hash.is_none() {
            self.cached.entry(hash).or_insert_with(|| {
                self.blocks[id as usize].hash = Some(hash);
                id
            });
        }
    }

    /// Ends one use of each block. Later blocks of a chain become evictable first, so that its beginning stays longest.
    pub(super) fn release(&mut self, ids: &[u32]) {
        for &id in ids.iter().rev() {
            let block = &mut self.blocks[id as usize];
            assert!(block.ref_count > 0, "block {id} released more often than used");
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.hash.is_some() {
                self.clock += 1;
                block.unused_since = self.clock;
                self.evictable.insert(self.clock, id);
            } else {
                self.free.push(id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hashes_depend_on_adapters_weights_and_all_tokens() {
        let base = root_hash(&[]);
        let a = root_hash(&[("a".into(), 1)]);
        let hashes = [
            base,
            a,
            root_hash(&[("a".into(), 2)]),
            root_hash(&[("b".into(), 1)]),
            root_hash(&[("a".into(), 1), ("b".into(), 1)]),
            chain_hash(&base, &[1, 2]),
            chain_hash(&a, &[1, 2]),
            chain_hash(&a, &[2, 1]),
            chain_hash(&chain_hash(&a, &[1, 2]), &[1, 2]),
        ];
        for (i, x) in hashes.iter().enumerate() {
            assert!(hashes[..i].iter().all(|y| x != y));
        }
    }

    #[test]
    fn unused_blocks_are_found_until_evicted_least_recently_used_first() {
        let mut pool = BlockPool::new(2);
        let (x, y) = (pool.allocate().expect("free"), pool.allocate().expect("free"));
        assert_eq!(pool.allocate(), None);
        let (hx, hy) = (root_hash(&[("x".into(), 0)]), root_hash(&[("y".into(), 0)]));
        pool.cache(x, hx);
        pool.cache(y, hy);
        pool.release(&[x]);
        pool.release(&[y]);
        assert_eq!((pool.available(), pool.find_cached(&[hx, hy]), pool.unreferenced(&[x, y])), (2, vec![x, y], 2));
        pool.share(x);
        pool.release(&[x]);
        assert_eq!(pool.allocate(), Some(y), "y is the least recently used");
        assert_eq!((pool.find_cached(&[hy]), pool.find_cached(&[hx, hy])), (vec![], vec![x]));
    }

    proptest! {
        #[test]
        fn no_block_leaks_or_is_handed_out_twice(ops in prop::collection::vec((0u8..4, any::<u8>()), 0..300)) {
            let mut pool = BlockPool::new(8);
            // A model: blocks in use with their number of users.
            let mut held: Vec<u32> = Vec::new();
            for (op, n) in ops {
                match op {
                    0 => if let Some(id) = pool.allocate() {
                        prop_assert!(!held.contains(&id), "block {id} is in use");
                        held.push(id);
                    } else {
                        prop_assert_eq!(pool.available(), 0);
                    },
                    1 => for id in pool.find_cached(&[root_hash(&[(String::new(), u32::from(n % 8))])]) {
                        pool.share(id);
                        held.push(id);
                    },
                    2 => if !held.is_empty() {
                        let id = held[usize::from(n) % held.len()];
                        pool.cache(id, root_hash(&[(String::new(), u32::from(n % 8))]));
                    },
                    _ => if !held.is_empty() {
                        let id = held.swap_remove(usize::from(n) % held.len());
                        pool.release(&[id]);
                    },
                }
                let mut used = held.clone();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(pool.available() + used.len(), pool.total());
            }
        }
    }
}
