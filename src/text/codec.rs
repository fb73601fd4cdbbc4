//! [`TextCodec`] converts text to tokens and back, with a model's tokenizer and chat template.
//!
//! The `tokenizers` crate encodes, so ids are Hugging Face's. Decoding is ours: every id stands for a fixed run of bytes.
//! A stream therefore takes constant time per token, never returns half a character, and returns in total exactly what
//! decoding all ids at once does.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Map, Value, json};
use tokenizers::{AddedToken, Tokenizer};

use super::messages::{ChatPrompt, with_tools_in_system_message};
use super::template::{ChatTemplate, SpecialTokens};
use super::tokenizer::{self, LoadedTokenizer};
use crate::hub::{ModelFiles, ModelFormat};
use crate::{Error, Result};

/// A model's tokenizer and chat template.
pub struct TextCodec {
    /// Text to ids.
    tokenizer: Tokenizer,
    /// Ids to text.
    token_bytes: TokenBytes,
    /// See [`TextCodec::bos_token_id`].
    bos: Option<u32>,
    /// See [`TextCodec::eos_token_ids`].
    eos: Vec<u32>,
    /// Absent in most models without instruction tuning.
    template: Option<ChatTemplate>,
    /// Special tokens by the names that templates use.
    special: SpecialTokens,
}

impl TextCodec {
    /// Reads the tokenizer and the chat template of a model.
    ///
    /// # Errors
    /// `Invalid`, naming the file: no tokenizer, or one that cannot be reproduced exactly.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let LoadedTokenizer { tokenizer, bos, eos, special, template } = match &files.format {
            ModelFormat::Gguf(path) => tokenizer::from_gguf(path)?,
            ModelFormat::HuggingFace(dir) => tokenizer::from_directory(dir)?,
            ModelFormat::Shape(config) => tokenizer::for_shape(config)?,
        };
        let token_bytes = TokenBytes::new(&tokenizer)?;
        let template = template.map(|source| ChatTemplate::new(&source, special.clone())).transpose()?;
        let mut codec = Self { tokenizer, token_bytes, bos, eos, template, special };
        if let Some(id) = codec.end_of_turn()?
            && !codec.eos.contains(&id)
        {
            codec.eos.push(id);
        }
        Ok(codec)
    }

    /// The special token that the template writes after an answer. Models of which only the end of a text is declared end their
    /// turns with it.
    fn end_of_turn(&self) -> Result<Option<u32>> {
        const ANSWER: &str = "AN ANSWER";
        let Some(template) = &self.template else { return Ok(None) };
        let messages = vec![json!({"role": "user", "content": "Hi"}), json!({"role": "assistant", "content": ANSWER})];
        // A template may refuse such a chat.
        let Ok(text) = template.render(&ChatPrompt::of(messages, false)) else { return Ok(None) };
        let Some((_, end)) = text.rsplit_once(ANSWER) else { return Ok(None) };
        let first = self.encode(end.trim_start(), false)?.first().copied();
        Ok(first.filter(|&id| self.is_special(id)))
    }

    /// Token ids of `text`. With `add_special_tokens`, the model's own special tokens go around it, as in transformers.
    /// Special tokens that are spelt out in the text are recognised.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|e| Error::invalid(format!("the text cannot be tokenized: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a prompt: as [`TextCodec::encode`], but an empty text becomes the token that begins a sequence.
    ///
    /// # Errors
    /// `Invalid` on `prompt` if it is empty and the model has no such token.
    pub(crate) fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, add_special_tokens)?;
        if ids.is_empty() {
            ids.extend(self.bos);
        }
        if ids.is_empty() {
            return Err(Error::invalid("the prompt is empty: this model needs at least one token").param("prompt"));
        }
        Ok(ids)
    }

    /// Text of `ids`. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are left out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let mut stream = self.stream(skip_special_tokens);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish()?);
        Ok(text)
    }

    /// Renders a chat with the model's template. Encode the result without adding special tokens, because the template contains
    /// them.
    ///
    /// # Errors
    /// `Invalid` if there is no template, or the template refuses the messages or has no place for what the prompt has.
    pub fn render_chat(&self, prompt: &ChatPrompt) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::invalid("this model has no chat template: use /v1/completions").code("no_chat_template")
        })?;
        template.render(prompt)
    }

    /// Whether the template lists tools. If not, [`with_tools_in_system_message`] does.
    ///
    /// [`with_tools_in_system_message`]: super::messages::with_tools_in_system_message
    pub fn template_knows_tools(&self) -> bool {
        self.template.as_ref().is_some_and(|template| template.reads("tools"))
    }

    /// Jinja source of the model's template, if it has one.
    pub(crate) fn template_source(&self) -> Option<&str> {
        self.template.as_ref().map(ChatTemplate::source)
    }

    /// The prompt as the model's template can render it: if the template does not know tools, a system message lists them.
    pub(crate) fn fit_tools(&self, prompt: ChatPrompt) -> ChatPrompt {
        if self.template_knows_tools() { prompt } else { with_tools_in_system_message(prompt) }
    }

    /// The tokenizer as JSON, and the source of the template. They determine the tokens of a prompt.
    pub(crate) fn sources(&self) -> Result<(String, Option<&str>)> {
        let tokenizer = self.tokenizer.to_string(false).map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
        Ok((tokenizer, self.template_source()))
    }

    /// A decoder for one sequence, which never returns half a character.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream<'_> {
        self.stream_keeping(skip_special_tokens, &[])
    }

    /// As [`TextCodec::stream`], but tokens that are spelt as one of `markers` are text, also where they are special tokens.
    pub fn stream_keeping(&self, skip_special_tokens: bool, markers: &[&str]) -> TextStream<'_> {
        let kept = markers.iter().filter_map(|marker| self.id_of(marker)).collect();
        TextStream { token_bytes: &self.token_bytes, skip_special_tokens, kept, pending: Vec::new(), at_start: true }
    }

    /// The bytes that an id stands for, which may be part of a character. Empty for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.token_bytes.get(id)
    }

    /// [`TextCodec::token_bytes`] as text. Invalid UTF-8 becomes U+FFFD.
    pub fn token_string(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The spelling of a token in the vocabulary, such as `Ġthe`, where [`TextCodec::token_string`] has a space. Empty for an id
    /// outside the vocabulary.
    pub(crate) fn spelling(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }

    /// The tokenizer's settings, under the names of transformers' `tokenizer_config.json`.
    pub(crate) fn info(&self) -> Result<Value> {
        let added: BTreeMap<u32, AddedToken> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        let added: Map<String, Value> = added
            .into_iter()
            .map(|(id, token)| {
                let AddedToken { content, single_word, lstrip, rstrip, normalized, special } = token;
                let token = json!({"content": content, "single_word": single_word, "lstrip": lstrip, "rstrip": rstrip,
                                   "normalized": normalized, "special": special});
                (id.to_string(), token)
            })
            .collect();
        let mut info = json!({
            // The class that reads any tokenizer.json.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.adds_bos()?,
            "clean_up_tokenization_spaces": false,
            "added_tokens_decoder": added,
        });
        for (name, token) in &self.special {
            info[name] = token.as_str().into();
        }
        if let Some(template) = self.template_source() {
            info["chat_template"] = template.into();
        }
        Ok(info)
    }

    /// Whether an id is a special token, such as the end of a turn.
    pub fn is_special(&self, id: u32) -> bool {
        self.token_bytes.special.get(id as usize).copied().unwrap_or(false)
    }

    /// The id of a token in the vocabulary's spelling, such as `<|im_end|>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The token that begins a sequence, if the model has one. `encode` adds it only for models that use it.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// Whether `encode` with special tokens puts [`TextCodec::bos_token_id`] first.
    pub(super) fn adds_bos(&self) -> Result<bool> {
        Ok(self.bos.is_some() && self.encode("", true)?.first() == self.bos.as_ref())
    }

    /// The ids that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The ids that are no text: special tokens, and added ones of the form `<...>`, such as `<think>`.
    pub(super) fn control_token_ids(&self) -> HashSet<u32> {
        let bracketed = |token: &str| token.starts_with('<') && token.ends_with('>');
        let added = self.tokenizer.get_added_tokens_decoder().into_iter();
        added.filter(|(_, token)| token.special || bracketed(&token.content)).map(|(id, _)| id).collect()
    }

    /// Whether the tokenizer puts a space before every text, which decoding removes.
    pub(super) fn drops_leading_space(&self) -> bool {
        self.token_bytes.drops_leading_space
    }

    /// One more than the highest id. The model's embedding may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.special.len()
    }
}

/// See [`TextCodec::stream`].
pub struct TextStream<'a> {
    /// Ids to bytes.
    token_bytes: &'a TokenBytes,
    /// Whether special tokens are left out.
    skip_special_tokens: bool,
    /// Special tokens that are not left out.
    kept: Vec<u32>,
    /// The beginning of a character. Between calls, at most three bytes.
    pending: Vec<u8>,
    /// No token has come yet: a leading space may have to be removed.
    at_start: bool,
}

impl TextStream<'_> {
    /// The text that this id completes; empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut bytes = self.token_bytes.get(id);
        let skips = self.skip_special_tokens && !self.kept.contains(&id);
        if bytes.is_empty() || skips && self.token_bytes.special[id as usize] {
            return Ok(String::new());
        }
        if std::mem::take(&mut self.at_start) && self.token_bytes.drops_leading_space {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(whole) => {
                    text.push_str(whole);
                    rest = &[];
                }
                Err(e) => {
                    let (valid, broken) = rest.split_at(e.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = broken;
                    // No length: the bytes may yet become a character.
                    let Some(length) = e.error_len() else { break };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[length..];
                }
            }
        }
        self.pending = rest.to_vec();
        Ok(text)
    }

    /// Text of the bytes that are left at the end. Invalid UTF-8 becomes U+FFFD.
    pub fn finish(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned())
    }
}

/// The bytes of every id.
struct TokenBytes {
    /// Concatenated in the order of the ids.
    bytes: Vec<u8>,
    /// The end of each id's bytes in `bytes`.
    ends: Vec<u32>,
    /// Whether each id is a special token.
    special: Vec<bool>,
    /// The tokenizer puts a space before every text, as SentencePiece does, and decoding removes it.
    drops_leading_space: bool,
}

impl TokenBytes {
    fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| Error::internal(e.to_string()))?;
        let decoder = TokenDecoder::read(&decoder)?;
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if size > 1 << 24 {
            return Err(Error::invalid(format!(
                "invalid tokenizer: its highest id is {}, and ids are below 2^24",
                size - 1
            )));
        }
        let mut tokens = vec![""; size];
        for (token, &id) in &vocab {
            tokens[id as usize] = token;
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(size));
        for token in tokens {
            bytes.extend(decoder.decode(token));
            ends.push(bytes.len() as u32);
        }
        let mut special = vec![false; size];
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        Ok(Self { bytes, ends, special, drops_leading_space: decoder.drops_leading_space })
    }

    fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// How a tokenizer's vocabulary spells bytes.
#[derive(Default)]
struct TokenDecoder {
    /// GPT-2's byte level: every byte is one printable character.
    byte_level: bool,
    /// Strings to replace, such as `▁` by a space.
    replace: Vec<(String, String)>,
    /// A token such as `<0x0A>` is a byte.
    byte_fallback: bool,
    /// See [`TokenBytes::drops_leading_space`].
    drops_leading_space: bool,
}

impl TokenDecoder {
    /// From the `decoder` of a tokenizer.json. Supports decoders that work token by token, as those of all Llama-like models
    /// do. Refuses others, such as WordPiece and CTC.
    fn read(json: &Value) -> Result<Self> {
        let mut decoder = Self::default();
        let steps = match json["decoders"].as_array() {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(json),
        };
        for step in steps {
            let text = |key: &str| step[key].as_str().map(str::to_string);
            match step["type"].as_str() {
                Some("ByteLevel") => decoder.byte_level = true,
                Some("ByteFallback") => decoder.byte_fallback = true,
                Some("Fuse") => {}
                Some("Replace") if step["pattern"]["String"].is_string() => {
                    let from = step["pattern"]["String"].as_str().unwrap_or_default().to_string();
                    decoder.replace.push((from, text("content").unwrap_or_default()));
                }
                Some("Metaspace") => {
                    decoder.replace.push((text("replacement").unwrap_or_default(), " ".to_string()));
                    decoder.drops_leading_space = step["prepend_scheme"] != "never";
                }
                Some("Strip") if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => {
                    decoder.drops_leading_space = true;
                }
                _ => return Err(Error::invalid(format!("unsupported tokenizer: its decoder is {step}"))),
            }
        }
        Ok(decoder)
    }

    /// The bytes that a token of the vocabulary stands for.
    fn decode(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // An added token may have characters outside the alphabet: it spells itself.
            let bytes = token.chars().map(byte_of).collect::<Option<Vec<u8>>>();
            return bytes.unwrap_or_else(|| token.as_bytes().to_vec());
        }
        let token = self.replace.iter().fold(token.to_string(), |t, (from, to)| t.replace(from, to));
        let byte = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
        match byte.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) if self.byte_fallback => vec![byte],
            _ => token.into_bytes(),
        }
    }
}

/// The byte that a character of GPT-2's alphabet stands for. Printable Latin-1 characters stand for themselves; the other 68
/// bytes are U+0100 and up, in order.
pub(super) fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|&b| printable(b)),
        code => (0..=255u8).filter(|&b| !printable(b)).nth((code - 0x100) as usize),
    }
}
