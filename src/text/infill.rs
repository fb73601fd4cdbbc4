//! Fill in the middle: prompts of a prefix and a suffix, for models whose vocabulary has tokens for it.

use super::codec::TextCodec;
use crate::{Error, Result};

/// The tokens of a model family around prefix and suffix.
struct InfillTokens {
    prefix: &'static str,
    suffix: &'static str,
    /// Ends the prompt; `None` where the prefix comes last and ends it.
    middle: Option<&'static str>,
}

/// The families: Qwen2.5-Coder and CodeGemma, StarCoder and Granite, DeepSeek-Coder, Code Llama, Codestral.
const FAMILIES: [InfillTokens; 5] = [
    InfillTokens { prefix: "<|fim_prefix|>", suffix: "<|fim_suffix|>", middle: Some("<|fim_middle|>") },
    InfillTokens { prefix: "<fim_prefix>", suffix: "<fim_suffix>", middle: Some("<fim_middle>") },
    InfillTokens { prefix: "<｜fim▁begin｜>", suffix: "<｜fim▁hole｜>", middle: Some("<｜fim▁end｜>") },
    InfillTokens { prefix: "▁<PRE>", suffix: "▁<SUF>", middle: Some("▁<MID>") },
    InfillTokens { prefix: "[PREFIX]", suffix: "[SUFFIX]", middle: None },
];

impl TextCodec {
    /// Token ids of the prompt whose output belongs between `prefix` and `suffix`.
    ///
    /// # Errors
    /// `Invalid` on `suffix` if the vocabulary has no tokens for it.
    pub(crate) fn encode_infill(&self, prefix: &str, suffix: &str) -> Result<Vec<u32>> {
        let find = |family: &InfillTokens| {
            let middle = family.middle.map(|token| self.id_of(token));
            let whole = middle != Some(None);
            Some((self.id_of(family.prefix)?, self.id_of(family.suffix)?, middle.flatten())).filter(|_| whole)
        };
        let (before_prefix, before_suffix, end) = FAMILIES.iter().find_map(find).ok_or_else(|| {
            let message =
                "`suffix`: this model's vocabulary has no tokens to fill in the middle, so put the text into `prompt`";
            Error::invalid(message).param("suffix").code("unsupported_parameter")
        })?;
        let prefix = [vec![before_prefix], self.encode(prefix, false)?].concat();
        let suffix = [vec![before_suffix], self.encode(suffix, false)?].concat();
        let begin = if self.adds_bos()? { self.bos_token_id() } else { None };
        let parts = if end.is_some() { [prefix, suffix] } else { [suffix, prefix] };
        Ok(begin.into_iter().chain(parts.concat()).chain(end).collect())
    }
}
