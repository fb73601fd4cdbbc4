//! Choosing tokens from logits on a GPU, so that only ids and the log-probabilities asked for cross the bus.
//!
//! The order of things is that of [`crate::engine::sampler`], which is the CPU's way and the reference: weights are the same
//! bit by bit, and so is the choice, but for draws that fall within rounding of a boundary. One difference: a draw
//! goes over the kept tokens best first only where `top_k` or the nucleus is within about the [`SMALL`] best, and by id
//! otherwise.

#[cfg(feature = "cuda")]
mod cuda;

use std::collections::HashMap;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::{Error, Result};

/// The most alternatives that can be reported; up to here `top_k` is drawn from best first.
pub const SMALL: usize = 1024;

/// Largest vocabulary: masses are summed in 64-bit fixed point.
const MAX_VOCAB: usize = 1 << 19;

/// Words of a task's record, `Task` in `kernels/sample.cu`.
const TASK: usize = 18;

/// What is asked of a row of logits. The default is the best token.
#[derive(Default)]
pub struct RowSampling<'a> {
    /// Added to logits, by id.
    pub bias: &'a [(u32, f32)],
    /// Applied after that.
    pub penalties: Option<Penalties<'a>>,
    /// Ids that may not come.
    pub masked: &'a [u32],
    /// Which token.
    pub choice: TokenChoice,
    /// Report the token, and this many of the most likely ones.
    pub top: Option<usize>,
}

/// Penalties of tokens seen before.
pub struct Penalties<'a> {
    /// How often each was generated (0: only in the prompt).
    pub counts: &'a HashMap<u32, u32>,
    /// Divides positive and multiplies negative logits.
    pub repetition: f32,
    /// Subtracted for each time.
    pub frequency: f32,
    /// Subtracted once from generated ones.
    pub presence: f32,
}

/// Which token of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum TokenChoice {
    /// The one with the largest logit.
    #[default]
    Best,
    /// This one, to report it.
    Given(u32),
    /// One drawn at random.
    Draw {
        /// Not 0.
        temperature: f32,
        /// Keep tokens with at least this share of the best one's weight; at most 1.
        min_p: f32,
        /// Keep this many; 0 keeps all.
        top_k: usize,
        /// Of those keep the best that together have this share; 1 keeps all.
        top_p: f32,
        /// Decides the draw, in [0, 1).
        uniform: f64,
    },
}

/// What came of a row.
#[derive(Debug, Clone, PartialEq)]
pub struct PickedToken {
    /// The token; without meaning if `max` is not finite.
    pub id: u32,
    /// The largest logit; NaN where one is NaN or infinite, minus infinity where all are masked.
    pub max: f32,
    /// Where asked for, and `max` is finite.
    pub report: Option<LogitReport>,
}

/// What log-probabilities are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitReport {
    /// The token's logit.
    pub logit: f32,
    /// One more than there are larger logits.
    pub rank: u32,
    /// Sum of `exp(logit - max)`.
    pub total: f64,
    /// Ids and logits of the most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Kernels on their way.
pub struct SampleLaunch {
    /// `u32`: id and largest logit of each row, then a record for each task. A captured graph writes it at each replay.
    words: Tensor,
    plan: SamplePlan,
}

/// Launches what is asked of the rows of `logits [rows, vocab]` f32, on a GPU; nothing waits for it. Biases, penalties and
/// masks are applied to `logits` in place. Rows that only want the best token need no parameters: then nothing is uploaded
/// and every launch depends on the shape alone, so that it can be part of a graph. Errors: shapes, or more is asked than
/// the kernels can do.
pub fn launch(logits: &Tensor, rows: &[RowSampling]) -> Result<SampleLaunch> {
    let (count, vocab) = logits.dims2()?;
    if count != rows.len() {
        return Err(Error::internal(format!("{} tasks for {count} rows of logits", rows.len())));
    }
    let plan = SamplePlan::new(rows, vocab)?;
    let words = logits.apply_op1_no_bwd(&plan)?;
    Ok(SampleLaunch { words, plan })
}

impl SampleLaunch {
    /// Waits, and brings what came of each row.
    pub fn read(&self) -> Result<Vec<PickedToken>> {
        let words = self.words.to_vec1::<u32>()?;
        let (best, records) = words.split_at(2 * self.plan.rows.len());
        let picked = |(place, best): (&ResultLocation, &[u32])| {
            let max = f32::from_bits(best[1]);
            let ResultLocation { record: Some(record), top } = *place else {
                return PickedToken { id: best[0], max, report: None };
            };
            // Without a finite maximum nothing was picked.
            if !max.is_finite() {
                return PickedToken { id: 0, max, report: None };
            }
            let record = &records[record * self.plan.stride..];
            let report = top.map(|top| LogitReport {
                logit: f32::from_bits(record[2]),
                rank: record[1],
                total: f64::from_bits(u64::from(record[4]) | u64::from(record[5]) << 32),
                top: record[6..6 + 2 * top].chunks_exact(2).map(|pair| (pair[0], f32::from_bits(pair[1]))).collect(),
            });
            PickedToken { id: record[0], max, report }
        };
        Ok(self.plan.rows.iter().zip(best.chunks_exact(2)).map(picked).collect())
    }
}

/// Where a row's results are.
#[derive(Debug, Clone, Copy)]
struct ResultLocation {
    /// Which of the records; none for the best token alone.
    record: Option<usize>,
    /// Alternatives in it, where it reports.
    top: Option<usize>,
}

/// Parameters as the kernels read them.
struct SamplePlan {
    rows: Vec<ResultLocation>,
    /// A record of each row with edits or picks, then their lists.
    words: Vec<u32>,
    /// How many such rows there are.
    tasks: usize,
    /// Some row has edits.
    edits: bool,
    /// Some row draws or reports.
    picks: bool,
    /// Words of a record of results.
    stride: usize,
}

impl SamplePlan {
    fn new(rows: &[RowSampling], vocab: usize) -> Result<Self> {
        if vocab == 0 || vocab > MAX_VOCAB {
            return Err(Error::internal(format!("sampling from {vocab} tokens; there may be 1 to {MAX_VOCAB}")));
        }
        let mut plan = Self { rows: Vec::new(), words: Vec::new(), tasks: 0, edits: false, picks: false, stride: 0 };
        let asks = |row: &RowSampling| row.edits() || row.picks();
        let mut lists = Vec::new();
        let records = rows.iter().filter(|row| asks(row)).count();
        let mut most = 0;
        for (index, row) in rows.iter().enumerate() {
            let top = row.top.map(|top| top.min(vocab));
            let record = row.picks().then_some(plan.tasks);
            plan.rows.push(ResultLocation { record, top });
            if !asks(row) {
                continue;
            }
            if top.is_some_and(|top| top > SMALL) {
                return Err(Error::internal(format!("{top:?} alternatives; there may be {SMALL}")));
            }
            if matches!(row.choice, TokenChoice::Given(id) if id as usize >= vocab) {
                return Err(Error::internal(format!("{:?} is outside the vocabulary of {vocab}", row.choice)));
            }
            most = most.max(top.unwrap_or(0));
            plan.tasks += 1;
            plan.edits |= row.edits();
            plan.picks |= row.picks();
            row.pack(index, vocab, TASK * records, &mut plan.words, &mut lists);
        }
        plan.words.append(&mut lists);
        plan.stride = if plan.picks { 6 + 2 * most } else { 0 };
        Ok(plan)
    }
}

impl RowSampling<'_> {
    /// Whether logits change.
    fn edits(&self) -> bool {
        !self.bias.is_empty() || self.penalties.is_some() || !self.masked.is_empty()
    }

    /// Whether more than the best token is wanted.
    fn picks(&self) -> bool {
        self.choice != TokenChoice::Best || self.top.is_some()
    }

    /// Adds the record of row `index` to `words`, and its lists to `lists`, which start at word `start`.
    fn pack(&self, index: usize, vocab: usize, start: usize, words: &mut Vec<u32>, lists: &mut Vec<u32>) {
        const DRAW: u32 = 1;
        const REPORT: u32 = 2;
        let mut flags = if self.top.is_some() { REPORT } else { 0 };
        let (mut uniform, mut temperature, mut min_p, mut top_p, mut top_k) = (0.0_f64, 1.0_f32, 0.0_f32, 1.0_f32, 0);
        let mut target = u32::MAX;
        match self.choice {
            TokenChoice::Best => {}
            TokenChoice::Given(id) => target = id,
            TokenChoice::Draw { .. } => flags |= DRAW,
        }
        if let TokenChoice::Draw { temperature: t, min_p: m, top_k: k, top_p: p, uniform: u } = self.choice {
            (uniform, temperature, min_p, top_p) = (u, t, m, p);
            top_k = if k < vocab { k as u32 } else { 0 };
        }
        let at = |lists: &Vec<u32>| (start + lists.len()) as u32;

        let bias = at(lists);
        let mut sorted = self.bias.to_vec();
        // Stable: several biases of an id are added in their order.
        sorted.sort_by_key(|(id, _)| *id);
        lists.extend(sorted.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]));
        let seen = at(lists);
        let penalties = self.penalties.as_ref();
        lists.extend(penalties.iter().flat_map(|p| p.counts).flat_map(|(id, count)| [*id, *count]));
        let masked = at(lists);
        lists.extend(self.masked);
        let end = at(lists);

        let uniform = uniform.to_bits();
        words.extend([uniform as u32, (uniform >> 32) as u32, index as u32, flags]);
        words.extend([temperature.to_bits(), min_p.to_bits(), top_p.to_bits(), top_k]);
        words.extend([target, self.top.unwrap_or(0).min(vocab) as u32, bias, seen, masked, end]);
        let factors = penalties.map_or([1.0, 0.0, 0.0], |p| [p.repetition, p.frequency, p.presence]);
        words.extend(factors.map(f32::to_bits));
        words.push(0);
    }
}

impl CustomOp1 for SamplePlan {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("on the CPU, the engine's sampler chooses tokens")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        logits: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> candle_core::Result<(candle_core::CudaStorage, Shape)> {
        cuda::forward(self, logits, layout)
    }
}
