//! Rotary position embedding (RoPE, Su et al., 2021) in Hugging Face's order: dimensions `i` and `i + head_dim / 2` of a head are
//! rotated as a pair.

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::simd::{self, Lanes, SimdKernel};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows of a task.
const ROWS: usize = 16;

/// The cosines and sines of every position, computed once, so that a step only multiplies.
pub struct RopeTable {
    /// `[positions, head_dim]` f32: `head_dim / 2` cosines, then as many sines.
    values: Tensor,
}

impl RopeTable {
    /// The table of positions `0..positions` on a device, from the model's `head_dim / 2` inverse frequencies. The angle is a product
    /// in f32, as in transformers; its cosine and sine are correctly rounded. Errors: the device has no memory for it.
    pub fn new(inv_freq: &[f32], positions: usize, device: &Device) -> Result<Self> {
        let mut values = Vec::with_capacity(positions * inv_freq.len() * 2);
        for position in 0..positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            values.extend(inv_freq.iter().map(|f| angle(f).cos() as f32));
            values.extend(inv_freq.iter().map(|f| angle(f).sin() as f32));
        }
        Ok(Self { values: Tensor::from_vec(values, (positions, inv_freq.len() * 2), device)? })
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.values.dims()[0]
    }

    /// Dimensions of a head.
    pub fn head_dim(&self) -> usize {
        self.values.dims()[1]
    }

    /// The table `[positions, head_dim]`: cosines, then sines.
    #[cfg(feature = "cuda")]
    pub(super) fn values(&self) -> &Tensor {
        &self.values
    }

    /// Checks positions. Errors: a position outside the table.
    pub(super) fn check(&self, positions: &[u32]) -> Result<()> {
        match positions.iter().find(|&&p| p as usize >= self.positions()) {
            Some(p) => Err(Error::invalid(format!("position {p} is past the model's {} positions", self.positions()))),
            None => Ok(()),
        }
    }
}

/// Rotates the first `heads` heads of each row of `x [T, >= heads·head_dim]` in place by their `positions [T]`. In a fused qkv
/// row these are the query and key heads. f32; bf16 on a GPU, where serving rotates in [`super::attention::append`] instead.
/// Errors: shapes that do not fit, a position outside the table.
pub fn apply_rope(x: &Tensor, heads: usize, positions: &[u32], table: &RopeTable) -> Result<()> {
    rotate(x, heads, positions, table, Direction::Forward)
}

/// Turns the gradient of the result of [`apply_rope`] into that of its input, in place: the rotation by the negative angle, which is
/// also the inverse. Shapes, dtypes and errors are those of [`apply_rope`].
pub fn apply_rope_backward(dx: &Tensor, heads: usize, positions: &[u32], table: &RopeTable) -> Result<()> {
    rotate(dx, heads, positions, table, Direction::Backward)
}

/// The sign of the angles.
#[derive(Clone, Copy)]
enum Direction {
    Forward,
    Backward,
}

impl Direction {
    /// Factor of the sines.
    fn sign(self) -> f32 {
        match self {
            Self::Forward => 1.0,
            Self::Backward => -1.0,
        }
    }
}

fn rotate(x: &Tensor, heads: usize, positions: &[u32], table: &RopeTable, direction: Direction) -> Result<()> {
    let (t, width) = x.dims2()?;
    if positions.len() != t || width < heads * table.head_dim() {
        return Err(Error::internal(format!(
            "RoPE on {heads} heads of {} dimensions in {:?} with {} positions",
            table.head_dim(),
            x.shape(),
            positions.len()
        )));
    }
    table.check(positions)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::rotate(x, heads, positions, table, direction);
    }
    Ok(x.inplace_op1(&Rotate { heads, positions, table, sign: direction.sign() })?)
}

struct Rotate<'a> {
    heads: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    /// Factor of the sines.
    sign: f32,
}

impl InplaceOp1 for Rotate<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (t, width) = l.shape().dims2()?;
        let head_dim = self.table.head_dim();
        let rotated = self.heads * head_dim;
        let table = cpu::values("rope", &self.table.values)?;
        let table = &table[..];
        let x = SharedMut::new(cpu::slice_mut("rope", s, l)?);
        cpu::for_each(t.div_ceil(ROWS), t * rotated, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                let angles = &table[self.positions[row] as usize * head_dim..][..head_dim];
                // SAFETY: inside the tensor, since `rotated <= width`; each row belongs to one task.
                let x = unsafe { x.slice(row * width, rotated) };
                simd::run(RopeRow { x, angles, sign: self.sign });
            }
        });
        Ok(())
    }
}

/// The rotated heads of one row.
struct RopeRow<'a> {
    x: &'a mut [f32],
    /// Cosines, then sines.
    angles: &'a [f32],
    /// Factor of the sines: -1 rotates back.
    sign: f32,
}

impl SimdKernel for RopeRow<'_> {
    /// Plain loops, which the compiler vectorises for the instruction set they are inlined into.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.angles.len() / 2;
        let (cos, sin) = self.angles.split_at(half);
        for head in self.x.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let sin = sin * self.sign;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, dot, random};

    #[test]
    fn matches_f64_and_leaves_value_heads_alone() {
        for (heads, head_dim, t) in [(1, 2, 1), (3, 4, 5), (4, 12, 40), (12, 64, 33), (2, 80, 7)] {
            let inv_freq: Vec<f32> =
                (0..head_dim / 2).map(|i| 100f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
            let table = RopeTable::new(&inv_freq, 300, &Device::Cpu).unwrap();
            let width = (heads + 1) * head_dim;
            let x = random(1, t * width);
            let positions: Vec<u32> = (0..t as u32).map(|i| (i * 97 + 5) % 300).collect();
            let y = Tensor::from_slice(&x, (t, width), &Device::Cpu).unwrap();
            apply_rope(&y, heads, &positions, &table).unwrap();
            let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut expected: Vec<f64> = x.iter().map(|&x| x.into()).collect();
            for (row, &position) in positions.iter().enumerate() {
                for head in 0..heads {
                    for (i, f) in inv_freq.iter().enumerate() {
                        let (sin, cos) = (f64::from(position) * f64::from(*f)).sin_cos();
                        let at = row * width + head * head_dim + i;
                        let (a, b) = (f64::from(x[at]), f64::from(x[at + head_dim / 2]));
                        expected[at] = a * cos - b * sin;
                        expected[at + head_dim / 2] = b * cos + a * sin;
                    }
                }
            }
            assert_close(&y, &expected, 1e-5);
            for row in 0..t {
                let values = row * width + heads * head_dim..(row + 1) * width;
                assert_eq!(y[values.clone()], x[values]);
            }
        }
    }

    #[test]
    fn refuses_a_position_past_the_table() {
        let table = RopeTable::new(&[1.0, 0.1], 8, &Device::Cpu).unwrap();
        let x = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(apply_rope(&x, 1, &[7], &table).is_ok());
        let error = apply_rope(&x, 1, &[8], &table).unwrap_err();
        assert!(error.message.contains("position 8"), "{error}");
    }

    #[test]
    fn backward_is_the_gradient_and_the_inverse() {
        let (heads, head_dim, t) = (3, 12, 20);
        let table = RopeTable::new(&[1.0, 0.5, 0.2, 0.1, 0.03, 0.01], 300, &Device::Cpu).unwrap();
        let positions: Vec<u32> = (0..t as u32).map(|i| (i * 97 + 5) % 300).collect();
        let rotated = |x: &[f32], direction| -> Vec<f32> {
            let y = Tensor::from_slice(x, (t, (heads + 1) * head_dim), &Device::Cpu).unwrap();
            rotate(&y, heads, &positions, &table, direction).unwrap();
            y.flatten_all().unwrap().to_vec1().unwrap()
        };
        let forward = |x: &[f32]| rotated(x, Direction::Forward);
        let backward = |x: &[f32]| rotated(x, Direction::Backward);
        let (x, dy) = (random(1, t * (heads + 1) * head_dim), random(2, t * (heads + 1) * head_dim));
        let exact = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_close(&backward(&forward(&x)), &exact(&x), 1e-6);
        // The rotation is linear, so its gradient is its adjoint: dy · forward(x) = backward(dy) · x.
        let (forward, backward) = (dot(&exact(&forward(&x)), &dy), dot(&exact(&backward(&dy)), &x));
        assert!((forward - backward).abs() < 1e-5 * forward.abs().max(1.0), "{forward} and {backward}");
    }
}
