//! A decoder block, forward and backward, on flat rows of several jobs.
//!
//! Between forward and backward a block's input is kept (checkpointing, Chen et al., 2016), and the rest where there is memory
//! for it. Else the backward makes it again, short of the last product, whose result no gradient needs, unless DoRA does.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::adapter::TrainableAdapter;
use crate::arch::Site;
use crate::model::decoder::Decoder;
use crate::model::weights::LayerWeights;
use crate::ops::attention::{causal, causal_backward};
use crate::ops::blas::gemm;
use crate::ops::dropout::dropout;
use crate::ops::heads;
use crate::ops::norm::{add_rms_norm, rms_norm, rms_norm_backward};
use crate::ops::quant::{self, QMatrix};
use crate::ops::rope::turn;
use crate::ops::swiglu::{swiglu, swiglu_backward};
use crate::{Error, Result};

/// Flat rows and whose they are.
#[derive(Default)]
pub struct Rows {
    /// Rows of each sequence; together they are all rows, in order.
    pub sequences: Vec<Range<usize>>,
    /// Position of each row in its sequence.
    pub positions: Vec<u32>,
    /// Rows of each job; together they are all rows, in order.
    pub segments: Vec<Segment>,
}

/// Rows of one job.
pub struct Segment {
    pub rows: Range<usize>,
    pub adapter: Arc<TrainableAdapter>,
    /// Probability, and a seed of its own for each pass; none while measuring.
    pub dropout: Option<(f32, u64)>,
}

/// One block of a model on some rows.
pub struct Block<'a> {
    pub model: &'a Decoder,
    pub layer: usize,
    pub rows: &'a Rows,
}

/// What a linear's backward needs beside its input.
struct Saved {
    /// `x · Aᵀ` of each segment, where it has pairs.
    low: Vec<Option<Tensor>>,
    /// The output before DoRA's gains, where there are any.
    plain: Option<Tensor>,
}

/// What the backward needs of a forward.
pub struct Activations {
    /// Normed input.
    x: Tensor,
    qkv: Tensor,
    /// q and k before their norms, where the model has them.
    unnormed: Option<Tensor>,
    attended: Tensor,
    lse: Tensor,
    /// The residual stream between attention and feed-forward.
    middle: Tensor,
    /// `middle`, normed.
    normed: Tensor,
    gate_up: Tensor,
    /// Input of the last product.
    hidden: Tensor,
    /// In the order of [`Site`].
    saved: [Saved; 4],
}

impl Activations {
    /// Bytes of what grows with the rows, the low-rank rest aside.
    pub fn bytes(&self) -> usize {
        let Self { x, qkv, unnormed, attended, lse, middle, normed, gate_up, hidden, saved } = self;
        let plain = saved.iter().filter_map(|saved| saved.plain.as_ref());
        let all = [x, qkv, attended, lse, middle, normed, gate_up, hidden].into_iter().chain(unnormed).chain(plain);
        all.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

impl Block<'_> {
    fn weights(&self) -> &LayerWeights {
        &self.model.weights().layers[self.layer]
    }

    fn eps(&self) -> f32 {
        self.model.config().rms_norm_eps
    }

    /// From the residual stream before the block and its norm, what the backward needs, and `(residual, x)` after the block,
    /// `x` normed for what follows.
    pub fn forward(&self, residual: &Tensor, x: &Tensor) -> Result<(Activations, Tensor, Tensor)> {
        let weights = self.model.weights();
        let next_norm = weights.layers.get(self.layer + 1).map_or(&weights.norm, |next| &next.attn_norm);
        let (activations, down) = self.run(residual, x.clone(), true)?;
        let down = down.ok_or_else(|| Error::internal("a block without its last product"))?;
        let (residual, x) = add_rms_norm(&activations.middle, &down, next_norm, self.eps())?;
        Ok((activations, residual, x))
    }

    /// From the residual stream before the block and the gradient of that after it, the gradient of the first; adds to
    /// those of the pairs. What the forward gave is made again unless it was `kept`.
    pub fn backward(&self, residual: &Tensor, kept: Option<Activations>, gradient: &Tensor) -> Result<Tensor> {
        let (weights, heads, eps) = (self.weights(), self.model.config().heads(), self.eps());
        let a = match kept {
            Some(activations) => activations,
            None => self.run(residual, rms_norm(residual, &weights.attn_norm, eps)?, false)?.0,
        };
        let dtype = a.hidden.dtype();
        let linear = |weight, x, dy, site: Site| self.linear_backward(weight, x, &a.saved[site as usize], dy, site);

        let dhidden = linear(&weights.down, &a.hidden, gradient.to_dtype(dtype)?, Site::Down)?;
        let dgate_up = swiglu_backward(&a.gate_up, &dhidden)?;
        let dnormed = linear(&weights.gate_up, &a.normed, dgate_up, Site::GateUp)?;
        let gradient = rms_norm_backward(&a.middle, &weights.ffn_norm, &dnormed, Some(gradient), eps)?;

        let dattended = linear(&weights.o, &a.attended, gradient.to_dtype(dtype)?, Site::O)?;
        let dqkv = causal_backward(&a.qkv, &a.attended, &a.lse, &dattended, &self.rows.sequences, heads)?;
        turn(&dqkv, heads.query + heads.kv, &self.rows.positions, self.model.rope(), true)?;
        if let (Some(unnormed), Some((q, k))) = (&a.unnormed, &weights.qk_norm) {
            heads::finish_backward(&dqkv, unnormed, (q, k), heads, eps)?;
        }
        let dx = linear(&weights.qkv, &a.x, dqkv, Site::Qkv)?;
        rms_norm_backward(residual, &weights.attn_norm, &dx, Some(&gradient), eps)
    }

    /// Goes through the block up to the last product, whose result comes too if it is `whole`.
    fn run(&self, residual: &Tensor, x: Tensor, whole: bool) -> Result<(Activations, Option<Tensor>)> {
        let (weights, heads, eps) = (self.weights(), self.model.config().heads(), self.eps());
        let (qkv, saved_qkv) = self.linear(&weights.qkv, &x, Site::Qkv)?;
        let norms = weights.qk_norm.as_ref().map(|(q, k)| (q, k));
        heads::finish(&qkv, weights.qkv_bias.as_ref(), None, heads, eps)?;
        let unnormed = norms.map(|_| qkv.copy()).transpose()?;
        heads::finish(&qkv, None, norms, heads, eps)?;
        turn(&qkv, heads.query + heads.kv, &self.rows.positions, self.model.rope(), false)?;
        let (attended, lse) = causal(&qkv, &self.rows.sequences, heads)?;
        let (o, saved_o) = self.linear(&weights.o, &attended, Site::O)?;
        let (middle, normed) = add_rms_norm(residual, &o, &weights.ffn_norm, eps)?;
        let (gate_up, saved_gate_up) = self.linear(&weights.gate_up, &normed, Site::GateUp)?;
        let hidden = swiglu(&gate_up)?;
        let (down, saved_down) = match whole || self.has_gain(Site::Down) {
            true => self.linear(&weights.down, &hidden, Site::Down).map(|(down, saved)| (Some(down), saved))?,
            false => (None, Saved { low: self.low(&hidden, Site::Down)?, plain: None }),
        };
        let saved = [saved_qkv, saved_o, saved_gate_up, saved_down];
        Ok((Activations { x, qkv, unnormed, attended, lse, middle, normed, gate_up, hidden, saved }, down))
    }

    /// `x · Wᵀ` plus the pairs' deltas, times DoRA's gains.
    fn linear(&self, weight: &QMatrix, x: &Tensor, site: Site) -> Result<(Tensor, Saved)> {
        let y = quant::matmul(weight, x, x.dtype())?;
        let low = self.low(x, site)?;
        for (segment, low) in self.rows.segments.iter().zip(&low) {
            let (Some(low), Some(pairs)) = (low, segment.adapter.site(self.layer, site)) else { continue };
            let (y, scale) = (segment.of(&y)?, segment.adapter.scale);
            for (i, part) in pairs.modules.iter().enumerate() {
                gemm(&y.narrow(1, part.offset, part.n)?, 1.0, &segment.low(low, i)?, &part.b.t()?, scale)?;
            }
        }
        match self.has_gain(site) {
            true => Ok((self.gained(&y, site)?, Saved { low, plain: Some(y) })),
            false => Ok((y, Saved { low, plain: None })),
        }
    }

    /// `x · Aᵀ` of every segment with pairs.
    fn low(&self, x: &Tensor, site: Site) -> Result<Vec<Option<Tensor>>> {
        let low = |segment: &Segment| {
            let Some(pairs) = segment.adapter.site(self.layer, site) else { return Ok(None) };
            let low = Tensor::zeros((segment.rows.len(), pairs.a.dims()[0]), x.dtype(), x.device())?;
            gemm(&low, 0.0, &self.dropped(segment.of(x)?, segment, site)?, &pairs.a.t()?, 1.0)?;
            Ok(Some(low))
        };
        self.rows.segments.iter().map(low).collect()
    }

    /// A segment's input of the pairs, or the gradient that comes through them, after dropout.
    fn dropped(&self, x: Tensor, segment: &Segment, site: Site) -> Result<Tensor> {
        let Some((p, seed)) = segment.dropout else { return Ok(x) };
        dropout(&x, p, seed.wrapping_add((Site::ALL.len() * self.layer + site as usize) as u64))
    }

    /// The gradient of a linear's input, given that of its output; adds to the pairs' gradients.
    fn linear_backward(&self, weight: &QMatrix, x: &Tensor, saved: &Saved, dy: Tensor, site: Site) -> Result<Tensor> {
        let dy = match &saved.plain {
            Some(plain) => {
                self.magnitudes_backward(plain, &dy, site)?;
                self.gained(&dy, site)?
            }
            None => dy,
        };
        let dx = quant::matmul_transposed(weight, &dy, dy.dtype())?;
        for (segment, low) in self.rows.segments.iter().zip(&saved.low) {
            let (Some(low), Some(pairs)) = (low, segment.adapter.site(self.layer, site)) else { continue };
            let (dy, scale) = (segment.of(&dy)?, segment.adapter.scale);
            let dlow = low.zeros_like()?;
            for (i, part) in pairs.modules.iter().enumerate() {
                let dy = dy.narrow(1, part.offset, part.n)?;
                gemm(&segment.low(&dlow, i)?, 0.0, &dy, &part.b, scale)?;
                gemm(&part.db, 1.0, &dy.t()?, &segment.low(low, i)?, scale)?;
            }
            let x = segment.of(x)?;
            let dx = segment.of(&dx)?;
            if segment.dropout.is_none() {
                gemm(&pairs.da, 1.0, &dlow.t()?, &x, 1.0)?;
                gemm(&dx, 1.0, &dlow, &pairs.a, 1.0)?;
            } else {
                let through = x.zeros_like()?;
                gemm(&through, 0.0, &dlow, &pairs.a, 1.0)?;
                gemm(&pairs.da, 1.0, &dlow.t()?, &self.dropped(x, segment, site)?, 1.0)?;
                dx.slice_set(&(&dx + self.dropped(through, segment, site)?)?, 0, 0)?;
            }
        }
        Ok(dx)
    }

    /// Whether DoRA's gains change a site's output.
    fn has_gain(&self, site: Site) -> bool {
        self.rows.segments.iter().any(|s| s.adapter.site(self.layer, site).is_some_and(|pairs| pairs.gain.is_some()))
    }

    /// `y`, or its gradient, times DoRA's gains.
    fn gained(&self, y: &Tensor, site: Site) -> Result<Tensor> {
        let gained = |segment: &Segment| {
            let y = segment.of(y)?;
            match segment.adapter.site(self.layer, site).and_then(|pairs| pairs.gain.as_ref()) {
                // A gain is close to 1, where bf16 has 8 bits.
                Some(gain) => Ok(y.to_dtype(DType::F32)?.broadcast_mul(gain)?.to_dtype(y.dtype())?),
                None => Ok(y),
            }
        };
        let pieces = self.rows.segments.iter().map(gained).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// Adds to the gradients of DoRA's magnitudes: `Σ dy · y / norm` over the rows, `y` being the output before its gain.
    fn magnitudes_backward(&self, y: &Tensor, dy: &Tensor, site: Site) -> Result<()> {
        for segment in &self.rows.segments {
            let Some(pairs) = segment.adapter.site(self.layer, site) else { continue };
            let products = (segment.of(y)?.to_dtype(DType::F32)? * segment.of(dy)?.to_dtype(DType::F32)?)?;
            let sums = products.sum_keepdim(0)?;
            for part in &pairs.modules {
                let Some(magnitude) = &part.magnitude else { continue };
                let sums = (sums.narrow(1, part.offset, part.n)? * &magnitude.inverse_norm)?;
                magnitude.grad.slice_set(&(&magnitude.grad + sums.t()?)?, 0, 0)?;
            }
        }
        Ok(())
    }
}

impl Segment {
    /// Its rows of a tensor of all rows: a view.
    fn of(&self, all: &Tensor) -> Result<Tensor> {
        Ok(all.narrow(0, self.rows.start, self.rows.len())?)
    }

    /// Its columns of the `i`-th part of a site in `x · Aᵀ`: a view.
    fn low(&self, low: &Tensor, i: usize) -> Result<Tensor> {
        let rank = self.adapter.rank;
        Ok(low.narrow(1, i * rank, rank)?)
    }
}
