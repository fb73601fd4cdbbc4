//! Models that bitsandbytes quantised to 4 bits (NF4, FP4): the codes are stored under the weight's own name, the scales and
//! the codebook in further tensors.
//!
//! ```text
//! P.weight                                  u8 [n·k/2, 1], or the same bytes as another type: two codes a byte
//! P.weight.quant_state.bitsandbytes__nf4    JSON: shape, block size, offset of the scales
//! P.weight.quant_map                        f32 [16]: the codebook
//! P.weight.absmax                           f32, one scale per block; u8 under double quantisation
//! P.weight.nested_absmax, .nested_quant_map f32: the scales of the scales and their codebook, under double quantisation
//! ```
//!
//! A module that was excluded from quantisation (`llm_int8_skip_modules`) is stored as in other models.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::tensors::{ModelTensors, TensorEncoding, TensorEntry};
use crate::ops::quant::nf4::{self, NESTED_BLOCK};
use crate::ops::quant::{Codec, Source};
use crate::{Error, Result};

/// The tensors that belong to the codes of a quantised weight.
pub struct BnbTensors {
    /// Values per scale.
    block: usize,
    /// One scale per block: f32, or u8 under double quantisation.
    absmax: TensorEntry,
    /// The codebook.
    quant_map: TensorEntry,
    /// Double quantisation.
    nested: Option<NestedScales>,
}

/// How the scales themselves are quantised.
struct NestedScales {
    /// Scales of the scales, one per [`NESTED_BLOCK`].
    absmax: TensorEntry,
    /// Their codebook.
    quant_map: TensorEntry,
    /// Mean of the scales.
    offset: f32,
}

/// The JSON of `quant_state`. Unknown fields are refused, because they may change the values.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    /// Type of the original. bitsandbytes rounds decoded values to it; here they stay exact.
    dtype: String,
    shape: [usize; 2],
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

/// Whether `quantization_config` means 4 bits by bitsandbytes. Its other settings are also in the state of each weight.
pub fn is_config(config: &Value) -> bool {
    let method = config["quant_method"].as_str();
    method.is_none_or(|m| m == "bitsandbytes") && config["load_in_4bit"] == true && config["load_in_8bit"] != true
}

/// Joins each quantised weight and the tensors that belong to it into one entry.
///
/// # Errors
/// Names the tensor: a state that is not understood, or a tensor that is missing or has another type or shape.
pub fn join(tensors: &mut ModelTensors) -> Result<()> {
    let states: Vec<String> = tensors.names().filter(|n| n.contains(".quant_state.")).map(str::to_string).collect();
    for name in states {
        join_weight(tensors, &name)?;
    }
    Ok(())
}

/// Joins the weight whose state is the tensor `name`.
fn join_weight(tensors: &mut ModelTensors, name: &str) -> Result<()> {
    let bad = |why: String| Error::invalid(format!("tensor {name}: {why}"));
    let (weight, kind) = match name.split_once(".quant_state.bitsandbytes__") {
        Some((weight, kind @ ("nf4" | "fp4"))) => (weight, kind),
        _ => return Err(bad("this kind of quantisation is not supported, only nf4 and fp4".into())),
    };
    let bytes = match tensors.remove(name) {
        Some(entry @ TensorEntry { encoding: TensorEncoding::Bytes, .. }) => tensors.read(&entry)?,
        _ => return Err(bad("expected U8".into())),
    };
    let state: QuantState = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
    let count = state.check(kind).map_err(bad)?;
    let joined = BnbTensors::take(tensors, weight, &state, count.div_ceil(state.blocksize))?;
    let entry = tensors.remove(weight).ok_or_else(|| bad(format!("there is no tensor {weight}")))?;
    if entry.bytes != count.div_ceil(2) as u64 || entry.shape.len() != 2 || entry.shape[1] != 1 {
        return Err(bad(format!(
            "tensor {weight} of {} bytes, {:?}, does not hold a matrix {:?}",
            entry.bytes, entry.shape, state.shape
        )));
    }
    let encoding = TensorEncoding::Bnb(Box::new(joined));
    tensors.add(weight.to_string(), TensorEntry { encoding, shape: state.shape.to_vec(), ..entry })
}

impl QuantState {
    /// Values of the weight. Errors: why the state is not supported.
    fn check(&self, kind: &str) -> std::result::Result<usize, String> {
        if self.quant_type != kind {
            return Err(format!("its quant_type is {:?}", self.quant_type));
        }
        if !self.blocksize.is_power_of_two() || !(32..=4096).contains(&self.blocksize) {
            return Err(format!("blocksize {} is not supported", self.blocksize));
        }
        if !matches!(&*self.dtype, "float32" | "float16" | "bfloat16") {
            return Err(format!("dtype {:?} is not supported", self.dtype));
        }
        match (self.nested_blocksize, self.nested_dtype.as_deref(), self.nested_offset) {
            (None, None, None) | (Some(NESTED_BLOCK), Some("float32"), Some(_)) => {}
            other => return Err(format!("nested quantisation {other:?} is not supported")),
        }
        let count = self.shape[0].checked_mul(self.shape[1]).filter(|&n| n > 0);
        count.ok_or_else(|| format!("shape {:?} is not supported", self.shape))
    }
}

impl BnbTensors {
    /// Takes the tensors that belong to a weight of `blocks` blocks, whose state was checked.
    fn take(tensors: &mut ModelTensors, weight: &str, state: &QuantState, blocks: usize) -> Result<Self> {
        let mut take = |part: &str, encoding: TensorEncoding, len: usize| -> Result<TensorEntry> {
            let name = format!("{weight}.{part}");
            let entry = tensors
                .remove(&name)
                .ok_or_else(|| Error::invalid(format!("tensor {weight} is quantised, but there is no {part}")))?;
            if entry.encoding.name() != encoding.name() || entry.shape != [len] {
                return Err(Error::invalid(format!(
                    "tensor {name} is {} {:?}, expected {} [{len}]",
                    entry.encoding.name(),
                    entry.shape,
                    encoding.name()
                )));
            }
            Ok(entry)
        };
        let f32s = || TensorEncoding::Values(Codec::F32);
        let nested = match state.nested_offset {
            None => None,
            Some(offset) => Some(NestedScales {
                absmax: take("nested_absmax", f32s(), blocks.div_ceil(NESTED_BLOCK))?,
                quant_map: take("nested_quant_map", f32s(), 256)?,
                offset,
            }),
        };
        let absmax = take("absmax", if nested.is_some() { TensorEncoding::Bytes } else { f32s() }, blocks)?;
        Ok(Self { block: state.blocksize, absmax, quant_map: take("quant_map", f32s(), 16)?, nested })
    }

    /// The tensors that belong to the codes.
    pub fn entries(&self) -> impl Iterator<Item = &TensorEntry> {
        let nested = self.nested.iter().flat_map(|n| [&n.absmax, &n.quant_map]);
        [&self.absmax, &self.quant_map].into_iter().chain(nested)
    }

    /// The settings that are in no tensor, for the fingerprint.
    pub fn settings(&self) -> String {
        format!("blocks of {}, offset {:?}", self.block, self.nested.as_ref().map(|n| n.offset))
    }

    /// The codes `[n, k]` with decoded scales, for packing.
    pub fn source(&self, n: usize, k: usize, codes: Vec<u8>, tensors: &ModelTensors) -> Result<Source<'static>> {
        let floats = |entry: &TensorEntry| -> Result<Vec<f32>> {
            let bytes = tensors.read(entry)?;
            Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let mismatch = |_| Error::internal("a quantisation map of another length");
        let scales = match &self.nested {
            None => floats(&self.absmax)?,
            Some(nested) => {
                let map: [f32; 256] = floats(&nested.quant_map)?.try_into().map_err(mismatch)?;
                nf4::decode_scales(&tensors.read(&self.absmax)?, &map, &floats(&nested.absmax)?, nested.offset)
            }
        };
        let codebook: [f32; 16] = floats(&self.quant_map)?.try_into().map_err(mismatch)?;
        Ok(Source::Codebook { n, k, block: self.block, codes: Cow::Owned(codes), scales, codebook })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use candle_core::{DType, Device};

    use super::*;
    use crate::model::weights::hf;
    use crate::ops::quant::QMatrix;

    #[test]
    fn decodes_to_the_bits_of_bitsandbytes() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nf4/bnb_nf4_dq.safetensors");
        let expected = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let mut listed = ModelTensors::new(str::to_string);
        hf::list(&mut listed, &path).unwrap();
        join(&mut listed).unwrap();
        for (name, n, k, dtype) in [("odd_rows_bf16", 96, 320, DType::BF16), ("plain_f16", 128, 256, DType::F16)] {
            let rows = listed.rows(&format!("{name}.weight"), n, k).unwrap();
            let matrix = QMatrix::pack(&[rows.source], &Device::Cpu).unwrap();
            let expected =
                expected[&format!("{name}.expected")].to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (row, expected) in expected.into_iter().enumerate() {
                // bitsandbytes rounds to the type of the original.
                let have = candle_core::Tensor::new(matrix.row(row as u32).unwrap(), &Device::Cpu).unwrap();
                let have = have.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(have, expected, "{name} {row}");
            }
        }
        let left: Vec<&str> = listed.names().collect();
        assert_eq!(left, ["odd_rows_bf16.expected", "odd_rows_bf16.source", "plain_f16.expected", "plain_f16.source"]);
    }
}
