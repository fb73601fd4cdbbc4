//! A forward pass over sequences of several jobs, and a backward pass if gradients are wanted, in bounded pieces.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::TrainableAdapter;
use super::block::{PassRows, SavedActivations, TrainBlock, TrainSegment};
use crate::Result;
use crate::model::decoder::Decoder;
use crate::ops::loss::{LossTarget, cross_entropy};
use crate::ops::norm::rms_norm_backward;

/// The rows of one job in a pass.
pub struct JobBatch {
    pub batch: TrainBatch,
    pub adapter: Arc<TrainableAdapter>,
    /// As `TrainSegment::dropout`.
    pub dropout: Option<(f32, u64)>,
}

/// Sequences and their targets.
#[derive(Default)]
pub struct TrainBatch {
    /// Of all sequences, back to back.
    pub tokens: Vec<u32>,
    /// Rows of each sequence.
    pub sequences: Vec<Range<usize>>,
    /// The tokens to predict, by ascending row.
    pub targets: Vec<LossTarget>,
}

impl TrainBatch {
    /// Adds a sequence. `target` says of each token after the first, by index, whether it is a target; `scale` multiplies
    /// the gradient of each target's loss.
    pub fn push(&mut self, tokens: &[u32], scale: f32, target: impl Fn(usize) -> bool) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.sequences.push(start..self.tokens.len());
        let targets = (1..tokens.len()).filter(|&i| target(i));
        self.targets.extend(targets.map(|i| LossTarget { row: (start + i - 1) as u32, id: tokens[i], scale }));
    }
}

/// The measurements of a pass, with one entry per target of a job's [`TrainBatch`].
#[derive(Debug, Default)]
pub struct TargetScores {
    /// Negative log-likelihoods, nats.
    pub nll: Vec<f32>,
    /// Whether the target was the likeliest token.
    pub correct: Vec<bool>,
}

/// A pass in progress.
pub struct Pass {
    model: Arc<Decoder>,
    rows: PassRows,
    tokens: Vec<u32>,
    targets: Vec<LossTarget>,
    /// Where each job's targets end.
    ends: Vec<usize>,
    stage: PassStage,
    gradient: bool,
    /// The residual stream before each block that the forward has reached and the backward has not. The last is the current
    /// one.
    residuals: Vec<Tensor>,
    /// The activations of each block that the forward has run, where there was room for them.
    saved: Vec<Option<SavedActivations>>,
    /// Bytes of activations that may still be saved.
    room: usize,
    /// Input of the next block or of the head; in the backward, the gradient of the residual stream.
    x: Option<Tensor>,
    /// Gradients of the head's input, chunk by chunk.
    dx: Vec<Tensor>,
    scores: TargetScores,
}

/// The next piece of a pass.
#[derive(Debug, Clone, Copy, PartialEq)]
enum PassStage {
    /// The forward of a block.
    Forward(usize),
    /// The loss of the rows from this one on.
    Loss(usize),
    /// The backward of a block.
    Backward(usize),
    Done,
}

impl Pass {
    /// A pass over the rows of some jobs. It saves up to `room` bytes of activations for the backward.
    pub fn new(model: Arc<Decoder>, batches: Vec<JobBatch>, gradient: bool, room: usize) -> Self {
        let (mut rows, mut tokens, mut targets, mut ends) = (PassRows::default(), Vec::new(), Vec::new(), Vec::new());
        for JobBatch { batch, adapter, dropout } in batches {
            let first = tokens.len();
            for sequence in batch.sequences {
                rows.positions.extend(0..sequence.len() as u32);
                rows.sequences.push(first + sequence.start..first + sequence.end);
            }
            tokens.extend(batch.tokens);
            rows.segments.push(TrainSegment { rows: first..tokens.len(), adapter, dropout });
            targets.extend(batch.targets.into_iter().map(|t| LossTarget { row: t.row + first as u32, ..t }));
            ends.push(targets.len());
        }
        let stage = PassStage::Forward(0);
        let (residuals, saved, x, dx, scores) = Default::default();
        Self { model, rows, tokens, targets, ends, stage, gradient, residuals, saved, room, x, dx, scores }
    }

    /// Runs one piece and waits for the device: the forward of a block, the loss of some rows, or the backward of a block. True
    /// after the last piece.
    pub fn advance(&mut self) -> Result<bool> {
        self.stage = match self.stage {
            PassStage::Forward(layer) => self.forward(layer)?,
            PassStage::Loss(row) => self.loss(row)?,
            PassStage::Backward(layer) => self.backward(layer)?,
            PassStage::Done => PassStage::Done,
        };
        self.model.weights().norm.device().synchronize()?;
        Ok(self.stage == PassStage::Done)
    }

    /// The scores of each job's targets, in the order of the jobs.
    pub fn scores(self) -> Vec<TargetScores> {
        let mut start = 0;
        let job = |end: usize| {
            let range = std::mem::replace(&mut start, end)..end;
            TargetScores { nll: self.scores.nll[range.clone()].to_vec(), correct: self.scores.correct[range].to_vec() }
        };
        self.ends.iter().copied().map(job).collect()
    }

    fn forward(&mut self, layer: usize) -> Result<PassStage> {
        let (residual, x) = match (self.residuals.last(), self.x.take()) {
            (Some(residual), Some(x)) => (residual.clone(), x),
            _ => {
                let (residual, x) = self.model.embed(&self.tokens, None)?;
                self.residuals.push(residual.clone());
                (residual, x)
            }
        };
        let (activations, residual, x) = self.block(layer).forward(&residual, x)?;
        if self.gradient {
            let left = self.room.checked_sub(activations.bytes());
            self.room = left.unwrap_or(self.room);
            self.saved.push(left.map(|_| activations));
        } else {
            self.residuals.clear();
        }
        self.residuals.push(residual);
        self.x = Some(x);
        let last = layer + 1 == self.model.config().num_layers;
        Ok(if last { PassStage::Loss(0) } else { PassStage::Forward(layer + 1) })
    }

    fn loss(&mut self, start: usize) -> Result<PassStage> {
        let weights = self.model.weights();
        let Some(x) = &self.x else { return Ok(PassStage::Done) };
        // On a CPU, these rows take about as long as a block. A GPU needs more rows to be busy.
        let end = self.tokens.len().min(start + if x.device().is_cpu() { 128 } else { 2048 });
        let within = |row: usize| self.targets.partition_point(|t| (t.row as usize) < row);
        let targets = self.targets[within(start)..within(end)].iter();
        let targets: Vec<LossTarget> = targets.map(|t| LossTarget { row: t.row - start as u32, ..*t }).collect();
        let rows = x.narrow(0, start, end - start)?;
        let loss = cross_entropy(&weights.head, &rows, &targets, self.gradient)?;
        self.scores.nll.extend(loss.nll);
        self.scores.correct.extend(loss.correct);
        self.dx.extend(loss.dx);
        if end < self.tokens.len() {
            return Ok(PassStage::Loss(end));
        }
        let Some(residual) = self.residuals.pop().filter(|_| self.gradient) else { return Ok(PassStage::Done) };
        let dx = Tensor::cat(&std::mem::take(&mut self.dx), 0)?;
        self.x = Some(rms_norm_backward(&residual, &weights.norm, &dx, None, weights.config.rms_norm_eps)?);
        Ok(PassStage::Backward(weights.layers.len() - 1))
    }

    fn backward(&mut self, layer: usize) -> Result<PassStage> {
        let (Some(residual), Some(gradient)) = (self.residuals.pop(), self.x.take()) else {
            return Ok(PassStage::Done);
        };
        let saved = self.saved.pop().flatten();
        self.x = Some(self.block(layer).backward(&residual, saved, &gradient)?);
        Ok(if layer > 0 { PassStage::Backward(layer - 1) } else { PassStage::Done })
    }

    fn block(&self, layer: usize) -> TrainBlock<'_> {
        TrainBlock { model: &self.model, layer, rows: &self.rows }
    }
}
