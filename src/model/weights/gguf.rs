//! GGUF files: one file with everything.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. candle parses the header, because its parser is well
//! tested against hostile lengths. The blocks of values are packed by [`crate::ops::quant`].

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};

use super::OpenModel;
use super::check::check_config;
use super::tensors::{ModelTensors, TensorEncoding, TensorEntry};
use crate::arch::{Architecture, ModelConfig, RopeScaling};
use crate::ops::quant::Codec;
use crate::{Error, Result};

/// Names within a decoder block in GGUF and in Hugging Face, without `.weight` or `.bias`.
const BLOCK_NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Names outside the decoder blocks.
const OUTER_NAMES: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Settings that change the arithmetic in ways that the decoder does not support.
const REFUSED: [&str; 7] = [
    "expert_count",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.scale",
    "logit_scale",
    "embedding_scale",
    "residual_scale",
];

/// The header of a GGUF file, and the open file, whose position is unspecified.
pub fn header(path: &Path) -> Result<(Content, File)> {
    let file = File::open(path).map_err(|e| Error::invalid(e.to_string()).in_file(path).caused_by(e))?;
    let content = Content::read(&mut BufReader::new(&file)).map_err(|e| {
        let why = e.to_string();
        let why = why.lines().next().unwrap_or(&why);
        if let Some(name) = unknown_type(why) {
            let message = format!("{} has tensors of the type {name}; supported are {SUPPORTED_TYPES}", path.display());
            return Error::invalid(message).path(path).caused_by(e);
        }
        Error::invalid(format!("{} is not a readable GGUF file: {why}", path.display())).path(path).caused_by(e)
    })?;
    Ok((content, file))
}

/// The types of tensors that are supported, for messages.
const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K and Q8_0";

/// The name of a type that candle's parser does not know, from its error `unknown dtype for tensor <id>`. Ids of `ggml_type` in
/// ggml.h.
fn unknown_type(why: &str) -> Option<String> {
    const NAMES: [(u32, &str); 18] = [
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
    ];
    let id: u32 = why.split_once("unknown dtype for tensor ")?.1.trim().parse().ok()?;
    let name = NAMES.iter().find(|(known, _)| *known == id).map(|(_, name)| (*name).to_owned());
    Some(name.unwrap_or_else(|| format!("number {id} of ggml")))
}

/// Reads the description and lists the tensors.
pub fn open(path: &Path) -> Result<OpenModel> {
    let (content, file) = header(path)?;
    let opened = Description::read(&content).and_then(|description| description.open(path, file));
    opened.map_err(|e| if e.message.contains(&*path.to_string_lossy()) { e } else { e.in_file(path) })
}

/// The header of a model that can be loaded.
struct Description<'a> {
    content: &'a Content,
    meta: GgufMetadata<'a>,
    architecture: &'static Architecture,
    num_heads: usize,
    num_kv_heads: usize,
}

impl<'a> Description<'a> {
    /// Reads the metadata. Errors: an architecture, or a variation of one, that is not supported; no number of heads.
    fn read(content: &'a Content) -> Result<Self> {
        let meta = GgufMetadata(&content.metadata);
        let architecture = Architecture::from_gguf(meta.text("general.architecture")?)?;
        let key = |name: &str| format!("{}.{name}", architecture.gguf);
        if let Some(count @ 2..) = meta.integer("split.count")? {
            return Err(Error::invalid(format!(
                "the file is one of {count} parts of a split model: join them with llama-gguf-split --merge"
            )));
        }
        for key in REFUSED.map(key) {
            if content.metadata.get(&key).is_some_and(|v| !is_off(v)) {
                return Err(Error::invalid(format!(
                    "{key} is set: this variation of the architecture is not supported"
                )));
            }
        }
        let num_heads = meta.required(&key("attention.head_count"))?;
        let num_kv_heads = meta.integer(&key("attention.head_count_kv"))?.unwrap_or(num_heads);
        Ok(Self { content, meta, architecture, num_heads, num_kv_heads })
    }

    /// The key of a setting of the architecture.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.gguf)
    }

    fn open(&self, path: &Path, file: File) -> Result<OpenModel> {
        let mut tensors =
            ModelTensors::new(|hf| gguf_name(hf).map_or_else(|| hf.into(), |own| format!("{own} ({hf})")));
        let file = tensors.add_file(path, file);
        for (label, info) in &self.content.tensor_infos {
            let name = hf_name(label);
            let entry = self.entry(label, info, name.as_deref(), file)?;
            tensors.add(name.unwrap_or_else(|| label.clone()), entry)?;
        }
        let tied = tensors.shape("lm_head.weight").is_none();
        let config = self.config(&mut tensors)?;
        Ok(OpenModel { config, tensors, tied })
    }

    /// The entry of a tensor. Errors: a type that is not supported, rows that do not consist of whole blocks.
    fn entry(&self, label: &str, info: &TensorInfo, hf_name: Option<&str>, file: usize) -> Result<TensorEntry> {
        let codec = codec(info.ggml_dtype).ok_or_else(|| {
            Error::invalid(format!("tensor {label} is {:?}; supported are {SUPPORTED_TYPES}", info.ggml_dtype))
        })?;
        let shape = info.shape.dims().to_vec();
        let (values, block) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
        let bytes = match shape.split_last() {
            Some((k, outer)) if k.is_multiple_of(values) => {
                outer.iter().try_fold(k / values * block, |n, d| n.checked_mul(*d))
            }
            _ => None,
        }
        .ok_or_else(|| {
            Error::invalid(format!("tensor {label}: shape {shape:?} is not a whole number of {codec:?} blocks"))
        })?;
        let interleaved_heads = match hf_name {
            _ if !self.architecture.interleaved => None,
            Some(n) if n.ends_with("q_proj.weight") => Some(self.num_heads),
            Some(n) if n.ends_with("k_proj.weight") => Some(self.num_kv_heads),
            _ => None,
        };
        Ok(TensorEntry {
            label: label.to_string(),
            encoding: TensorEncoding::Values(codec),
            shape,
            file,
            offset: self.content.tensor_data_offset.saturating_add(info.offset),
            bytes: bytes as u64,
            interleaved_heads,
        })
    }

    /// The shape of the decoder. Takes the tensor of RoPE factors, if there is one.
    fn config(&self, tensors: &mut ModelTensors) -> Result<ModelConfig> {
        let meta = &self.meta;
        let hidden_size = meta.required(&self.key("embedding_length"))?;
        let head_dim = self.head_dim(hidden_size)?;
        let vocab_size = tensors
            .shape("model.embed_tokens.weight")
            .and_then(|shape| shape.first().copied())
            .ok_or_else(|| Error::invalid("there is no tensor token_embd.weight"))?;
        let factors = match tensors.shape("rope_freqs.weight") {
            Some(_) => Some(tensors.vector("rope_freqs.weight", head_dim / 2)?),
            None => None,
        };
        // Up to its length, a sliding window is full attention, and sequences end there.
        let window = meta.integer(&self.key("attention.sliding_window"))?.filter(|&w| w > 0).unwrap_or(usize::MAX);
        let eps = self.key("attention.layer_norm_rms_epsilon");
        let config = ModelConfig {
            hidden_size,
            intermediate_size: meta.required(&self.key("feed_forward_length"))?,
            num_layers: meta.required(&self.key("block_count"))?,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim,
            vocab_size,
            rms_norm_eps: meta.float(&eps)?.ok_or_else(|| Error::invalid(format!("metadata {eps} is missing")))?,
            rope_theta: meta.float(&self.key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: self.rope_scaling(factors)?,
            qkv_bias: self.architecture.qkv_bias,
            qk_norm: self.architecture.qk_norm,
            max_position_embeddings: meta.required(&self.key("context_length"))?.min(window),
        };
        check_config(&config)?;
        Ok(config)
    }

    /// The width of a head. Errors: heads whose values or rotated part have another width.
    fn head_dim(&self, hidden_size: usize) -> Result<usize> {
        let head_dim = match self.meta.integer(&self.key("attention.key_length"))? {
            Some(length) => length,
            None if self.num_heads > 0 => hidden_size / self.num_heads,
            None => 0,
        };
        for key in ["attention.value_length", "rope.dimension_count"].map(|name| self.key(name)) {
            if let Some(length) = self.meta.integer(&key)?
                && length != head_dim
            {
                return Err(Error::invalid(format!(
                    "{key} {length} differs from the head dimension {head_dim}: not supported"
                )));
            }
        }
        Ok(head_dim)
    }

    /// Linear scaling is in the metadata. Llama 3's is a tensor of `factors`, one per frequency.
    fn rope_scaling(&self, factors: Option<Vec<f32>>) -> Result<RopeScaling> {
        let (kind, factor) = (self.key("rope.scaling.type"), self.key("rope.scaling.factor"));
        let number = |key: &str| self.meta.float(key);
        let factor = match self.meta.text(&kind)? {
            None => number(&self.key("rope.scale_linear"))?.unwrap_or(1.0),
            Some("none") => 1.0,
            Some("linear") => {
                number(&factor)?.ok_or_else(|| Error::invalid(format!("{kind} is linear, but there is no {factor}")))?
            }
            Some(other) => {
                return Err(Error::invalid(format!(
                    "RoPE scaling {other:?} is not supported, only none, linear and llama3's factors"
                )));
            }
        };
        Ok(match factors {
            Some(factors) => RopeScaling::Factors(factors.into_iter().map(|f| f * factor).collect()),
            None if factor == 1.0 => RopeScaling::None,
            None => RopeScaling::Linear { factor },
        })
    }
}

fn codec(dtype: GgmlDType) -> Option<Codec> {
    Some(match dtype {
        GgmlDType::F32 => Codec::F32,
        GgmlDType::F16 => Codec::F16,
        GgmlDType::BF16 => Codec::BF16,
        GgmlDType::Q4_0 => Codec::Q4_0,
        GgmlDType::Q4_1 => Codec::Q4_1,
        GgmlDType::Q5_0 => Codec::Q5_0,
        GgmlDType::Q5_1 => Codec::Q5_1,
        GgmlDType::Q8_0 => Codec::Q8_0,
        GgmlDType::Q4K => Codec::Q4K,
        GgmlDType::Q5K => Codec::Q5K,
        GgmlDType::Q6K => Codec::Q6K,
        GgmlDType::Q8_1 | GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q8K => return None,
    })
}

/// `blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`.
pub fn hf_name(own: &str) -> Option<String> {
    if let Some((_, name)) = OUTER_NAMES.iter().find(|(gguf, _)| *gguf == own) {
        return Some(name.to_string());
    }
    let (layer, part) = own.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.').filter(|(_, kind)| ["weight", "bias"].contains(kind))?;
    let (_, name) = BLOCK_NAMES.iter().find(|(gguf, _)| *gguf == part)?;
    Some(format!("model.layers.{layer}.{name}.{kind}"))
}

/// `model.layers.3.self_attn.q_proj.weight` to `blk.3.attn_q.weight`.
pub fn gguf_name(hf: &str) -> Option<String> {
    if let Some((own, _)) = OUTER_NAMES.iter().find(|(_, name)| *name == hf) {
        return Some(own.to_string());
    }
    let (layer, part) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = part.rsplit_once('.')?;
    let (own, _) = BLOCK_NAMES.iter().find(|(_, name)| *name == part)?;
    Some(format!("blk.{layer}.{own}.{kind}"))
}

/// Whether a setting has no effect: zero, false or empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::F32(v) => *v == 0.0,
        Value::F64(v) => *v == 0.0,
        Value::Bool(v) => !v,
        Value::String(v) => v.is_empty(),
        Value::Array(v) => v.is_empty(),
        other => integer(other) == Some(0),
    }
}

/// The value of an integer of any width that is not negative.
pub fn integer(value: &Value) -> Option<usize> {
    match *value {
        Value::U8(v) => Some(v.into()),
        Value::U16(v) => Some(v.into()),
        Value::U32(v) => usize::try_from(v).ok(),
        Value::U64(v) => usize::try_from(v).ok(),
        Value::I8(v) => usize::try_from(v).ok(),
        Value::I16(v) => usize::try_from(v).ok(),
        Value::I32(v) => usize::try_from(v).ok(),
        Value::I64(v) => usize::try_from(v).ok(),
        _ => None,
    }
}

/// Typed look-ups in a header: `None` if the key is absent. Errors: a value of another type, naming the key.
pub struct GgufMetadata<'a>(pub &'a HashMap<String, Value>);

impl<'a> GgufMetadata<'a> {
    /// An integer of any width.
    pub fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number", integer)
    }

    /// An integer that must be there.
    pub fn required(&self, key: &str) -> Result<usize> {
        self.integer(key)?.ok_or_else(|| Error::invalid(format!("metadata {key} is missing")))
    }

    /// A float.
    pub fn float(&self, key: &str) -> Result<Option<f32>> {
        self.get(key, "a number", |v| match v {
            Value::F32(v) => Some(*v),
            Value::F64(v) => Some(*v as f32),
            other => integer(other).map(|v| v as f32),
        })
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.get(key, "text", |v| v.to_string().ok().map(String::as_str))
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |v| v.to_bool().ok())
    }

    /// An array, with each element converted by `element`.
    pub fn list<T>(&self, key: &str, element: impl Fn(&'a Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        self.get(key, "a list of one kind", |v| v.to_vec().ok()?.iter().map(&element).collect())
    }

    fn get<T>(&self, key: &str, kind: &str, read: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(value) => match read(value) {
                Some(value) => Ok(Some(value)),
                None => Err(Error::invalid(format!("metadata {key} is not {kind}"))),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_that_cannot_be_served_have_names() {
        let of = |id: u32| unknown_type(&format!("unknown dtype for tensor {id}"));
        assert_eq!((of(20).as_deref(), of(39).as_deref()), (Some("IQ4_NL"), Some("MXFP4")));
        assert_eq!(of(99).as_deref(), Some("number 99 of ggml"));
        assert_eq!(unknown_type("unknown magic 0"), None);
        // A header with one tensor: its name `t`, one dimension of 32, the type and the offset. The name of the type depends on
        // the words of candle's error.
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        [1_u64, 0, 1].iter().for_each(|count| bytes.extend(count.to_le_bytes()));
        bytes.push(b't');
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(32_u64.to_le_bytes());
        bytes.extend(20_u32.to_le_bytes());
        bytes.extend(0_u64.to_le_bytes());
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), bytes).expect("written");
        let error = header(file.path()).expect_err("the type is unknown").to_string();
        assert!(error.contains("tensors of the type IQ4_NL; supported are F32"), "{error}");
    }
}
