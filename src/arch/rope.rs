//! The rotary frequencies of a model (RoPE; Su et al., 2021) and how a model scales them for long contexts.

use std::f32::consts::PI;

use super::ModelConfig;

/// Scaling of the rotary frequencies, as Hugging Face's `rope_scaling`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths are divided by `factor`, short ones are kept, and those between are interpolated.
    Llama3 {
        /// The divisor.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length before the extension.
        original_max_position_embeddings: usize,
    },
    /// Frequency `i` is divided by the `i`-th of `head_dim / 2` factors. GGUF files carry Llama 3.1's scaling like this.
    Factors(Vec<f32>),
}

impl ModelConfig {
    /// Inverse frequencies of the rotary embedding `[head_dim / 2]`, as transformers' `modeling_rope_utils` computes them.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let dim = self.head_dim;
        let plain = (0..dim / 2).map(|i| 1.0 / self.rope_theta.powf((2 * i) as f32 / dim as f32));
        match &self.rope_scaling {
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
        let plain = config(RopeScaling::None).inverse_frequencies();
        assert_eq!(plain.len(), 64);
        assert_eq!(plain[0], 1.0);
        assert!((f64::from(plain[63]) / 500000f64.powf(-126.0 / 128.0) - 1.0).abs() < 1e-6);
        let linear = config(RopeScaling::Linear { factor: 4.0 }).inverse_frequencies();
        let factors = config(RopeScaling::Factors(vec![4.0; 64])).inverse_frequencies();
        assert!(plain.iter().zip(&linear).all(|(p, l)| p / 4.0 == *l));
        assert_eq!(linear, factors);
    }

    #[test]
    fn llama3_scaling_keeps_short_divides_long_and_blends_between() {
        let plain = config(RopeScaling::None).inverse_frequencies();
        let scaled = config(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        })
        .inverse_frequencies();
        // In 8192 positions, dimension 28 rotates more than four times and dimension 35 less than once.
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
