//! The Llama decoder on a flat batch: rows of many sequences, prompts' chunks and decode steps alike.

use std::f32::consts::PI;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::kv::KvCache;
use super::linear::linear;
use super::weights::{LayerWeights, Weights};
use crate::arch::Site;
use crate::arch::{ModelConfig, RopeScaling};
use crate::lora::delta::Adapters;
use crate::lora::slots::SlotPool;
use crate::ops::attention::attention;
use crate::ops::batch::Batch;
use crate::ops::heads;
use crate::ops::norm::{add_rms_norm, rms_norm};
use crate::ops::quant::{self, QMatrix};
use crate::ops::rope::RopeTable;
use crate::ops::swiglu::swiglu;
use crate::{Error, Result, gpu};

/// A decoder ready to run: resident weights and rotary tables.
pub struct Decoder {
    weights: Weights,
    rope: RopeTable,
}

impl Decoder {
    /// Checks that the weights have the shapes of their config, and builds the rotary table.
    pub fn new(weights: Weights) -> Result<Self> {
        check_shapes(&weights)?;
        let config = &weights.config;
        let frequencies = inverse_frequencies(config);
        let rope = RopeTable::new(&frequencies, config.max_position_embeddings, weights.norm.device())?;
        Ok(Self { weights, rope })
    }

    /// Shape of the decoder.
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// The resident weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Rotary tables of all positions.
    pub fn rope(&self) -> &RopeTable {
        &self.rope
    }

    /// Runs a step: writes the rows' keys and values to the cache and returns logits `[logit_rows, vocab]` f32. A row's
    /// logits depend, bit for bit, on its own sequence and adapters only. Errors when the batch contradicts itself, the
    /// cache or the model; the cache may then hold some of the step's keys.
    pub fn forward(&self, batch: &Batch, kv: &mut KvCache, slots: &SlotPool) -> Result<Tensor> {
        let Weights { config, embedding, layers, norm, head, .. } = &self.weights;
        self.check(batch)?;
        let device = norm.device();
        if batch.rows() == 0 {
            return Ok(Tensor::zeros((0, head.n()), DType::F32, device)?);
        }
        // After the last layer's keys are written, only rows whose logits are wanted go on.
        let logit_segments = batch.logit_segments();
        let mut adapters = Adapters { segments: &batch.segments, slots, step: batch.step.as_ref(), logits: false };

        let eps = config.rms_norm_eps;
        let mut residual = quant::gather_rows(embedding, &batch.tokens, batch.step.as_ref())?;
        let mut x = match layers.first() {
            Some(layer) => rms_norm(&residual, &layer.attn_norm, eps)?,
            None => rms_norm(&residual, norm, eps)?,
        };
        for (i, layer) in layers.iter().enumerate() {
            gpu::next_block();
            let qkv = linear(&layer.qkv, &x, &adapters, i, Site::Qkv)?;
            let norms = layer.qk_norm.as_ref().map(|(q, k)| (q, k));
            heads::finish(&qkv, layer.qkv_bias.as_ref(), norms, config.heads(), eps)?;
            kv.append(i, &qkv, batch, &self.rope)?;
            let last = i + 1 == layers.len();
            if last && batch.selects_logits() && batch.logit_rows.is_empty() {
                return Ok(Tensor::zeros((0, head.n()), DType::F32, device)?);
            }
            let mut attended = attention(&qkv, kv.layer(i), batch, config.heads())?;
            if last && batch.selects_logits() {
                let logit_ids = Tensor::new(batch.logit_rows.as_slice(), device)?;
                attended = attended.index_select(&logit_ids, 0)?;
                residual = residual.index_select(&logit_ids, 0)?;
                (adapters.segments, adapters.logits) = (&logit_segments, true);
            }
            let o = linear(&layer.o, &attended, &adapters, i, Site::O)?;
            (residual, x) = add_rms_norm(&residual, &o, &layer.ffn_norm, eps)?;

            let gate_up = linear(&layer.gate_up, &x, &adapters, i, Site::GateUp)?;
            let down = linear(&layer.down, &swiglu(&gate_up)?, &adapters, i, Site::Down)?;
            let next_norm = layers.get(i + 1).map_or(norm, |next| &next.attn_norm);
            (residual, x) = add_rms_norm(&residual, &down, next_norm, eps)?;
        }
        linear(head, &x, &adapters, layers.len(), Site::Head)
    }

    /// What the ops do not check themselves. Errors: arrays of different lengths, a token or a logit row that is not there.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let rows = batch.tokens.len();
        if batch.positions.len() != rows || batch.slot_mapping.len() != rows {
            return Err(Error::internal(format!(
                "{rows} tokens with {} positions and {} cache slots",
                batch.positions.len(),
                batch.slot_mapping.len()
            )));
        }
        let vocab = self.weights.embedding.n();
        if let Some(token) = batch.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::invalid(format!("token id {token}: the model has {vocab}")));
        }
        let ascending = batch.logit_rows.is_sorted_by(|a, b| a < b);
        if !ascending || batch.logit_rows.last().is_some_and(|&row| row as usize >= rows) {
            return Err(Error::internal(format!("logit rows {:?} of {rows}: not ascending rows", batch.logit_rows)));
        }
        Ok(())
    }
}

/// Inverse frequencies of the rotary embedding `[head_dim / 2]`, as transformers' `modeling_rope_utils` computes them.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let dim = config.head_dim;
    let plain = (0..dim / 2).map(|i| 1.0 / config.rope_theta.powf((2 * i) as f32 / dim as f32));
    match &config.rope_scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|f| f / factor).collect(),
        RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, factor)| f / factor).collect(),
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = original_max_position_embeddings as f32;
            let scale = |f: f32| {
                let wavelength = 2.0 * PI / f;
                if wavelength < original / high_freq_factor {
                    f
                } else if wavelength > original / low_freq_factor {
                    f / factor
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            plain.map(scale).collect()
        }
    }
}

/// Every matrix and norm as its config says, so that a forward pass cannot run into a wrong shape.
fn check_shapes(weights: &Weights) -> Result<()> {
    let c = &weights.config;
    if c.num_kv_heads == 0
        || !c.num_heads.is_multiple_of(c.num_kv_heads)
        || c.head_dim == 0
        || !c.head_dim.is_multiple_of(2)
    {
        return Err(Error::invalid(format!(
            "{} query heads, {} key-value heads of width {}: the first is a multiple of the second, the width even",
            c.num_heads, c.num_kv_heads, c.head_dim
        )));
    }
    if let RopeScaling::Factors(factors) = &c.rope_scaling
        && factors.len() != c.head_dim / 2
    {
        return Err(Error::invalid(format!("{} rotary factors for heads of width {}", factors.len(), c.head_dim)));
    }
    if weights.layers.len() != c.num_layers {
        return Err(Error::invalid(format!(
            "{} decoder blocks, the config says {}",
            weights.layers.len(),
            c.num_layers
        )));
    }
    let matrix = |name: &str, m: &Arc<QMatrix>, n: usize, k: usize| {
        if (m.n(), m.k()) == (n, k) {
            return Ok(());
        }
        Err(Error::invalid(format!("{name} is [{}, {}], the config says [{n}, {k}]", m.n(), m.k())))
    };
    let vector = |name: &str, t: &Tensor, len: usize| {
        if t.dims() == [len] && t.dtype() == DType::F32 {
            return Ok(());
        }
        Err(Error::invalid(format!("{name} is {:?} {:?}, the config says [{len}] f32", t.dims(), t.dtype())))
    };
    let norm = |name: &str, t: &Tensor| vector(name, t, c.hidden_size);
    matrix("embedding", &weights.embedding, c.vocab_size, c.hidden_size)?;
    matrix("head", &weights.head, c.vocab_size, c.hidden_size)?;
    norm("final norm", &weights.norm)?;
    for (i, layer) in weights.layers.iter().enumerate() {
        let LayerWeights { attn_norm, qkv, qkv_bias, qk_norm, o, ffn_norm, gate_up, down } = layer;
        if (qkv_bias.is_some(), qk_norm.is_some()) != (c.qkv_bias, c.qk_norm) {
            return Err(Error::invalid(format!("block {i} has other biases or norms of heads than the config says")));
        }
        if let Some(bias) = qkv_bias {
            vector(&format!("block {i} qkv_bias"), bias, c.heads().qkv_width())?;
        }
        for t in qk_norm.iter().flat_map(|(q, k)| [q, k]) {
            vector(&format!("block {i} qk_norm"), t, c.head_dim)?;
        }
        norm(&format!("block {i} attn_norm"), attn_norm)?;
        norm(&format!("block {i} ffn_norm"), ffn_norm)?;
        matrix(&format!("block {i} qkv"), qkv, c.heads().qkv_width(), c.hidden_size)?;
        matrix(&format!("block {i} o"), o, c.hidden_size, c.num_heads * c.head_dim)?;
        matrix(&format!("block {i} gate_up"), gate_up, 2 * c.intermediate_size, c.hidden_size)?;
        matrix(&format!("block {i} down"), down, c.hidden_size, c.intermediate_size)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Llama 3.1 8B's rotary settings.
    fn config(rope_scaling: RopeScaling) -> ModelConfig {
        ModelConfig {
            hidden_size: 4096,
            intermediate_size: 14336,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            vocab_size: 128256,
            rms_norm_eps: 1e-5,
            rope_theta: 500000.0,
            rope_scaling,
            qkv_bias: false,
            qk_norm: false,
            max_position_embeddings: 131072,
        }
    }

    #[test]
    fn rotary_frequencies_follow_their_scaling() {
        let plain = inverse_frequencies(&config(RopeScaling::None));
        assert_eq!(plain.len(), 64);
        assert_eq!(plain[0], 1.0);
        assert!((f64::from(plain[63]) / 500000f64.powf(-126.0 / 128.0) - 1.0).abs() < 1e-6);
        let linear = inverse_frequencies(&config(RopeScaling::Linear { factor: 4.0 }));
        let factors = inverse_frequencies(&config(RopeScaling::Factors(vec![4.0; 64])));
        assert!(plain.iter().zip(&linear).all(|(p, l)| p / 4.0 == *l));
        assert_eq!(linear, factors);
    }

    #[test]
    fn llama3_scaling_keeps_short_divides_long_and_blends_between() {
        let plain = inverse_frequencies(&config(RopeScaling::None));
        let scaled = inverse_frequencies(&config(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }));
        // In 8192 positions dimension 28 turns more than four times, dimension 35 less than once.
        let divisors: Vec<f64> = plain.iter().zip(&scaled).map(|(p, s)| f64::from(p / s)).collect();
        assert!(divisors[..29].iter().all(|d| *d == 1.0), "{divisors:?}");
        assert!(divisors[35..].iter().all(|d| *d == 8.0), "{divisors:?}");
        for (i, divisor) in divisors.iter().enumerate().take(35).skip(29) {
            let turns = 8192.0 * f64::from(plain[i]) / (2.0 * std::f64::consts::PI);
            let share = (turns - 1.0) / 3.0;
            assert!((divisor - 1.0 / ((1.0 - share) / 8.0 + share)).abs() < 1e-5, "{i}: {divisor}");
        }
    }
}
