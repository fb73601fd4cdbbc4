//! A merged model as a Hugging Face directory: config.json, the tokenizer, and bf16 tensors in one file.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs;
use std::path::Path;

use candle_core::DType;
use half::bf16;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};

use super::{MergedModel, MergedTensor};
use crate::arch::{Architecture, RopeScaling};
use crate::hub::{ModelFiles, ModelFormat};
use crate::text::codec::TextCodec;
use crate::{Error, Result};

/// Files that are copied from the directory of the base.
const COPIED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
];

/// Writes `merged`, whose base was loaded from `files`, to a new directory.
pub fn write(files: &ModelFiles, merged: &MergedModel, dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    let mut config = match &files.format {
        ModelFormat::HuggingFace(source) => {
            for file in COPIED.iter().filter(|file| source.join(file).is_file()) {
                fs::copy(source.join(file), dir.join(file))?;
            }
            serde_json::from_slice(&fs::read(source.join("config.json"))?)
                .map_err(|e| Error::invalid(format!("config.json: {e}")))?
        }
        _ => {
            let codec = TextCodec::load(files)?;
            write_tokenizer(&codec, dir)?;
            config(merged, &codec)?
        }
    };
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
        config.insert("tie_word_embeddings".into(), merged.tied().into());
        // The name in transformers 4, and the one from transformers 5 on.
        config.insert("torch_dtype".into(), "bfloat16".into());
        config.insert("dtype".into(), "bfloat16".into());
    }
    fs::write(dir.join("config.json"), format!("{config:#}\n"))?;

    let failure = RefCell::new(None);
    let tensors = merged.tensors()?.into_iter();
    let tensors = tensors.map(|tensor| (tensor.name.clone(), Bf16Tensor { tensor, failure: &failure }));
    let about = [("format".to_owned(), "pt".to_owned())].into();
    serialize_to_file(tensors, Some(about), &dir.join("model.safetensors"))
        .map_err(|e| Error::internal(format!("model.safetensors: {e}")))?;
    failure.into_inner().map_or(Ok(()), Err)
}

/// A tensor that is computed when it is written, so that one at a time is in memory.
struct Bf16Tensor<'a> {
    tensor: MergedTensor<'a>,
    /// The last error, which [`View::data`] cannot return.
    failure: &'a RefCell<Option<Error>>,
}

impl View for Bf16Tensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let values =
            self.tensor.values().and_then(|v| Ok(v.to_dtype(DType::BF16)?.flatten_all()?.to_vec1::<bf16>()?));
        Cow::Owned(match values {
            Ok(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Err(error) => {
                self.failure.replace(Some(error));
                vec![0; self.data_len()]
            }
        })
    }

    fn data_len(&self) -> usize {
        2 * self.tensor.shape.iter().product::<usize>()
    }
}

/// A config.json for a base that was loaded from GGUF.
fn config(merged: &MergedModel, codec: &TextCodec) -> Result<Value> {
    let c = &merged.weights.config;
    let architecture = Architecture::of(c);
    let rope_scaling = match &c.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {
            return Err(Error::invalid(
                "the base has a RoPE factor for each frequency, which config.json cannot express: merge to GGUF",
            ));
        }
    };
    Ok(json!({
        "architectures": [architecture.class],
        "model_type": architecture.model_type,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope_scaling,
        "bos_token_id": codec.bos_token_id(),
        "eos_token_id": codec.eos_token_ids(),
    }))
}

/// Writes the files of a tokenizer that was rebuilt from GGUF metadata.
fn write_tokenizer(codec: &TextCodec, dir: &Path) -> Result<()> {
    let (tokenizer, template) = codec.sources()?;
    fs::write(dir.join("tokenizer.json"), tokenizer)?;
    if let Some(template) = template {
        fs::write(dir.join("chat_template.jinja"), template)?;
    }
    let name = |id: Option<u32>| id.map(|id| codec.token_string(id));
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name(codec.bos_token_id()),
        "eos_token": name(codec.eos_token_ids().first().copied()),
    });
    fs::write(dir.join("tokenizer_config.json"), format!("{settings:#}\n"))?;
    Ok(())
}
