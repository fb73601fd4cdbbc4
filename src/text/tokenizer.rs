//! Loads Hugging Face tokenizers from tokenizer.json, or rebuilds them from GGUF metadata.
//!
//! A GGUF file has the vocabulary and the merges, but only a name for the rest (`tokenizer.ggml.pre`). The normaliser, the
//! pre-tokenizer and the post-processor are those of the tokenizer.json of the models that carry the name. Unknown names are
//! refused: an almost right tokenizer would silently make the model worse.

mod to_gguf;

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Tokenizer};

use crate::hub;
use crate::model::weights::gguf::{self, GgufMetadata};
use crate::text::codec::byte_of;
use crate::text::template::SpecialTokens;
use crate::{Error, Result};

pub(crate) use to_gguf::to_gguf;

/// A tokenizer, and the other settings for text in a model's files.
pub(super) struct LoadedTokenizer {
    /// Text to ids.
    pub(super) tokenizer: Tokenizer,
    /// The token that begins a sequence, if the model has one.
    pub(super) bos: Option<u32>,
    /// The tokens that end a sequence.
    pub(super) eos: Vec<u32>,
    /// Special tokens for chat templates, such as `bos_token` and `eos_token`.
    pub(super) special: SpecialTokens,
    /// Jinja source of the chat template.
    pub(super) template: Option<String>,
}

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const QWEN2_SPLIT: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's `token_type` values.
mod token_type {
    pub(super) const NORMAL: usize = 1;
    pub(super) const UNKNOWN: usize = 2;
    pub(super) const CONTROL: usize = 3;
    pub(super) const USER_DEFINED: usize = 4;
    pub(super) const UNUSED: usize = 5;
}

/// Loads a tokenizer from the metadata of a GGUF file.
pub(super) fn from_gguf(path: &Path) -> Result<LoadedTokenizer> {
    let (content, _) = gguf::header(path)?;
    build(&GgufMetadata(&content.metadata)).map_err(|e| e.in_file(path))
}

fn build(meta: &GgufMetadata) -> Result<LoadedTokenizer> {
    use candle_core::quantized::gguf_file::Value as Gguf;
    fn text(value: &Gguf) -> Option<&str> {
        if let Gguf::String(text) = value { Some(text) } else { None }
    }
    let tokens = meta
        .list("tokenizer.ggml.tokens", text)?
        .ok_or_else(|| Error::invalid("the metadata tokenizer.ggml.tokens is missing: the file has no tokenizer"))?;
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
                    "the tokenizer has {} tokens, {} scores and no merges: each token needs a score",
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
    let components = match kind {
        "llama" => sentencepiece(space_prefix),
        "gpt2" => byte_level(pre)?,
        other => {
            return Err(Error::invalid(format!(
                "unsupported tokenizer.ggml.model {other:?}: gpt2 and llama are supported"
            )));
        }
    };

    let mut model = BPE::builder().vocab_and_merges(vocab, merges).ignore_merges(components.whole_words_first);
    if kind == "llama" {
        model = model.byte_fallback(true).fuse_unk(true);
        if let Some(unknown) = unknown {
            model = model.unk_token(tokens[unknown as usize].to_string());
        }
    }
    let model = model.build().map_err(|e| Error::invalid(format!("tokenizer.ggml: {e}")))?;
    let mut tokenizer = assemble(model, &components)?;

    let add_bos = meta.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(components.adds_bos);
    let add_eos = meta.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    let around = (bos.filter(|_| add_bos), eos.filter(|_| add_eos));
    tokenizer.with_post_processor(component::<PostProcessorWrapper>("post-processor", &around_text(around, &tokens))?);

    // Only added tokens are matched whole in a text. Otherwise `<|im_end|>` would be split.
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
    Ok(LoadedTokenizer {
        tokenizer,
        bos,
        eos: ends,
        special: special.into_iter().filter_map(|(key, id)| Some((key.to_string(), name(id)?))).collect(),
        template: meta.text("tokenizer.chat_template")?.map(str::to_string),
    })
}

/// Builds a tokenizer without special tokens.
fn assemble(model: BPE, components: &TokenizerComponents) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(component::<NormalizerWrapper>("normalizer", &components.normalizer)?)
        .map_err(|e| Error::internal(e.to_string()).caused_by(e))?
        .with_pre_tokenizer(component::<PreTokenizerWrapper>("pre-tokenizer", &components.pre_tokenizer)?)
        .with_decoder(component::<DecoderWrapper>("decoder", &components.decoder)?);
    Ok(tokenizer)
}

/// The components that a GGUF file names but does not contain.
struct TokenizerComponents {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    /// A pre-token in the vocabulary becomes that token without merging, as in tiktoken.
    whole_words_first: bool,
    /// Default of `tokenizer.ggml.add_bos_token`.
    adds_bos: bool,
}

/// SentencePiece BPE, as in Llama 2's tokenizer.json: a space is put before the text and after special tokens, and spaces
/// are spelt `▁`.
fn sentencepiece(space_prefix: bool) -> TokenizerComponents {
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
    TokenizerComponents {
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        whole_words_first: false,
        adds_bos: true,
    }
}

/// Byte-level BPE, with the pre-tokenizer that `pre` names.
fn byte_level(pre: &str) -> Result<TokenizerComponents> {
    let bytes =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false}, bytes(false)]})
    };
    let components = |pre_tokenizer, tiktoken: bool| TokenizerComponents {
        normalizer: Value::Null,
        pre_tokenizer,
        decoder: bytes(true),
        whole_words_first: tiktoken,
        adds_bos: tiktoken,
    };
    Ok(match pre {
        "smollm" => {
            let digits = json!({"type": "Digits", "individual_digits": true});
            components(json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]}), false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => components(split(LLAMA3_SPLIT), true),
        "tekken" => components(split(TEKKEN_SPLIT), true),
        "qwen2" => TokenizerComponents { normalizer: json!({"type": "NFC"}), ..components(split(QWEN2_SPLIT), false) },
        "gpt-2" | "default" => components(bytes(true), false),
        other => {
            return Err(Error::invalid(format!(
                "unsupported tokenizer.ggml.pre {other:?}: smollm, llama-bpe, tekken, qwen2, gpt-2 and default are \
                 supported. Use the model's Hugging Face directory, with its tokenizer.json, instead"
            )));
        }
    })
}

/// A post-processor that puts `bos` and `eos` around a text.
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

/// A component of the `tokenizers` crate from its JSON in tokenizer.json.
fn component<T: serde::de::DeserializeOwned>(what: &str, json: &Value) -> Result<Option<T>> {
    Option::deserialize(json).map_err(|e| Error::internal(format!("{what}: {e}")).caused_by(e))
}

/// SentencePiece keeps a score for each piece instead of merges. Every way to split a piece into two known ones is a merge;
/// pieces with better scores come first (transformers' `generate_merges`).
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
    // Of equal scores, longer halves come first, then the order of the vocabulary.
    let length = |s: &str| s.chars().count();
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(length(b.1).cmp(&length(a.1))).then(length(b.2).cmp(&length(a.2))));
    merges.into_iter().map(|(_, left, right)| (left.to_string(), right.to_string())).collect()
}

/// Loads a tokenizer from a Hugging Face directory.
pub(super) fn from_directory(dir: &Path) -> Result<LoadedTokenizer> {
    let path = dir.join("tokenizer.json");
    let mut tokenizer =
        Tokenizer::from_file(&path).map_err(|e| Error::invalid(e.to_string()).caused_by(e).in_file(&path))?;
    // Training scripts save these settings. A server never truncates or pads a prompt.
    tokenizer.with_truncation(None).map_err(|e| Error::internal(e.to_string()).caused_by(e))?.with_padding(None);

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
        Err(_) => hub::settings_template(&settings).map(str::to_owned),
    };
    Ok(LoadedTokenizer { tokenizer, bos, eos, special, template })
}

/// For a config.json alone: the tokenizer.json in its directory, or else a synthetic tokenizer. Its ids below 256 are bytes,
/// and text is encoded as bytes. Every other id decodes to its own number.
pub(super) fn for_shape(config: &Path) -> Result<LoadedTokenizer> {
    if let Some(dir) = config.parent().filter(|dir| dir.join("tokenizer.json").is_file()) {
        return from_directory(dir);
    }
    let bad = |why: &str| Error::invalid(why).in_file(config);
    let json = optional_json(config)?;
    let size = json["vocab_size"]
        .as_u64()
        .and_then(|n| u32::try_from(n).ok())
        .ok_or_else(|| bad("`vocab_size` is missing or invalid"))?;
    if size < 256 {
        return Err(bad("`vocab_size` is below 256, too small for all bytes: put a tokenizer.json into its directory"));
    }
    let bytes = ('\0'..'\u{200}').filter_map(|c| Some((c.to_string(), u32::from(byte_of(c)?))));
    // In byte-level spelling, `Ġ` is a space.
    let vocab: Vocab = bytes.chain((256..size).map(|id| (format!("Ġ{id}"), id))).collect();
    let model = BPE::builder().vocab_and_merges(vocab, Merges::new()).build();
    let tokenizer = assemble(model.map_err(|e| bad(&e.to_string()))?, &byte_level("default")?)?;
    let bos = ids_of(&json["bos_token_id"]).first().copied();
    Ok(LoadedTokenizer {
        tokenizer,
        bos,
        eos: ids_of(&json["eos_token_id"]),
        special: SpecialTokens::new(),
        template: None,
    })
}

/// Reads one id or a list of ids.
fn ids_of(value: &Value) -> Vec<u32> {
    let ids = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    ids.iter().filter_map(|v| u32::try_from(v.as_u64()?).ok()).collect()
}

/// Reads a JSON file; `Null` if it does not exist.
fn optional_json(path: &Path) -> Result<Value> {
    match std::fs::read(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(e) => Err(Error::invalid(e.to_string()).caused_by(e).in_file(path)),
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|e| Error::invalid(e.to_string()).caused_by(e).in_file(path))
        }
    }
}
