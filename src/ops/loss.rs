//! Cross-entropy of next tokens, fused with the output head: the logits of all rows never exist at once.

use std::f32::consts::LOG2_E;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor};

use super::cpu;
use super::pool::SharedMut;
use super::quant::{self, QMatrix};
use super::simd::{self, LANES, Lanes, SimdKernel};
use crate::{Error, Result};

#[cfg(feature = "cuda")]
mod cuda;

/// Rows whose logits exist at a time.
const ROWS: usize = 256;

/// The token that a row should predict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossTarget {
    /// Row of `x`.
    pub row: u32,
    /// The token's id.
    pub id: u32,
    /// Factor of the target's gradient.
    pub scale: f32,
}

/// The result of [`cross_entropy`].
pub struct Loss {
    /// Negative log-likelihood of each target, in nats.
    pub nll: Vec<f32>,
    /// Whether each target is its row's most likely token. Among equally likely tokens, the first counts.
    pub correct: Vec<bool>,
    /// The gradient of the sum of `scale · nll` with respect to `x`, if it was asked for.
    pub dx: Option<Tensor>,
}

/// The loss of `targets`, in ascending order of rows, under the logits `x [T, hidden] · headᵀ`. With `gradient`, computes
/// `dx [T, hidden]` too, which is zero in rows without a target. f32; on a GPU `x` and `dx` are bf16. Errors: a target outside `x` or
/// `head`, targets out of order.
pub fn cross_entropy(head: &QMatrix, x: &Tensor, targets: &[LossTarget], gradient: bool) -> Result<Loss> {
    let (t, hidden) = x.dims2()?;
    let ascending = targets.is_sorted_by(|a, b| a.row < b.row) && targets.last().is_none_or(|l| (l.row as usize) < t);
    if !ascending || hidden != head.k() {
        return Err(Error::internal(format!(
            "loss of x {:?} with a [{}, {}] head: the targets' rows must ascend and lie in x",
            x.shape(),
            head.n(),
            head.k()
        )));
    }
    if let Some(target) = targets.iter().find(|target| target.id as usize >= head.n()) {
        return Err(Error::invalid(format!("token id {} is outside the vocabulary of {} ids", target.id, head.n())));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda::cross_entropy(head, x, targets, gradient);
    }
    let mut rows = vec![(0.0, false); targets.len()];
    let mut dx = if gradient { vec![0.0; t * hidden] } else { Vec::new() };
    let values = cpu::values("cross-entropy", x)?;
    for (targets, rows) in targets.chunks(ROWS).zip(rows.chunks_mut(ROWS)) {
        let at = |target: &LossTarget| target.row as usize * hidden..(target.row as usize + 1) * hidden;
        let x: Vec<f32> = targets.iter().flat_map(|target| &values[at(target)]).copied().collect();
        let x = Tensor::from_vec(x, (targets.len(), hidden), &Device::Cpu)?;
        let logits = quant::matmul(head, &x, DType::F32)?;
        logits.inplace_op1(&Softmax { targets, gradient, rows: SharedMut::new(rows) })?;
        if gradient {
            let d = quant::matmul_transposed(head, &logits, DType::F32)?;
            let d = cpu::values("cross-entropy", &d)?;
            targets.iter().zip(d.chunks_exact(hidden)).for_each(|(target, d)| dx[at(target)].copy_from_slice(d));
        }
    }
    let dx = gradient.then(|| Tensor::from_vec(dx, x.shape(), &Device::Cpu)).transpose()?;
    let (nll, correct) = rows.into_iter().unzip();
    Ok(Loss { nll, correct, dx })
}

/// The loss of each row of logits. With `gradient`, turns the logits into their gradient.
struct Softmax<'a> {
    targets: &'a [LossTarget],
    gradient: bool,
    /// Of each target: its negative log-likelihood, and whether it is the most likely token.
    rows: SharedMut<(f32, bool)>,
}

impl InplaceOp1 for Softmax<'_> {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, s: &mut CpuStorage, l: &Layout) -> candle_core::Result<()> {
        let (rows, n) = l.shape().dims2()?;
        let logits = SharedMut::new(cpu::slice_mut(self.name(), s, l)?);
        // An exponential takes about as long as sixteen multiply-adds.
        cpu::for_each(rows, 16 * rows * n, |row| {
            // SAFETY: inside the logits and the results; each row belongs to one task.
            let (logits, result) = unsafe { (logits.slice(row * n, n), self.rows.slice(row, 1)) };
            simd::run(SoftmaxRow {
                logits,
                target: self.targets[row],
                gradient: self.gradient,
                result: &mut result[0],
            });
        });
        Ok(())
    }
}

/// The softmax of one row.
struct SoftmaxRow<'a> {
    logits: &'a mut [f32],
    target: LossTarget,
    gradient: bool,
    result: &'a mut (f32, bool),
}

impl SimdKernel for SoftmaxRow<'_> {
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let Self { logits, target: LossTarget { id, scale, .. }, gradient, result } = self;
        let id = id as usize;

        // The largest logit.
        let target = logits[id];
        let (body, tail) = logits.as_chunks::<LANES>();
        let mut max = L::splat(f32::NEG_INFINITY);
        for x in body {
            max = L::load(x).max(max);
        }
        let max = tail.iter().fold(max.max_lane(), |max, x| max.max(*x));
        let likeliest = target == max && logits[..id].iter().all(|x| *x < max);

        // Exponentials in place of the logits, and their sum.
        let (body, tail) = logits.as_chunks_mut::<LANES>();
        let mut last = [f32::NEG_INFINITY; LANES];
        last[..tail.len()].copy_from_slice(tail);
        // Sums of pieces are added in f64: the rounding of one long f32 sum would reach the fifth digit of the loss.
        let mut sum = 0.0;
        for piece in body.chunks_mut(64).chain([std::slice::from_mut(&mut last)]) {
            let mut part = L::splat(0.0);
            for x in piece {
                let p = L::load(x).sub(L::splat(max)).mul(L::splat(LOG2_E)).exp2();
                p.store(x);
                part = part.add(p);
            }
            sum += f64::from(part.sum());
        }
        tail.copy_from_slice(&last[..tail.len()]);

        // The loss, and the gradient `scale · (p - onehot(id))`.
        *result = ((sum.ln() - f64::from(target - max)) as f32, likeliest);
        if gradient {
            let share = (f64::from(scale) / sum) as f32;
            logits.iter_mut().for_each(|p| *p *= share);
            logits[id] -= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::reference::{assert_close, gradient, random};

    const HIDDEN: usize = 20;

    fn head(vocab: usize) -> (QMatrix, Vec<f32>) {
        let rows = random(1, vocab * HIDDEN);
        (QMatrix::dense(vocab, HIDDEN, rows.clone()).unwrap(), rows)
    }

    fn loss(head: &QMatrix, x: &[f32], targets: &[LossTarget], gradient: bool) -> Result<Loss> {
        let x = Tensor::from_slice(x, (x.len() / HIDDEN, HIDDEN), &Device::Cpu)?;
        cross_entropy(head, &x, targets, gradient)
    }

    /// `log_softmax` of the logits of one row.
    fn log_probabilities(rows: &[f32], x: &[f64]) -> Vec<f64> {
        let logit = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>();
        let logits: Vec<f64> = rows.chunks_exact(HIDDEN).map(logit).collect();
        let max = logits.iter().fold(f64::NEG_INFINITY, |m, l| m.max(*l));
        let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
        logits.iter().map(|l| l - max - sum.ln()).collect()
    }

    #[test]
    fn matches_log_softmax_and_the_gradient_finite_differences() {
        // Includes more targets than a chunk holds, and vocabularies that are not whole vectors or pieces.
        for (vocab, t, every) in [(1, 1, 1), (7, 3, 2), (33, 5, 1), (1100, 2, 1), (50, 2 * ROWS + 44, 1), (50, 400, 3)]
        {
            let (head, rows) = head(vocab);
            let x: Vec<f32> = random(2, t * HIDDEN).iter().map(|x| x * 4.0).collect();
            let target = |row: usize| LossTarget {
                row: row as u32,
                id: (row * 7 % vocab) as u32,
                scale: 0.5 + row as f32 / t as f32,
            };
            let targets: Vec<LossTarget> = (0..t).step_by(every).map(target).collect();
            let of = |x: &[f64], target: &LossTarget| {
                let row = target.row as usize;
                log_probabilities(&rows, &x[row * HIDDEN..(row + 1) * HIDDEN])
            };
            let exact: Vec<f64> = x.iter().map(|&x| x.into()).collect();
            let found = loss(&head, &x, &targets, true).unwrap();
            let expected: Vec<f64> = targets.iter().map(|t| -of(&exact, t)[t.id as usize]).collect();
            assert_close(&found.nll, &expected, 1e-6);
            for (target, &correct) in targets.iter().zip(&found.correct) {
                let log = of(&exact, target);
                let likeliest = log.iter().all(|l| *l <= log[target.id as usize]);
                assert_eq!(correct, likeliest, "{target:?}");
            }
            let dx: Vec<f32> = found.dx.unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let mut expected = vec![0.0; t * HIDDEN];
            for target in &targets {
                let row = target.row as usize * HIDDEN..(target.row as usize + 1) * HIDDEN;
                let loss = |x: &[f64]| -log_probabilities(&rows, x)[target.id as usize] * f64::from(target.scale);
                expected[row.clone()].copy_from_slice(&gradient(&x[row], 0..HIDDEN, loss));
            }
            assert_close(&dx, &expected, 1e-6);

            let alone = loss(&head, &x, &targets, false).unwrap();
            assert!(alone.dx.is_none());
            assert_eq!((alone.nll, alone.correct), (found.nll, found.correct));
        }
    }

    #[test]
    fn the_first_of_equal_logits_is_the_most_likely() {
        let head = QMatrix::dense(3, HIDDEN, vec![0.5; 3 * HIDDEN]).unwrap();
        let targets: Vec<LossTarget> = (0..3).map(|row| LossTarget { row, id: row, scale: 1.0 }).collect();
        let found = loss(&head, &[1.0; 3 * HIDDEN], &targets, false).unwrap();
        assert_eq!(found.correct, [true, false, false]);
        assert_close(&found.nll, &[3f64.ln(); 3], 1e-6);
    }

    #[test]
    fn no_targets_give_no_loss() {
        let (head, _) = head(5);
        let found = loss(&head, &random(1, 2 * HIDDEN), &[], true).unwrap();
        assert!(found.nll.is_empty() && found.correct.is_empty());
        assert_eq!(found.dx.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap(), [0.0; 2 * HIDDEN]);
    }

    #[test]
    fn refuses_targets_outside_the_rows_or_out_of_order() {
        let (head, _) = head(5);
        let x = random(1, 2 * HIDDEN);
        let run = |targets: &[(u32, u32)]| {
            let targets: Vec<LossTarget> =
                targets.iter().map(|&(row, id)| LossTarget { row, id, scale: 1.0 }).collect();
            loss(&head, &x, &targets, true)
        };
        assert!(run(&[(0, 4), (1, 0)]).is_ok());
        for wrong in [&[(2, 0)][..], &[(0, 5)], &[(1, 0), (0, 0)], &[(1, 0), (1, 1)]] {
            assert!(run(wrong).is_err(), "{wrong:?}");
        }
    }
}
