//! Cuts prompts that are too long, as transformers and vLLM do.

use super::codec::TextCodec;
use crate::{Error, Result};

/// The end of a prompt from which tokens are taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TruncationSide {
    /// The beginning: the last tokens stay.
    Left,
    /// The end: the first tokens stay.
    Right,
}

/// How long a prompt may be, and how a longer one is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Truncation {
    /// Number of tokens that stay; at least 1.
    pub(crate) tokens: usize,
    /// Where a longer prompt is cut.
    pub(crate) side: TruncationSide,
}

impl Truncation {
    /// The part of `ids` that stays.
    pub(crate) fn cut(self, ids: &[u32]) -> &[u32] {
        let excess = ids.len().saturating_sub(self.tokens);
        match self.side {
            TruncationSide::Left => &ids[excess..],
            TruncationSide::Right => &ids[..ids.len() - excess],
        }
    }

    /// As [`TextCodec::encode_prompt`], then cut. The special tokens that the tokenizer puts around the text stay and count.
    /// Errors: nothing but special tokens would stay.
    pub(crate) fn encode_prompt(self, codec: &TextCodec, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = codec.encode_prompt(text, add_special_tokens)?;
        if ids.len() <= self.tokens {
            return Ok(ids);
        }
        let plain = if add_special_tokens { codec.encode(text, false)? } else { ids.clone() };
        self.cut_between(&ids, &plain)
    }

    /// Cuts `plain`, which stands between special tokens in `ids`.
    fn cut_between(self, ids: &[u32], plain: &[u32]) -> Result<Vec<u32>> {
        let special = ids.len().saturating_sub(plain.len());
        if self.tokens <= special {
            let message = format!(
                "`truncate_prompt_tokens` must be above {special}, the number of special tokens around the text, not {}",
                self.tokens
            );
            return Err(Error::invalid(message).param("truncate_prompt_tokens").code("invalid_value"));
        }
        let before = (0..=special)
            .find(|&before| ids[before..].starts_with(plain))
            .ok_or_else(|| Error::internal("the tokenizer splits a text differently beside special tokens"))?;
        let (head, tail) = (&ids[..before], &ids[before + plain.len()..]);
        let part = Self { tokens: self.tokens - special, ..self }.cut(plain);
        Ok([head, part, tail].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_cut_on_one_side() {
        let cut = |tokens, side| Truncation { tokens, side }.cut(&[1, 2, 3]).to_vec();
        assert_eq!(cut(2, TruncationSide::Left), [2, 3]);
        assert_eq!(cut(2, TruncationSide::Right), [1, 2]);
        assert_eq!(cut(3, TruncationSide::Left), [1, 2, 3]);
        assert_eq!(cut(9, TruncationSide::Right), [1, 2, 3]);
    }

    #[test]
    fn special_tokens_stay() {
        let cut = |tokens, side, ids: &[u32]| Truncation { tokens, side }.cut_between(ids, &[5, 6, 7]);
        assert_eq!(cut(3, TruncationSide::Left, &[1, 5, 6, 7]).unwrap(), [1, 6, 7]);
        assert_eq!(cut(3, TruncationSide::Right, &[1, 5, 6, 7, 2]).unwrap(), [1, 5, 2]);
        assert_eq!(cut(2, TruncationSide::Left, &[5, 6, 7]).unwrap(), [6, 7]);
        let error = cut(2, TruncationSide::Left, &[1, 5, 6, 7, 2]).unwrap_err();
        assert!(error.message.contains("above 2"), "{error}");
    }
}
