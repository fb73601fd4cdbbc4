//! A product of small f32 matrices within one task, on one thread. Attention's products and the gradients of linears use it.

use super::simd::{LANES, Lanes, SimdKernel};

/// `c [rows, columns] += a [rows, inner] · b [inner, columns]`, where `b` and `c` are in vectors. Each element is summed over `inner` in
/// order and then added to `c`, so its bits do not depend on the other sizes.
pub struct TaskGemm<'a> {
    pub rows: usize,
    pub inner: usize,
    /// Columns of `b` and `c`, in vectors.
    pub columns: usize,
    pub a: &'a [f32],
    pub a_strides: Strides,
    pub b: &'a [[f32; LANES]],
    /// Vectors from one row of `b` to the next.
    pub b_stride: usize,
    pub c: &'a mut [[f32; LANES]],
    /// Vectors from one row of `c` to the next.
    pub c_stride: usize,
}

/// Distances in a matrix, in values.
#[derive(Clone, Copy)]
pub struct Strides {
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
}

impl SimdKernel for TaskGemm<'_> {
    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        for start in (0..self.rows).step_by(L::ROWS) {
            match L::ROWS.min(self.rows - start) {
                1 => self.rows::<L, 1>(start),
                2 => self.rows::<L, 2>(start),
                3 => self.rows::<L, 3>(start),
                _ => self.rows::<L, 4>(start),
            }
        }
    }
}

impl TaskGemm<'_> {
    #[inline(always)]
    fn rows<L: Lanes, const R: usize>(&mut self, start: usize) {
        let mut column = 0;
        while column + 4 <= self.columns {
            self.tile::<L, R, 4>(start, column);
            column += 4;
        }
        while column < self.columns {
            self.tile::<L, R, 1>(start, column);
            column += 1;
        }
    }

    /// `R` rows by `C` vectors of columns.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const C: usize>(&mut self, start: usize, column: usize) {
        let Strides { row, column: step } = self.a_strides;
        let a = &self.a[start * row..];
        let mut sum = [[L::splat(0.0); C]; R];
        for i in 0..self.inner {
            let from = &self.b[i * self.b_stride + column..][..C];
            let mut b = [L::splat(0.0); C];
            for c in 0..C {
                b[c] = L::load(&from[c]);
            }
            for r in 0..R {
                let a = L::splat(a[r * row + i * step]);
                for c in 0..C {
                    sum[r][c] = a.mul_add(b[c], sum[r][c]);
                }
            }
        }
        for r in 0..R {
            let to = &mut self.c[(start + r) * self.c_stride + column..][..C];
            for c in 0..C {
                L::load(&to[c]).add(sum[r][c]).store(&mut to[c]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::{assert_close, random};
    use crate::ops::simd;

    #[test]
    fn matches_f64_with_any_strides() {
        for (rows, inner, columns) in [(1, 1, 1), (4, 3, 4), (5, 64, 7), (7, 17, 3), (66, 130, 9)] {
            let (a, b) = (random(1, rows * inner), random(2, inner * (columns + 1) * LANES));
            let c = random(3, rows * (columns + 2) * LANES);
            for a_strides in [Strides { row: inner, column: 1 }, Strides { row: 1, column: rows }] {
                let mut out = c.clone();
                simd::run(TaskGemm {
                    rows,
                    inner,
                    columns,
                    a: &a,
                    a_strides,
                    b: b.as_chunks().0,
                    b_stride: columns + 1,
                    c: out.as_chunks_mut().0,
                    c_stride: columns + 2,
                });
                let mut expected: Vec<f64> = c.iter().map(|&c| c.into()).collect();
                for (row, expected) in expected.chunks_mut((columns + 2) * LANES).enumerate() {
                    for (column, expected) in expected[..columns * LANES].iter_mut().enumerate() {
                        for i in 0..inner {
                            let a = a[row * a_strides.row + i * a_strides.column];
                            *expected += f64::from(a) * f64::from(b[i * (columns + 1) * LANES + column]);
                        }
                    }
                }
                assert_close(&out, &expected, 1e-6);
            }
        }
    }
}
