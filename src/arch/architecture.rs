//! The supported architectures: the additions of each to Llama, and its names in the model formats.

use super::ModelConfig;
use crate::{Error, Result};

/// A decoder architecture. Everything that these fields do not say is as in Llama.
#[derive(Debug)]
pub struct Architecture {
    /// Class in `architectures` of config.json.
    pub class: &'static str,
    /// `model_type` in config.json.
    pub model_type: &'static str,
    /// `general.architecture` in GGUF.
    pub gguf: &'static str,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether each query and key head is normalised before RoPE.
    pub qk_norm: bool,
    /// Width of a head if config.json has no `head_dim`; `None` for `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// Whether `sliding_window` applies if config.json has no `use_sliding_window`.
    pub sliding_window: bool,
    /// Whether llama.cpp interleaves the rows of q and k for its own RoPE.
    pub interleaved: bool,
}

const LLAMA: Architecture = Architecture {
    class: "LlamaForCausalLM",
    model_type: "llama",
    gguf: "llama",
    qkv_bias: false,
    qk_norm: false,
    head_dim: None,
    sliding_window: true,
    interleaved: true,
};

/// All supported architectures. Of those with the same name in GGUF, the first is the one that GGUF means.
static ARCHITECTURES: [Architecture; 4] = [
    LLAMA,
    Architecture { class: "MistralForCausalLM", model_type: "mistral", ..LLAMA },
    Architecture {
        class: "Qwen2ForCausalLM",
        model_type: "qwen2",
        gguf: "qwen2",
        qkv_bias: true,
        sliding_window: false,
        interleaved: false,
        ..LLAMA
    },
    Architecture {
        class: "Qwen3ForCausalLM",
        model_type: "qwen3",
        gguf: "qwen3",
        qk_norm: true,
        head_dim: Some(128),
        sliding_window: false,
        interleaved: false,
        ..LLAMA
    },
];

impl Architecture {
    /// The architecture that config.json names by class or by `model_type`. Errors: the names of those that are supported.
    pub fn from_hf(name: Option<&str>) -> Result<&'static Self> {
        let known = |a: &&Self| name.is_some_and(|name| [a.class, a.model_type].contains(&name));
        ARCHITECTURES.iter().find(known).ok_or_else(|| unsupported(name, ARCHITECTURES.iter().map(|a| a.class)))
    }

    /// The architecture that GGUF metadata names. Errors: the names of those that are supported.
    pub fn from_gguf(name: Option<&str>) -> Result<&'static Self> {
        let known = |a: &&Self| name == Some(a.gguf);
        ARCHITECTURES.iter().find(known).ok_or_else(|| unsupported(name, ARCHITECTURES.iter().map(|a| a.gguf)))
    }

    /// The first architecture that computes as `config` says.
    pub fn of(config: &ModelConfig) -> &'static Self {
        let same = |a: &&Self| (a.qkv_bias, a.qk_norm) == (config.qkv_bias, config.qk_norm);
        ARCHITECTURES.iter().find(same).unwrap_or(&ARCHITECTURES[0])
    }
}

fn unsupported(name: Option<&str>, supported: impl Iterator<Item = &'static str>) -> Error {
    let mut names: Vec<_> = supported.collect();
    names.dedup();
    let (last, first) = names.split_last().unwrap_or((&"none", &[]));
    let name = name.unwrap_or("(none)");
    Error::invalid(format!("architecture {name:?} is not supported, only {} and {last}", first.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_finds_its_architecture() {
        for a in &ARCHITECTURES {
            assert_eq!(Architecture::from_hf(Some(a.class)).unwrap().class, a.class);
            assert_eq!(Architecture::from_hf(Some(a.model_type)).unwrap().class, a.class);
            assert_eq!(Architecture::from_gguf(Some(a.gguf)).unwrap().interleaved, a.interleaved);
        }
        let error = Architecture::from_gguf(Some("gemma3")).unwrap_err().message;
        assert_eq!(error, "architecture \"gemma3\" is not supported, only llama, qwen2 and qwen3");
        let error = Architecture::from_hf(None).unwrap_err().message;
        assert!(
            error.contains("(none)") && error.contains("MistralForCausalLM, Qwen2ForCausalLM and Qwen3"),
            "{error}"
        );
    }
}
