//! KV blocks: allocation, reference counts, and the prefix cache.
//!
//! A full block is named by a hash of everything that decides its keys and values: the adapter generations and weights of the
//! sequence, and all tokens up to its end (a SHA-256 chain, so equal names mean equal content for any purpose). A named
//! block that nobody uses stays findable until its memory is needed; the longest unused goes first.

use std::collections::{BTreeMap, HashMap};

use sha2::{Digest, Sha256};

/// Name of a full block's content.
pub type BlockHash = [u8; 32];

/// First link of a chain: what besides tokens decides keys and values.
pub fn root_hash(adapters: &[(String, u32)]) -> BlockHash {
    let mut hash = Sha256::new();
    for (generation, weight) in adapters {
        hash.update((generation.len() as u64).to_le_bytes());
        hash.update(generation);
        hash.update(weight.to_le_bytes());
    }
    hash.finalize().into()
}

/// Next link: a block of `tokens` after `parent`.
pub fn chain_hash(parent: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hash = Sha256::new();
    hash.update(parent);
    for token in tokens {
        hash.update(token.to_le_bytes());
    }
    hash.finalize().into()
}

/// One block's state.
#[derive(Debug, Clone, Default)]
struct KvBlock {
    /// Sequences that use it.
    ref_count: u32,
    /// Its name, once it is full, written and findable.
    hash: Option<BlockHash>,
    /// Its place in `BlockPool::evictable` while unused and named.
    idle_since: u64,
}

/// All KV blocks.
pub struct BlockPool {
    blocks: Vec<KvBlock>,
    /// Unused blocks without a name.
    free: Vec<u32>,
    /// Unused blocks with a name, longest unused first.
    evictable: BTreeMap<u64, u32>,
    /// Name to block, for blocks in use and evictable ones.
    named: HashMap<BlockHash, u32>,
    /// Counts releases, to order `evictable`.
    clock: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        Self {
            blocks: vec![KvBlock::default(); blocks],
            free: (0..blocks as u32).rev().collect(),
            evictable: BTreeMap::new(),
            named: HashMap::new(),
            clock: 0,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that can be allocated, evictable named ones included.
    pub fn free(&self) -> usize {
        self.free.len() + self.evictable.len()
    }

    /// A block for new content, or `None` when all are in use.
    pub fn allocate(&mut self) -> Option<u32> {
        let id = self.free.pop().or_else(|| {
            let (_, id) = self.evictable.pop_first()?;
            let hash = self.blocks[id as usize].hash.take();
            self.named.remove(&hash.expect("evictable blocks are named"));
            Some(id)
        })?;
        self.blocks[id as usize].ref_count = 1;
        Some(id)
    }

    /// The blocks of the longest run of `hashes`, from the first, that are all there.
    pub fn find(&self, hashes: &[BlockHash]) -> Vec<u32> {
        hashes.iter().map_while(|hash| self.named.get(hash).copied()).collect()
    }

    /// How many of `ids` nobody uses: to share them takes that many from [`BlockPool::free`].
    pub fn unreferenced(&self, ids: &[u32]) -> usize {
        ids.iter().filter(|id| self.blocks[**id as usize].ref_count == 0).count()
    }

    /// One more user of a block that [`BlockPool::find`] gave.
    pub fn share(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        if block.ref_count == 0 {
            self.evictable.remove(&block.idle_since);
        }
        block.ref_count += 1;
    }

    /// Names a block whose keys and values are all written. Where the name is taken already, nothing changes.
    pub fn publish(&mut self, id: u32, hash: BlockHash) {
        if self.blocks[id as usize].hash.is_none() {
            self.named.entry(hash).or_insert_with(|| {
                self.blocks[id as usize].hash = Some(hash);
                id
            });
        }
    }

    /// Ends one use of each block. Later blocks of a chain become evictable first, so that its beginning stays longest.
    pub fn release(&mut self, ids: &[u32]) {
        for &id in ids.iter().rev() {
            let block = &mut self.blocks[id as usize];
            assert!(block.ref_count > 0, "block {id} released more often than used");
            block.ref_count -= 1;
            if block.ref_count > 0 {
                continue;
            }
            if block.hash.is_some() {
                self.clock += 1;
                block.idle_since = self.clock;
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
    fn names_depend_on_adapters_weights_and_all_tokens() {
        let base = root_hash(&[]);
        let a = root_hash(&[("a".into(), 1)]);
        let names = [
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
        for (i, x) in names.iter().enumerate() {
            assert!(names[..i].iter().all(|y| x != y));
        }
    }

    #[test]
    fn idle_blocks_are_found_until_evicted_longest_unused_first() {
        let mut pool = BlockPool::new(2);
        let (x, y) = (pool.allocate().expect("free"), pool.allocate().expect("free"));
        assert_eq!(pool.allocate(), None);
        let (hx, hy) = (root_hash(&[("x".into(), 0)]), root_hash(&[("y".into(), 0)]));
        pool.publish(x, hx);
        pool.publish(y, hy);
        pool.release(&[x]);
        pool.release(&[y]);
        assert_eq!((pool.free(), pool.find(&[hx, hy]), pool.unreferenced(&[x, y])), (2, vec![x, y], 2));
        pool.share(x);
        pool.release(&[x]);
        assert_eq!(pool.allocate(), Some(y), "y was unused longest");
        assert_eq!((pool.find(&[hy]), pool.find(&[hx, hy])), (vec![], vec![x]));
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
                        prop_assert_eq!(pool.free(), 0);
                    },
                    1 => for id in pool.find(&[root_hash(&[(String::new(), u32::from(n % 8))])]) {
                        pool.share(id);
                        held.push(id);
                    },
                    2 => if !held.is_empty() {
                        let id = held[usize::from(n) % held.len()];
                        pool.publish(id, root_hash(&[(String::new(), u32::from(n % 8))]));
                    },
                    _ => if !held.is_empty() {
                        let id = held.swap_remove(usize::from(n) % held.len());
                        pool.release(&[id]);
                    },
                }
                let mut used = held.clone();
                used.sort_unstable();
                used.dedup();
                prop_assert_eq!(pool.free() + used.len(), pool.total());
            }
        }
    }
}
