//! The sampler: from a row of logits to the next token.
//!
//! The order of the steps is vLLM's: masks (`min_tokens`, `bad_words`, constraints), `logit_bias`, repetition penalty, frequency and presence penalties;
//! then the log-probabilities are computed; then greedy choice, or temperature, `min_p`, `top_k`, `top_p` (of the tokens that
//! `top_k` keeps) and a draw. Equal logits rank by id, the lowest first.
//!
//! The result for a row depends on nothing else in the batch, and the draw of the i-th token only on the seed and i, so a
//! preempted sequence continues as before. Sums run in a fixed order over fixed chunks, and the exponential is computed here,
//! so results do not depend on the machine's libm. A whole row is sorted only if `top_p` reaches that far.
//!
//! Logits on a GPU are sampled there by [`crate::ops::sample`], in the same steps.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, Device, Storage, Tensor};
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64;

use super::constraint::TokenMask;
use super::request::{Logprobs, SamplingParams};
use crate::ops::pool::parallel_for;
use crate::ops::sample::{self as on_device, LogitReport, Penalties, PickedToken};
use crate::{Error, Result};

/// Logits are scanned in chunks of this size: four times sixteen lanes, which the compiler keeps in registers.
const CHUNK: usize = 64;

/// A sampled or scored token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// Its log-probabilities, if they were requested.
    pub logprobs: Option<Logprobs>,
}

/// The tokens to which penalties apply, and how often each was generated (0: it occurs only in the prompt).
#[derive(Debug, Default)]
pub struct TokenCounts {
    /// Empty if no penalty is set.
    by_id: HashMap<u32, u32>,
    /// Whether any penalty is set. If not, nothing is counted.
    enabled: bool,
}

impl TokenCounts {
    /// The counts of a sequence that has generated nothing.
    pub fn new(params: &SamplingParams, prompt: &[u32]) -> Self {
        let enabled =
            params.repetition_penalty != 1.0 || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
        let by_id = if enabled { prompt.iter().map(|id| (*id, 0)).collect() } else { HashMap::new() };
        Self { by_id, enabled }
    }

    /// Counts a generated token.
    pub fn push(&mut self, id: u32) {
        if self.enabled {
            *self.by_id.entry(id).or_insert(0) += 1;
        }
    }
}

/// Everything that determines the sampled token, besides the logits.
pub struct SamplingMetadata<'a> {
    /// The request's parameters.
    pub params: &'a SamplingParams,
    /// The tokens to which penalties apply.
    pub counts: &'a TokenCounts,
    /// Ids that must not be sampled.
    pub masked: &'a [u32],
    /// The tokens that may be sampled; `None` allows all.
    pub allowed: Option<&'a TokenMask>,
    /// Determines the draw, together with `index`.
    pub seed: u64,
    /// Index of the token in the output.
    pub index: usize,
}

/// A task for one row of logits.
pub enum LogitsTask<'a> {
    /// Samples the next token, see [`sample`].
    Sample(SamplingMetadata<'a>),
    /// Computes the log-probability of `id` and `top` alternatives, see [`score`].
    Score {
        /// The token id.
        id: u32,
        /// Number of alternatives.
        top: usize,
    },
}

/// Runs each task on its row of `logits [tasks, vocab]` f32, on their device. On a GPU, masks, biases and penalties change the
/// logits in place. Errors: logits of another shape or type. Each task also has an error of its own.
pub fn run_tasks(logits: &Tensor, tasks: &[LogitsTask]) -> Result<Vec<Result<SampledToken>>> {
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
        let picked = tasks.iter().zip(picked).enumerate();
        return picked
            .map(|(row, (task, picked))| Ok(task.outcome(picked, &task.chosen_logits(&logits, row)?, vocab)))
            .collect();
    }
    run_on_cpu(&logits, tasks)
}

fn run_on_cpu(logits: &Tensor, tasks: &[LogitsTask]) -> Result<Vec<Result<SampledToken>>> {
    let (rows, vocab) = logits.dims2()?;
    let (storage, layout) = logits.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(values)) = &*storage else {
        return Err(Error::internal("logits must be f32"));
    };
    let values = &values[layout.start_offset()..layout.start_offset() + rows * vocab];
    let samples: Vec<_> = tasks.iter().map(|_| Mutex::new(None)).collect();
    parallel_for(rows, |row| {
        let logits = &values[row * vocab..(row + 1) * vocab];
        let sample = match &tasks[row] {
            LogitsTask::Sample(metadata) => sample(logits, metadata),
            &LogitsTask::Score { id, top } => score(logits, id, top).map(|l| SampledToken { id, logprobs: Some(l) }),
        };
        *samples[row].lock().unwrap_or_else(PoisonError::into_inner) = Some(sample);
    });
    let samples = samples.into_iter().map(|sample| sample.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(samples.map(|sample| sample.unwrap_or_else(|| Err(Error::internal("a row was not sampled")))).collect())
}

impl LogitsTask<'_> {
    /// The task for a GPU.
    fn row(&self, vocab: usize) -> on_device::RowSampling<'_> {
        let metadata = match *self {
            Self::Score { id, top } if (id as usize) < vocab => {
                let choice = on_device::TokenChoice::Given(id);
                return on_device::RowSampling { choice, top: Some(top), ..Default::default() };
            }
            Self::Score { .. } => return on_device::RowSampling::default(),
            Self::Sample(ref metadata) => metadata,
        };
        let SamplingParams { temperature, top_p, top_k, min_p, .. } = *metadata.params;
        on_device::RowSampling {
            bias: &metadata.params.logit_bias,
            penalties: metadata.counts.enabled.then_some(Penalties {
                counts: &metadata.counts.by_id,
                repetition: metadata.params.repetition_penalty,
                frequency: metadata.params.frequency_penalty,
                presence: metadata.params.presence_penalty,
            }),
            masked: metadata.masked,
            allowed: metadata.allowed.map(TokenMask::words),
            choice: match temperature {
                0.0 => on_device::TokenChoice::Best,
                _ => on_device::TokenChoice::Draw { temperature, min_p, top_k, top_p, uniform: metadata.uniform() },
            },
            top: metadata.params.logprobs,
        }
    }

    /// The ids whose log-probabilities are reported, and their changed logits in row `row`, from the GPU. A copy per row: few
    /// requests ask for these.
    fn chosen_logits(&self, logits: &Tensor, row: usize) -> Result<Vec<(u32, f32)>> {
        let Self::Sample(SamplingMetadata { params, .. }) = self else { return Ok(Vec::new()) };
        if params.logprobs.is_none() || params.logprob_token_ids.is_empty() {
            return Ok(Vec::new());
        }
        let ids = &params.logprob_token_ids;
        let index = Tensor::new(ids.as_slice(), logits.device())?;
        let values = logits.get(row)?.index_select(&index, 0)?.to_vec1::<f32>()?;
        Ok(ids.iter().copied().zip(values).collect())
    }

    /// The result of the task, from what the GPU returned. `chosen`: see [`Self::chosen_logits`].
    fn outcome(&self, picked: PickedToken, chosen: &[(u32, f32)], vocab: usize) -> Result<SampledToken> {
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
                chosen: chosen.iter().map(|(id, logit)| (*id, logprob(*logit))).collect(),
            }
        });
        match self {
            Self::Score { id, .. } if logprobs.is_none() => Err(outside(*id, vocab)),
            _ => Ok(SampledToken { id: picked.id, logprobs }),
        }
    }
}

impl SamplingMetadata<'_> {
    /// The random number of the draw, in [0, 1).
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
    Error::invalid("no token is left: every token is masked or has a logit of minus infinity")
}

fn outside(id: u32, vocab: usize) -> Error {
    Error::internal(format!("token {id} is outside the vocabulary of {vocab}"))
}

thread_local! {
    /// A copy of the row with changed logits, and the weights of a draw.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Samples a token from `logits [vocab]`. Errors: `Internal` if a logit is NaN or infinite, `Invalid`
/// if every token is masked.
pub fn sample(logits: &[f32], metadata: &SamplingMetadata) -> Result<SampledToken> {
    SCRATCH.with_borrow_mut(|[copy, weights]| {
        let logits = adjust(logits, metadata, copy);
        let (best, max) = checked_argmax(logits)?;
        let params = metadata.params;
        let id = if params.temperature == 0.0 { best } else { draw(logits, max, metadata, weights) };
        let logprobs = params.logprobs.map(|top| report(logits, max, id, top, &params.logprob_token_ids));
        Ok(SampledToken { id, logprobs })
    })
}

/// The log-probability of `id` under the unchanged `logits [vocab]`, with the `top` most likely tokens. Errors: `Internal` if
/// a logit is NaN or infinite, or if `id` is outside the vocabulary.
pub fn score(logits: &[f32], id: u32, top: usize) -> Result<Logprobs> {
    let (_, max) = checked_argmax(logits)?;
    if id as usize >= logits.len() {
        return Err(outside(id, logits.len()));
    }
    Ok(report(logits, max, id, top, &[]))
}

/// The logits after masks, bias and penalties: a changed copy, or the row itself if none applies.
fn adjust<'a>(logits: &'a [f32], metadata: &SamplingMetadata, copy: &'a mut Vec<f32>) -> &'a [f32] {
    let SamplingMetadata { params, counts, masked, allowed, .. } = metadata;
    if masked.is_empty() && allowed.is_none() && params.logit_bias.is_empty() && !counts.enabled {
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
    if let Some(allowed) = allowed {
        apply_mask(copy, allowed.words());
    }
    copy
}

/// Sets the logits of tokens that are not allowed to minus infinity. `words` has a bit for each id.
fn apply_mask(logits: &mut [f32], words: &[u32]) {
    let words = words.iter().copied().chain(std::iter::repeat(0));
    for (logits, word) in logits.chunks_mut(32).zip(words) {
        match word {
            0 => logits.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            word => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

/// The lowest id with the largest logit, and that logit, in one pass that the compiler vectorises. Errors: a logit is NaN or
/// positive infinity, or all are negative infinity.
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

/// Orders larger logits first, and equal ones by id. The logits are not NaN.
fn order(a: (f32, u32), b: (f32, u32)) -> Ordering {
    b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
}

/// The `k` largest logits with their ids, best first.
fn largest(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let k = k.min(logits.len());
    if k == 0 {
        return Vec::new();
    }
    // k chunks have a logit at or above the k-th largest of the chunks' maxima, so the k largest logits are in chunks whose
    // maximum is at or above it.
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
fn draw(logits: &[f32], max: f32, metadata: &SamplingMetadata, weights: &mut Vec<f32>) -> u32 {
    let SamplingParams { temperature, top_p, top_k, min_p, .. } = *metadata.params;
    let weight = |logit: f32| {
        let weight = exp((logit - max) / temperature);
        if weight < min_p { 0.0 } else { weight }
    };
    let uniform = metadata.uniform();

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
                // Because of rounding, even the sum of all weights may be below the total.
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
    // Because of rounding, this chunk may come after the last one with a weight: go back to it.
    while chunk > 0 && sums[chunk] == 0.0 {
        chunk -= 1;
        left = sums[chunk];
    }
    let ids = (chunk * CHUNK) as u32..;
    let candidates: Vec<_> = weights.chunks(CHUNK).nth(chunk).unwrap_or(&[]).iter().copied().zip(ids).collect();
    pick_at(&candidates, left)
}

/// The shortest prefix of `best` whose weight reaches `top_p` of `total`, if any does.
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

/// The candidate at the fraction `uniform` of the total weight.
fn pick(candidates: &[(f32, u32)], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|(weight, _)| f64::from(*weight)).sum();
    pick_at(candidates, uniform * total)
}

/// The candidate whose part of the running sum contains `left`, or the last one with a weight if rounding leads past it.
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

/// Log-probability and rank of `id`, and the `top` most likely tokens.
fn report(logits: &[f32], max: f32, id: u32, top: usize, chosen: &[u32]) -> Logprobs {
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
        // An id of the tokenizer may lie outside the rows of the head.
        chosen: chosen.iter().filter_map(|id| Some((*id, logprob(*logits.get(*id as usize)?)))).collect(),
    }
}

/// The log-probability of a logit. `total` is the sum of `exp(logit - max)` over the row.
fn logprob(logit: f32, max: f32, total: f64) -> f32 {
    (f64::from(logit) - (f64::from(max) + total.ln())) as f32
}

/// The sum of at most [`CHUNK`] values, in a fixed order over lanes.
fn sum(values: &[f32]) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0_f64; LANES];
    for values in values.chunks(LANES) {
        lanes.iter_mut().zip(values).for_each(|(lane, value)| *lane += f64::from(*value));
    }
    lanes.iter().sum()
}

/// `e^x` for `x <= 0`, within 2 units in the last place; 0 below -87, where `f32` underflows. Plain arithmetic, so that loops
/// over it vectorise (Cephes' `expf`: range reduction by ln 2 in two parts, then a polynomial).
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer.
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
