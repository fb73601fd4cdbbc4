//! AdamW (Loshchilov and Hutter, 2019) with f32 moments, or with moments of 8 bits (Dettmers et al., 2022), and the sum of
//! squares that gradients are clipped by.

use std::sync::LazyLock;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::quant::nf4::{dynamic_map, unsigned_dynamic_map};
use super::simd::{self, Kernel, LANES, Lanes};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Values that share an absolute maximum where moments have 8 bits.
pub const BLOCK: usize = 256;
/// Bytes of a block of 8-bit moments: codes, then the f32 that they are multiples of, little-endian.
pub const BLOCK_BYTES: usize = BLOCK + 4;
/// Values a task takes.
const TASK: usize = 16 * BLOCK;

/// What a step takes besides tensors. New parameters are `p · (1 - lr · weight_decay) - lr · m̂ / (√v̂ + eps)`, `m̂` and `v̂`
/// being the moments over `1 - betaᵗ`.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// Number of this step, from 1.
    pub step: usize,
    pub lr: f32,
    pub beta1: f32,
    pub beta2: f32,
    pub eps: f32,
    pub weight_decay: f32,
    /// Gradients are multiplied by this first: clipping, or a mean.
    pub grad_scale: f32,
}

/// The same as the loops need it.
#[derive(Debug, Clone, Copy)]
struct Factors {
    scale: f32,
    /// `beta` and `1 - beta` of each moment.
    m: [f32; 2],
    v: [f32; 2],
    /// `1 - lr · weight_decay`.
    keep: f32,
    /// `lr / (1 - beta1ᵗ)`.
    size: f32,
    /// `1 / √(1 - beta2ᵗ)`.
    root: f32,
    eps: f32,
}

impl AdamwStep {
    fn factors(&self) -> Factors {
        let parts = |beta: f32| [beta, (1.0 - f64::from(beta)) as f32];
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(self.step as i32);
        Factors {
            scale: self.grad_scale,
            m: parts(self.beta1),
            v: parts(self.beta2),
            keep: (1.0 - f64::from(self.lr) * f64::from(self.weight_decay)) as f32,
            size: (f64::from(self.lr) / correction(self.beta1)) as f32,
            root: (1.0 / correction(self.beta2).sqrt()) as f32,
            eps: self.eps,
        }
    }
}

/// One step in place: `params`, `grads`, `m` and `v` are contiguous f32 of one size, four tensors with storage of their own;
/// moments are zero before the first step. `grads` are finite, as [`sum_of_squares`] shows, and stay as they are.
pub fn adamw_step(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Result<()> {
    let count = params.elem_count();
    if [grads, m, v].iter().any(|t| t.elem_count() != count) || step.step == 0 {
        return Err(refused(params, grads, m, v, step));
    }
    let factors = step.factors();
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return cuda::step(params, grads, m, v, &factors);
    }
    m.inplace_op1(&Moment { grads, second: false, factors })?;
    v.inplace_op1(&Moment { grads, second: true, factors })?;
    Ok(params.inplace_op1(&Update { m, v, factors })?)
}

/// As [`adamw_step`], with moments of 8 bits as bitsandbytes stores them: `m` and `v` are u8 `[n / 256 up, 260]`, a row being
/// 256 codes (of the signed and the unsigned dynamic map) and the f32 that they are multiples of; see [`zero_moments`]. A
/// flat buffer may hold several tensors; those that start at a multiple of 256 share no maximum.
pub fn adamw8bit_step(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Result<()> {
    let count = params.elem_count();
    let moments = [count.div_ceil(BLOCK), BLOCK_BYTES];
    if grads.elem_count() != count || [m, v].iter().any(|t| t.dims() != moments) || step.step == 0 {
        return Err(refused(params, grads, m, v, step));
    }
    let factors = step.factors();
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return cuda::step8(params, grads, m, v, &factors);
    }
    // Parameters see the new moments before these are rounded.
    params.inplace_op1(&Update8 { grads, m, v, factors })?;
    m.inplace_op1(&Moment8 { grads, second: false, factors })?;
    Ok(v.inplace_op1(&Moment8 { grads, second: true, factors })?)
}

/// 8-bit moments of `n` values before the first step.
pub fn zero_moments(n: usize, device: &Device) -> Result<Tensor> {
    // Any code times zero.
    Ok(Tensor::zeros((n.div_ceil(BLOCK), BLOCK_BYTES), DType::U8, device)?)
}

/// Sum of the squares of a contiguous f32 tensor, in an order fixed by its size. On a GPU, waits for it.
pub fn sum_of_squares(x: &Tensor) -> Result<f32> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::sum_of_squares(x);
    }
    let (storage, layout) = x.storage_and_layout();
    let x = values("sum-of-squares", &storage, layout)?;
    let mut sums = vec![0.0; x.len().div_ceil(TASK)];
    let shared = SharedMut::new(&mut sums);
    cpu::for_each(x.len().div_ceil(TASK), x.len(), |task| {
        // SAFETY: a sum a task.
        let sum = unsafe { shared.slice(task, 1) };
        simd::run(Squares { x: &x[cpu::chunk(task, TASK, x.len())], sum: &mut sum[0] });
    });
    Ok(total(&sums))
}

/// Sum of partial sums: in f64, since there may be many.
fn total(sums: &[f32]) -> f32 {
    sums.iter().map(|s| f64::from(*s)).sum::<f64>() as f32
}

fn refused(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Error {
    Error::internal(format!(
        "step {} of {:?} with gradients {:?} and moments {:?} and {:?}",
        step.step,
        params.shape(),
        grads.shape(),
        m.shape(),
        v.shape()
    ))
}

/// The values of a contiguous f32 tensor on the CPU.
fn values<'a>(op: &'static str, storage: &'a Storage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match storage {
        Storage::Cpu(storage) => cpu::slice(op, storage, layout),
        _ => candle_core::bail!("{op} of tensors on different devices"),
    }
}

/// The bytes of contiguous 8-bit moments on the CPU.
fn bytes<'a>(storage: &'a Storage, layout: &Layout) -> candle_core::Result<&'a [u8]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::U8(bytes)), Some((start, end))) => Ok(&bytes[start..end]),
        _ => candle_core::bail!("8-bit moments are contiguous u8 on the parameters' device"),
    }
}

/// A moment's decayed average: of gradients, or of their squares.
struct Moment<'a> {
    grads: &'a Tensor,
    second: bool,
    factors: Factors,
}

impl InplaceOp1 for Moment<'_> {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (storage, layout) = self.grads.storage_and_layout();
        let grads = values(self.name(), &storage, layout)?;
        let moment = cpu::slice_mut(self.name(), s, l)?;
        let (count, moment) = (moment.len(), SharedMut::new(moment));
        cpu::for_each(count.div_ceil(TASK), count, |task| {
            let range = cpu::chunk(task, TASK, count);
            // SAFETY: inside the tensor, and each value belongs to one task.
            let moment = unsafe { moment.slice(range.start, range.len()) };
            simd::run(Average { moment, grads: &grads[range], second: self.second, factors: &self.factors });
        });
        Ok(())
    }
}

struct Update<'a> {
    m: &'a Tensor,
    v: &'a Tensor,
    factors: Factors,
}

impl InplaceOp1 for Update<'_> {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let ((m, m_layout), (v, v_layout)) = (self.m.storage_and_layout(), self.v.storage_and_layout());
        let (m, v) = (values(self.name(), &m, m_layout)?, values(self.name(), &v, v_layout)?);
        let params = cpu::slice_mut(self.name(), s, l)?;
        let (count, params) = (params.len(), SharedMut::new(params));
        cpu::for_each(count.div_ceil(TASK), 8 * count, |task| {
            let range = cpu::chunk(task, TASK, count);
            // SAFETY: inside the tensor, and each value belongs to one task.
            let params = unsafe { params.slice(range.start, range.len()) };
            simd::run(Move { params, m: &m[range.clone()], v: &v[range], factors: &self.factors });
        });
        Ok(())
    }
}

struct Update8<'a> {
    grads: &'a Tensor,
    m: &'a Tensor,
    v: &'a Tensor,
    factors: Factors,
}

impl InplaceOp1 for Update8<'_> {
    fn name(&self) -> &'static str {
        "adamw8bit-update"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (storage, layout) = self.grads.storage_and_layout();
        let grads = values(self.name(), &storage, layout)?;
        let ((m, m_layout), (v, v_layout)) = (self.m.storage_and_layout(), self.v.storage_and_layout());
        let (m, v) = (bytes(&m, m_layout)?, bytes(&v, v_layout)?);
        let params = cpu::slice_mut(self.name(), s, l)?;
        let (count, params) = (params.len(), SharedMut::new(params));
        let factors = &self.factors;
        cpu::for_each(count.div_ceil(BLOCK), 16 * count, |block| {
            let range = cpu::chunk(block, BLOCK, count);
            // SAFETY: inside the tensor, and each value belongs to one task.
            let params = unsafe { params.slice(range.start, range.len()) };
            let (grads, at) = (&grads[range], block * BLOCK_BYTES);
            let m = next(&m[at..at + BLOCK_BYTES], grads, false, factors);
            let v = next(&v[at..at + BLOCK_BYTES], grads, true, factors);
            simd::run(Move { params, m: &m, v: &v, factors });
        });
        Ok(())
    }
}

/// A moment of 8 bits: read, averaged, rounded.
struct Moment8<'a> {
    grads: &'a Tensor,
    second: bool,
    factors: Factors,
}

impl InplaceOp1 for Moment8<'_> {
    fn name(&self) -> &'static str {
        "adamw8bit-moment"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (storage, layout) = self.grads.storage_and_layout();
        let grads = values(self.name(), &storage, layout)?;
        let (CpuStorage::U8(moment), Some((start, end))) = (s, l.contiguous_offsets()) else {
            candle_core::bail!("8-bit moments are contiguous u8")
        };
        let moment = SharedMut::new(&mut moment[start..end]);
        cpu::for_each(grads.len().div_ceil(BLOCK), 64 * grads.len(), |block| {
            // SAFETY: inside the tensor, and each block belongs to one task.
            let moment = unsafe { moment.slice(block * BLOCK_BYTES, BLOCK_BYTES) };
            let grads = &grads[cpu::chunk(block, BLOCK, grads.len())];
            let values = next(moment, grads, self.second, &self.factors);
            let max = values.iter().fold(0f32, |max, x| max.max(x.abs()));
            let inverse = if max > 0.0 { 1.0 / max } else { 0.0 };
            let (codes, scale) = moment.split_at_mut(BLOCK);
            let midpoints = midpoints(self.second);
            codes.iter_mut().zip(values).for_each(|(code, x)| *code = nearest(midpoints, x * inverse));
            scale.copy_from_slice(&max.to_le_bytes());
        });
        Ok(())
    }
}

/// A block's moment after these gradients, in f32; zero past them.
fn next(block: &[u8], grads: &[f32], second: bool, factors: &Factors) -> [f32; BLOCK] {
    let (codes, scale) = block.split_at(BLOCK);
    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
    let map = map(second);
    let mut moment = [0.0; BLOCK];
    let moments = &mut moment[..grads.len()];
    moments.iter_mut().zip(codes).for_each(|(x, code)| *x = map[usize::from(*code)] * scale);
    simd::run(Average { moment: moments, grads, second, factors });
    moment
}

/// What codes of the first or second moment stand for, ascending.
fn map(second: bool) -> &'static [f32; 256] {
    if second { unsigned_dynamic_map() } else { dynamic_map() }
}

/// Halfway between neighbours of a map.
fn midpoints(second: bool) -> &'static [f32; 255] {
    static MIDPOINTS: LazyLock<[[f32; 255]; 2]> = LazyLock::new(|| {
        [false, true].map(|second| std::array::from_fn(|i| (map(second)[i] + map(second)[i + 1]) / 2.0))
    });
    &MIDPOINTS[usize::from(second)]
}

/// The code nearest to `x`, of two as near the lower: how many midpoints are below it, by bisection.
fn nearest(midpoints: &[f32; 255], x: f32) -> u8 {
    let mut code = 0;
    for half in [128, 64, 32, 16, 8, 4, 2, 1] {
        if midpoints[code + half - 1] < x {
            code += half;
        }
    }
    code as u8
}

/// `moment = beta · moment + (1 - beta) · g`, or `g²`.
struct Average<'a> {
    moment: &'a mut [f32],
    grads: &'a [f32],
    second: bool,
    factors: &'a Factors,
}

impl Kernel for Average<'_> {
    /// Plain loops: the compiler vectorises them for the instruction set it is inlined into.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Factors { scale, m, v, .. } = *self.factors;
        if self.second {
            for (x, g) in self.moment.iter_mut().zip(self.grads) {
                let g = g * scale;
                *x = v[0] * *x + v[1] * (g * g);
            }
        } else {
            for (x, g) in self.moment.iter_mut().zip(self.grads) {
                *x = m[0] * *x + m[1] * (g * scale);
            }
        }
    }
}

/// The step of the parameters.
struct Move<'a> {
    params: &'a mut [f32],
    m: &'a [f32],
    v: &'a [f32],
    factors: &'a Factors,
}

impl Kernel for Move<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Factors { keep, size, root, eps, .. } = *self.factors;
        for ((p, m), v) in self.params.iter_mut().zip(self.m).zip(self.v) {
            *p = *p * keep - size * (m / (v.sqrt() * root + eps));
        }
    }
}

struct Squares<'a> {
    x: &'a [f32],
    sum: &'a mut f32,
}

impl Kernel for Squares<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (chunks, tail) = self.x.as_chunks::<LANES>();
        let mut squares = L::splat(0.0);
        for chunk in chunks {
            let x = L::load(chunk);
            squares = x.mul_add(x, squares);
        }
        let x: L = simd::load_part(tail);
        *self.sum = x.mul_add(x, squares).sum();
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;
    use crate::ops::reference::{assert_close, random};

    const STEP: AdamwStep = AdamwStep {
        step: 1,
        lr: 0.01,
        beta1: 0.875,
        beta2: 0.999_023_44,
        eps: 1e-8,
        weight_decay: 0.1,
        grad_scale: 1.0,
    };

    fn tensor(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, values.len(), &Device::Cpu).unwrap()
    }

    fn to_vec(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn golden(name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(include_bytes!("../../tests/goldens/adamw.safetensors")).unwrap();
        let bytes = file.tensor(name).unwrap().data().to_vec();
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    }

    fn golden_codes(name: &str) -> Vec<u8> {
        let file = SafeTensors::deserialize(include_bytes!("../../tests/goldens/adamw.safetensors")).unwrap();
        file.tensor(name).unwrap().data().to_vec()
    }

    #[test]
    fn maps_are_those_of_bitsandbytes() {
        assert_eq!(map(false).to_vec(), golden("m_map"));
        assert_eq!(map(true).to_vec(), golden("v_map"));
    }

    /// Runs the golden file's steps, its gradients doubled and halved again, and compares parameters after each.
    fn check(name: &str, tolerance: f64, run: impl Fn(&Tensor, &Tensor, &AdamwStep)) {
        let start = golden("start");
        let params = tensor(&start);
        let (grads, want) = (golden("grads"), golden(name));
        for (i, (grads, want)) in grads.chunks(start.len()).zip(want.chunks(start.len())).enumerate() {
            let doubled: Vec<f32> = grads.iter().map(|g| 2.0 * g).collect();
            run(&params, &tensor(&doubled), &AdamwStep { step: i + 1, grad_scale: 0.5, ..STEP });
            let want: Vec<f64> = want.iter().map(|p| f64::from(*p)).collect();
            assert_close(&to_vec(&params), &want, tolerance);
        }
    }

    #[test]
    fn steps_are_those_of_torch() {
        let zeros = || tensor(&vec![0.0; golden("start").len()]);
        let (m, v) = (zeros(), zeros());
        check("adamw", 1e-6, |params, grads, step| adamw_step(params, grads, &m, &v, step).unwrap());
    }

    #[test]
    fn steps_with_8_bits_are_those_of_bitsandbytes() {
        let count = golden("start").len();
        let moments = || zero_moments(count, &Device::Cpu).unwrap();
        let (m, v) = (moments(), moments());
        check("adamw8bit", 1e-6, |params, grads, step| adamw8bit_step(params, grads, &m, &v, step).unwrap());
        for (moment, name) in [(m, "m"), (v, "v")] {
            let rows = moment.to_vec2::<u8>().unwrap();
            let codes: Vec<u8> = rows.iter().flat_map(|row| row[..BLOCK].to_vec()).take(count).collect();
            assert_eq!(codes, golden_codes(name), "{name}");
            let maxima: Vec<f32> =
                rows.iter().map(|row| f32::from_le_bytes(row[BLOCK..].try_into().unwrap())).collect();
            assert_close(&maxima, &golden(&format!("{name}_max")).into_iter().map(f64::from).collect::<Vec<_>>(), 1e-6);
        }
    }

    #[test]
    fn codes_are_nearest() {
        for second in [false, true] {
            let map = map(second);
            for x in random(1, 5000).into_iter().chain([-2.0, 0.0, 1.0, 2.0]).chain(*midpoints(second)) {
                let code = usize::from(nearest(midpoints(second), x));
                let best = map.iter().fold(f32::INFINITY, |best, y| best.min((y - x).abs()));
                assert!((map[code] - x).abs() <= best + 1e-7, "{x}: {code}");
            }
        }
    }

    /// Long enough for several tasks, and for the last to be short.
    #[test]
    fn long_tensors_and_sums_match_f64() {
        let n = 5 * TASK + 77;
        let (p, g) = (random(1, n), random(2, n));
        let (params, m, v) = (tensor(&p), tensor(&vec![0.0; n]), tensor(&vec![0.0; n]));
        let params8 = tensor(&p);
        let (m8, v8) = (zero_moments(n, &Device::Cpu).unwrap(), zero_moments(n, &Device::Cpu).unwrap());
        adamw_step(&params, &tensor(&g), &m, &v, &STEP).unwrap();
        adamw8bit_step(&params8, &tensor(&g), &m8, &v8, &STEP).unwrap();
        // In the first step moments are gradients and their squares, so every value moves by the rate.
        let moved = |(p, g): (&f32, &f32)| f64::from(*p) * (1.0 - 0.001) - 0.01 * f64::from(g.signum());
        let want: Vec<f64> = p.iter().zip(&g).map(moved).collect();
        assert_close(&to_vec(&params), &want, 1e-5);
        assert_close(&to_vec(&params8), &want, 1e-5);
        let sum: f64 = g.iter().map(|g| f64::from(*g).powi(2)).sum();
        assert!((f64::from(sum_of_squares(&tensor(&g)).unwrap()) / sum - 1.0).abs() < 1e-6);
    }

    #[test]
    fn refuses_other_shapes() {
        let (four, five) = (tensor(&[0.0; 4]), tensor(&[0.0; 5]));
        let moments = zero_moments(4, &Device::Cpu).unwrap();
        assert!(adamw_step(&four, &five, &four, &four, &STEP).is_err());
        assert!(adamw_step(&four, &five, &five, &five, &STEP).is_err());
        assert!(adamw8bit_step(&four, &five, &moments, &moments, &STEP).is_err());
        let zeroth = AdamwStep { step: 0, ..STEP };
        assert!(adamw8bit_step(&four, &tensor(&[0.0; 4]), &moments, &moments, &zeroth).is_err());
    }
}
