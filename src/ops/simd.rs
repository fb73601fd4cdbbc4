//! Vectors of sixteen f32 lanes, in which the CPU halves are written.
//!
//! A kernel is written once over [`Lanes`] and compiled for AVX-512, for AVX2 with FMA, and for the target's baseline. Every operation
//! rounds once, in the same way on each, and sums add halves pairwise. All three therefore give the same bits.

use std::f32::consts::LN_2;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// A kernel that [`run`] compiles for each instruction set. Mark its `run` and every generic function that it calls
/// `#[inline(always)]`: only inlined code is compiled for its caller's instruction set. For the same reason, keep vectors out of
/// closures that the standard library calls (`map`, `array::from_fn`), which become functions of their own.
pub trait SimdKernel {
    /// Runs the kernel with vectors `L`.
    fn run<L: Lanes>(self);
}

/// Runs a kernel with the widest vectors of this machine.
pub fn run(kernel: impl SimdKernel) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just detected.
            return unsafe { x86::run_avx512(kernel) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just detected.
            return unsafe { x86::run_avx2(kernel) };
        }
    }
    kernel.run::<PortableLanes>();
}

/// A vector of [`LANES`] f32.
pub trait Lanes: Copy {
    /// Rows of a register tile of four vectors a row: as many as fit in the registers.
    const ROWS: usize;

    /// A vector with `x` in every lane.
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self > other ? self : other`, so `other` if either is NaN, as on x86.
    fn max(self, other: Self) -> Self;
    /// `self < other ? self : other`.
    fn min(self, other: Self) -> Self;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// Rounds to the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `self · 2ⁿ` for integers `n` in -127..=127. `n = -127` gives zero.
    fn scale(self, n: Self) -> Self;

    /// The sum of the lanes: halves are added pairwise until one lane is left.
    #[inline(always)]
    fn sum(self) -> f32 {
        fold(self, |a, b| a + b)
    }

    /// The largest lane.
    #[inline(always)]
    fn max_lane(self) -> f32 {
        fold(self, |a, b| if a > b { a } else { b })
    }

    /// 2 to the power of each lane: relative error below 1.3e-7 from 2^-126.5 to 2^127, zero for smaller results, NaN for NaN.
    ///
    /// `2^x = 2^n · 2^f`, where `n` is the nearest integer to `x`. `2^f` is a polynomial through the Chebyshev nodes of [-½, ½],
    /// exactly 1 at 0, with an error of 1e-8.
    #[inline(always)]
    fn exp2(self) -> Self {
        const C: [f32; 6] = [1.545_316_3e-4, 1.339_086_3e-3, 9.618_083e-3, 5.550_357e-2, 2.402_265e-1, LN_2];
        // The constants come first in `max` and `min`, so that NaN passes through.
        let x = Self::splat(127.0).min(Self::splat(-127.0).max(self));
        let n = x.round();
        let f = x.sub(n);
        let mut p = Self::splat(C[0]);
        for c in &C[1..] {
            p = p.mul_add(f, Self::splat(*c));
        }
        p.mul_add(f, Self::splat(1.0)).scale(n)
    }
}

#[inline(always)]
fn fold<L: Lanes>(v: L, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut x = [0.0; LANES];
    v.store(&mut x);
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            x[i] = f(x[i], x[i + half]);
        }
    }
    x[0]
}

/// Loads fewer than [`LANES`] values, with zeros after them.
#[inline(always)]
pub fn load_part<L: Lanes>(from: &[f32]) -> L {
    let mut x = [0.0; LANES];
    x[..from.len()].copy_from_slice(from);
    L::load(&x)
}

/// The dot product of two slices: summed within lanes, then across them.
#[inline(always)]
pub fn dot<L: Lanes>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sum = L::splat(0.0);
    for (a, b) in a.iter().zip(b) {
        sum = L::load(a).mul_add(L::load(b), sum);
    }
    load_part::<L>(a_tail).mul_add(load_part(b_tail), sum).sum()
}

/// `2ⁿ` for the `n` of [`Lanes::scale`]; zero for -127.
#[inline(always)]
fn power_of_two(n: f32) -> f32 {
    // Wraps and truncates. For NaN the bits do not matter, since the product is NaN anyway.
    f32::from_bits((n as i32).wrapping_add(127).wrapping_shl(23) as u32)
}

/// An array, which the compiler turns into the vectors of the target's baseline.
#[derive(Clone, Copy)]
struct PortableLanes([f32; LANES]);

impl PortableLanes {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for PortableLanes {
    const ROWS: usize = 2;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Self {
        Self(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i].mul_add(a.0[i], b.0[i])))
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }
    #[inline(always)]
    fn scale(self, n: Self) -> Self {
        self.zip(n, |a, n| a * power_of_two(n))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Lanes, SimdKernel};

    #[target_feature(enable = "avx512f,avx2,fma")]
    pub fn run_avx512(kernel: impl SimdKernel) {
        kernel.run::<Avx512>();
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn run_avx2(kernel: impl SimdKernel) {
        kernel.run::<Avx2>();
    }

    /// One zmm register. Only [`run_avx512`] uses it, so its methods run on processors with AVX-512 only.
    #[derive(Clone, Copy)]
    struct Avx512(__m512);

    /// Two ymm registers. Only [`run_avx2`] uses it, so its methods run on processors with AVX2 and FMA only.
    #[derive(Clone, Copy)]
    struct Avx2(__m256, __m256);

    // SAFETY of every block in this implementation: the processor has AVX-512 (see `Avx512`), and loads and stores go
    // through references to whole arrays.
    impl Lanes for Avx512 {
        const ROWS: usize = 4;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            Self(unsafe { _mm512_set1_ps(x) })
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            Self(unsafe { _mm512_loadu_ps(from.as_ptr()) })
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(unsafe { _mm512_add_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            Self(unsafe { _mm512_sub_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            Self(unsafe { _mm512_mul_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            Self(unsafe { _mm512_div_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            Self(unsafe { _mm512_max_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn min(self, other: Self) -> Self {
            Self(unsafe { _mm512_min_ps(self.0, other.0) })
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            Self(unsafe { _mm512_fmadd_ps(self.0, a.0, b.0) })
        }
        #[inline(always)]
        fn round(self) -> Self {
            Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
        }
        #[inline(always)]
        fn scale(self, n: Self) -> Self {
            Self(unsafe {
                let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.0), _mm512_set1_epi32(127));
                _mm512_mul_ps(self.0, _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent)))
            })
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe {
                let high =
                    _mm512_castpd_ps(_mm512_castpd256_pd512(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0))));
                sum8(_mm256_add_ps(_mm512_castps512_ps256(self.0), _mm512_castps512_ps256(high)))
            }
        }
        #[inline(always)]
        fn max_lane(self) -> f32 {
            unsafe { _mm512_reduce_max_ps(self.0) }
        }
    }

    // SAFETY of every block in this implementation: the processor has AVX2 and FMA (see `Avx2`), and loads and stores go
    // through references to arrays that hold both halves.
    impl Lanes for Avx2 {
        const ROWS: usize = 1;

        #[inline(always)]
        fn splat(x: f32) -> Self {
            let v = unsafe { _mm256_set1_ps(x) };
            Self(v, v)
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Self {
            unsafe { Self(_mm256_loadu_ps(from.as_ptr()), _mm256_loadu_ps(from.as_ptr().add(8))) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            unsafe {
                _mm256_storeu_ps(to.as_mut_ptr(), self.0);
                _mm256_storeu_ps(to.as_mut_ptr().add(8), self.1);
            }
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn div(self, other: Self) -> Self {
            unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn min(self, other: Self) -> Self {
            unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
        }
        #[inline(always)]
        fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0), _mm256_fmadd_ps(self.1, a.1, b.1)) }
        }
        #[inline(always)]
        fn round(self) -> Self {
            const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
        }
        #[inline(always)]
        fn scale(self, n: Self) -> Self {
            unsafe { Self(scale8(self.0, n.0), scale8(self.1, n.1)) }
        }
        #[inline(always)]
        fn sum(self) -> f32 {
            unsafe { sum8(_mm256_add_ps(self.0, self.1)) }
        }
    }

    /// The sum of eight lanes, halves added pairwise.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn sum8(v: __m256) -> f32 {
        // SAFETY: uses registers only; the caller promises AVX2.
        unsafe {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_shuffle_ps::<1>(v, v)))
        }
    }

    /// [`Lanes::scale`] of eight lanes.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn scale8(v: __m256, n: __m256) -> __m256 {
        // SAFETY: uses registers only; the caller promises AVX2.
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::random;

    /// Every operation on every pair of neighbouring vectors of `x`.
    struct All<'a> {
        x: &'a [f32],
        out: &'a mut Vec<f32>,
    }

    impl SimdKernel for All<'_> {
        #[inline(always)]
        fn run<L: Lanes>(self) {
            let mut to = [0.0; LANES];
            for pair in self.x.as_chunks::<LANES>().0.windows(2) {
                let (a, b) = (L::load(&pair[0]), L::load(&pair[1]));
                let n = L::splat(-127.0).max(L::splat(127.0).min(a.round()));
                for v in [a.add(b), a.sub(b), a.mul(b), a.div(b), a.max(b), a.min(b), a.mul_add(b, a), n, b.scale(n)] {
                    v.store(&mut to);
                    self.out.extend(to);
                }
                a.exp2().store(&mut to);
                self.out.extend(to);
                self.out.extend([a.sum(), a.max_lane(), load_part::<L>(&pair[0][..5]).sum()]);
            }
        }
    }

    fn inputs() -> Vec<f32> {
        let mut x: Vec<f32> = random(1, 100 * LANES).iter().map(|x| x * 140.0).collect();
        x.extend([0.0, -0.0, 0.5, 1.5, -2.5, 1e-40, -1e30, 1e30, 127.0, -126.5, -127.0, 128.0, -150.0, 1.0, 2.0, -1.0]);
        x
    }

    fn results(run: impl Fn(All)) -> Vec<u32> {
        let mut out = Vec::new();
        run(All { x: &inputs(), out: &mut out });
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let plain = results(|all| all.run::<PortableLanes>());
        assert_eq!(plain, results(|all| run(all)));
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just detected.
            assert_eq!(plain, results(|all| unsafe { x86::run_avx2(all) }));
        }
    }

    #[test]
    fn powers_of_two_are_close_and_exact_where_it_matters() {
        let exp2 = |x: f32| {
            let mut to = [0.0; LANES];
            PortableLanes::splat(x).exp2().store(&mut to);
            to[0]
        };
        for x in (-126_400..127_000).map(|i| i as f32 / 1000.0).chain(random(2, 10_000)) {
            let expected = f64::from(x).exp2();
            let error = (f64::from(exp2(x)) / expected - 1.0).abs();
            assert!(error < 1.3e-7, "2^{x}: off by {error}");
        }
        assert_eq!(
            [0.0, -0.0, 1.0, -3.0, -127.0, -1e30, f32::NEG_INFINITY].map(exp2),
            [1.0, 1.0, 2.0, 0.125, 0.0, 0.0, 0.0]
        );
        assert!(exp2(f32::NAN).is_nan() && exp2(f32::INFINITY).is_finite());
    }
}
