//! Memory for weights, in huge pages if the system has them.
//!
//! A decode step streams every weight once. With pages of 4 KiB it would wait for address translation about as long as for memory.
//! Matrices of small models are smaller than a huge page, so many share one mapping, which is freed with the last of them.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use memmap2::MmapMut;

use crate::{Error, Result};

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a mapping that buffers share. Its unused part takes no memory.
const CHUNK: usize = 256 << 20;
/// Bytes of a cache line. Buffers start at one, so that no vector load touches two.
const LINE: usize = 64;

/// The mapping from which buffers are cut, and the number of bytes already cut.
static CURRENT: Mutex<Option<(Arc<MmapMut>, usize)>> = Mutex::new(None);

/// Number types of which any bytes are a valid value.
///
/// # Safety
/// Any bytes are a value of the type, and its alignment is at most a cache line.
pub unsafe trait PlainNumber: Copy {}
// SAFETY: plain numbers.
unsafe impl PlainNumber for u8 {}
// SAFETY: plain numbers.
unsafe impl PlainNumber for u32 {}
// SAFETY: plain numbers.
unsafe impl PlainNumber for f32 {}
// SAFETY: plain numbers.
unsafe impl PlainNumber for f16 {}
// SAFETY: plain numbers.
unsafe impl PlainNumber for bf16 {}

/// A buffer of a fixed number of values, initially zero.
pub struct Resident<T: PlainNumber> {
    /// Keeps the mapping alive.
    map: Arc<MmapMut>,
    /// The buffer's first byte in the mapping, at the start of a cache line.
    start: usize,
    /// Number of values.
    len: usize,
    values: PhantomData<T>,
}

impl<T: PlainNumber> Resident<T> {
    /// A buffer of `len` zeros. Errors: the system has no memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, used) = match current.take().filter(|(map, used)| used + bytes <= map.len()) {
            Some(current) => current,
            None => {
                let map = MmapMut::map_anon(CHUNK.max(bytes) + HUGE)
                    .map_err(|e| Error::internal(format!("no memory for {bytes} bytes of weights: {e}")))?;
                // Without huge pages everything works, but slower.
                #[cfg(target_os = "linux")]
                let _ = map.advise(memmap2::Advice::HugePage);
                let start = map.as_ptr().align_offset(HUGE);
                (Arc::new(map), start)
            }
        };
        *current = Some((map.clone(), used + bytes));
        Ok(Self { map, start: used, len, values: PhantomData })
    }

    /// The values.
    pub fn values(&self) -> &[T] {
        // SAFETY: the range was cut from the mapping for this buffer alone and starts at a cache line. Any bytes are values, and
        // they change through `&mut self` only.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.start).cast(), self.len) }
    }

    /// The values, for writing.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above. The mapping is writable, and is used through the buffers cut from it only.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_ptr().cast_mut().add(self.start).cast(), self.len) }
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_disjoint_and_aligned() {
        let mut all: Vec<Resident<u32>> =
            [1, 17, 0, 100_000, CHUNK / 4 + 1, 3].map(|len| Resident::zeroed(len).expect("memory")).into();
        for (i, buffer) in all.iter_mut().enumerate() {
            assert!(buffer.values().iter().all(|&v| v == 0));
            assert_eq!(buffer.values().as_ptr() as usize % LINE, 0);
            buffer.values_mut().fill(i as u32 + 1);
        }
        for (i, buffer) in all.iter().enumerate() {
            assert!(buffer.values().iter().all(|&v| v == i as u32 + 1));
        }
    }
}
