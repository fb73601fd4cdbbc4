//! AdamW (Loshchilov and Hutter, 2019) with f32 moments or 8-bit moments (Dettmers et al., 2022), and the sum of squares that
//! gradient clipping needs.

use std::sync::LazyLock;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::quant::nf4::{dynamic_map, unsigned_dynamic_map};
use super::simd::{self, LANES, Lanes, SimdKernel};
use crate::gpu::constants::ADAMW_BLOCK;
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Values of a block of 8-bit moments, which share a scale.
const BLOCK: usize = ADAMW_BLOCK;
/// Bytes of a block of 8-bit moments: the codes, then their scale as f32, little-endian.
const BLOCK_BYTES: usize = BLOCK + 4;
/// Values of a task.
const TASK: usize = 16 * BLOCK;

/// The numbers of one step. The new parameters are `p · (1 - lr · weight_decay) - lr · m̂ / (√v̂ + eps)`, where `m̂` and `v̂` are the
/// moments divided by `1 - betaᵗ`.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// Number of the step, from 1: the `t` of the bias correction.
    pub step: usize,
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment, the mean of the gradients.
    pub beta1: f32,
    /// Decay of the second moment, the mean of their squares.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Factor of the gradients, applied first: clipping, a mean over tokens.
    pub grad_scale: f32,
}

/// The factors of a step, as the loops and the kernels take them.
#[derive(Debug, Clone, Copy)]
struct AdamwFactors {
    grad_scale: f32,
    first: MomentDecay,
    second: MomentDecay,
    /// `1 - lr · weight_decay`.
    keep: f32,
    /// `lr / (1 - beta1ᵗ)`.
    step_size: f32,
    /// `1 / √(1 - beta2ᵗ)`.
    root_correction: f32,
    eps: f32,
}

/// `beta` and `1 - beta` of a moment: the factors of its old value and of the new gradient.
#[derive(Debug, Clone, Copy)]
struct MomentDecay {
    old: f32,
    new: f32,
}

/// The first moment averages the gradients, the second their squares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    First,
    Second,
}

impl AdamwStep {
    fn factors(&self) -> AdamwFactors {
        let decay = |beta: f32| MomentDecay { old: beta, new: (1.0 - f64::from(beta)) as f32 };
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(self.step as i32);
        AdamwFactors {
            grad_scale: self.grad_scale,
            first: decay(self.beta1),
            second: decay(self.beta2),
            keep: (1.0 - f64::from(self.lr) * f64::from(self.weight_decay)) as f32,
            step_size: (f64::from(self.lr) / correction(self.beta1)) as f32,
            root_correction: (1.0 / correction(self.beta2).sqrt()) as f32,
            eps: self.eps,
        }
    }
}

/// One step in place. `params`, `grads`, `m` and `v` are contiguous f32 tensors of one size, each with a storage of its own. The
/// moments `m` and `v` are zero before the first step. `grads` must be finite, which [`sum_of_squares`] shows, and do not change.
/// Errors: different sizes, step 0.
pub fn adamw_step(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Result<()> {
    let count = params.elem_count();
    if [grads, m, v].iter().any(|t| t.elem_count() != count) || step.step == 0 {
        return Err(misfit(params, grads, m, v, step));
    }
    let factors = step.factors();
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return cuda::step(params, grads, m, v, &factors);
    }
    m.inplace_op1(&UpdateMoment { grads, moment: Moment::First, factors })?;
    v.inplace_op1(&UpdateMoment { grads, moment: Moment::Second, factors })?;
    Ok(params.inplace_op1(&UpdateParams { m, v, factors })?)
}

/// [`adamw_step`] with 8-bit moments, as in bitsandbytes. `m` and `v` are u8 `[⌈n / 256⌉, 260]`, made by [`zero_moments`]. A row is a
/// block: 256 codes of the signed (`m`) or unsigned (`v`) dynamic map, and the f32 scale of their values. Tensors that start at
/// multiples of 256 in a flat buffer share no block. Errors: those of [`adamw_step`].
pub fn adamw8bit_step(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Result<()> {
    let count = params.elem_count();
    let moments = [count.div_ceil(BLOCK), BLOCK_BYTES];
    if grads.elem_count() != count || [m, v].iter().any(|t| t.dims() != moments) || step.step == 0 {
        return Err(misfit(params, grads, m, v, step));
    }
    let factors = step.factors();
    #[cfg(feature = "cuda")]
    if params.device().is_cuda() {
        return cuda::step8(params, grads, m, v, &factors);
    }
    // The parameters take the new moments before these are rounded to 8 bits.
    params.inplace_op1(&UpdateParams8bit { grads, m, v, factors })?;
    m.inplace_op1(&UpdateMoment8bit { grads, moment: Moment::First, factors })?;
    Ok(v.inplace_op1(&UpdateMoment8bit { grads, moment: Moment::Second, factors })?)
}

/// 8-bit moments of `n` values before the first step: u8 `[⌈n / 256⌉, 260]`. Errors: the device has no memory for them.
pub fn zero_moments(n: usize, device: &Device) -> Result<Tensor> {
    // The scale is zero, so the codes do not matter.
    Ok(Tensor::zeros((n.div_ceil(BLOCK), BLOCK_BYTES), DType::U8, device)?)
}

/// The sum of the squares of a contiguous f32 tensor, added in an order that depends on its size alone. On a GPU, waits for the
/// result. Errors: a tensor that is not contiguous f32.
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
        // SAFETY: each task has one sum of its own.
        let sum = unsafe { shared.slice(task, 1) };
        simd::run(SquaresSum { x: &x[cpu::chunk(task, TASK, x.len())], sum: &mut sum[0] });
    });
    Ok(total(&sums))
}

/// The sum of partial sums, in f64 because there may be many.
fn total(sums: &[f32]) -> f32 {
    sums.iter().map(|s| f64::from(*s)).sum::<f64>() as f32
}

fn misfit(params: &Tensor, grads: &Tensor, m: &Tensor, v: &Tensor, step: &AdamwStep) -> Error {
    Error::internal(format!(
        "AdamW step {}: parameters {:?}, gradients {:?}, moments {:?} and {:?}",
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
        _ => candle_core::bail!("8-bit moments must be contiguous u8 tensors on the parameters' device"),
    }
}

/// Updates an f32 moment.
struct UpdateMoment<'a> {
    grads: &'a Tensor,
    moment: Moment,
    factors: AdamwFactors,
}

impl InplaceOp1 for UpdateMoment<'_> {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (storage, layout) = self.grads.storage_and_layout();
        let grads = values(self.name(), &storage, layout)?;
        let values = cpu::slice_mut(self.name(), s, l)?;
        let (count, values) = (values.len(), SharedMut::new(values));
        cpu::for_each(count.div_ceil(TASK), count, |task| {
            let range = cpu::chunk(task, TASK, count);
            // SAFETY: inside the tensor; each value belongs to one task.
            let values = unsafe { values.slice(range.start, range.len()) };
            simd::run(MomentUpdate { values, grads: &grads[range], moment: self.moment, factors: &self.factors });
        });
        Ok(())
    }
}

/// Updates parameters from new f32 moments.
struct UpdateParams<'a> {
    m: &'a Tensor,
    v: &'a Tensor,
    factors: AdamwFactors,
}

impl InplaceOp1 for UpdateParams<'_> {
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
            // SAFETY: inside the tensor; each value belongs to one task.
            let params = unsafe { params.slice(range.start, range.len()) };
            simd::run(ParamsUpdate { params, m: &m[range.clone()], v: &v[range], factors: &self.factors });
        });
        Ok(())
    }
}

/// Updates parameters from old 8-bit moments and gradients.
struct UpdateParams8bit<'a> {
    grads: &'a Tensor,
    m: &'a Tensor,
    v: &'a Tensor,
    factors: AdamwFactors,
}

impl InplaceOp1 for UpdateParams8bit<'_> {
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
            // SAFETY: inside the tensor; each value belongs to one task.
            let params = unsafe { params.slice(range.start, range.len()) };
            let (grads, at) = (&grads[range], block * BLOCK_BYTES);
            let m = next_moment(&m[at..at + BLOCK_BYTES], grads, Moment::First, factors);
            let v = next_moment(&v[at..at + BLOCK_BYTES], grads, Moment::Second, factors);
            simd::run(ParamsUpdate { params, m: &m, v: &v, factors });
        });
        Ok(())
    }
}

/// Updates an 8-bit moment: reads it, averages in f32 and rounds it to codes of a new scale.
struct UpdateMoment8bit<'a> {
    grads: &'a Tensor,
    moment: Moment,
    factors: AdamwFactors,
}

impl InplaceOp1 for UpdateMoment8bit<'_> {
    fn name(&self) -> &'static str {
        "adamw8bit-moment"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (storage, layout) = self.grads.storage_and_layout();
        let grads = values(self.name(), &storage, layout)?;
        let (CpuStorage::U8(blocks), Some((start, end))) = (s, l.contiguous_offsets()) else {
            candle_core::bail!("8-bit moments must be contiguous u8 tensors")
        };
        let blocks = SharedMut::new(&mut blocks[start..end]);
        let midpoints = self.moment.midpoints();
        cpu::for_each(grads.len().div_ceil(BLOCK), 64 * grads.len(), |i| {
            // SAFETY: inside the tensor; each block belongs to one task.
            let block = unsafe { blocks.slice(i * BLOCK_BYTES, BLOCK_BYTES) };
            let grads = &grads[cpu::chunk(i, BLOCK, grads.len())];
            let values = next_moment(block, grads, self.moment, &self.factors);
            let max = values.iter().fold(0f32, |max, x| max.max(x.abs()));
            let inverse = if max > 0.0 { 1.0 / max } else { 0.0 };
            let (codes, scale) = block.split_at_mut(BLOCK);
            codes.iter_mut().zip(values).for_each(|(code, x)| *code = nearest(midpoints, x * inverse));
            scale.copy_from_slice(&max.to_le_bytes());
        });
        Ok(())
    }
}

/// A block of an 8-bit moment after `grads`, in f32; zero past the last gradient.
fn next_moment(block: &[u8], grads: &[f32], moment: Moment, factors: &AdamwFactors) -> [f32; BLOCK] {
    let (codes, scale) = block.split_at(BLOCK);
    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
    let map = moment.map();
    let mut next = [0.0; BLOCK];
    let values = &mut next[..grads.len()];
    values.iter_mut().zip(codes).for_each(|(x, code)| *x = map[usize::from(*code)] * scale);
    simd::run(MomentUpdate { values, grads, moment, factors });
    next
}

impl Moment {
    /// The values of its codes, ascending.
    fn map(self) -> &'static [f32; 256] {
        match self {
            Self::First => dynamic_map(),
            Self::Second => unsigned_dynamic_map(),
        }
    }

    /// The midpoints between neighbouring values of its map.
    fn midpoints(self) -> &'static [f32; 255] {
        static FIRST: LazyLock<[f32; 255]> = LazyLock::new(|| midpoints(Moment::First.map()));
        static SECOND: LazyLock<[f32; 255]> = LazyLock::new(|| midpoints(Moment::Second.map()));
        match self {
            Self::First => &FIRST,
            Self::Second => &SECOND,
        }
    }
}

fn midpoints(map: &[f32; 256]) -> [f32; 255] {
    std::array::from_fn(|i| (map[i] + map[i + 1]) / 2.0)
}

/// The code of the value nearest to `x`, the lower one at a midpoint: the number of midpoints below `x`, by bisection.
fn nearest(midpoints: &[f32; 255], x: f32) -> u8 {
    let mut code = 0;
    for half in [128, 64, 32, 16, 8, 4, 2, 1] {
        if midpoints[code + half - 1] < x {
            code += half;
        }
    }
    code as u8
}

/// `values = beta · values + (1 - beta) · g`, or `g²` for the second moment.
struct MomentUpdate<'a> {
    values: &'a mut [f32],
    grads: &'a [f32],
    moment: Moment,
    factors: &'a AdamwFactors,
}

impl SimdKernel for MomentUpdate<'_> {
    /// Plain loops, which the compiler vectorises for the instruction set they are inlined into.
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let AdamwFactors { grad_scale, first, second, .. } = *self.factors;
        match self.moment {
            Moment::First => {
                for (x, g) in self.values.iter_mut().zip(self.grads) {
                    *x = first.old * *x + first.new * (g * grad_scale);
                }
            }
            Moment::Second => {
                for (x, g) in self.values.iter_mut().zip(self.grads) {
                    let g = g * grad_scale;
                    *x = second.old * *x + second.new * (g * g);
                }
            }
        }
    }
}

/// `params = params · keep - step_size · m / (√v · root_correction + eps)`.
struct ParamsUpdate<'a> {
    params: &'a mut [f32],
    m: &'a [f32],
    v: &'a [f32],
    factors: &'a AdamwFactors,
}

impl SimdKernel for ParamsUpdate<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let AdamwFactors { keep, step_size, root_correction, eps, .. } = *self.factors;
        for ((p, m), v) in self.params.iter_mut().zip(self.m).zip(self.v) {
            *p = *p * keep - step_size * (m / (v.sqrt() * root_correction + eps));
        }
    }
}

/// Sum of the squares of a task's values.
struct SquaresSum<'a> {
    x: &'a [f32],
    sum: &'a mut f32,
}

impl SimdKernel for SquaresSum<'_> {
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
    fn maps_equal_those_of_bitsandbytes() {
        assert_eq!(Moment::First.map().to_vec(), golden("m_map"));
        assert_eq!(Moment::Second.map().to_vec(), golden("v_map"));
    }

    /// Runs the steps of the golden file and compares the parameters after each. Gradients are doubled, and halved by `grad_scale`.
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
    fn steps_match_torch() {
        let zeros = || tensor(&vec![0.0; golden("start").len()]);
        let (m, v) = (zeros(), zeros());
        check("adamw", 1e-6, |params, grads, step| adamw_step(params, grads, &m, &v, step).unwrap());
    }

    #[test]
    fn steps_with_8_bit_moments_match_bitsandbytes() {
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
    fn codes_are_the_nearest() {
        for moment in [Moment::First, Moment::Second] {
            let (map, midpoints) = (moment.map(), moment.midpoints());
            for x in random(1, 5000).into_iter().chain([-2.0, 0.0, 1.0, 2.0]).chain(*midpoints) {
                let code = usize::from(nearest(midpoints, x));
                let best = map.iter().fold(f32::INFINITY, |best, y| best.min((y - x).abs()));
                assert!((map[code] - x).abs() <= best + 1e-7, "{x}: {code}");
            }
        }
    }

    /// The tensors are long enough for several tasks, the last of which is short.
    #[test]
    fn long_tensors_and_sums_match_f64() {
        let n = 5 * TASK + 77;
        let (p, g) = (random(1, n), random(2, n));
        let (params, m, v) = (tensor(&p), tensor(&vec![0.0; n]), tensor(&vec![0.0; n]));
        let params8 = tensor(&p);
        let (m8, v8) = (zero_moments(n, &Device::Cpu).unwrap(), zero_moments(n, &Device::Cpu).unwrap());
        adamw_step(&params, &tensor(&g), &m, &v, &STEP).unwrap();
        adamw8bit_step(&params8, &tensor(&g), &m8, &v8, &STEP).unwrap();
        // After the first step the corrected moments are the gradients and their squares, so every value moves by the learning rate.
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
