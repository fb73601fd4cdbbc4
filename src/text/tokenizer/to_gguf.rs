//! Writes a byte-level BPE tokenizer of Hugging Face as GGUF metadata, in the form of llama.cpp's converter.
//!
//! GGUF has only a name for the pre-tokenizer. The name is found by trial: its pre-tokenizer must split a difficult text into
//! the same words. The metadata is read back, and must give the same ids.

use std::collections::HashMap;
use std::path::Path;

use candle_core::quantized::gguf_file::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{
    ModelWrapper, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
    Tokenizer,
};

use super::{GgufMetadata, LoadedTokenizer, assemble, build, byte_level, from_directory, token_type};
use crate::{Error, Result};

/// Names of the known pre-tokenizers.
const NAMES: [&str; 5] = ["llama-bpe", "tekken", "qwen2", "smollm", "gpt-2"];

/// A text that each of them splits differently: contractions, digits, cases, marks, spaces and line ends.
const TEXT: &str = "Hello, World! I'm here; it's WE'LL  3 12 345 67890 ½ ٣٤٥\n\n\n  three   spaces \t\ttabs\r\n über e\u{301}te\u{301} \
                    HTTPServer camelCase İstanbul 你好，世界 مرحبا русский हिन्दी 🚀🔥👩‍👩‍👧 a\u{a0}b foo/bar//baz\n/x !!\n?? <|x|> [y] '' ";

/// The metadata of the tokenizer in `dir`, for a model with `rows` embeddings.
///
/// # Errors
/// `Invalid`: the tokenizer is not a byte-level BPE, or GGUF metadata cannot describe it exactly.
pub(crate) fn to_gguf(dir: &Path, rows: usize) -> Result<HashMap<String, Value>> {
    convert(&from_directory(dir)?, rows).map_err(|mut e| {
        e.message += ": merge to safetensors and convert that with llama.cpp's convert_hf_to_gguf.py";
        e.in_file(dir.join("tokenizer.json"))
    })
}

fn convert(loaded: &LoadedTokenizer, rows: usize) -> Result<HashMap<String, Value>> {
    let tokenizer = &loaded.tokenizer;
    let ModelWrapper::BPE(model) = tokenizer.get_model() else {
        return Err(Error::invalid("only byte-level BPE tokenizers can be written to GGUF"));
    };
    if model.byte_fallback {
        return Err(Error::invalid(
            "this is a SentencePiece tokenizer, and tokenizer.json does not contain its scores",
        ));
    }
    let extras = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
    if model.dropout.is_some() || extras.into_iter().flatten().any(|extra| !extra.is_empty()) {
        return Err(Error::invalid("GGUF cannot describe BPE with a dropout, a prefix or a suffix"));
    }
    let (tokens, types) = vocabulary(tokenizer, rows)?;
    let text = |s: &str| Value::String(s.to_owned());
    let mut metadata = HashMap::from([
        ("tokenizer.ggml.model".to_owned(), text("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), text(name(tokenizer, model.ignore_merges)?)),
        ("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.token_type".to_owned(), Value::Array(types.into_iter().map(Value::I32).collect())),
        ("tokenizer.ggml.merges".to_owned(), Value::Array(merges(model)?)),
    ]);
    if let Some(template) = &loaded.template {
        metadata.insert("tokenizer.chat_template".into(), text(template));
    }

    let named = |key: &str| loaded.special.get(key).and_then(|token| tokenizer.token_to_id(token));
    let eos = named("eos_token").or(loaded.eos.first().copied());
    // GGUF has fields for two more tokens that end a sequence.
    let mut others = loaded.eos.iter().copied().filter(|id| Some(*id) != eos);
    let ids = [
        ("bos", loaded.bos),
        ("eos", eos),
        ("eot", others.next()),
        ("eom", others.next()),
        ("unknown", named("unk_token")),
        ("padding", named("pad_token")),
    ];
    if others.next().is_some() {
        return Err(Error::invalid("more than three tokens end a sequence, and GGUF has room for three"));
    }
    for (name, id) in ids {
        metadata.extend(id.map(|id| (format!("tokenizer.ggml.{name}_token_id"), Value::U32(id))));
    }
    let (plain, whole) = (encode(tokenizer, "a", false)?, encode(tokenizer, "a", true)?);
    let starts = |ids: &[u32]| loaded.bos.is_some() && ids.first() == loaded.bos.as_ref();
    let ends = |ids: &[u32]| eos.is_some() && ids.last() == eos.as_ref();
    metadata.insert("tokenizer.ggml.add_bos_token".into(), Value::Bool(starts(&whole) && !starts(&plain)));
    metadata.insert("tokenizer.ggml.add_eos_token".into(), Value::Bool(ends(&whole) && !ends(&plain)));

    // Compares the ids of a text with all added tokens.
    let added = tokenizer.get_added_tokens_decoder().into_iter().map(|(_, token)| token.content + " ");
    let text = TEXT.to_owned() + &added.collect::<String>();
    let again = build(&GgufMetadata(&metadata))?.tokenizer;
    if encode(&again, &text, true)? != encode(tokenizer, &text, true)? {
        return Err(Error::invalid("rebuilt from GGUF metadata, the tokenizer gives other ids"));
    }
    Ok(metadata)
}

/// The spelling and the type of every id.
fn vocabulary(tokenizer: &Tokenizer, rows: usize) -> Result<(Vec<String>, Vec<i32>)> {
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![token_type::UNUSED as i32; rows];
    let mut put = |id: u32, token: String, kind: usize| -> Result<()> {
        let beyond =
            || Error::invalid(format!("the tokenizer has an id {id}, but the model has only {rows} embeddings"));
        *tokens.get_mut(id as usize).ok_or_else(beyond)? = token;
        types[id as usize] = kind as i32;
        Ok(())
    };
    for (token, id) in tokenizer.get_vocab(false) {
        put(id, token, token_type::NORMAL)?;
    }
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        if token.single_word || token.lstrip || token.rstrip {
            let message =
                format!("token {:?} depends on the text around it, for which GGUF has no flag", token.content);
            return Err(Error::invalid(message));
        }
        // llama.cpp's rule: some models do not mark their control tokens as special.
        let control = token.special || (token.content.starts_with("<|") && token.content.ends_with("|>"));
        put(id, token.content, if control { token_type::CONTROL } else { token_type::USER_DEFINED })?;
    }
    Ok((tokens, types))
}

/// The merges in their order, each as `left right`.
fn merges(model: &BPE) -> Result<Vec<Value>> {
    let json = serde_json::to_value(model).map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
    let pair = |pair: &serde_json::Value| {
        let (left, right) = (pair[0].as_str()?, pair[1].as_str()?);
        // In byte-level spelling, no token contains a space.
        (!left.contains(' ') && !right.contains(' ')).then(|| Value::String(format!("{left} {right}")))
    };
    let merges = json["merges"].as_array().and_then(|merges| merges.iter().map(pair).collect());
    merges.ok_or_else(|| Error::invalid("its merges contain spaces, so it is not a byte-level BPE"))
}

/// GGUF's name of the pre-tokenizer.
fn name(tokenizer: &Tokenizer, whole_words_first: bool) -> Result<&'static str> {
    let wanted = words(tokenizer)?;
    for name in NAMES {
        let components = byte_level(name)?;
        let same = components.whole_words_first == whole_words_first;
        if same && words(&assemble(BPE::default(), &components)?)? == wanted {
            return Ok(name);
        }
    }
    Err(Error::invalid(format!("its pre-tokenizer is none of {}", NAMES.join(", "))))
}

/// The test text, normalised and split into words.
fn words(tokenizer: &Tokenizer) -> Result<Vec<String>> {
    let failed = |e: tokenizers::Error| Error::invalid(e.to_string());
    let mut text = NormalizedString::from(TEXT);
    if let Some(normalizer) = tokenizer.get_normalizer() {
        normalizer.normalize(&mut text).map_err(failed)?;
    }
    let mut text = PreTokenizedString::from(text);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut text).map_err(failed)?;
    }
    let splits = text.get_splits(OffsetReferential::Normalized, OffsetType::None);
    Ok(splits.into_iter().map(|(word, ..)| word.to_owned()).collect())
}

fn encode(tokenizer: &Tokenizer, text: &str, special: bool) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, special).map_err(|e| Error::invalid(e.to_string()))?;
    Ok(encoding.get_ids().to_vec())
}
