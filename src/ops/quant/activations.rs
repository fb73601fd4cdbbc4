//! Activations as the CPU's kernels read them: tiles of up to eight rows, interleaved so that one pointer walks a whole tile.
//!
//! For integer kernels a row is quantised to `x = scale · q`, where `q` is a 16-bit integer in two int8 planes, `q = 256 · hi + lo`. One
//! plane would not be enough. Differences of log-probabilities to float activations on SmolLM2, in nats:
//!
//! | activations | mean | largest |
//! |---|---|---|
//! | one int8 plane, one scale per 32 values | 0.069 | 0.68 |
//! | two int8 planes, one scale per row | 0.002 | 0.02 |

use super::affine::GROUP;
use crate::ops::pool::{SharedMut, parallel_for};

/// Rows of a full tile. Eight float accumulators, two integer ones and eight vectors of codes fit in AVX-512's registers.
pub const ROWS: usize = 8;

/// Largest magnitude of `q`: keeps `hi` in -127..=127.
const LIMIT: f32 = 32639.0;

/// Up to [`ROWS`] activation rows.
#[derive(Default)]
pub struct ActivationTile {
    /// Rows of this tile, 1 to [`ROWS`].
    pub rows: usize,
    /// `[k / 32][rows][hi 32, lo 32]`: the two planes of `q`.
    pub planes: Vec<i8>,
    /// `[k / 32][rows]`: the exact sum of `q` over each group of 32, which mins and zero points multiply.
    pub sums: Vec<f32>,
    /// `[k / 32][rows][2]`: the sums over each half of a group, for formats with a scale per 16 values.
    pub half_sums: Vec<f32>,
    /// The scale of each row. NaN for a row with an infinity or a NaN, so that all its products are NaN.
    pub scales: [f32; ROWS],
    /// `[k rounded up to 8][rows]`: the unquantised values, for float kernels.
    pub values: Vec<f32>,
}

/// The forms of activations that a product needs.
#[derive(Clone, Copy)]
pub struct ActivationForms {
    /// Quantised, for integer kernels. Needs a `k` that is a multiple of 32.
    pub integer: bool,
    /// Unquantised, for float kernels.
    pub float: bool,
}

/// Cuts `x [m, k]` into tiles.
pub fn tiles(x: &[f32], k: usize, forms: ActivationForms) -> Vec<ActivationTile> {
    let inputs: Vec<&[f32]> = x.chunks(ROWS * k).collect();
    let mut tiles: Vec<ActivationTile> = inputs.iter().map(|_| ActivationTile::default()).collect();
    let shared = SharedMut::new(&mut tiles);
    parallel_for(inputs.len(), |i| {
        // SAFETY: `tiles` has one tile for each input; each is written by one task.
        let tile = unsafe { shared.slice(i, 1) };
        tile[0] = ActivationTile::new(inputs[i], k, forms);
    });
    tiles
}

impl ActivationTile {
    /// A tile of the rows of `x [rows, k]`.
    fn new(x: &[f32], k: usize, forms: ActivationForms) -> Self {
        let mut tile = Self { rows: x.len() / k, ..Self::default() };
        let rows = tile.rows;
        if forms.integer {
            let cells = k / GROUP * rows;
            tile.planes = vec![0; cells * 2 * GROUP];
            tile.sums = vec![0.0; cells];
            tile.half_sums = vec![0.0; cells * 2];
            tile.quantise(x, k);
        }
        if forms.float {
            tile.values = vec![0.0; k.next_multiple_of(8) * rows];
            for (t, row) in x.chunks_exact(k).enumerate() {
                for (values, &v) in tile.values.chunks_exact_mut(rows).zip(row) {
                    values[t] = v;
                }
            }
        }
        tile
    }

    /// Fills planes, sums and scales. Compiled for each instruction set; the arithmetic is exact, so all give the same bits.
    fn quantise(&mut self, x: &[f32], k: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
            fn avx512(tile: &mut ActivationTile, x: &[f32], k: usize) {
                tile.quantise_rows(x, k);
            }
            #[target_feature(enable = "avx2")]
            fn avx2(tile: &mut ActivationTile, x: &[f32], k: usize) {
                tile.quantise_rows(x, k);
            }
            if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
                // SAFETY: the features were detected; avx512bw implies avx512f.
                return unsafe { avx512(self, x, k) };
            }
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature was detected.
                return unsafe { avx2(self, x, k) };
            }
        }
        self.quantise_rows(x, k);
    }

    #[inline(always)]
    fn quantise_rows(&mut self, x: &[f32], k: usize) {
        /// Adding it to a float below 2^22 rounds that to an integer, ties to even, which then is in the sum's low bits.
        const ROUND: f32 = 12_582_912.0;
        for (t, row) in x.chunks_exact(k).enumerate() {
            // Bits order magnitudes, with infinity and NaN above all others.
            let max = f32::from_bits(row.iter().fold(0, |a, v| a.max(v.to_bits() & 0x7fff_ffff)));
            if !max.is_finite() {
                self.scales[t] = f32::NAN;
                continue;
            }
            if max < f32::MIN_POSITIVE * LIMIT {
                // Zero, or so small that the scale would be subnormal. Planes and sums stay zero.
                continue;
            }
            self.scales[t] = max / LIMIT;
            let inverse = LIMIT / max;
            for (g, x) in row.as_chunks::<GROUP>().0.iter().enumerate() {
                let cell = g * self.rows + t;
                let (hi, lo) = self.planes[cell * 2 * GROUP..][..2 * GROUP].split_at_mut(GROUP);
                let mut halves = [0; 2];
                for (h, half) in halves.iter_mut().enumerate() {
                    for i in 16 * h..16 * (h + 1) {
                        let q = (x[i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
                        let high = (q + 128) >> 8;
                        hi[i] = high as i8;
                        lo[i] = (q - (high << 8)) as i8;
                        *half += q;
                    }
                }
                self.half_sums[2 * cell] = halves[0] as f32;
                self.half_sums[2 * cell + 1] = halves[1] as f32;
                self.sums[cell] = (halves[0] + halves[1]) as f32;
            }
        }
    }

    /// `q` of input `i` of row `t`.
    #[inline]
    pub fn q(&self, t: usize, i: usize) -> i32 {
        let at = (i / GROUP * self.rows + t) * 2 * GROUP + i % GROUP;
        256 * i32::from(self.planes[at]) + i32::from(self.planes[at + GROUP])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEGER: ActivationForms = ActivationForms { integer: true, float: false };

    #[test]
    fn integers_are_near_and_sums_are_exact() {
        let (k, m) = (96, 19);
        let x: Vec<f32> = (0..m * k).map(|i| ((i * 7919) % 1000) as f32 / 37.0 - 13.0).collect();
        let tiles = tiles(&x, k, ActivationForms { integer: true, float: true });
        assert_eq!(tiles.iter().map(|t| t.rows).collect::<Vec<_>>(), [8, 8, 3]);
        for row in 0..m {
            let (tile, t) = (&tiles[row / ROWS], row % ROWS);
            for i in 0..k {
                let want = x[row * k + i];
                assert!((tile.q(t, i) as f32 * tile.scales[t] - want).abs() <= 0.51 * tile.scales[t]);
                assert_eq!(tile.values[i * tile.rows + t], want);
            }
            for g in 0..k / GROUP {
                let sum = |from: usize, len: usize| (from..from + len).map(|i| tile.q(t, GROUP * g + i)).sum::<i32>();
                let cell = g * tile.rows + t;
                assert_eq!(tile.sums[cell], sum(0, 32) as f32);
                assert_eq!(tile.half_sums[2 * cell..][..2], [sum(0, 16) as f32, sum(16, 16) as f32]);
            }
        }
    }

    #[test]
    fn extremes_fit_the_planes() {
        let k = 32;
        for size in [f32::MAX, 1.0, 1e-33, 3e-34, f32::MIN_POSITIVE, 1e-45] {
            let mut x = vec![0.0; k];
            (x[0], x[1], x[2]) = (size, -size, size / 2.0);
            let tile = ActivationTile::new(&x, k, INTEGER);
            let zero = size < 3.8e-34;
            assert_eq!((tile.q(0, 0), tile.q(0, 1)), if zero { (0, 0) } else { (32639, -32639) }, "{size}");
            assert_eq!(tile.scales[0] == 0.0, zero, "{size}");
        }
    }

    #[test]
    fn only_a_row_that_is_not_finite_becomes_nan() {
        let k = 32;
        let mut x = vec![1f32; 4 * k];
        (x[k], x[2 * k + 3]) = (f32::NAN, f32::NEG_INFINITY);
        let tile = ActivationTile::new(&x, k, INTEGER);
        assert_eq!(tile.scales.map(f32::is_nan)[..4], [false, true, true, false]);
    }
}
