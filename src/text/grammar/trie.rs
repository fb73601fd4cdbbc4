//! The tokenizer's trie, on which masks are computed.

use std::sync::Arc;

use llguidance::toktrie::{INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::text::codec::TextCodec;

/// The trie of a model's tokens, and its tokenizer.
pub(super) fn tok_env(codec: Arc<TextCodec>) -> TokEnv {
    let control = codec.control_token_ids();
    let word = |id: u32| {
        let mut bytes = codec.token_bytes(id).to_vec();
        if control.contains(&id) {
            // The marker keeps it out of text: a grammar names such a token as `<|im_end|>`.
            bytes.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
        bytes
    };
    let size = codec.vocab_size() as u32;
    let words: Vec<Vec<u8>> = (0..size).map(word).collect();
    let eos: Vec<u32> = codec.eos_token_ids().iter().copied().filter(|id| *id < size).collect();
    let mut trie = TokTrie::from(&TokRxInfo::new(size, eos.first().copied().unwrap_or(INVALID_TOKEN)), &words);
    if !eos.is_empty() {
        trie = trie.with_eos_tokens(&eos);
    }
    Arc::new(CodecEnv { codec, trie })
}

struct CodecEnv {
    codec: Arc<TextCodec>,
    trie: TokTrie,
}

impl TokenizerEnv for CodecEnv {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| match self.codec.encode(text, false) {
            // A text that the tokenizer normalises, or that spells a special token, has other bytes.
            Ok(ids) if self.trie.decode_raw(&ids) == text.as_bytes() => ids,
            _ => self.trie.greedy_tokenize(text.as_bytes()),
        })
    }

    /// Whether the tokens of forced text may be forced. A tokenizer that puts a space before every text has other tokens for text
    /// that continues an output.
    fn tokenize_is_canonical(&self) -> bool {
        !self.codec.drops_leading_space()
    }
}
