//! Dummy weights for a shape, to measure the speed and memory of models without their files.
//!
//! Codes are random bytes instead of quantised floats. Scales keep the size of activations: the values of a matrix `[n, k]`
//! have mean 0 and standard deviation 1/√k. The same shape gets the same weights every time.

use std::borrow::Cow;

use half::{bf16, f16};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};

use super::{Quantize, TensorSource};
use crate::ops::quant::nf4::{BLOCK, CODEBOOK};
use crate::ops::quant::{Codec, Source};
use crate::{Error, Result};

/// Standard deviation of the integers 0 to 15, each equally likely.
const CODES_DEVIATION: f32 = 4.609_772;

/// The dummy tensors of a model.
pub struct DummyTensors {
    /// Format of the linears.
    format: Quantize,
}

impl DummyTensors {
    /// Tensors with linears in `format`.
    pub fn new(format: Quantize) -> Self {
        Self { format }
    }

    /// Blocks of a GGUF format with random codes. `fill` replaces the random scales of each block.
    fn blocks(
        &self,
        codec: Codec,
        name: &str,
        (n, k): (usize, usize),
        fill: impl Fn(&mut [u8]),
    ) -> Result<Source<'static>> {
        if !k.is_multiple_of(codec.block()) {
            return Err(Error::invalid(format!(
                "{name} [{n}, {k}]: {codec:?} has blocks of {}, which do not divide its rows",
                codec.block()
            )));
        }
        let mut bytes = random_bytes(name, n * (k / codec.block()) * codec.block_bytes());
        bytes.chunks_exact_mut(codec.block_bytes()).for_each(fill);
        Ok(Source::Blocks { codec, n, k, bytes: Cow::Owned(bytes) })
    }
}

impl TensorSource for DummyTensors {
    fn linear(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        let deviation = 1.0 / (k as f32).sqrt();
        let scale = f16::from_f32(deviation / CODES_DEVIATION);
        // Codes of Q4_0 and NF4 are not symmetric around 0. Scales of either sign keep a mean from adding up along k.
        match self.format {
            Quantize::Q4_0 => self.blocks(Codec::Q4_0, name, (n, k), |block| {
                let [low, high] = scale.to_le_bytes();
                (block[0], block[1]) = (low, high | block[1] & 0x80);
            }),
            Quantize::Q4_1 => self.blocks(Codec::Q4_1, name, (n, k), |block| {
                let min = f16::from_f32(scale.to_f32() * -7.5);
                block[..2].copy_from_slice(&scale.to_le_bytes());
                block[2..4].copy_from_slice(&min.to_le_bytes());
            }),
            Quantize::Nf4 => {
                let size = (CODEBOOK.iter().map(|v| v * v).sum::<f32>() / 16.0).sqrt();
                let signs = random_bytes(&format!("{name}.absmax"), (n * k).div_ceil(BLOCK));
                Ok(Source::Codebook {
                    n,
                    k,
                    block: BLOCK,
                    codes: Cow::Owned(random_bytes(name, (n * k).div_ceil(2))),
                    scales: signs.iter().map(|b| if b & 1 == 0 { deviation } else { -deviation } / size).collect(),
                    codebook: CODEBOOK,
                })
            }
        }
    }

    fn table(&mut self, name: &str, n: usize, k: usize) -> Result<Source<'static>> {
        let bytes = uniform(name, n * k, 1.0 / (k as f32).sqrt());
        Ok(Source::Blocks { codec: Codec::BF16, n, k, bytes: Cow::Owned(bytes) })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        if !name.ends_with(".bias") {
            return Ok(vec![1.0; len]);
        }
        Ok(random_bytes(name, len).into_iter().map(|b| (f32::from(b) - 127.5) / 1000.0).collect())
    }

    fn sample(&self, feed: &mut dyn FnMut(&[u8])) -> Result<()> {
        feed(format!("dummy {:?}", self.format).as_bytes());
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// Bytes of `count` bf16 values with mean 0 and standard deviation `deviation`, always the same for a name.
pub fn uniform(name: &str, count: usize, deviation: f32) -> Vec<u8> {
    let value = |byte: u8| (f32::from(byte) - 127.5) / 127.5 * 3f32.sqrt() * deviation;
    let table: [[u8; 2]; 256] = std::array::from_fn(|byte| bf16::from_f32(value(byte as u8)).to_le_bytes());
    let mut generator = generator(name);
    let mut bytes = Vec::with_capacity(2 * count);
    let mut random = [0; 4096];
    while bytes.len() < 2 * count {
        let some = &mut random[..(count - bytes.len() / 2).min(4096)];
        generator.fill_bytes(some);
        bytes.extend(some.iter().flat_map(|&byte| table[usize::from(byte)]));
    }
    bytes
}

fn random_bytes(name: &str, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    generator(name).fill_bytes(&mut bytes);
    bytes
}

/// A generator seeded with the hash of the name (FNV-1a).
fn generator(name: &str) -> Pcg64Mcg {
    let seed = name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    Pcg64Mcg::seed_from_u64(seed)
}
