//! An adapter's weights in host memory, in the precision of its file.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use safetensors::Dtype;

use crate::arch::Module;

/// An adapter in host memory: only the modules it changes, each with its own rank.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterWeights {
    /// In order of layers, and of [`Module`] within a layer. The head comes last.
    pub modules: Vec<ModuleWeights>,
}

/// The low-rank pair of one module.
#[derive(Debug, Clone, PartialEq)]
pub struct ModuleWeights {
    /// Index of the decoder block. For the head, the number of blocks, so that it sorts last.
    pub layer: usize,
    /// The linear layer that it changes.
    pub module: Module,
    /// The pair's rank: rows of A.
    pub rank: usize,
    /// Factor of the delta: `alpha / rank`, or `alpha / sqrt(rank)` under rsLoRA.
    pub scale: f32,
    /// `A [rank, k]`, row-major. For AdaLoRA, its rows are already multiplied by E.
    pub a: FloatVec,
    /// `B [n, rank]`, row-major.
    pub b: FloatVec,
    /// `lora_B.bias [n]`, which is scaled like the delta.
    pub bias: Option<FloatVec>,
    /// DoRA's magnitudes `[n]`: the norms of the changed weight's rows.
    pub magnitude: Option<FloatVec>,
}

/// Floats in the precision of their file.
#[derive(Debug, Clone, PartialEq)]
pub enum FloatVec {
    F32(Box<[f32]>),
    F16(Box<[f16]>),
    BF16(Box<[bf16]>),
}

impl FloatVec {
    /// Reads little-endian bytes. `None` for any other dtype.
    pub(crate) fn read(dtype: Dtype, bytes: &[u8]) -> Option<Self> {
        let halves = || bytes.chunks_exact(2).map(|c| [c[0], c[1]]);
        match dtype {
            Dtype::F32 => {
                Some(Self::F32(bytes.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect()))
            }
            Dtype::F16 => Some(Self::F16(halves().map(f16::from_le_bytes).collect())),
            Dtype::BF16 => Some(Self::BF16(halves().map(bf16::from_le_bytes).collect())),
            _ => None,
        }
    }

    /// The values as f32, which holds them exactly.
    pub fn to_f32(&self) -> Vec<f32> {
        match self {
            Self::F32(v) => v.to_vec(),
            Self::F16(v) => v.to_f32_vec(),
            Self::BF16(v) => v.to_f32_vec(),
        }
    }

    /// Bytes of the values.
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(v) => v.len() * 4,
            Self::F16(v) => v.len() * 2,
            Self::BF16(v) => v.len() * 2,
        }
    }

    /// Whether every value is zero.
    fn is_zero(&self) -> bool {
        match self {
            Self::F32(v) => v.iter().all(|x| *x == 0.0),
            Self::F16(v) => v.iter().all(|x| x.to_bits() << 1 == 0),
            Self::BF16(v) => v.iter().all(|x| x.to_bits() << 1 == 0),
        }
    }

    /// The index of the first NaN or infinity.
    pub(crate) fn first_not_finite(&self) -> Option<usize> {
        match self {
            Self::F32(v) => v.iter().position(|x| !x.is_finite()),
            Self::F16(v) => v.iter().position(|x| !x.is_finite()),
            Self::BF16(v) => v.iter().position(|x| !x.is_finite()),
        }
    }
}

impl ModuleWeights {
    /// Whether its delta is zero for every input. DoRA's magnitudes may change the output even so.
    fn is_zero(&self) -> bool {
        let product = self.scale == 0.0 || self.a.is_zero() || self.b.is_zero();
        let bias = self.bias.as_ref().is_none_or(|bias| self.scale == 0.0 || bias.is_zero());
        product && bias && self.magnitude.is_none()
    }

    /// The sum of `size` over all tensors.
    fn total(&self, size: impl Fn(&FloatVec) -> usize) -> usize {
        [Some(&self.a), Some(&self.b), self.bias.as_ref(), self.magnitude.as_ref()]
            .into_iter()
            .flatten()
            .map(size)
            .sum()
    }
}

impl AdapterWeights {
    /// Bytes in host memory.
    pub fn bytes(&self) -> usize {
        self.modules.iter().map(|m| m.total(FloatVec::bytes)).sum()
    }

    /// Whether the adapter changes nothing: the delta of every module is zero.
    pub(crate) fn is_zero(&self) -> bool {
        self.modules.iter().all(ModuleWeights::is_zero)
    }

    /// Whether any module has DoRA's magnitudes. Such an adapter is exclusive: it cannot be mixed with others or weighted.
    pub(crate) fn has_magnitudes(&self) -> bool {
        self.modules.iter().any(|m| m.magnitude.is_some())
    }

    /// Bytes in a slot on the CPU, where all values are f32.
    pub fn slot_bytes(&self) -> usize {
        let f32_bytes = |v: &FloatVec| match v {
            FloatVec::F32(v) => v.len() * 4,
            half => half.bytes() * 2,
        };
        self.modules.iter().map(|m| m.total(f32_bytes)).sum()
    }
}
