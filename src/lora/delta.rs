//! Adds the adapters' deltas to a base product: shrink computes `h = weight · scale · x·Aᵀ`, expand adds `h·Bᵀ`, segment by segment of
//! a flat batch (LoRA, Hu et al., 2021; segments as in Punica, Chen et al., 2023).
//!
//! This file is the CPU half. Shrink computes `h` of all segments in parallel, then expand adds all deltas. Both sum in an order that
//! depends on shapes alone, so a row's bits do not depend on its neighbours or its segment.

#[cfg(feature = "cuda")]
mod cuda;

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};

use super::magnitude::Magnitude;
use super::slots::SlotPool;
use crate::arch::Site;
use crate::ops::batch::DeviceStep;
use crate::ops::batch::Segment;
use crate::ops::cpu;
use crate::ops::pool::SharedMut;
use crate::ops::simd::{self, LANES, Lanes, SimdKernel};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
pub use cuda::{has_dora_gains, work, work_words};

/// The adapters of a step's rows.
#[derive(Clone, Copy)]
pub struct Adapters<'a> {
    /// The segments of the rows.
    pub segments: &'a [Segment],
    /// The slots' weights.
    pub slots: &'a SlotPool,
    /// On a GPU, the step's metadata in device memory.
    pub step: Option<&'a DeviceStep>,
    /// Whether the rows are the logit rows alone. Then `segments` is [`crate::ops::batch::Batch::logit_segments`].
    pub logit_rows_only: bool,
}

/// One adapter's pair for one module, as the CPU's op reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraPair {
    /// The module's first column in the fused output of its site: k follows q in qkv.
    pub offset: usize,
    /// Output features of the module.
    pub n: usize,
    /// Input features.
    pub k: usize,
    /// The pair's exact rank. Ranks differ between modules and between adapters.
    pub rank: usize,
    /// `alpha / rank`, or `alpha / sqrt(rank)` under rsLoRA.
    pub scale: f32,
    /// `A [rank, k]`, row-major.
    pub a: Vec<f32>,
    /// `Bᵀ [rank, n]`, row-major, which expand reads in the order of the output.
    pub b: Vec<f32>,
    /// `lora_B.bias [n]`, which is scaled like the delta.
    pub bias: Option<Vec<f32>>,
    /// DoRA's magnitudes, whose gains scale the sum of base and delta.
    pub magnitude: Option<Magnitude>,
}

/// Rows of a task.
const ROWS: usize = 32;
/// Ranks of a shrink task.
const RANKS: usize = 8;
/// Output columns of an expand task.
const COLUMNS: usize = 512;

/// Adds the deltas of a site to its base product in place: `y[row] += Σ weight · scale · ((x[row] · Aᵀ) · Bᵀ + bias)`. The sum runs over
/// the terms of the row's segment, in order, and over the modules of each term's slot at this layer and site, each at its own
/// columns. Then DoRA's gains scale the row. An adapter with gains must be the only term, at weight 1.
///
/// `x [T, k]`, `y [T, n]`; f32, on a GPU `x` is bf16 and `y` is bf16 or f32. Rows outside the segments do not change. Errors: a pair
/// that does not fit `x` and `y`, a segment that does not fit the rows.
pub fn add_delta(y: &Tensor, x: &Tensor, adapters: &Adapters, layer: usize, site: Site) -> Result<()> {
    #[cfg(feature = "cuda")]
    if y.device().is_cuda() {
        return cuda::add_delta(y, x, adapters, layer, site);
    }
    add_pairs(y, x, adapters.segments, |slot| adapters.slots.pairs(slot, layer, site))
}

/// [`add_delta`] on the CPU, with the pairs of each slot.
fn add_pairs<'a>(y: &Tensor, x: &Tensor, segments: &[Segment], pairs: impl Fn(u32) -> &'a [LoraPair]) -> Result<()> {
    let ((rows, n), (x_rows, k)) = (y.dims2()?, x.dims2()?);
    if rows != x_rows {
        return Err(Error::internal(format!("delta of {x_rows} rows for {rows} rows")));
    }
    // One delta for each pair of each segment, and its place among the intermediate values.
    let mut deltas = Vec::new();
    let mut shrunk_len = 0;
    let mut end = 0;
    for segment in segments {
        if segment.rows.start < end || segment.rows.end > rows || segment.rows.is_empty() {
            return Err(Error::internal(format!(
                "segment {:?} in {rows} rows, after a segment that ends at row {end}",
                segment.rows
            )));
        }
        end = segment.rows.end;
        for &(slot, weight) in &segment.terms {
            for pair in pairs(slot) {
                pair.check(n, k)?;
                let gains = pair.gains()?;
                if gains.is_some() && (segment.terms.len() > 1 || weight != 1.0) {
                    return Err(Error::internal("DoRA adapters cannot be weighted or mixed with others"));
                }
                deltas.push(SegmentDelta {
                    rows: segment.rows.clone(),
                    pair,
                    weight: weight * pair.scale,
                    gains,
                    shrunk_start: shrunk_len,
                });
                shrunk_len += segment.rows.len() * pair.rank;
            }
        }
    }
    if deltas.is_empty() {
        return Ok(());
    }
    Ok(y.inplace_op2(x, &AddDelta { deltas, shrunk_len })?)
}

impl<'a> Adapters<'a> {
    /// All pairs of the rows' adapters at a layer and site. Empty on a GPU.
    pub fn pairs(&self, layer: usize, site: Site) -> impl Iterator<Item = &'a LoraPair> {
        let slots = self.slots;
        self.segments.iter().flat_map(|s| &s.terms).flat_map(move |&(slot, _)| slots.pairs(slot, layer, site))
    }
}

impl LoraPair {
    /// Checks that the pair's arrays have its shape, and that it fits a matrix `[n, k]`.
    fn check(&self, n: usize, k: usize) -> Result<()> {
        let Self { offset, n: out, k: inp, rank, a, b, bias, magnitude, .. } = self;
        let whole = a.len() == rank * inp
            && b.len() == rank * out
            && bias.as_ref().is_none_or(|v| v.len() == *out)
            && magnitude.as_ref().is_none_or(|m| m.rows() == *out);
        if !whole || *inp != k || offset + out > n || *rank == 0 {
            return Err(Error::internal(format!(
                "a pair of rank {rank} for {inp} -> {out} at column {offset}, with {} and {} values, for a site of {k} -> {n}",
                a.len(),
                b.len()
            )));
        }
        Ok(())
    }
}

/// The delta of one pair for one segment.
struct SegmentDelta<'a> {
    /// The segment's rows.
    rows: Range<usize>,
    pair: &'a LoraPair,
    /// The term's weight, times the pair's scale.
    weight: f32,
    /// DoRA's gains of the pair's columns.
    gains: Option<&'a [f32]>,
    /// Where its `h = weight · scale · x·Aᵀ [rows, rank]` starts among the intermediate values.
    shrunk_start: usize,
}

struct AddDelta<'a> {
    /// In the order of segments, and of terms within a segment.
    deltas: Vec<SegmentDelta<'a>>,
    /// The number of intermediate values: the sizes of all deltas' `h`.
    shrunk_len: usize,
}

impl InplaceOp2 for AddDelta<'_> {
    fn name(&self) -> &'static str {
        "lora-add-delta"
    }

    fn cpu_fwd(&self, s1: &mut CpuStorage, l1: &Layout, s2: &CpuStorage, l2: &Layout) -> candle_core::Result<()> {
        let n = l1.shape().dims2()?.1;
        let y = SharedMut::new(cpu::slice_mut("lora-add-delta", s1, l1)?);
        let x = cpu::slice("lora-add-delta", s2, l2)?;
        let mut shrunk = vec![0.0; self.shrunk_len];
        self.shrink(x, &mut shrunk);
        self.expand(&shrunk, y, n);
        Ok(())
    }
}

impl AddDelta<'_> {
    /// Computes `h = weight · scale · x·Aᵀ` of every delta.
    fn shrink(&self, x: &[f32], shrunk: &mut [f32]) {
        let mut tasks = Vec::new();
        let mut multiply_adds = 0;
        for delta in &self.deltas {
            multiply_adds += delta.rows.len() * delta.pair.a.len();
            for rows in chunks(delta.rows.clone(), ROWS) {
                tasks.extend(chunks(0..delta.pair.rank, RANKS).map(|ranks| (delta, rows.clone(), ranks)));
            }
        }
        let shrunk = SharedMut::new(shrunk);
        cpu::for_each(tasks.len(), multiply_adds, |task| {
            let (delta, rows, ranks) = tasks[task].clone();
            simd::run(Shrink { delta, rows, ranks, x, shrunk });
        });
    }

    /// Adds `h·Bᵀ + weight · scale · bias` of every delta to `y`. A task adds all deltas of its rows and columns, in order.
    fn expand(&self, shrunk: &[f32], y: SharedMut<f32>, n: usize) {
        let mut tasks = Vec::new();
        let mut multiply_adds = 0;
        for deltas in self.deltas.chunk_by(|a, b| a.rows == b.rows) {
            multiply_adds += deltas.iter().map(|d| d.rows.len() * d.pair.b.len()).sum::<usize>();
            for rows in chunks(deltas[0].rows.clone(), ROWS) {
                tasks.extend(chunks(0..n, COLUMNS).map(|columns| (deltas, rows.clone(), columns)));
            }
        }
        cpu::for_each(tasks.len(), multiply_adds, |task| {
            let (deltas, rows, columns) = tasks[task].clone();
            for delta in deltas {
                let Range { start, end } = delta.pair.offset..delta.pair.offset + delta.pair.n;
                let columns = columns.start.max(start)..columns.end.min(end);
                if !columns.is_empty() {
                    simd::run(Expand { delta, rows: rows.clone(), columns, shrunk, y, n });
                }
            }
        });
    }
}

/// Cuts `range` into ranges of `step`.
fn chunks(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..(start + step).min(range.end))
}

/// Shrink of some rows and ranks of one delta: `h = weight · scale · x·Aᵀ`.
struct Shrink<'a> {
    delta: &'a SegmentDelta<'a>,
    rows: Range<usize>,
    ranks: Range<usize>,
    x: &'a [f32],
    shrunk: SharedMut<f32>,
}

impl SimdKernel for Shrink<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for start in self.rows.clone().step_by(L::ROWS) {
            match L::ROWS.min(self.rows.end - start) {
                1 => self.rows::<L, 1>(start),
                2 => self.rows::<L, 2>(start),
                3 => self.rows::<L, 3>(start),
                _ => self.rows::<L, 4>(start),
            }
        }
    }
}

impl Shrink<'_> {
    #[inline(always)]
    fn rows<L: Lanes, const R: usize>(&self, start: usize) {
        let mut rank = self.ranks.start;
        while rank + 4 <= self.ranks.end {
            self.tile::<L, R, 4>(start, rank);
            rank += 4;
        }
        while rank < self.ranks.end {
            self.tile::<L, R, 1>(start, rank);
            rank += 1;
        }
    }

    /// `R` rows by `C` ranks. Each dot product is summed within lanes along `k`, then across lanes.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const C: usize>(&self, start: usize, rank: usize) {
        let LoraPair { k, rank: width, ref a, .. } = *self.delta.pair;
        let (body, tail) = (k / LANES, k / LANES * LANES);
        let x: [&[f32]; R] = std::array::from_fn(|r| &self.x[(start + r) * k..(start + r + 1) * k]);
        let a: [&[f32]; C] = std::array::from_fn(|c| &a[(rank + c) * k..(rank + c + 1) * k]);
        let x_body: [&[[f32; LANES]]; R] = std::array::from_fn(|r| &x[r].as_chunks().0[..body]);
        let a_body: [&[[f32; LANES]]; C] = std::array::from_fn(|c| &a[c].as_chunks().0[..body]);
        let mut sum = [[L::splat(0.0); C]; R];
        for i in 0..body {
            let mut at = [L::splat(0.0); C];
            for c in 0..C {
                at[c] = L::load(&a_body[c][i]);
            }
            for r in 0..R {
                let x = L::load(&x_body[r][i]);
                for c in 0..C {
                    sum[r][c] = x.mul_add(at[c], sum[r][c]);
                }
            }
        }
        for r in 0..R {
            let x: L = simd::load_part(&x[r][tail..]);
            let at = self.delta.shrunk_start + (start + r - self.delta.rows.start) * width + rank;
            // SAFETY: ranks of one row of a delta, inside its `h`; each belongs to one task.
            let shrunk = unsafe { self.shrunk.slice(at, C) };
            for c in 0..C {
                let sum = x.mul_add(simd::load_part(&a[c][tail..]), sum[r][c]).sum();
                shrunk[c] = self.delta.weight * sum;
            }
        }
    }
}

/// Expand of some rows and columns of one delta: `y += h·Bᵀ + weight · scale · bias`, then `y *= gains`.
struct Expand<'a> {
    delta: &'a SegmentDelta<'a>,
    rows: Range<usize>,
    /// Columns of `y`.
    columns: Range<usize>,
    shrunk: &'a [f32],
    y: SharedMut<f32>,
    /// Width of `y`.
    n: usize,
}

impl SimdKernel for Expand<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for start in self.rows.clone().step_by(L::ROWS) {
            match L::ROWS.min(self.rows.end - start) {
                1 => self.rows::<L, 1>(start),
                2 => self.rows::<L, 2>(start),
                3 => self.rows::<L, 3>(start),
                _ => self.rows::<L, 4>(start),
            }
        }
    }
}

impl Expand<'_> {
    #[inline(always)]
    fn rows<L: Lanes, const R: usize>(&self, start: usize) {
        let mut column = self.columns.start;
        while column + 4 * LANES <= self.columns.end {
            self.tile::<L, R, 4>(start, column);
            column += 4 * LANES;
        }
        while column + LANES <= self.columns.end {
            self.tile::<L, R, 1>(start, column);
            column += LANES;
        }
        self.tail::<L, R>(start, column);
    }

    /// The `h` of a row.
    #[inline(always)]
    fn shrunk(&self, row: usize) -> &[f32] {
        let at = self.delta.shrunk_start + (row - self.delta.rows.start) * self.delta.pair.rank;
        &self.shrunk[at..at + self.delta.pair.rank]
    }

    /// `R` rows by `C` vectors of columns from `column` on. The sum over ranks starts from the bias, and is added to `y` at once.
    #[inline(always)]
    fn tile<L: Lanes, const R: usize, const C: usize>(&self, start: usize, column: usize) {
        let LoraPair { offset, n, rank, ref b, ref bias, .. } = *self.delta.pair;
        let first = column - offset;
        let shrunk: [&[f32]; R] = std::array::from_fn(|r| &self.shrunk(start + r)[..rank]);
        let mut sum = [[L::splat(0.0); C]; R];
        if let Some(bias) = bias {
            let bias = bias[first..].as_chunks::<LANES>().0;
            for c in 0..C {
                let bias = L::load(&bias[c]).mul(L::splat(self.delta.weight));
                for sum in &mut sum {
                    sum[c] = bias;
                }
            }
        }
        for j in 0..rank {
            let b = &b[j * n + first..].as_chunks::<LANES>().0[..C];
            let mut at = [L::splat(0.0); C];
            for c in 0..C {
                at[c] = L::load(&b[c]);
            }
            for r in 0..R {
                let h = L::splat(shrunk[r][j]);
                for c in 0..C {
                    sum[r][c] = h.mul_add(at[c], sum[r][c]);
                }
            }
        }
        for r in 0..R {
            let at = (start + r) * self.n + column;
            // SAFETY: columns of one row of `y`; each belongs to one task.
            let y = unsafe { self.y.slice(at, C * LANES) };
            for (c, (y, sum)) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(sum[r]).enumerate() {
                let mut changed = L::load(y).add(sum);
                if let Some(gains) = self.delta.gains {
                    changed = changed.mul(L::load(&gains[first..].as_chunks::<LANES>().0[c]));
                }
                changed.store(y);
            }
        }
    }

    /// The last columns, which are fewer than a vector.
    #[inline(always)]
    fn tail<L: Lanes, const R: usize>(&self, start: usize, column: usize) {
        let LoraPair { offset, n, rank, ref b, ref bias, .. } = *self.delta.pair;
        let (first, width) = (column - offset, self.columns.end - column);
        if width == 0 {
            return;
        }
        for row in start..start + R {
            let mut sum = L::splat(0.0);
            if let Some(bias) = bias {
                sum = simd::load_part::<L>(&bias[first..first + width]).mul(L::splat(self.delta.weight));
            }
            let shrunk = self.shrunk(row);
            for j in 0..rank {
                let b: L = simd::load_part(&b[j * n + first..j * n + first + width]);
                sum = L::splat(shrunk[j]).mul_add(b, sum);
            }
            let at = row * self.n + column;
            // SAFETY: as in `tile`.
            let y = unsafe { self.y.slice(at, width) };
            let mut changed = simd::load_part::<L>(y).add(sum);
            if let Some(gains) = self.delta.gains {
                changed = changed.mul(simd::load_part(&gains[first..first + width]));
            }
            let mut last = [0.0; LANES];
            changed.store(&mut last);
            y.copy_from_slice(&last[..width]);
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::reference::{assert_close, random};

    fn pair(seed: u64, offset: usize, (n, k, rank): (usize, usize, usize), bias: bool) -> LoraPair {
        LoraPair {
            offset,
            n,
            k,
            rank,
            scale: 0.25 + seed as f32,
            a: random(seed, rank * k),
            b: random(seed + 100, rank * n),
            bias: bias.then(|| random(seed + 200, n)),
            magnitude: None,
        }
    }

    /// Adds the deltas of all segments in one call.
    fn run(y: &[f32], x: &[f32], rows: usize, segments: &[Segment], slots: &[Vec<LoraPair>]) -> Vec<f32> {
        let y = Tensor::from_slice(y, (rows, y.len() / rows), &Device::Cpu).unwrap();
        let x = Tensor::from_slice(x, (rows, x.len() / rows), &Device::Cpu).unwrap();
        add_pairs(&y, &x, segments, |slot| &slots[slot as usize]).unwrap();
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn reference(y: &[f32], x: &[f32], terms: &[(u32, f32)], slots: &[Vec<LoraPair>]) -> Vec<f64> {
        let mut y: Vec<f64> = y.iter().map(|&y| y.into()).collect();
        for &(slot, weight) in terms {
            for p in &slots[slot as usize] {
                let h = |j: usize| (0..p.k).map(|i| f64::from(x[i]) * f64::from(p.a[j * p.k + i])).sum::<f64>();
                let h: Vec<f64> = (0..p.rank).map(h).collect();
                for i in 0..p.n {
                    let sum: f64 = (0..p.rank).map(|j| h[j] * f64::from(p.b[j * p.n + i])).sum();
                    let bias = p.bias.as_ref().map_or(0.0, |b| f64::from(b[i]));
                    y[p.offset + i] += f64::from(weight) * f64::from(p.scale) * (sum + bias);
                }
            }
        }
        y
    }

    #[test]
    fn matches_f64_and_rows_stand_alone() {
        for (rows, n, k) in [(1usize, 1usize, 1usize), (9, 64, 48), (40, 100, 37), (70, 1100, 65)] {
            let part = n.div_ceil(3);
            let slots = vec![
                vec![pair(1, 0, (part, k, 1), false), pair(2, n - part, (part, k, 8), true)],
                vec![pair(3, 0, (n, k, 33), false)],
                vec![pair(4, n - part, (part, k, 256), false), pair(5, n - 1, (1, k, 5), true)],
                vec![],
            ];
            let terms: [Vec<(u32, f32)>; 5] = [
                vec![(0, 1.0)],
                vec![(1, 0.7), (0, -0.3), (2, 0.5)],
                vec![(2, 1.0)],
                vec![(3, 1.0)],
                vec![(1, 2.0), (1, 1.0)],
            ];
            let (y, x) = (random(7, rows * n), random(8, rows * k));
            // Segments of several lengths, with gaps between some of them.
            let (mut segments, mut start) = (Vec::new(), usize::from(rows > 1));
            for (i, length) in [1, 2, 5, 3, 18, 30].into_iter().enumerate() {
                if start + length <= rows {
                    segments.push(Segment { rows: start..start + length, terms: terms[i % 5].clone() });
                    start += length + i % 2;
                }
            }
            let out = run(&y, &x, rows, &segments, &slots);
            for row in 0..rows {
                let (y, x) = (&y[row * n..(row + 1) * n], &x[row * k..(row + 1) * k]);
                let out = &out[row * n..(row + 1) * n];
                match segments.iter().find(|s| s.rows.contains(&row)) {
                    None => assert_eq!(out, y),
                    Some(segment) => {
                        assert_close(out, &reference(y, x, &segment.terms, &slots), 1e-5);
                        let alone = [Segment { rows: 0..1, terms: segment.terms.clone() }];
                        assert_eq!(out, run(y, x, 1, &alone, &slots), "row {row}");
                    }
                }
            }
        }
    }

    #[test]
    fn refuses_pairs_and_segments_that_do_not_fit() {
        let tensor = |n| Tensor::zeros((2, n), candle_core::DType::F32, &Device::Cpu).unwrap();
        let (y, x) = (tensor(8), tensor(4));
        let segment = |rows| [Segment { rows, terms: vec![(0, 1.0)] }];
        let fits = [pair(1, 4, (4, 4, 2), false)];
        assert!(add_pairs(&y, &x, &segment(0..2), |_| &fits).is_ok());
        assert!(add_pairs(&y, &x, &segment(1..3), |_| &fits).is_err());
        for wrong in [pair(1, 5, (4, 4, 2), false), pair(1, 0, (4, 5, 2), false), pair(1, 0, (4, 4, 0), false)] {
            let wrong = [wrong];
            assert!(add_pairs(&y, &x, &segment(0..2), |_| &wrong).is_err());
        }
    }
}
