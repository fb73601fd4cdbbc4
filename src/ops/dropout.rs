//! Dropout (Srivastava et al., 2014). The mask is a function of a seed, so the backward computes it again instead of storing it.

#[cfg(feature = "cuda")]
mod cuda;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::cpu;
use super::pool::SharedMut;
use crate::{Error, Result};

/// Values of a task.
const TASK: usize = 1 << 14;

/// Sets each value of `x` to zero with probability `p` in [0, 1) and divides the others by `1 - p`. Which values become zero depends on
/// `seed` and their positions alone, so the same call on the gradient is the backward. `x` is contiguous and f32; on a GPU bf16.
/// Errors: a `p` outside [0, 1).
pub fn dropout(x: &Tensor, p: f32, seed: u64) -> Result<Tensor> {
    if !(0.0..1.0).contains(&p) {
        return Err(Error::invalid(format!("dropout {p} must be at least 0 and below 1")));
    }
    let op = Dropout { seed, threshold: (f64::from(p) * 2f64.powi(32)) as u32, scale: 1.0 / (1.0 - p) };
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::dropout(x, &op);
    }
    Ok(x.apply_op1_no_bwd(&op)?)
}

struct Dropout {
    seed: u64,
    /// A value becomes zero if its 32 random bits are below this.
    threshold: u32,
    /// Factor of the other values.
    scale: f32,
}

impl Dropout {
    /// 32 random bits for each of the values `2 · pair` and `2 · pair + 1` (SplitMix64, Steele et al., 2014).
    #[inline(always)]
    fn bits(&self, pair: u64) -> [u32; 2] {
        let mut z = self.seed.wrapping_add(pair.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        [z as u32, (z >> 32) as u32]
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = cpu::slice("dropout", s, l)?;
        let mut y = vec![0.0; x.len()];
        let shared = SharedMut::new(&mut y);
        cpu::for_each(x.len().div_ceil(TASK), 4 * x.len(), |task| {
            let range = cpu::chunk(task, TASK, x.len());
            // SAFETY: inside the output; each value belongs to one task.
            let y = unsafe { shared.slice(range.start, range.len()) };
            let first = range.start / 2;
            for ((i, x), y) in x[range].chunks(2).enumerate().zip(y.chunks_mut(2)) {
                let bits = self.bits((first + i) as u64);
                for ((y, x), bits) in y.iter_mut().zip(x).zip(bits) {
                    *y = if bits < self.threshold { 0.0 } else { x * self.scale };
                }
            }
        });
        Ok((CpuStorage::F32(y), l.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn ones(n: usize, p: f32, seed: u64) -> Vec<f32> {
        let x = Tensor::ones(n, candle_core::DType::F32, &Device::Cpu).unwrap();
        dropout(&x, p, seed).unwrap().to_vec1().unwrap()
    }

    #[test]
    fn drops_the_given_share_and_keeps_the_mean() {
        for (p, n) in [(0.05f32, 100_001), (0.5, 77_777)] {
            let y = ones(n, p, 7);
            let dropped = y.iter().filter(|y| **y == 0.0).count() as f64 / n as f64;
            assert!((dropped - f64::from(p)).abs() < 0.006, "{dropped}");
            assert!(y.iter().all(|y| *y == 0.0 || (y - 1.0 / (1.0 - p)).abs() < 1e-6));
        }
        assert_eq!(ones(9, 0.0, 1), [1.0; 9]);
    }

    #[test]
    fn the_mask_depends_on_the_seed() {
        assert_eq!(ones(40_000, 0.3, 1), ones(40_000, 0.3, 1));
        assert_ne!(ones(40_000, 0.3, 1), ones(40_000, 0.3, 2));
        let zeros = Tensor::zeros(4, candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(dropout(&zeros, 1.0, 0).is_err() && dropout(&zeros, f32::NAN, 0).is_err());
    }
}
