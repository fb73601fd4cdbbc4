//! Text to tokens and back: tokenizer, chat template, streaming decoder.
//!
//! Encoding is the `tokenizers` crate's, so ids are Hugging Face's by construction. Decoding is ours: every id stands
//! for a fixed run of bytes, so that a stream needs O(1) a token, never gives out half a character, and adds up to
//! exactly what decoding all ids at once gives.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::template::ChatTemplate;
use super::tokenizer::{self, Loaded};
use crate::hub::{ModelFiles, ModelFormat};
use crate::{Error, Result};

/// A model's tokenizer and chat template.
pub struct TextCodec {
    /// Text to ids.
    tokenizer: Tokenizer,
    /// Ids to text.
    pieces: Pieces,
    /// See [`TextCodec::bos_token_id`].
    bos: Option<u32>,
    /// See [`TextCodec::eos_token_ids`].
    eos: Vec<u32>,
    /// Absent for base models.
    template: Option<ChatTemplate>,
}

impl TextCodec {
    /// Reads the tokenizer and the chat template of a model.
    ///
    /// # Errors
    /// `Invalid`, naming the file: no tokenizer, or one that cannot be reproduced exactly.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        let Loaded { tokenizer, bos, eos, special, template } = match &files.format {
            ModelFormat::Gguf(path) => tokenizer::from_gguf(path)?,
            ModelFormat::HuggingFace(dir) => tokenizer::from_directory(dir)?,
            ModelFormat::Shape(config) => tokenizer::for_shape(config)?,
        };
        let pieces = Pieces::new(&tokenizer)?;
        let template = template.map(|source| ChatTemplate::new(&source, special)).transpose()?;
        Ok(Self { tokenizer, pieces, bos, eos, template })
    }

    /// Token ids of `text`, with the model's own special tokens around it if asked (as Hugging Face's). Special tokens
    /// written out in the text are recognised.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|e| Error::invalid(format!("the text cannot be tokenized: {e}")))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Token ids of a prompt: `encode`, where an empty text begins where every text begins.
    ///
    /// # Errors
    /// `Invalid` on `prompt` if nothing is left to begin with.
    pub fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let mut ids = self.encode(text, add_special_tokens)?;
        if ids.is_empty() {
            ids.extend(self.bos);
        }
        if ids.is_empty() {
            return Err(Error::invalid("the prompt is empty: this model needs at least one token").param("prompt"));
        }
        Ok(ids)
    }

    /// Text of `ids`; broken UTF-8 becomes U+FFFD, ids that stand for nothing are left out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let mut stream = self.stream(skip_special_tokens);
        let mut text = String::new();
        for &id in ids {
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish()?);
        Ok(text)
    }

    /// A prompt from chat messages through the model's template (`add_generation_prompt` opens the answer). Tokenize it
    /// without adding special tokens: the template has them.
    ///
    /// # Errors
    /// `Invalid` if the model has no template, or the template refuses the messages.
    pub fn apply_chat_template(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::invalid("this model has no chat template: use /v1/completions").code("no_chat_template")
        })?;
        template.render(messages, add_generation_prompt)
    }

    /// The tokenizer as JSON and the template's source: what decides the tokens of a prompt.
    pub fn sources(&self) -> Result<(String, Option<String>)> {
        let tokenizer = self.tokenizer.to_string(false).map_err(|e| Error::internal(e.to_string()))?;
        Ok((tokenizer, self.template.as_ref().map(ChatTemplate::source).transpose()?))
    }

    /// A decoder for one sequence that never gives out half a character. `skip_special_tokens` as in `decode`.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream<'_> {
        TextStream { pieces: &self.pieces, skip_special_tokens, pending: Vec::new(), at_start: true }
    }

    /// The bytes that an id stands for, not always whole characters; none for an id that is not in the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.pieces.bytes(id)
    }

    /// [`TextCodec::token_bytes`] as text, broken UTF-8 as U+FFFD.
    pub fn token_string(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// The id of a token as the vocabulary spells it, such as `<|im_end|>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// Begins a sequence, where the model has such a token (`encode` adds it only if the model does).
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// Ids that end a sequence.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Number of ids: one more than the highest. The model's embedding may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.pieces.special.len()
    }
}

/// See [`TextCodec::stream`].
pub struct TextStream<'a> {
    /// Ids to bytes.
    pieces: &'a Pieces,
    /// Whether special tokens are left out.
    skip_special_tokens: bool,
    /// The beginning of a character; at most three bytes between calls.
    pending: Vec<u8>,
    /// Nothing came yet: a leading space may have to go.
    at_start: bool,
}

impl TextStream<'_> {
    /// The text that this id completes; empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> Result<String> {
        let mut bytes = self.pieces.bytes(id);
        if bytes.is_empty() || self.skip_special_tokens && self.pieces.special[id as usize] {
            return Ok(String::new());
        }
        if std::mem::take(&mut self.at_start) && self.pieces.drops_leading_space {
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

    /// What is left at the end, broken UTF-8 as U+FFFD.
    pub fn finish(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned())
    }
}

/// The bytes of every id, in one allocation.
struct Pieces {
    /// All of them, in the order of the ids.
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<u32>,
    /// Which are special.
    special: Vec<bool>,
    /// SentencePiece puts a space before the text; decoding takes it off again.
    drops_leading_space: bool,
}

impl Pieces {
    fn new(tokenizer: &Tokenizer) -> Result<Self> {
        let decoder = serde_json::to_value(tokenizer.get_decoder()).map_err(|e| Error::internal(e.to_string()))?;
        let decoder = Decoder::read(&decoder)?;
        let vocab = tokenizer.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id as usize + 1);
        if size > 1 << 24 {
            return Err(Error::invalid(format!(
                "the tokenizer's highest id is {}: no vocabulary is that large",
                size - 1
            )));
        }
        let mut tokens = vec![""; size];
        for (token, &id) in &vocab {
            tokens[id as usize] = token;
        }
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(size));
        for token in tokens {
            bytes.extend(decoder.bytes(token));
            ends.push(bytes.len() as u32);
        }
        let mut special = vec![false; size];
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            special[id as usize] = token.special;
        }
        Ok(Self { bytes, ends, special, drops_leading_space: decoder.drops_leading_space })
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

/// How a tokenizer spells bytes.
#[derive(Default)]
struct Decoder {
    /// GPT-2's: every byte is one printable character.
    byte_level: bool,
    /// Spelling of something else, such as `▁` for a space.
    replace: Vec<(String, String)>,
    /// `<0x0A>` is a byte.
    byte_fallback: bool,
    /// See [`Pieces::drops_leading_space`].
    drops_leading_space: bool,
}

impl Decoder {
    /// From the `decoder` of a tokenizer.json. Everything that works token by token, as all decoders of Llama-like
    /// models do; others (WordPiece, CTC) are refused.
    fn read(form: &Value) -> Result<Self> {
        let mut decoder = Self::default();
        let steps = match form["decoders"].as_array() {
            Some(steps) => steps.as_slice(),
            None => std::slice::from_ref(form),
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
                _ => return Err(Error::invalid(format!("a tokenizer with decoder {step} is not supported"))),
            }
        }
        Ok(decoder)
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        if self.byte_level {
            // A token with a character outside the alphabet (an added one) is itself.
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

/// GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes are U+0100 and up, in order.
pub(super) fn byte_of(c: char) -> Option<u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    match u32::from(c) {
        code @ 0..=0xFF => Some(code as u8).filter(|&b| printable(b)),
        code => (0..=255u8).filter(|&b| !printable(b)).nth((code - 0x100) as usize),
    }
}
