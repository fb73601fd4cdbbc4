//! Logits to a token.
//!
//! Order, as in vLLM: repetition, presence and frequency penalties; logit bias; stop ids masked below `min_tokens`;
//! log-probabilities are reported from here; then temperature, min-p, top-k, top-p, and one draw. The draw depends on the
//! seed and the token's index alone.

use std::cmp::Ordering;
use std::collections::HashMap;

use rand::Rng;
use rand_pcg::Pcg64;

use super::request::{Logprobs, SamplingParams};
use crate::{Error, Result};

/// What a draw needs besides logits.
pub struct Draw<'a> {
    /// How to sample.
    pub params: &'a SamplingParams,
    /// Decides the draw, with `index`.
    pub seed: u64,
    /// Tokens generated so far.
    pub index: usize,
    /// Ids of the prompt, for the repetition penalty.
    pub prompt: &'a [u32],
    /// How often each id was generated.
    pub counts: &'a HashMap<u32, u32>,
    /// Ids that would end the sequence: masked below `min_tokens`.
    pub stop_ids: &'a [u32],
}

/// Chooses the next token from `logits [vocab]`. Error: logits without a finite maximum (a fault of model or adapter).
pub fn sample(logits: &[f32], draw: &Draw) -> Result<(u32, Option<Logprobs>)> {
    let mut changed = Vec::new();
    let logits = if changes_logits(draw) {
        changed.extend_from_slice(logits);
        change_logits(&mut changed, draw);
        &changed
    } else {
        logits
    };
    let best = argmax(logits)?;
    let id = if draw.params.temperature == 0.0 { best } else { choose(logits, logits[best as usize], draw) };
    let logprobs = draw.params.logprobs.map(|top| logprobs(logits, id, top)).transpose()?;
    Ok((id, logprobs))
}

/// Log-probability of `id`, its rank, and the `top` most likely ids.
pub fn logprobs(logits: &[f32], id: u32, top: usize) -> Result<Logprobs> {
    let max = logits[argmax(logits)? as usize];
    let total: f64 = logits.iter().map(|l| f64::from((l - max).exp())).sum();
    let normaliser = f64::from(max) + total.ln();
    let of = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let own = logits[id as usize];
    let rank = 1 + logits.iter().filter(|l| **l > own).count() as u32;
    let top = top_ids(logits, top).into_iter().map(|i| (i, of(logits[i as usize]))).collect();
    Ok(Logprobs { logprob: of(own), rank, top })
}

fn changes_logits(draw: &Draw) -> bool {
    let p = draw.params;
    p.repetition_penalty != 1.0
        || p.presence_penalty != 0.0
        || p.frequency_penalty != 0.0
        || !p.logit_bias.is_empty()
        || draw.index < p.min_tokens
}

fn change_logits(logits: &mut [f32], draw: &Draw) {
    let p = draw.params;
    if p.repetition_penalty != 1.0 {
        let mut seen: Vec<u32> = draw.prompt.iter().chain(draw.counts.keys()).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 { *logit / p.repetition_penalty } else { *logit * p.repetition_penalty };
        }
    }
    for (&id, &count) in draw.counts {
        logits[id as usize] -= p.presence_penalty + p.frequency_penalty * count as f32;
    }
    for &(id, bias) in &p.logit_bias {
        logits[id as usize] += bias;
    }
    if draw.index < p.min_tokens {
        for &id in draw.stop_ids {
            logits[id as usize] = f32::NEG_INFINITY;
        }
    }
}

/// Index of the largest logit, the lowest on ties.
fn argmax(logits: &[f32]) -> Result<u32> {
    // Lanes with their own maxima, so that the loop vectorises; NaN makes a lane NaN for good.
    const LANES: usize = 16;
    let mut max = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (m, l) in max.iter_mut().zip(chunk) {
            *m = if *l > *m || l.is_nan() { *l } else { *m };
        }
    }
    let max = max.iter().chain(rest).fold(f32::NEG_INFINITY, |m, l| if *l > m || l.is_nan() { *l } else { m });
    if !max.is_finite() {
        return Err(Error::internal("the model gave logits that are not finite; its adapter may be broken"));
    }
    let at = logits.iter().position(|l| *l == max);
    at.map(|i| i as u32).ok_or_else(|| Error::internal("the model gave logits that are not numbers"))
}

/// Larger logits first, lower ids first on ties.
fn order(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + '_ {
    |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

/// The `count` most likely ids, in order.
fn top_ids(logits: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(logits.len());
    if count == 0 {
        return Vec::new();
    }
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, order(logits));
        ids.truncate(count);
    }
    ids.sort_unstable_by(order(logits));
    ids
}

/// One draw after temperature and truncation.
fn choose(logits: &[f32], max: f32, draw: &Draw) -> u32 {
    let p = draw.params;
    let weight = |id: u32| f64::from(((logits[id as usize] - max) / p.temperature).exp());
    let mut rng = Pcg64::new(u128::from(draw.seed), draw.index as u128);
    // 53 random bits: uniform in [0, 1).
    let uniform = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let pick = |ids: &mut dyn Iterator<Item = u32>, total: f64| {
        let mut left = uniform * total;
        let mut last = 0;
        for id in ids {
            let w = weight(id);
            if w > 0.0 {
                last = id;
                left -= w;
                if left < 0.0 {
                    break;
                }
            }
        }
        last
    };
    let all = 0..logits.len() as u32;
    if p.min_p == 0.0 && p.top_k == 0 && p.top_p >= 1.0 {
        return pick(&mut all.clone(), all.map(weight).sum());
    }
    // The best token's weight is 1, so min-p compares with weights as they are.
    let mut ids: Vec<u32> = all.filter(|&id| weight(id) >= f64::from(p.min_p) && weight(id) > 0.0).collect();
    if p.top_k > 0 && p.top_k < ids.len() {
        ids.select_nth_unstable_by(p.top_k - 1, order(logits));
        ids.truncate(p.top_k);
    }
    let mut total: f64 = ids.iter().map(|&id| weight(id)).sum();
    if p.top_p < 1.0 {
        let target = f64::from(p.top_p) * total;
        (ids, total) = nucleus(logits, ids, target, weight);
    } else {
        ids.sort_unstable_by(order(logits));
    }
    pick(&mut ids.into_iter(), total)
}

/// The fewest most likely of `ids` whose weights reach `target`, in order, and their sum. Sorts no more than it must.
fn nucleus(logits: &[f32], mut ids: Vec<u32>, target: f64, weight: impl Fn(u32) -> f64) -> (Vec<u32>, f64) {
    let mut sorted = 0;
    let mut sum = 0.0;
    let mut step = 64;
    while sorted < ids.len() {
        let rest = &mut ids[sorted..];
        let len = step.min(rest.len());
        if len < rest.len() {
            rest.select_nth_unstable_by(len - 1, order(logits));
        }
        rest[..len].sort_unstable_by(order(logits));
        for i in sorted..sorted + len {
            sum += weight(ids[i]);
            if sum >= target {
                ids.truncate(i + 1);
                return (ids, sum);
            }
        }
        sorted += len;
        step *= 4;
    }
    (ids, sum)
}

#[cfg(test)]
mod tests;
