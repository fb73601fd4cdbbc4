//! Compares the base that an adapter was trained on, as its files name it, with the served base.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use crate::hub;

/// The base that an adapter says it was trained on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseClaim {
    /// `base_model_name_or_path`: a repository, a name or a path.
    pub name: Option<String>,
    /// `quiver.base_fingerprint`, which our trainer writes: the hash of the base's tensors.
    pub fingerprint: Option<String>,
}

/// The served base.
#[derive(Debug, Clone, Default)]
pub struct ServedBase {
    /// The names under which it may be known. If empty, nothing is compared.
    pub names: Vec<String>,
    /// The hash of its tensors.
    pub fingerprint: String,
    /// Jinja source of its chat template, if it has one.
    pub chat_template: Option<String>,
}

/// A difference between the two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BaseMismatch {
    /// For a person.
    pub(super) message: String,
    /// Whether the adapter surely belongs to another base. A local path proves nothing.
    pub(super) certain: bool,
}

impl BaseClaim {
    /// The claim in a PEFT config.
    pub(super) fn of(config: &Map<String, Value>) -> Self {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned);
        Self {
            name: text(config.get("base_model_name_or_path")),
            fingerprint: text(config.get("quiver").and_then(|quiver| quiver.get("base_fingerprint"))),
        }
    }
}

impl ServedBase {
    /// What to say of an adapter's own chat template. `None` if it has none, or that of this base.
    pub(super) fn template_warning(&self, own: Option<&str>) -> Option<String> {
        let (own, base) = (own?.trim(), self.chat_template.as_deref().unwrap_or_default().trim());
        (own != base).then(|| {
            "the adapter's folder has a chat template that differs from the base's. Chats are rendered with the base's; for \
             the adapter's own form, POST /v1/completions with a prompt in it"
                .to_owned()
        })
    }

    /// How the claim differs from this base. `None` if it agrees or says nothing.
    pub(super) fn mismatch(&self, claim: &BaseClaim) -> Option<BaseMismatch> {
        let served = self.names.first()?;
        let named = claim.name.as_ref().map(|name| (name, self.names.iter().any(|own| same_model(own, name))));
        match (&claim.fingerprint, named) {
            (Some(theirs), _) if *theirs == self.fingerprint => None,
            (Some(_), Some((name, false))) => Some(BaseMismatch {
                message: format!(
                    "the adapter was trained on {name:?}, and the served base is {served:?} (base_fingerprint)"
                ),
                certain: true,
            }),
            (Some(_), _) => Some(BaseMismatch {
                message: format!(
                    "the adapter was trained on other weights than those of {served:?}: another quantisation or revision \
                     (base_fingerprint)"
                ),
                certain: true,
            }),
            (None, Some((name, false))) => Some(BaseMismatch {
                message: format!(
                    "the adapter names the base {name:?}, and the served base is {served:?} (base_model_name_or_path); if they \
                     are the same, give the name with --served-model-name"
                ),
                certain: !is_path(name),
            }),
            (None, Some((_, true)) | None) => None,
        }
    }
}

/// Limit on the files that may hold an adapter's template, bytes.
const MAX_TEMPLATE_FILE: u64 = 16 << 20;

/// The chat template that a trainer saved beside an adapter: `chat_template.jinja`, or `chat_template` of `tokenizer_config.json`.
pub(super) fn own_template(source: &Path) -> Option<String> {
    let read = |name: &str| {
        let path = source.join(name);
        let small = fs::metadata(&path).is_ok_and(|found| found.is_file() && found.len() <= MAX_TEMPLATE_FILE);
        small.then(|| fs::read_to_string(path).ok()).flatten()
    };
    read("chat_template.jinja").or_else(|| {
        let config: Value = serde_json::from_str(&read("tokenizer_config.json")?).ok()?;
        hub::settings_template(&config).map(str::to_owned)
    })
}

/// Whether a name is a path on the machine of the training.
fn is_path(name: &str) -> bool {
    name.starts_with(['/', '.', '~']) || name.contains('\\') || name.matches('/').count() > 1
}

/// Whether two names mean the same model: case, owner, separators, and the marks of a format or a quantisation are ignored.
fn same_model(a: &str, b: &str) -> bool {
    core_name(a) == core_name(b)
}

/// Marks of a format, a precision or a mirror at the end of a name.
const SUFFIXES: [&str; 32] = [
    "gguf",
    "mlx",
    "hf",
    "ud",
    "bnb",
    "unsloth",
    "dynamic",
    "awq",
    "gptq",
    "autoround",
    "quantized",
    "safetensors",
    "bf16",
    "fp16",
    "f16",
    "fp32",
    "f32",
    "fp8",
    "nf4",
    "fp4",
    "nvfp4",
    "mxfp4",
    "int4",
    "int8",
    "w4a16",
    "w8a8",
    "w8a16",
    "2bit",
    "3bit",
    "4bit",
    "6bit",
    "8bit",
];

/// A name without what does not tell models apart.
fn core_name(name: &str) -> String {
    let name = name.trim_end_matches(['/', '\\']);
    // A snapshot in Hugging Face's cache: models--org--name/snapshots/<commit>.
    let name = match name.split_once("models--") {
        Some((_, rest)) => rest.split(['/', '\\']).next().unwrap_or(rest).rsplit("--").next().unwrap_or(rest),
        None => name.rsplit(['/', '\\']).next().unwrap_or(name),
    };
    let name = name.rsplit_once('@').map_or(name, |(name, _)| name).to_lowercase();
    let name = name.strip_suffix(".gguf").unwrap_or(&name).replace("-bit", "bit").replace(['_', ' '], "-");
    let mut parts: Vec<&str> = name.split('-').collect();
    // A quantisation of llama.cpp is its own part (`-Q4_K_M`), or follows a dot (`.Q4_1`), and ends the name.
    if let Some(at) = parts.iter().position(|part| quant_tag(part)).filter(|at| *at > 0) {
        parts.truncate(at);
    }
    let dotted = |part: &&str| part.rsplit_once('.').is_some_and(|(_, tag)| quant_tag(tag));
    if let Some(at) = parts.iter().position(dotted) {
        parts.truncate(at + 1);
        parts[at] = parts[at].rsplit_once('.').map_or(parts[at], |(name, _)| name);
    }
    while parts.len() > 1 && parts.last().is_some_and(|last| SUFFIXES.contains(last) || last.is_empty()) {
        parts.pop();
    }
    if parts.len() > 1 && parts[0] == "meta" {
        parts.remove(0);
    }
    parts.join("-")
}

/// Whether a part of a name is llama.cpp's name of a quantisation, or the start of one: `q4`, `q8`, `iq4`.
fn quant_tag(part: &str) -> bool {
    let digits = part.strip_prefix("iq").or_else(|| part.strip_prefix('q'));
    digits.is_some_and(|digits| digits.len() == 1 && digits.chars().all(|c| c.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_one_model() {
        for (a, b) in [
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
            ("SmolLM2-135M-Instruct.Q4_1", "HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("/models/SmolLM2-135M-Instruct-Q4_K_M.gguf", "SmolLM2-135M-Instruct"),
            ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "meta-llama/Llama-3.2-1B-Instruct"),
            ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "Qwen/Qwen3-4B"),
            ("unsloth/meta-llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B"),
            ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B"),
            ("mlx-community/SmolLM2-135M-Instruct-4bit", "SmolLM2-135M-Instruct"),
            ("bartowski/Qwen2.5-0.5B-Instruct-GGUF", "Qwen/Qwen2.5-0.5B-Instruct"),
            ("/data/huggingface/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a/", "Qwen/Qwen3-4B"),
            ("C:\\models\\Qwen3-4B", "qwen3_4b"),
        ] {
            assert!(same_model(a, b), "{a} {b}: {} {}", core_name(a), core_name(b));
        }
        for (a, b) in [
            ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B-Instruct"),
            ("Qwen/Qwen3-4B", "Qwen/Qwen3-8B"),
            ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-8B"),
            ("tiny", "base"),
        ] {
            assert!(!same_model(a, b), "{a} {b}: {}", core_name(a));
        }
    }

    #[test]
    fn only_what_is_sure_is_certain() {
        let base = ServedBase {
            names: vec!["served".into(), "org/base".into()],
            fingerprint: "1".into(),
            chat_template: None,
        };
        let check = |name: Option<&str>, fingerprint: Option<&str>| {
            let claim = BaseClaim { name: name.map(Into::into), fingerprint: fingerprint.map(Into::into) };
            base.mismatch(&claim).map(|mismatch| mismatch.certain)
        };
        assert_eq!(check(None, None), None);
        assert_eq!(check(Some("Base"), None), None);
        assert_eq!(check(Some("/data/base"), None), None);
        assert_eq!(check(Some("other"), Some("1")), None, "the weights are the same");
        assert_eq!(check(Some("org/other"), None), Some(true));
        assert_eq!(check(Some("/data/checkpoint-7"), None), Some(false));
        assert_eq!(check(Some("base"), Some("2")), Some(true));
        assert_eq!(check(None, Some("2")), Some(true));
        assert_eq!(ServedBase::default().mismatch(&BaseClaim { name: Some("x".into()), fingerprint: None }), None);
    }
}
