//! First-fit allocation of ranges in one stretch of memory.

use std::collections::BTreeMap;
use std::ops::Range;

/// The free ranges of a stretch of memory. Freed ranges merge with their free neighbours.
#[derive(Debug, Clone)]
pub struct RangeAllocator {
    /// Start -> end of each free range. No two touch.
    free: BTreeMap<usize, usize>,
}

impl RangeAllocator {
    /// An allocator of `0..len`, all of it free.
    pub fn new(len: usize) -> Self {
        let mut allocator = Self { free: BTreeMap::new() };
        allocator.free(0..len);
        allocator
    }

    /// Whether [`RangeAllocator::allocate`] would succeed.
    pub fn fits(&self, len: usize) -> bool {
        self.free.iter().any(|(start, end)| end - start >= len)
    }

    /// Allocates the first free range of this length. `None` if no free range is long enough.
    pub fn allocate(&mut self, len: usize) -> Option<Range<usize>> {
        let (&start, &end) = self.free.iter().find(|(start, end)| *end - *start >= len)?;
        self.free.remove(&start);
        self.free(start + len..end);
        Some(start..start + len)
    }

    /// Frees an allocated range.
    pub fn free(&mut self, range: Range<usize>) {
        let Range { mut start, mut end } = range;
        if start >= end {
            return;
        }
        if let Some((&before, &touching)) = self.free.range(..start).next_back()
            && touching == start
        {
            self.free.remove(&before);
            start = before;
        }
        if let Some(after) = self.free.remove(&end) {
            end = after;
        }
        self.free.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Allocations never overlap, and succeed whenever a free range is long enough. Freed ranges merge completely.
        #[test]
        fn allocates_without_overlap_and_merges_what_is_freed(steps in prop::collection::vec((any::<bool>(), 1usize..40, any::<usize>()), 0..200)) {
            const LEN: usize = 128;
            let mut allocator = RangeAllocator::new(LEN);
            let mut taken: Vec<Range<usize>> = Vec::new();
            for (take, len, which) in steps {
                if take {
                    let mut used = [false; LEN];
                    taken.iter().for_each(|range| used[range.clone()].fill(true));
                    let room = used.windows(len).any(|w| w.iter().all(|used| !used));
                    prop_assert_eq!(allocator.fits(len), room);
                    let range = allocator.allocate(len);
                    prop_assert_eq!(range.is_some(), room);
                    if let Some(range) = range {
                        prop_assert_eq!(range.len(), len);
                        prop_assert!(used[range.clone()].iter().all(|used| !used));
                        taken.push(range);
                    }
                } else if !taken.is_empty() {
                    allocator.free(taken.swap_remove(which % taken.len()));
                }
            }
            taken.into_iter().for_each(|range| allocator.free(range));
            prop_assert_eq!(allocator.free, BTreeMap::from([(0, LEN)]));
        }
    }
}
