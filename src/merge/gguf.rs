//! A merged model as a GGUF file. The metadata is that of the base, or the metadata that llama.cpp's converter writes for a Hugging
//! Face directory. Each tensor is computed when it is written, so that one at a time is in memory.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, version 3. candle has a writer, but it needs all tensors
//! in memory.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::{MergeFormat, MergedModel, MergedTensor, TensorOrigin};
use crate::arch::{Architecture, ModelConfig, RopeScaling};
use crate::hub::{ModelFiles, ModelFormat};
use crate::model::weights::gguf::{self, GgufMetadata};
use crate::text::tokenizer;
use crate::{Error, Result};

/// Alignment of tensors in bytes, GGUF's default.
const ALIGNMENT: usize = 32;
/// The tensor of RoPE factors, one per frequency.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A tensor of the file.
struct GgufTensor<'a> {
    /// Name in GGUF.
    label: String,
    tensor: MergedTensor<'a>,
    /// Number of heads, if the rows of each head are interleaved for llama.cpp's RoPE.
    interleaved_heads: Option<usize>,
    dtype: GgmlDType,
}

/// Writes `merged`, whose base was loaded from `base`, to `out`.
pub fn write(base: &ModelFiles, merged: &MergedModel, format: MergeFormat, out: &Path) -> Result<()> {
    let (mut metadata, others) = match &base.format {
        ModelFormat::Gguf(source) => from_gguf(source, merged)?,
        ModelFormat::HuggingFace(dir) => from_directory(&base.name, dir, &merged.weights.config)?,
        ModelFormat::Shape(_) => return Err(Error::internal("dummy weights have no metadata")),
    };
    let architecture = Architecture::from_gguf(GgufMetadata(&metadata).text("general.architecture")?)?;
    let tensors = tensors(merged, others, format, architecture.interleaved)?;
    metadata.insert("general.file_type".into(), Value::U32(file_type(format)));
    // The tensors are written with the default alignment.
    metadata.remove("general.alignment");

    let mut out = BufWriter::new(File::create(out)?);
    out.write_all(&header(&metadata.into_iter().collect(), &tensors)?)?;
    for tensor in &tensors {
        let bytes = tensor.quantize()?;
        if bytes.data()?.len() != tensor.bytes() {
            return Err(Error::internal(format!("{} has another size than planned", tensor.label)));
        }
        out.write_all(&bytes.data()?)?;
        out.write_all(&[0; ALIGNMENT][..padding(tensor.bytes())])?;
    }
    out.flush()?;
    Ok(())
}

/// llama.cpp's number of a format.
fn file_type(format: MergeFormat) -> u32 {
    match format {
        MergeFormat::GgufQ8_0 => 7,
        MergeFormat::GgufQ4_1 => 3,
        MergeFormat::Safetensors | MergeFormat::GgufF16 => 1,
    }
}

/// The tensors of the file: the merged ones, and the `others` of the base. `interleaved` is [`Architecture::interleaved`].
fn tensors<'a>(
    merged: &MergedModel<'a>,
    others: Vec<(String, Tensor)>,
    format: MergeFormat,
    interleaved: bool,
) -> Result<Vec<GgufTensor<'a>>> {
    let config = &merged.weights.config;
    let (matrix, table) = match format {
        MergeFormat::GgufQ8_0 => (GgmlDType::Q8_0, GgmlDType::Q8_0),
        MergeFormat::GgufQ4_1 => (GgmlDType::Q4_1, GgmlDType::Q8_0),
        MergeFormat::Safetensors | MergeFormat::GgufF16 => (GgmlDType::F16, GgmlDType::F16),
    };
    let mut tensors = Vec::new();
    for tensor in merged.tensors()? {
        let label = gguf::gguf_name(&tensor.name)
            .ok_or_else(|| Error::internal(format!("GGUF has no name for {}", tensor.name)))?;
        let interleaved_heads = match &tensor.name {
            name if interleaved && name.ends_with("q_proj.weight") => Some(config.num_heads),
            name if interleaved && name.ends_with("k_proj.weight") => Some(config.num_kv_heads),
            _ => None,
        };
        let dtype = match &tensor.shape[..] {
            [_] => GgmlDType::F32,
            _ if ["token_embd.weight", "output.weight"].contains(&&*label) => table,
            _ => matrix,
        };
        // Rows that are not a whole number of blocks stay in 16 bits, as in llama.cpp.
        let fits = tensor.shape.last().is_some_and(|k| k.is_multiple_of(dtype.block_size()));
        let dtype = if fits { dtype } else { GgmlDType::F16 };
        tensors.push(GgufTensor { label, tensor, interleaved_heads, dtype });
    }
    for (label, values) in others {
        let shape = values.dims().to_vec();
        let tensor = MergedTensor { name: label.clone(), shape, origin: TensorOrigin::Vector(values) };
        tensors.push(GgufTensor { label, tensor, interleaved_heads: None, dtype: GgmlDType::F32 });
    }
    Ok(tensors)
}

/// Metadata, and the tensors of the base that [`MergedModel::tensors`] does not list.
type MetadataAndTensors = (HashMap<String, Value>, Vec<(String, Tensor)>);

/// The metadata and further tensors of a base that is a GGUF file.
fn from_gguf(source: &Path, merged: &MergedModel) -> Result<MetadataAndTensors> {
    let (content, mut file) = gguf::header(source)?;
    let merged: Vec<_> = merged.tensors()?.iter().filter_map(|tensor| gguf::gguf_name(&tensor.name)).collect();
    let mut others = Vec::new();
    for label in content.tensor_infos.keys().filter(|label| !merged.contains(label)) {
        others.push((label.clone(), content.tensor(&mut file, label, &Device::Cpu)?.dequantize(&Device::Cpu)?));
    }
    Ok((content.metadata, others))
}

/// The metadata and further tensors that llama.cpp's converter writes for a Hugging Face directory.
fn from_directory(name: &str, dir: &Path, config: &ModelConfig) -> Result<MetadataAndTensors> {
    let mut metadata = tokenizer::to_gguf(dir, config.vocab_size)?;
    let architecture = Architecture::of(config).gguf;
    let text = |text: &str| Value::String(text.into());
    metadata.extend([
        ("general.architecture".into(), text(architecture)),
        ("general.name".into(), text(name)),
        ("general.type".into(), text("model")),
        ("general.quantization_version".into(), Value::U32(2)),
    ]);
    let mut set = |key: &str, value: Value| drop(metadata.insert(format!("{architecture}.{key}"), value));
    for (key, value) in [
        ("attention.head_count", config.num_heads),
        ("attention.head_count_kv", config.num_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("block_count", config.num_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("rope.dimension_count", config.head_dim),
        ("vocab_size", config.vocab_size),
    ] {
        // The loader refuses larger values.
        set(key, Value::U32(value as u32));
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    set("rope.freq_base", Value::F32(config.rope_theta));
    let factors = match &config.rope_scaling {
        RopeScaling::None => None,
        RopeScaling::Linear { factor } => {
            set("rope.scaling.type", text("linear"));
            set("rope.scaling.factor", Value::F32(*factor));
            None
        }
        RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {
            let plain = ModelConfig { rope_scaling: RopeScaling::None, ..config.clone() }.inverse_frequencies();
            let factors = plain.iter().zip(config.inverse_frequencies()).map(|(plain, scaled)| plain / scaled);
            Some((ROPE_FACTORS.into(), Tensor::from_iter(factors, &Device::Cpu)?))
        }
    };
    Ok((metadata, factors.into_iter().collect()))
}

impl GgufTensor<'_> {
    /// Bytes in the file, without padding.
    fn bytes(&self) -> usize {
        self.tensor.shape.iter().product::<usize>() / self.dtype.block_size() * self.dtype.type_size()
    }

    fn quantize(&self) -> Result<QTensor> {
        let mut values = self.tensor.values()?;
        if let Some(heads) = self.interleaved_heads {
            values = interleave_halves(&values, heads)?;
        }
        Ok(QTensor::quantize(&values, self.dtype)?)
    }
}

/// The rows of q or k in the order of llama.cpp's RoPE: the first row of each half of a head, then the second of each, and so
/// on. Loading undoes it.
fn interleave_halves(rows: &Tensor, heads: usize) -> Result<Tensor> {
    let (n, k) = rows.dims2()?;
    Ok(rows.reshape((heads, 2, n / heads / 2, k))?.transpose(1, 2)?.contiguous()?.reshape((n, k))?)
}

/// The bytes before the tensors.
fn header(metadata: &BTreeMap<String, Value>, tensors: &[GgufTensor]) -> Result<Vec<u8>> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut out, key);
        out.extend(kind(value).to_le_bytes());
        put(&mut out, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        put_text(&mut out, &tensor.label);
        out.extend((tensor.tensor.shape.len() as u32).to_le_bytes());
        // Innermost dimension first.
        for &n in tensor.tensor.shape.iter().rev() {
            out.extend((n as u64).to_le_bytes());
        }
        let dtype: u32 = match tensor.dtype {
            GgmlDType::F32 => 0,
            GgmlDType::F16 => 1,
            GgmlDType::Q4_1 => 3,
            GgmlDType::Q8_0 => 8,
            other => return Err(Error::internal(format!("merged models are not written as {other:?}"))),
        };
        out.extend(dtype.to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += tensor.bytes() + padding(tensor.bytes());
    }
    out.resize(out.len() + padding(out.len()), 0);
    Ok(out)
}

/// Bytes from `length` to the next aligned offset.
fn padding(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT) - length
}

/// GGUF's number for the type of a value.
fn kind(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.push(*v),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push((*v).into()),
        Value::String(text) => put_text(out, text),
        Value::Array(items) => {
            // All items have one type; an empty array may have any.
            out.extend(items.first().map_or(kind(&Value::U32(0)), kind).to_le_bytes());
            out.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| put(out, item));
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
