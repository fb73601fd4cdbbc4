//! One forward pass, and backward pass if gradients are wanted, of sequences of several jobs, in bounded pieces.

use std::ops::Range;
use std::sync::Arc;

use candle_core::Tensor;

use super::adapter::TrainableAdapter;
use super::block::{Activations, Block, Rows, Segment};
use crate::Result;
use crate::model::decoder::Decoder;
use crate::ops::loss::{Target, cross_entropy};
use crate::ops::norm::{rms_norm, rms_norm_backward};
use crate::ops::quant;

/// What a job puts into a pass.
pub struct Part {
    pub batch: Batch,
    pub adapter: Arc<TrainableAdapter>,
    /// As in [`Segment`].
    pub dropout: Option<(f32, u64)>,
}

/// Sequences and what they should predict.
#[derive(Default)]
pub struct Batch {
    /// Of all sequences, back to back.
    pub tokens: Vec<u32>,
    /// Rows of each sequence.
    pub sequences: Vec<Range<usize>>,
    /// What is predicted where; rows ascend.
    pub targets: Vec<Target>,
}

impl Batch {
    /// Adds a sequence. `scaled` says, for each token after the first, whether it is a target; its gradient gets `scale`.
    pub fn push(&mut self, tokens: &[u32], scale: f32, target: impl Fn(usize) -> bool) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.sequences.push(start..self.tokens.len());
        let targets = (1..tokens.len()).filter(|&i| target(i));
        self.targets.extend(targets.map(|i| Target { row: (start + i - 1) as u32, id: tokens[i], scale }));
    }
}

/// What a pass finds of its targets, in their order.
#[derive(Debug, Default)]
pub struct Scores {
    /// Negative log-likelihoods, nats.
    pub nll: Vec<f32>,
    /// Whether the target was the likeliest.
    pub correct: Vec<bool>,
}

/// A pass under way.
pub struct Pass {
    model: Arc<Decoder>,
    rows: Rows,
    tokens: Vec<u32>,
    targets: Vec<Target>,
    /// Where each job's targets end.
    ends: Vec<usize>,
    stage: Stage,
    gradient: bool,
    /// The residual stream before each block, as far as the forward has come and the backward not; the last one is now's.
    residuals: Vec<Tensor>,
    /// What the backward needs of each block, where it was kept.
    kept: Vec<Option<Activations>>,
    /// Bytes that may still be kept.
    room: usize,
    /// Input of the next block or of the head; then the gradient of the residual stream.
    x: Option<Tensor>,
    /// Gradients of the head's input, chunk by chunk.
    dx: Vec<Tensor>,
    scores: Scores,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Forward(usize),
    /// From this row on.
    Loss(usize),
    Backward(usize),
    Done,
}

impl Pass {
    /// A pass over what some jobs put in. Of activations, up to `room` bytes are kept for the backward.
    pub fn new(model: Arc<Decoder>, parts: Vec<Part>, gradient: bool, room: usize) -> Self {
        let (mut rows, mut tokens, mut targets, mut ends) = (Rows::default(), Vec::new(), Vec::new(), Vec::new());
        for Part { batch, adapter, dropout } in parts {
            let first = tokens.len();
            for sequence in batch.sequences {
                rows.positions.extend(0..sequence.len() as u32);
                rows.sequences.push(first + sequence.start..first + sequence.end);
            }
            tokens.extend(batch.tokens);
            rows.segments.push(Segment { rows: first..tokens.len(), adapter, dropout });
            targets.extend(batch.targets.into_iter().map(|t| Target { row: t.row + first as u32, ..t }));
            ends.push(targets.len());
        }
        let stage = Stage::Forward(0);
        let (residuals, kept, x, dx, scores) = Default::default();
        Self { model, rows, tokens, targets, ends, stage, gradient, residuals, kept, room, x, dx, scores }
    }

    /// Runs one piece, and waits for it: a block forward, some rows' loss, or a block backward. True when that was the last.
    pub fn advance(&mut self) -> Result<bool> {
        self.stage = match self.stage {
            Stage::Forward(layer) => self.forward(layer)?,
            Stage::Loss(row) => self.loss(row)?,
            Stage::Backward(layer) => self.backward(layer)?,
            Stage::Done => Stage::Done,
        };
        self.model.weights().norm.device().synchronize()?;
        Ok(self.stage == Stage::Done)
    }

    /// What was found, job by job.
    pub fn scores(self) -> Vec<Scores> {
        let mut start = 0;
        let part = |end: usize| {
            let range = std::mem::replace(&mut start, end)..end;
            Scores { nll: self.scores.nll[range.clone()].to_vec(), correct: self.scores.correct[range].to_vec() }
        };
        self.ends.iter().copied().map(part).collect()
    }

    fn forward(&mut self, layer: usize) -> Result<Stage> {
        let weights = self.model.weights();
        let eps = weights.config.rms_norm_eps;
        let (residual, x) = match (self.residuals.last(), self.x.take()) {
            (Some(residual), Some(x)) => (residual.clone(), x),
            _ => {
                let residual = quant::gather_rows(&weights.embedding, &self.tokens, None)?;
                let x = rms_norm(&residual, &weights.layers[0].attn_norm, eps)?;
                self.residuals.push(residual.clone());
                (residual, x)
            }
        };
        let (made, residual, x) = Block { model: &self.model, layer, rows: &self.rows }.forward(&residual, &x)?;
        if self.gradient {
            let left = self.room.checked_sub(made.bytes());
            self.room = left.unwrap_or(self.room);
            self.kept.push(left.map(|_| made));
        } else {
            self.residuals.clear();
        }
        self.residuals.push(residual);
        self.x = Some(x);
        Ok(if layer + 1 < weights.layers.len() { Stage::Forward(layer + 1) } else { Stage::Loss(0) })
    }

    fn loss(&mut self, start: usize) -> Result<Stage> {
        let weights = self.model.weights();
        let Some(x) = &self.x else { return Ok(Stage::Done) };
        // On a CPU a block's worth of time; a GPU needs as many rows to be busy.
        let end = self.tokens.len().min(start + if x.device().is_cpu() { 128 } else { 2048 });
        let within = |row: usize| self.targets.partition_point(|t| (t.row as usize) < row);
        let targets = self.targets[within(start)..within(end)].iter();
        let targets: Vec<Target> = targets.map(|t| Target { row: t.row - start as u32, ..*t }).collect();
        let rows = x.narrow(0, start, end - start)?;
        let loss = cross_entropy(&weights.head, &rows, &targets, self.gradient)?;
        self.scores.nll.extend(loss.nll);
        self.scores.correct.extend(loss.correct);
        self.dx.extend(loss.dx);
        if end < self.tokens.len() {
            return Ok(Stage::Loss(end));
        }
        let Some(residual) = self.residuals.pop().filter(|_| self.gradient) else { return Ok(Stage::Done) };
        let dx = Tensor::cat(&std::mem::take(&mut self.dx), 0)?;
        self.x = Some(rms_norm_backward(&residual, &weights.norm, &dx, None, weights.config.rms_norm_eps)?);
        Ok(Stage::Backward(weights.layers.len() - 1))
    }

    fn backward(&mut self, layer: usize) -> Result<Stage> {
        let (Some(residual), Some(gradient)) = (self.residuals.pop(), self.x.take()) else { return Ok(Stage::Done) };
        let (block, kept) = (Block { model: &self.model, layer, rows: &self.rows }, self.kept.pop().flatten());
        self.x = Some(block.backward(&residual, kept, &gradient)?);
        Ok(if layer > 0 { Stage::Backward(layer - 1) } else { Stage::Done })
    }
}
