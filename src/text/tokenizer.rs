//! Tokenizers as Hugging Face has them, from tokenizer.json or rebuilt from GGUF metadata.
//!
//! A GGUF file has the vocabulary and the merges, but only a name for the rest (`tokenizer.ggml.pre`): normaliser,
//! pre-tokenizer and post-processor are those of the tokenizer.json of the models that carry the name. A name that is
//! not known here is refused: a tokenizer that is almost right gives answers that are almost right.

mod to_gguf;

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

use crate::model::weights::gguf::{self, GgufMetadata};
use crate::text::codec::byte_of;
use crate::text::template::SpecialTokens;
use crate::{Error, Result};

pub use to_gguf::to_gguf;

/// A tokenizer and what else a model says about its text.
pub struct Loaded {
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// Begins a sequence, where the model has such a token.
    pub bos: Option<u32>,
    /// End a sequence.
    pub eos: Vec<u32>,
    /// For chat templates: `bos_token`, `eos_token` and the like.
    pub special: SpecialTokens,
    /// Jinja source of the chat template.
    pub template: Option<String>,
}

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's `token_type` values.
mod token_type {
    pub const NORMAL: usize = 1;
    pub const UNKNOWN: usize = 2;
    pub const CONTROL: usize = 3;
    pub const USER_DEFINED: usize = 4;
    pub const UNUSED: usize = 5;
}

/// From a GGUF file's metadata.
pub fn from_gguf(path: &Path) -> Result<Loaded> {
    let (content, _) = gguf::header(path)?;
    build(&GgufMetadata(&content.metadata)).map_err(|e| e.in_file(path))
}

fn build(meta: &GgufMetadata) -> Result<Loaded> {
    use candle_core::quantized::gguf_file::Value as Gguf;
    fn text(value: &Gguf) -> Option<&str> {
        if let Gguf::String(text) = value { Some(text) } else { None }
    }
    let tokens = meta
        .list("tokenizer.ggml.tokens", text)?
        .ok_or_else(|| Error::invalid("metadata tokenizer.ggml.tokens is missing: the file has no tokenizer"))?;
    let types = meta.list("tokenizer.ggml.token_type", gguf::integer)?.unwrap_or_default();
    let id = |name: &str| -> Result<Option<u32>> {
        match meta.integer(&format!("tokenizer.ggml.{name}_token_id"))? {
            Some(id) if id >= tokens.len() => Err(Error::invalid(format!(
                "tokenizer.ggml.{name}_token_id {id} is not in the vocabulary of {}",
                tokens.len()
            ))),
            id => Ok(id.map(|id| id as u32)),
        }
    };
    let (bos, eos, unknown) = (id("bos")?, id("eos")?, id("unknown")?);

    let vocab: Vocab = tokens.iter().enumerate().map(|(id, token)| (token.to_string(), id as u32)).collect();
    let merges = match meta.list("tokenizer.ggml.merges", |v| text(v)?.split_once(' '))? {
        Some(pairs) => pairs.into_iter().map(|(l, r)| (l.to_string(), r.to_string())).collect(),
        None => {
            let scores = meta.list("tokenizer.ggml.scores", |v| v.to_f32().ok())?.unwrap_or_default();
            if scores.len() != tokens.len() {
                return Err(Error::invalid(format!(
                    "{} tokens with {} scores and no merges",
                    tokens.len(),
                    scores.len()
                )));
            }
            merges_from_scores(&tokens, &scores, &vocab)
        }
    };
    let kind = meta.text("tokenizer.ggml.model")?.unwrap_or("(none)");
    let pre = meta.text("tokenizer.ggml.pre")?.unwrap_or("default");
    let space_prefix = meta.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let parts = match kind {
        "llama" => sentencepiece(space_prefix),
        "gpt2" => byte_level(pre)?,
        other => return Err(Error::invalid(format!("tokenizer.ggml.model {other:?} is not supported: gpt2 or llama"))),
    };

    let mut model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(parts.whole_words_first);
    if kind == "llama" {
        model = model.byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = unknown {
            model = model.unk_token(tokens[unknown as usize].to_string());
        }
    }
    let model = model.build().map_err(|e| Error::invalid(format!("tokenizer.ggml: {e}")))?;
    let mut tokenizer = assemble(model, &parts)?;

    let add_bos = meta.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(parts.adds_bos);
    let add_eos = meta.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let around = (bos.filter(|_| add_bos), eos.filter(|_| add_eos));
    tokenizer.with_post_processor(part::<PostProcessorWrapper>("post-processor", &around_text(around, &tokens))?);

    // Only these are matched whole in text; without them `<|im_end|>` would be cut into pieces.
    let of_type = |wanted: &[usize]| -> Vec<String> {
        let pairs = types.iter().zip(&tokens);
        pairs.filter(|(t, s)| wanted.contains(t) && !s.is_empty()).map(|(_, s)| s.to_string()).collect()
    };
    let add = |special| move |s: String| AddedToken::from(s, special).normalized(false);
    tokenizer
        .add_special_tokens(of_type(&[token_type::CONTROL, token_type::UNKNOWN]).into_iter().map(add(true)))
        .and_then(|_| tokenizer.add_tokens(of_type(&[token_type::USER_DEFINED]).into_iter().map(add(false))))
        .map_err(|e| Error::invalid(format!("special tokens: {e}")))?;

    let name = |id: Option<u32>| id.map(|id| tokens[id as usize].to_string());
    let special = [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", id("padding")?)];
    let mut ends: Vec<u32> = [eos, id("eot")?, id("eom")?].into_iter().flatten().collect();
    ends.dedup();
    Ok(Loaded {
        tokenizer,
        bos,
        eos: ends,
        special: special.into_iter().filter_map(|(key, id)| Some((key.to_string(), name(id)?))).collect(),
        template: meta.text("tokenizer.chat_template")?.map(str::to_string),
    })
}

/// A tokenizer without special tokens.
fn assemble(model: BPE, parts: &Parts) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(part::<NormalizerWrapper>("normalizer", &parts.normalizer)?)
        .map_err(|e| Error::internal(e.to_string()))?
        .with_pre_tokenizer(part::<PreTokenizerWrapper>("pre-tokenizer", &parts.pre_tokenizer)?)
        .with_decoder(part::<DecoderWrapper>("decoder", &parts.decoder)?);
    Ok(tokenizer)
}

/// What a GGUF file only has a name for.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    /// A pre-token that is in the vocabulary is that token, whatever the merges (as tiktoken).
    whole_words_first: bool,
    /// What holds when the file does not say.
    adds_bos: bool,
}

/// SentencePiece BPE as in Llama 2's tokenizer.json: a space goes before the text (and after a special token), and spaces
/// are spelt `▁`.
fn sentencepiece(space_prefix: bool) -> Parts {
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    Parts {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        whole_words_first: false,
        adds_bos: true,
    }
}

/// Byte-level BPE, cut into words first as `pre` says.
fn byte_level(pre: &str) -> Result<Parts> {
    let bytes =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, bytes(false)]})
    };
    let parts = |pre_tokenizer, tiktoken: bool| Parts {
        normalizer: Value::Null,
        pre_tokenizer,
        decoder: bytes(true),
        whole_words_first: tiktoken,
        adds_bos: tiktoken,
    };
    Ok(match pre {
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            parts(json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => parts(split(LLAMA3_SPLIT), true),
        "tekken" => parts(split(TEKKEN_SPLIT), true),
        "qwen2" => Parts { normalizer: json!({"type": "NFC"}), ..parts(split(QWEN2_SPLIT), false) },
        "gpt-2" | "default" => parts(bytes(true), false),
        other => {
            return Err(Error::invalid(format!(
                "tokenizer.ggml.pre {other:?} is not supported: smollm, llama-bpe, tekken, qwen2, gpt-2 or default. The \
                 model's Hugging Face directory, with its tokenizer.json, works"
            )));
        }
    })
}

/// A post-processor that puts the model's own tokens around a text.
fn around_text((bos, eos): (Option<u32>, Option<u32>), tokens: &[&str]) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let name = |id: u32| tokens[id as usize];
    let special = |id: Option<u32>| id.map(|id| json!({"SpecialToken": {"id": name(id), "type_id": 0}}));
    let text = json!({"Sequence": {"id": "A", "type_id": 0}});
    let single: Vec<Value> = [special(bos), Some(text), special(eos)].into_iter().flatten().collect();
    let names: serde_json::Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|id| (name(id).to_string(), json!({"id": name(id), "ids": [id], "tokens": [name(id)]})))
        .collect();
    let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
    json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": names})
}

/// A component of the `tokenizers` crate from its form in tokenizer.json.
fn part<T: serde::de::DeserializeOwned>(what: &str, form: &Value) -> Result<Option<T>> {
    Option::deserialize(form).map_err(|e| Error::internal(format!("{what}: {e}")))
}

/// SentencePiece keeps a score a piece instead of merges: every way to cut a piece in two known ones is a merge, better
/// pieces first (as transformers' `generate_merges`).
fn merges_from_scores(tokens: &[&str], scores: &[f32], vocab: &Vocab) -> Merges {
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let mut cuts: Vec<_> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = token.split_at(at);
                Some(((*vocab.get(left)?, *vocab.get(right)?), (left, right)))
            })
            .collect();
        cuts.sort_by_key(|(ids, _)| *ids);
        merges.extend(cuts.into_iter().map(|(_, (left, right))| (score, left, right)));
    }
    // Longer halves first among equals, then the order of the vocabulary.
    let length = |s: &str| s.chars().count();
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(length(b.1).cmp(&length(a.1))).then(length(b.2).cmp(&length(a.2))));
    merges.into_iter().map(|(_, left, right)| (left.to_string(), right.to_string())).collect()
}

/// From a Hugging Face directory.
pub fn from_directory(dir: &Path) -> Result<Loaded> {
    let path = dir.join("tokenizer.json");
    let mut tokenizer = Tokenizer::from_file(&path).map_err(|e| Error::invalid(format!("{}: {e}", path.display())))?;
    // Saved by training scripts; a server never cuts or fills a prompt.
    tokenizer.with_truncation(None).map_err(|e| Error::internal(e.to_string()))?.with_padding(None);

    let settings = optional_json(&dir.join("tokenizer_config.json"))?;
    let config = optional_json(&dir.join("config.json"))?;
    let generation = optional_json(&dir.join("generation_config.json"))?;
    // A token is a string, or an object with its content.
    let token = |v: &Value| v.as_str().or(v["content"].as_str()).map(str::to_string);
    let special: SpecialTokens = settings
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| key.ends_with("_token"))
        .filter_map(|(key, value)| Some((key.clone(), token(value)?)))
        .collect();
    let named = |key: &str| special.get(key).and_then(|token| tokenizer.token_to_id(token));
    let mut eos = ids_of(&generation["eos_token_id"]);
    if eos.is_empty() {
        eos = ids_of(&config["eos_token_id"]);
    }
    if let Some(id) = named("eos_token")
        && !eos.contains(&id)
    {
        eos.push(id);
    }
    let bos = named("bos_token").or(ids_of(&config["bos_token_id"]).first().copied());
    let template = match std::fs::read_to_string(dir.join("chat_template.jinja")) {
        Ok(source) => Some(source),
        Err(_) => match &settings["chat_template"] {
            Value::Array(named) => {
                named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()).map(str::to_string)
            }
            one => one.as_str().map(str::to_string),
        },
    };
    Ok(Loaded { tokenizer, bos, eos, special, template })
}

/// For a config.json: the tokenizer beside it, or else a made-up one with which text of all ids can be asked for and read:
/// ids below 256 are bytes, the others spell themselves, and text becomes bytes.
pub fn for_shape(config: &Path) -> Result<Loaded> {
    if let Some(dir) = config.parent().filter(|dir| dir.join("tokenizer.json").is_file()) {
        return from_directory(dir);
    }
    let bad = |why: &str| Error::invalid(format!("{}: {why}", config.display()));
    let form = optional_json(config)?;
    let size = form["vocab_size"].as_u64().and_then(|n| u32::try_from(n).ok()).ok_or_else(|| bad("no vocab_size"))?;
    if size < 256 {
        return Err(bad("a vocabulary without all bytes: put a tokenizer.json beside it"));
    }
    let bytes = ('\0'..'\u{200}').filter_map(|c| Some((c.to_string(), u32::from(byte_of(c)?))));
    // In byte-level spelling, Ġ is a space.
    let vocab: Vocab = bytes.chain((256..size).map(|id| (format!("Ġ{id}"), id))).collect();
    let model = BPE::builder().vocab_and_merges(vocab, Merges::new()).build();
    let tokenizer = assemble(model.map_err(|e| bad(&e.to_string()))?, &byte_level("default")?)?;
    let bos = ids_of(&form["bos_token_id"]).first().copied();
    Ok(Loaded { tokenizer, bos, eos: ids_of(&form["eos_token_id"]), special: SpecialTokens::new(), template: None })
}

/// One id or a list of them.
fn ids_of(value: &Value) -> Vec<u32> {
    let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    ids.iter().filter_map(|v| u32::try_from(v.as_u64()?).ok()).collect()
}

/// Null if the file is not there.
fn optional_json(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(Error::invalid(format!("{}: {e}", path.display()))),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::invalid(format!("{}: {e}", path.display()))),
    }
}
