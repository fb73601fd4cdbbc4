//! Checkpoints that bitsandbytes quantised to 4 bits (NF4, FP4): codes under the weight's own name, scales and codebook
//! in tensors beside it.
//!
//! ```text
//! P.weight                                  u8 [n·k/2, 1], or the same bytes as another type: two codes a byte
//! P.weight.quant_state.bitsandbytes__nf4    JSON: shape, block size, offset of the scales
//! P.weight.quant_map                        f32 [16]: the codebook
//! P.weight.absmax                           f32, a scale a block; or u8, quantised themselves, and then
//! P.weight.nested_absmax, .nested_quant_map f32: the scales' scales and their codebook
//! ```
//!
//! A module that was not to be quantised (`llm_int8_skip_modules`) is stored as always.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;

use super::checkpoint::{Checkpoint, Entry, Form};
use crate::ops::quant::nf4::{self, NESTED_BLOCK};
use crate::ops::quant::{Codec, Source};
use crate::{Error, Result};

/// The tensors beside a quantised weight.
pub struct Packed {
    /// Values per scale.
    block: usize,
    /// One a block; f32, or u8 if nested.
    absmax: Entry,
    /// The codebook.
    quant_map: Entry,
    /// Double quantisation.
    nested: Option<Nested>,
}

/// How scales are quantised themselves.
struct Nested {
    /// Scales of the scales, one a [`NESTED_BLOCK`].
    absmax: Entry,
    /// What their codes stand for.
    quant_map: Entry,
    /// Mean of the scales.
    offset: f32,
}

/// `quant_state`, whole: a field that is not here may change the values.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    quant_type: String,
    blocksize: usize,
    /// Type of the original, which bitsandbytes rounds decoded values to; ours stay exact.
    dtype: String,
    shape: [usize; 2],
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f32>,
}

/// Whether `quantization_config` says 4 bits by bitsandbytes. What it says beyond is in each weight's state too.
pub fn is_config(config: &Value) -> bool {
    let method = config["quant_method"].as_str();
    method.is_none_or(|m| m == "bitsandbytes") && config["load_in_4bit"] == true && config["load_in_8bit"] != true
}

/// Makes one tensor of each quantised weight and what lies beside it.
///
/// # Errors
/// Names the tensor: a state that is not understood, a tensor beside it that is missing or has another type or shape.
pub fn join(checkpoint: &mut Checkpoint) -> Result<()> {
    let states: Vec<String> = checkpoint.names().filter(|n| n.contains(".quant_state.")).map(str::to_string).collect();
    for name in states {
        let bad = |why: String| Error::invalid(format!("tensor {name}: {why}"));
        let (weight, kind) = match name.split_once(".quant_state.bitsandbytes__") {
            Some((weight, kind @ ("nf4" | "fp4"))) => (weight, kind),
            _ => return Err(bad("this kind of quantisation is not supported, only nf4 and fp4".into())),
        };
        let bytes = match checkpoint.remove(&name) {
            Some(entry @ Entry { form: Form::Bytes, .. }) => checkpoint.read(&entry)?,
            _ => return Err(bad("it is not bytes".into())),
        };
        let state: State = serde_json::from_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        if state.quant_type != kind {
            return Err(bad(format!("its quant_type is {:?}", state.quant_type)));
        }
        if !state.blocksize.is_power_of_two() || !(32..=4096).contains(&state.blocksize) {
            return Err(bad(format!("blocksize {} is not supported", state.blocksize)));
        }
        if !matches!(&*state.dtype, "float32" | "float16" | "bfloat16") {
            return Err(bad(format!("dtype {:?} is not supported", state.dtype)));
        }
        let count = state.shape[0].checked_mul(state.shape[1]).filter(|&n| n > 0);
        let count = count.ok_or_else(|| bad(format!("shape {:?}", state.shape)))?;
        let blocks = count.div_ceil(state.blocksize);

        let mut beside = |part: &str, form: Form, len: usize| -> Result<Entry> {
            let name = format!("{weight}.{part}");
            let entry = checkpoint
                .remove(&name)
                .ok_or_else(|| Error::invalid(format!("tensor {weight} is quantised, but there is no {part}")))?;
            if entry.form.name() != form.name() || entry.shape != [len] {
                return Err(Error::invalid(format!(
                    "tensor {name} is {} {:?}, expected {} [{len}]",
                    entry.form.name(),
                    entry.shape,
                    form.name()
                )));
            }
            Ok(entry)
        };
        let f32s = || Form::Values(Codec::F32);
        let nested = match (state.nested_blocksize, state.nested_dtype.as_deref(), state.nested_offset) {
            (None, None, None) => None,
            (Some(NESTED_BLOCK), Some("float32"), Some(offset)) => Some(Nested {
                absmax: beside("nested_absmax", f32s(), blocks.div_ceil(NESTED_BLOCK))?,
                quant_map: beside("nested_quant_map", f32s(), 256)?,
                offset,
            }),
            other => return Err(bad(format!("nested quantisation {other:?} is not supported"))),
        };
        let absmax = beside("absmax", if nested.is_some() { Form::Bytes } else { f32s() }, blocks)?;
        let packed = Packed { block: state.blocksize, absmax, quant_map: beside("quant_map", f32s(), 16)?, nested };

        let entry = checkpoint.remove(weight).ok_or_else(|| bad(format!("there is no tensor {weight}")))?;
        if entry.bytes != count.div_ceil(2) as u64 || entry.shape.len() != 2 || entry.shape[1] != 1 {
            return Err(bad(format!(
                "tensor {weight} of {} bytes, {:?}, does not hold a matrix {:?}",
                entry.bytes, entry.shape, state.shape
            )));
        }
        checkpoint.add(
            weight.to_string(),
            Entry { form: Form::Packed(Box::new(packed)), shape: state.shape.to_vec(), ..entry },
        )?;
    }
    Ok(())
}

impl Packed {
    /// The tensors beside the codes.
    pub fn parts(&self) -> impl Iterator<Item = &Entry> {
        let nested = self.nested.iter().flat_map(|n| [&n.absmax, &n.quant_map]);
        [&self.absmax, &self.quant_map].into_iter().chain(nested)
    }

    /// Numbers that are in no tensor, for the fingerprint.
    pub fn settings(&self) -> String {
        format!("blocks of {}, offset {:?}", self.block, self.nested.as_ref().map(|n| n.offset))
    }

    /// For packing, once the scales are decoded.
    pub fn source(&self, n: usize, k: usize, codes: Vec<u8>, checkpoint: &Checkpoint) -> Result<Source<'static>> {
        let floats = |entry: &Entry| -> Result<Vec<f32>> {
            let bytes = checkpoint.read(entry)?;
            Ok(bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        };
        let mismatch = |_| Error::internal("a quantisation map of another length");
        let scales = match &self.nested {
            None => floats(&self.absmax)?,
            Some(nested) => {
                let map: [f32; 256] = floats(&nested.quant_map)?.try_into().map_err(mismatch)?;
                nf4::decode_scales(&checkpoint.read(&self.absmax)?, &map, &floats(&nested.absmax)?, nested.offset)
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
        let mut checkpoint = Checkpoint::new(str::to_string);
        hf::list(&mut checkpoint, &path).unwrap();
        join(&mut checkpoint).unwrap();
        for (name, n, k, dtype) in [("odd_rows_bf16", 96, 320, DType::BF16), ("plain_f16", 128, 256, DType::F16)] {
            let rows = checkpoint.rows(&format!("{name}.weight"), n, k).unwrap();
            let matrix = QMatrix::pack(&[rows.source], &Device::Cpu).unwrap();
            let expected =
                expected[&format!("{name}.expected")].to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap();
            for (row, expected) in expected.into_iter().enumerate() {
                // It rounds to the type of the original.
                let have = candle_core::Tensor::new(matrix.row(row as u32).unwrap(), &Device::Cpu).unwrap();
                let have = have.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(have, expected, "{name} {row}");
            }
        }
        let left: Vec<&str> = checkpoint.names().collect();
        assert_eq!(left, ["odd_rows_bf16.expected", "odd_rows_bf16.source", "plain_f16.expected", "plain_f16.source"]);
    }
}
