//! Rotary position embedding (Su et al., 2021) in Hugging Face's order: dimension `i` turns with `i + head_dim / 2`.

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::simd::{self, Kernel, Lanes};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows a task takes.
const ROWS: usize = 16;

/// Cosines and sines of every position, so that a step only multiplies.
pub struct RopeTable {
    /// `[positions, head_dim]` f32: per position `head_dim / 2` cosines, then as many sines.
    values: Tensor,
}

impl RopeTable {
    /// For positions `0..positions` and the `head_dim / 2` inverse frequencies of the model, on a device. The angle is the
    /// product in f32, as transformers computes it, its cosine and sine correctly rounded. Errors: no memory for it.
    pub fn new(inv_freq: &[f32], positions: usize, device: &Device) -> Result<Self> {
        let mut values = Vec::with_capacity(positions * inv_freq.len() * 2);
        for position in 0..positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            values.extend(inv_freq.iter().map(|f| angle(f).cos() as f32));
            values.extend(inv_freq.iter().map(|f| angle(f).sin() as f32));
        }
        Ok(Self { values: Tensor::from_vec(values, (positions, inv_freq.len() * 2), device)? })
    }

    /// Positions it holds.
    pub fn positions(&self) -> usize {
        self.values.dims()[0]
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.values.dims()[1]
    }

    /// Its `[positions, head_dim]`.
    #[cfg(feature = "cuda")]
    pub(super) fn values(&self) -> &Tensor {
        &self.values
    }

    /// Errors when it does not hold all of `positions`.
    pub(super) fn check(&self, positions: &[u32]) -> Result<()> {
        match positions.iter().find(|&&p| p as usize >= self.positions()) {
            Some(p) => Err(Error::invalid(format!("position {p}, but the model has {}", self.positions()))),
            None => Ok(()),
        }
    }
}

/// Turns the first `heads` heads of each row of `x [T, >= heads·head_dim]` in place by their `positions [T]`, or `back`, which
/// is the gradient. In a fused qkv row these are the query and key heads. f32, on a GPU bf16; there, serving turns in
/// [`super::attention::append`] on the way.
pub fn turn(x: &Tensor, heads: usize, positions: &[u32], table: &RopeTable, back: bool) -> Result<()> {
    let (t, width) = x.dims2()?;
    if positions.len() != t || width < heads * table.head_dim() {
        return Err(Error::internal(format!(
            "rope of {:?} with {heads} heads of {} and {} positions",
            x.shape(),
            table.head_dim(),
            positions.len()
        )));
    }
    table.check(positions)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::turn(x, heads, positions, table, back);
    }
    Ok(x.inplace_op1(&Turn { heads, positions, table, back })?)
}

struct Turn<'a> {
    heads: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    back: bool,
}

impl InplaceOp1 for Turn<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (t, width) = l.shape().dims2()?;
        let head_dim = self.table.head_dim();
        let turned = self.heads * head_dim;
        let table = cpu::values("rope", &self.table.values)?;
        let (table, sign) = (&table[..], if self.back { -1.0 } else { 1.0 });
        let x = SharedMut::new(cpu::slice_mut("rope", s, l)?);
        cpu::for_each(t.div_ceil(ROWS), t * turned, |task| {
            for row in cpu::chunk(task, ROWS, t) {
                let turn = &table[self.positions[row] as usize * head_dim..][..head_dim];
                // SAFETY: inside the tensor, since `turned <= width`, and each row belongs to one task.
                let x = unsafe { x.slice(row * width, turned) };
                simd::run(Row { x, turn, sign });
            }
        });
        Ok(())
    }
}

struct Row<'a> {
    x: &'a mut [f32],
    /// Cosines, then sines.
    turn: &'a [f32],
    /// Of the sines: -1 turns back.
    sign: f32,
}

impl Kernel for Row<'_> {
    /// Plain loops: the compiler vectorises them for the instruction set it is inlined into.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let half = self.turn.len() / 2;
        let (cos, sin) = self.turn.split_at(half);
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
    fn matches_f64_and_leaves_values_alone() {
        for (heads, head_dim, t) in [(1, 2, 1), (3, 4, 5), (4, 12, 40), (12, 64, 33), (2, 80, 7)] {
            let inv_freq: Vec<f32> =
                (0..head_dim / 2).map(|i| 100f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
            let table = RopeTable::new(&inv_freq, 300, &Device::Cpu).unwrap();
            let width = (heads + 1) * head_dim;
            let x = random(1, t * width);
            let positions: Vec<u32> = (0..t as u32).map(|i| (i * 97 + 5) % 300).collect();
            let y = Tensor::from_slice(&x, (t, width), &Device::Cpu).unwrap();
            turn(&y, heads, &positions, &table, false).unwrap();
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
    fn a_position_past_the_table_is_refused() {
        let table = RopeTable::new(&[1.0, 0.1], 8, &Device::Cpu).unwrap();
        let x = Tensor::zeros((1, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        assert!(turn(&x, 1, &[7], &table, false).is_ok());
        let error = turn(&x, 1, &[8], &table, false).unwrap_err();
        assert!(error.message.contains("position 8"), "{error}");
    }

    #[test]
    fn turning_back_is_the_gradient_and_the_inverse() {
        let (heads, head_dim, t) = (3, 12, 20);
        let table = RopeTable::new(&[1.0, 0.5, 0.2, 0.1, 0.03, 0.01], 300, &Device::Cpu).unwrap();
        let positions: Vec<u32> = (0..t as u32).map(|i| (i * 97 + 5) % 300).collect();
        let turned = |x: &[f32], back: bool| -> Vec<f32> {
            let y = Tensor::from_slice(x, (t, (heads + 1) * head_dim), &Device::Cpu).unwrap();
            turn(&y, heads, &positions, &table, back).unwrap();
            y.flatten_all().unwrap().to_vec1().unwrap()
        };
        let (x, dy) = (random(1, t * (heads + 1) * head_dim), random(2, t * (heads + 1) * head_dim));
        let exact = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_close(&turned(&turned(&x, false), true), &exact(&x), 1e-6);
        // It is linear, so that the gradient is what keeps the product: dy · turn(x) = back(dy) · x.
        let (forward, backward) = (dot(&exact(&turned(&x, false)), &dy), dot(&exact(&turned(&dy, true)), &x));
        assert!((forward - backward).abs() < 1e-5 * forward.abs().max(1.0), "{forward} and {backward}");
    }
}
