//! A merged model as a GGUF file, by candle's writer: the base's own metadata, and its tensors in another form. The writer
//! takes all tensors at once, so that the merged model is in memory in the form that is written.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{Format, Merged};
use crate::model::weights::gguf::{self, Metadata};
use crate::{Error, Result};

/// Writes `merged`, whose base is the GGUF file `source`, to `out`.
pub fn write(source: &Path, merged: &Merged, format: Format, out: &Path) -> Result<()> {
    let (content, mut file) = gguf::header(source)?;
    // As llama.cpp numbers them.
    let (matrix, table, file_type) = match format {
        Format::GgufQ8_0 => (GgmlDType::Q8_0, GgmlDType::Q8_0, 7),
        Format::GgufQ4_1 => (GgmlDType::Q4_1, GgmlDType::Q8_0, 3),
        Format::Safetensors | Format::GgufF16 => (GgmlDType::F16, GgmlDType::F16, 1),
    };
    let llama = Metadata(&content).text("general.architecture")? == Some("llama");
    let config = &merged.weights.config;
    let mut tensors = BTreeMap::new();
    for entry in merged.entries()? {
        let label = gguf::gguf_name(&entry.name)
            .ok_or_else(|| Error::internal(format!("GGUF has no name for {}", entry.name)))?;
        let mut values = entry.values()?;
        if llama && entry.name.ends_with("q_proj.weight") {
            values = interleave_halves(&values, config.num_heads)?;
        } else if llama && entry.name.ends_with("k_proj.weight") {
            values = interleave_halves(&values, config.num_kv_heads)?;
        }
        let dtype = match entry.shape.len() {
            1 => GgmlDType::F32,
            _ if ["token_embd.weight", "output.weight"].contains(&&*label) => table,
            _ => matrix,
        };
        tensors.insert(label, QTensor::quantize(&values, dtype)?);
    }
    // What the decoder reads as settings: RoPE's factors.
    for label in content.tensor_infos.keys() {
        if !tensors.contains_key(label) {
            tensors.insert(label.clone(), content.tensor(&mut file, label, &Device::Cpu)?);
        }
    }
    let file_type = Value::U32(file_type);
    let mut metadata: BTreeMap<&str, &Value> = content.metadata.iter().map(|(key, v)| (key.as_str(), v)).collect();
    metadata.insert("general.file_type", &file_type);
    // The writer's alignment is the one that holds when none is given.
    metadata.remove("general.alignment");
    let metadata: Vec<_> = metadata.into_iter().collect();
    let tensors: Vec<_> = tensors.iter().map(|(label, tensor)| (label.as_str(), tensor)).collect();
    let mut out = BufWriter::new(File::create(out)?);
    gguf_file::write(&mut out, &metadata, &tensors)?;
    out.flush()?;
    Ok(())
}

/// The rows of q or k as llama.cpp rotates them: first of one half of a head, first of the other, second of one half, and so
/// on. Loading undoes it.
fn interleave_halves(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, k) = rows.dims2()?;
    Ok(rows.reshape((heads, 2, n / heads / 2, k))?.transpose(1, 2)?.contiguous()?.reshape((n, k))?)
}
