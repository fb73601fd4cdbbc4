//! From a row of logits to the next token.
//!
//! In vLLM's order: ids masked by `min_tokens`, `logit_bias`, repetition penalty, frequency and presence penalties; here
//! log-probabilities are taken; then greedy choice, or temperature, `min_p`, `top_k`, `top_p` (of what `top_k` left) and
//! a draw. Equal logits rank by id, the lowest first.
//!
//! A row depends on nothing else in the batch, and the draw for the i-th token on the seed and i alone, so a sequence
//! goes on the same after a preemption. Sums run in a fixed order over fixed chunks, and the exponential is our own, so
//! results do not depend on the machine's libm either. Nothing sorts a whole row unless `top_p` really reaches that far.
//!
//! Logits on a GPU stay there: [`crate::ops::sample`] does the same, and this file tells it what and reads what came.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use super::request::{Logprobs, SamplingParams};
use crate::ops::pool::parallel_for;
use crate::ops::sample::{self as on_device, LogitReport, Penalties, PickedToken};
use crate::{Error, Result};

/// Logits are scanned in chunks of this size: sixteen lanes that a compiler keeps in registers, times four.
const CHUNK: usize = 64;

/// A chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// When asked for.
    pub logprobs: Option<Logprobs>,
}

/// Which tokens penalties apply to, and how often each was generated (0: only in the prompt).
#[derive(Debug, Default)]
pub struct TokenCounts {
    /// Empty while no penalty is set.
    by_id: HashMap<u32, u32>,
    /// Whether any penalty is set, so that the others need not count.
    on: bool,
}

impl TokenCounts {
    /// Of a sequence that has generated nothing.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let on = params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let counts = if on { prompt.iter().map(|id| (*id, 0)).collect() } else { HashMap::new() };
        Self { by_id: counts, on }
    }

    /// Counts a generated token.
    pub fn push(&mut self, id: u32) {
        if self.on {
            *self.by_id.entry(id).or_insert(0) += 1;
        }
    }
}

/// Everything besides the logits that decides a token.
pub struct SamplingMetadata<'a> {
    /// How to sample.
    pub params: &'a SamplingParams,
    /// What penalties apply to.
    pub counts: &'a TokenCounts,
    /// Ids that may not come yet.
    pub masked: &'a [u32],
    /// Decides the draw, with `index`.
    pub seed: u64,
    /// Which token of the output this is, from 0.
    pub index: usize,
}

/// What is asked of a row of logits.
pub enum LogitsTask<'a> {
    /// The next token: [`sample`].
    Next(SamplingMetadata<'a>),
    /// How likely this id is, and as many alternatives: [`score`]. The sample is the id.
    Score(u32, usize),
}

/// Answers each task from its row of `logits [tasks, vocab]` f32, on the device where they are. What a task changes of its
/// row, a GPU changes in place. Errors: other shapes; and each task's own.
pub fn answer(logits: &Tensor, tasks: &[LogitsTask]) -> Result<Vec<Result<SampledToken>>> {
    let (rows, vocab) = logits.dims2()?;
    if rows != tasks.len() {
        return Err(Error::internal(format!("{rows} rows of logits for {} tasks", tasks.len())));
    }
    if tasks.is_empty() {
        return Ok(Vec::new());
    }
    let logits = logits.contiguous()?;
    if !matches!(logits.device(), Device::Cpu) {
        let rows: Vec<_> = tasks.iter().map(|task| task.row(vocab)).collect();
        let picked = on_device::launch(&logits, &rows)?.read()?;
        return Ok(tasks.iter().zip(picked).map(|(task, picked)| task.outcome(picked, vocab)).collect());
    }
    let (storage, layout) = logits.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        return Err(Error::internal("logits must be f32"));
    };
    let values = &values[layout.start_offset()..layout.start_offset() + rows * vocab];
    let samples: Vec<_> = tasks.iter().map(|_| Mutex::new(None)).collect();
    parallel_for(rows, |row| {
        let logits = &values[row * vocab..(row + 1) * vocab];
        let sample = match &tasks[row] {
            LogitsTask::Next(choice) => sample(logits, choice),
            LogitsTask::Score(id, top) => score(logits, *id, *top).map(|l| SampledToken { id: *id, logprobs: Some(l) }),
        };
        *samples[row].lock().unwrap_or_else(PoisonError::into_inner) = Some(sample);
    });
    let samples = samples.into_iter().map(|sample| sample.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(samples.map(|sample| sample.unwrap_or_else(|| Err(Error::internal("a row was not sampled")))).collect())
}

impl LogitsTask<'_> {
    /// The same for a GPU.
    fn row(&self, vocab: usize) -> on_device::RowSampling<'_> {
        let choice = match self {
            Self::Score(id, top) if (*id as usize) < vocab => {
                let choice = on_device::TokenChoice::Given(*id);
                return on_device::RowSampling { choice, top: Some(*top), ..Default::default() };
            }
            Self::Score(..) => return on_device::RowSampling::default(),
            Self::Next(choice) => choice,
        };
        let SamplingParams { temperature, top_p, top_k, min_p, .. } = *choice.params;
        on_device::RowSampling {
            bias: &choice.params.logit_bias,
            penalties: choice.counts.on.then_some(Penalties {
                counts: &choice.counts.by_id,
                repetition: choice.params.repetition_penalty,
                frequency: choice.params.frequency_penalty,
                presence: choice.params.presence_penalty,
            }),
            masked: choice.masked,
            choice: match temperature {
                0.0 => on_device::TokenChoice::Best,
                _ => on_device::TokenChoice::Draw { temperature, min_p, top_k, top_p, uniform: choice.uniform() },
            },
            top: choice.params.logprobs,
        }
    }

    /// What a GPU's answer means.
    fn outcome(&self, picked: PickedToken, vocab: usize) -> Result<SampledToken> {
        if picked.max.is_nan() {
            return Err(not_finite());
        }
        if picked.max == f32::NEG_INFINITY {
            return Err(all_masked());
        }
        let logprobs = picked.report.map(|report| {
            let LogitReport { logit, rank, total, top } = report;
            let logprob = |logit| logprob(logit, picked.max, total);
            Logprobs {
                logprob: logprob(logit),
                rank,
                top: top.into_iter().map(|(id, logit)| (id, logprob(logit))).collect(),
            }
        });
        match self {
            Self::Score(id, _) if logprobs.is_none() => Err(outside(*id, vocab)),
            _ => Ok(SampledToken { id: picked.id, logprobs }),
        }
    }
}

impl SamplingMetadata<'_> {
    /// Decides a draw: in [0, 1).
    fn uniform(&self) -> f64 {
        let mut rng = Pcg64::seed_from_u64(self.seed);
        rng.advance(self.index as u128);
        (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

fn not_finite() -> Error {
    Error::internal("the model gave a logit that is NaN or infinite")
}

fn all_masked() -> Error {
    Error::internal("every token is masked or has a logit of minus infinity")
}

fn outside(id: u32, vocab: usize) -> Error {
    Error::internal(format!("token {id} is outside the vocabulary of {vocab}"))
}

thread_local! {
    /// A changed copy of a row, and the weights of a draw.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Chooses a token from `logits [vocab]`. Errors: `Internal` if a logit is NaN or infinite, or every token is masked.
pub fn sample(logits: &[f32], choice: &SamplingMetadata) -> Result<SampledToken> {
    SCRATCH.with_borrow_mut(|[copy, weights]| {
        let logits = adjust(logits, choice, copy);
        let (best, max) = checked_argmax(logits)?;
        let params = choice.params;
        let id = if params.temperature == 0.0 { best } else { draw(logits, max, choice, weights) };
        let logprobs = params.logprobs.map(|top| report(logits, max, id, top));
        Ok(SampledToken { id, logprobs })
    })
}

/// The log-probability of `id` under `logits [vocab]` as they are, with the `top` most likely alternatives. Errors:
/// `Internal` if a logit is NaN or infinite, or `id` is outside the vocabulary.
pub fn score(logits: &[f32], id: u32, top: usize) -> Result<Logprobs> {
    let (_, max) = checked_argmax(logits)?;
    if id as usize >= logits.len() {
        return Err(outside(id, logits.len()));
    }
    Ok(report(logits, max, id, top))
}

/// The logits after masks, bias and penalties; the row itself where there are none.
fn adjust<'a>(logits: &'a [f32], choice: &SamplingMetadata, copy: &'a mut Vec<f32>) -> &'a [f32] {
    let SamplingMetadata { params, counts, masked, .. } = choice;
    if masked.is_empty() && params.logit_bias.is_empty() && !counts.on {
        return logits;
    }
    copy.clear();
    copy.extend_from_slice(logits);
    for &(id, bias) in &params.logit_bias {
        if let Some(logit) = copy.get_mut(id as usize) {
            *logit += bias;
        }
    }
    for (&id, &count) in &counts.by_id {
        let Some(logit) = copy.get_mut(id as usize) else { continue };
        *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
        if count > 0 {
            *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
        }
    }
    for &id in *masked {
        if let Some(logit) = copy.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    copy
}

/// The largest logit and the lowest id that has it, in one pass that the compiler vectorises.
fn checked_argmax(logits: &[f32]) -> Result<(u32, f32)> {
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut at = [0_u32; LANES];
    let mut valid = [true; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for (row, chunk) in chunks.enumerate() {
        for lane in 0..LANES {
            let logit = chunk[lane];
            valid[lane] &= logit < f32::INFINITY;
            let better = logit > max[lane];
            max[lane] = if better { logit } else { max[lane] };
            at[lane] = if better { row as u32 } else { at[lane] };
        }
    }
    let tail = logits.len() - rest.len();
    for (lane, &logit) in rest.iter().enumerate() {
        valid[lane] &= logit < f32::INFINITY;
        if logit > max[lane] {
            (max[lane], at[lane]) = (logit, (tail / LANES) as u32);
        }
    }
    if valid.contains(&false) {
        return Err(not_finite());
    }
    let lanes = (0..LANES).map(|lane| (at[lane] * LANES as u32 + lane as u32, max[lane]));
    match lanes.min_by(|a, b| order((a.1, a.0), (b.1, b.0))) {
        Some((id, max)) if max > f32::NEG_INFINITY => Ok((id, max)),
        _ => Err(all_masked()),
    }
}

/// Larger logits first, then lower ids. Logits are not NaN.
fn order(a: (f32, u32), b: (f32, u32)) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// The `k` largest logits with their ids, best first.
fn largest(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let k = k.min(logits.len());
    if k == 0 {
        return Vec::new();
    }
    // k chunks have a logit at or above the k-th largest of the chunks' maxima, so the k largest are all there.
    let maxima: Vec<f32> =
        logits.chunks(CHUNK).map(|chunk| chunk.iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect();
    let floor = match maxima.len() {
        chunks if k <= chunks => {
            let mut sorted = maxima.clone();
            *sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
        }
        _ => f32::NEG_INFINITY,
    };
    let mut best = Vec::with_capacity(2 * k);
    for (i, chunk) in logits.chunks(CHUNK).enumerate().filter(|(i, _)| maxima[*i] >= floor) {
        let ids = (i * CHUNK) as u32..;
        best.extend(chunk.iter().copied().zip(ids).filter(|(logit, _)| *logit >= floor));
    }
    if best.len() > k {
        best.select_nth_unstable_by(k - 1, |a, b| order(*a, *b));
        best.truncate(k);
    }
    best.sort_unstable_by(|a, b| order(*a, *b));
    best
}

/// Draws a token after temperature, `min_p`, `top_k` and `top_p`.
fn draw(logits: &[f32], max: f32, choice: &SamplingMetadata, weights: &mut Vec<f32>) -> u32 {
    let SamplingParams { temperature, top_p, top_k, min_p, .. } = *choice.params;
    let weight = |logit: f32| {
        let weight = exp((logit - max) / temperature);
        if weight < min_p { 0.0 } else { weight }
    };
    let uniform = choice.uniform();

    if top_k > 0 && top_k < logits.len() {
        let best: Vec<_> = largest(logits, top_k).into_iter().map(|(logit, id)| (weight(logit), id)).collect();
        let total = best.iter().map(|(weight, _)| f64::from(*weight)).sum();
        return pick(nucleus(&best, top_p, total).unwrap_or(&best), uniform);
    }

    weights.clear();
    weights.extend(logits.iter().map(|&logit| weight(logit)));
    let sums: Vec<f64> = weights.chunks(CHUNK).map(sum).collect();
    let total: f64 = sums.iter().sum();
    if top_p < 1.0 {
        let mut k = 256;
        loop {
            let best: Vec<_> = largest(logits, k).into_iter().map(|(_, id)| (weights[id as usize], id)).collect();
            match nucleus(&best, top_p, total) {
                Some(nucleus) => return pick(nucleus, uniform),
                // Rounding may keep the whole sum below the total.
                None if best.len() == logits.len() => return pick(&best, uniform),
                None => k *= 8,
            }
        }
    }

    let mut left = uniform * total;
    let mut chunk = 0;
    while chunk + 1 < sums.len() && left >= sums[chunk] {
        left -= sums[chunk];
        chunk += 1;
    }
    // Rounding may lead past the last token with a weight: go back to one that has it.
    while chunk > 0 && sums[chunk] == 0.0 {
        chunk -= 1;
        left = sums[chunk];
    }
    let ids = (chunk * CHUNK) as u32..;
    let candidates: Vec<_> = weights.chunks(CHUNK).nth(chunk).unwrap_or(&[]).iter().copied().zip(ids).collect();
    pick_at(&candidates, left)
}

/// The shortest start of `best` whose weight reaches `top_p` of `total`, if it does.
fn nucleus(best: &[(f32, u32)], top_p: f32, total: f64) -> Option<&[(f32, u32)]> {
    let goal = f64::from(top_p) * total;
    let mut reached = 0.0;
    for (i, (weight, _)) in best.iter().enumerate() {
        reached += f64::from(*weight);
        if reached >= goal {
            return Some(&best[..=i]);
        }
    }
    None
}

/// The candidate at `uniform` of their total weight.
fn pick(candidates: &[(f32, u32)], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
    pick_at(candidates, uniform * total)
}

/// The candidate whose share of the running sum holds `left`; the last one with a weight where rounding leads past it.
fn pick_at(candidates: &[(f32, u32)], mut left: f64) -> u32 {
    let mut last = candidates.first().map_or(0, |(_, id)| *id);
    for &(weight, id) in candidates.iter().filter(|(weight, _)| *weight > 0.0) {
        last = id;
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Log-probability and rank of `id`, and the `top` best tokens.
fn report(logits: &[f32], max: f32, id: u32, top: usize) -> Logprobs {
    let mut total = 0.0;
    let mut weights = [0.0; CHUNK];
    for chunk in logits.chunks(CHUNK) {
        let weights = &mut weights[..chunk.len()];
        weights.iter_mut().zip(chunk).for_each(|(weight, logit)| *weight = exp(logit - max));
        total += sum(weights);
    }
    let own = logits[id as usize];
    let logprob = |logit| logprob(logit, max, total);
    Logprobs {
        logprob: logprob(own),
        rank: 1 + logits.iter().map(|logit| u32::from(*logit > own)).sum::<u32>(),
        top: largest(logits, top).into_iter().map(|(logit, id)| (id, logprob(logit))).collect(),
    }
}

/// Of a logit, where `total` is the sum of `exp(logit - max)`.
fn logprob(logit: f32, max: f32, total: f64) -> f32 {
    (f64::from(logit) - (f64::from(max) + total.ln())) as f32
}

/// Sum of at most a chunk, in a fixed order over lanes.
fn sum(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0_f64; LANES];
    for values in values.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += f64::from(*value));
    }
    lanes.iter().sum()
}

/// e to the `x` for `x <= 0`, within 2 units in the last place; 0 below -87, where floats end. Plain arithmetic, so that
/// loops over it vectorise (Cephes' expf: range reduction by ln 2 in two parts, then a polynomial).
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 * 2^23 rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let n = clamped * std::f32::consts::LOG2_E + ROUND;
    let exponent = (n.to_bits() << 23).wrapping_add(1.0_f32.to_bits());
    let n = n - ROUND;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let e = (p * r * r + r + 1.0) * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { e }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0_f64;
        for i in 0..=870_000 {
            let x = -(i as f32) * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            worst = worst.max((got - want).abs() / want);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-87.5), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn largest_equals_a_full_sort() {
        let mut rng = Pcg64::seed_from_u64(1);
        for len in [1, 2, 63, 64, 65, 500, 1000] {
            // Few distinct values, so that ties are everywhere.
            let logits: Vec<f32> = (0..len).map(|_| (rng.next_u64() % 40) as f32 - 20.0).collect();
            let mut sorted: Vec<_> = logits.iter().copied().zip(0..).collect();
            sorted.sort_by(|a, b| order(*a, *b));
            for k in [0, 1, 2, 7, 8, 9, 64, len, len + 1] {
                assert_eq!(largest(&logits, k), sorted[..k.min(len)], "{k} of {len}");
            }
        }
    }
}
