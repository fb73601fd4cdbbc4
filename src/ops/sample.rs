//! Sampling tokens from logits on a GPU, so that only ids and the requested log-probabilities are copied to the host.
//!
//! The reference is the engine's sampler on the CPU, `engine::sampler`. The kernels apply the same steps in the same order. Token
//! weights are equal bit for bit, and so is the choice, except for draws within rounding of a boundary between two tokens. One
//! thing differs: a draw runs over the kept tokens in order of their logits only if `top_k` or the nucleus lies within about the
//! [`SMALL`] best, and in order of their ids otherwise.

#[cfg(feature = "cuda")]
mod cuda;

use std::collections::HashMap;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::gpu::constants;
use crate::{Error, Result};

/// The most alternatives that can be reported, and the largest `top_k` that is drawn in order of the logits.
pub const SMALL: usize = constants::SAMPLE_MAX_TOP;

/// The largest vocabulary. Weights are summed in 64-bit fixed point.
const MAX_VOCAB: usize = constants::SAMPLE_SEGMENT * constants::SAMPLE_MAX_SEGMENTS;

/// Words of a task's parameters: `Task` in `kernels/sample.cu`.
const TASK: usize = constants::SAMPLE_TASK_WORDS;

/// The sampling parameters of one row of logits. The default takes the token with the largest logit.
#[derive(Default)]
pub struct RowSampling<'a> {
    /// Ids and the values added to their logits.
    pub bias: &'a [(u32, f32)],
    /// Penalties, applied after the bias.
    pub penalties: Option<Penalties<'a>>,
    /// Ids that must not be chosen.
    pub masked: &'a [u32],
    /// The ids that may be chosen: bit `id % 32` of word `id / 32`, 0 beyond the words. `None` allows all.
    pub allowed: Option<&'a [u32]>,
    /// How the token is chosen.
    pub choice: TokenChoice,
    /// Report the token's log-probability, and those of this many most likely tokens.
    pub top: Option<usize>,
}

/// Penalties of tokens that the sequence contains.
pub struct Penalties<'a> {
    /// How often each token was generated. 0: it is in the prompt only.
    pub counts: &'a HashMap<u32, u32>,
    /// Divides positive logits and multiplies negative ones.
    pub repetition: f32,
    /// Subtracted once for each time that the token was generated.
    pub frequency: f32,
    /// Subtracted once if the token was generated.
    pub presence: f32,
}

/// How a row's token is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum TokenChoice {
    /// The token with the largest logit.
    #[default]
    Best,
    /// A given token, for its log-probability.
    Given(u32),
    /// A random draw.
    Draw {
        /// Divides the logits. Not 0.
        temperature: f32,
        /// Keeps tokens with at least this share of the best token's weight. At most 1.
        min_p: f32,
        /// Keeps this many tokens. 0 keeps all.
        top_k: usize,
        /// Of these, keeps the best tokens that together have this share of the weight. 1 keeps all.
        top_p: f32,
        /// The random number of the draw, in [0, 1).
        uniform: f64,
    },
}

/// The result of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct PickedToken {
    /// The token. Meaningless if `max` is not finite.
    pub id: u32,
    /// The largest logit. NaN if a logit is NaN or infinite, minus infinity if all tokens are masked.
    pub max: f32,
    /// Present if it was requested and `max` is finite.
    pub report: Option<LogitReport>,
}

/// The logits from which log-probabilities are computed: `logit - max - ln(total)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogitReport {
    /// The token's logit.
    pub logit: f32,
    /// Its rank, from 1: one more than the number of larger logits.
    pub rank: u32,
    /// The sum of `exp(logit - max)` over the vocabulary.
    pub total: f64,
    /// Ids and logits of the most likely tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// Launched sampling kernels, whose results can be read.
pub struct SampleLaunch {
    /// `u32`: id and largest logit of each row, then a record for each task. A captured CUDA graph writes it at each replay.
    words: Tensor,
    plan: SamplePlan,
}

/// Launches the sampling of `logits [rows, vocab]` f32, on a GPU, without waiting. Biases, penalties and masks change `logits` in
/// place. If all rows take the best token, nothing is uploaded and the launches depend on the shape alone, so that a CUDA graph can
/// capture them. Errors: shapes that do not fit, a vocabulary or a report that is too large.
pub fn launch(logits: &Tensor, rows: &[RowSampling]) -> Result<SampleLaunch> {
    let (count, vocab) = logits.dims2()?;
    if count != rows.len() {
        return Err(Error::internal(format!("sampling parameters of {} rows for {count} rows of logits", rows.len())));
    }
    let plan = SamplePlan::new(rows, vocab)?;
    let words = logits.apply_op1_no_bwd(&plan)?;
    Ok(SampleLaunch { words, plan })
}

impl SampleLaunch {
    /// Waits for the kernels and returns each row's result. Errors: the GPU failed.
    pub fn read(&self) -> Result<Vec<PickedToken>> {
        let words = self.words.to_vec1::<u32>()?;
        let (best, records) = words.split_at(2 * self.plan.rows.len());
        let picked = |(place, best): (&ResultLocation, &[u32])| {
            let max = f32::from_bits(best[1]);
            let ResultLocation { record: Some(record), top } = *place else {
                return PickedToken { id: best[0], max, report: None };
            };
            // Without a finite maximum the kernels choose no token.
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

/// Where a row's result lies.
#[derive(Debug, Clone, Copy)]
struct ResultLocation {
    /// Index of its record. `None`: only the best token was requested.
    record: Option<usize>,
    /// Alternatives in the record, if it reports.
    top: Option<usize>,
}

/// The parameters of all rows, as the kernels read them.
struct SamplePlan {
    rows: Vec<ResultLocation>,
    /// The parameters of each task, a row with edits or picks, then their lists.
    words: Vec<u32>,
    /// The number of tasks.
    tasks: usize,
    /// Whether some task edits its logits.
    edits: bool,
    /// Whether some task draws or reports.
    picks: bool,
    /// Words of a result record.
    stride: usize,
}

impl SamplePlan {
    fn new(rows: &[RowSampling], vocab: usize) -> Result<Self> {
        if vocab == 0 || vocab > MAX_VOCAB {
            return Err(Error::internal(format!("sampling from a vocabulary of {vocab}: it must be 1 to {MAX_VOCAB}")));
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
                return Err(Error::internal(format!("{top:?} alternatives requested: at most {SMALL}")));
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
    /// Whether the logits change.
    fn edits(&self) -> bool {
        !self.bias.is_empty() || self.penalties.is_some() || !self.masked.is_empty() || self.allowed.is_some()
    }

    /// Whether more than the best token is requested.
    fn picks(&self) -> bool {
        self.choice != TokenChoice::Best || self.top.is_some()
    }

    /// Appends the parameters of row `index` to `words` and their lists to `lists`, the first of which is at word `start`.
    fn pack(&self, index: usize, vocab: usize, start: usize, words: &mut Vec<u32>, lists: &mut Vec<u32>) {
        const DRAW: u32 = 1;
        const REPORT: u32 = 2;
        // How the token is chosen.
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
        // The lists of biases, penalised tokens and masked tokens.
        let at = |lists: &Vec<u32>| (start + lists.len()) as u32;

        let bias = at(lists);
        let mut sorted = self.bias.to_vec();
        // A stable sort: several biases of an id are added in their order.
        sorted.sort_by_key(|(id, _)| *id);
        lists.extend(sorted.iter().flat_map(|(id, bias)| [*id, bias.to_bits()]));
        let seen = at(lists);
        let penalties = self.penalties.as_ref();
        lists.extend(penalties.iter().flat_map(|p| p.counts).flat_map(|(id, count)| [*id, *count]));
        let masked = at(lists);
        lists.extend(self.masked);
        let end = at(lists);
        // A bit for each id of the vocabulary. 0: none.
        let allowed = self.allowed.map_or(0, |words| {
            let start = at(lists);
            let padded = words.iter().copied().chain(std::iter::repeat(0));
            lists.extend(padded.take(vocab.div_ceil(32)));
            start
        });

        // The 18 words of `Task`.
        let uniform = uniform.to_bits();
        words.extend([uniform as u32, (uniform >> 32) as u32, index as u32, flags]);
        words.extend([temperature.to_bits(), min_p.to_bits(), top_p.to_bits(), top_k]);
        words.extend([target, self.top.unwrap_or(0).min(vocab) as u32, bias, seen, masked, end]);
        let factors = penalties.map_or([1.0, 0.0, 0.0], |p| [p.repetition, p.frequency, p.presence]);
        words.extend(factors.map(f32::to_bits));
        words.push(allowed);
    }
}

impl CustomOp1 for SamplePlan {
    fn name(&self) -> &'static str {
        "sample"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        candle_core::bail!("the sampling kernels run on a GPU only")
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
