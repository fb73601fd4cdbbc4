//! Memory for weights, in huge pages where the system has them.
//!
//! A decode step streams every weight once, and with pages of 4 KiB it waits for address translation about as long as for
//! memory. Matrices of small models are below the size of a huge page, so many share one mapping, which is freed with
//! the last of them.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use half::{bf16, f16};
use memmap2::MmapMut;

use crate::{Error, Result};

/// A huge page.
const HUGE: usize = 2 << 20;
/// Bytes of a mapping that matrices share; what is not used of it takes no memory.
const CHUNK: usize = 256 << 20;
/// Buffers start at a cache line, so that no vector load takes two.
const LINE: usize = 64;

/// A mapping to cut buffers from, and the bytes already cut.
static CURRENT: Mutex<Option<(Arc<MmapMut>, usize)>> = Mutex::new(None);

/// Types of which any bytes are a value.
///
/// # Safety
/// Only for plain numbers no more aligned than a cache line.
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

/// A fixed number of values, zero at first.
pub struct Resident<T: PlainNumber> {
    /// Keeps the mapping.
    map: Arc<MmapMut>,
    /// First byte in the mapping, a multiple of [`LINE`] from a page's start.
    start: usize,
    /// Number of values.
    len: usize,
    values: PhantomData<T>,
}

impl<T: PlainNumber> Resident<T> {
    /// `len` zeros. Errors: the system has no memory to give.
    pub fn zeroed(len: usize) -> Result<Self> {
        let bytes = (len * size_of::<T>()).next_multiple_of(LINE);
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (map, used) = match current.take().filter(|(map, used)| used + bytes <= map.len()) {
            Some(current) => current,
            None => {
                let map = MmapMut::map_anon(CHUNK.max(bytes) + HUGE)
                    .map_err(|e| Error::internal(format!("no memory for {bytes} bytes of weights: {e}")))?;
                // Without huge pages everything works, only slower.
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
        // SAFETY: the range was cut from the mapping for this buffer alone, starts at a line, and any bytes are values;
        // it changes only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(self.start).cast(), self.len) }
    }

    /// The values, to fill them.
    pub fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above; the mapping is writable, and nobody uses it but through the buffers cut from it.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_ptr().cast_mut().add(self.start).cast(), self.len) }
    }

    /// Bytes they take.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zero_apart_and_aligned() {
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
