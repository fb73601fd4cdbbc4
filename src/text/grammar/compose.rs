//! Grammars made of others: each plain grammar is a grammar of its own, and a rule of Lark joins them.

use std::collections::HashSet;

use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::regex_to_lark;

use super::{Grammar, MAX_SCHEMA_BYTES, check_size, lark_string};
use crate::Result;
use crate::text::codec::TextCodec;
use crate::text::reasoning::ReasoningFormat;

impl Grammar {
    /// This text.
    pub(crate) fn literal(text: impl Into<String>) -> Self {
        Self::Choice(vec![text.into()])
    }

    /// This grammar for the text after a model's thinking, which is free. `starts_in_reasoning`: the prompt has opened the
    /// thinking. If not, the model may open it.
    pub fn after_reasoning(self, format: ReasoningFormat, starts_in_reasoning: bool) -> Self {
        let line_ends = Self::Regex("\n{0,2}".into());
        if starts_in_reasoning {
            return Self::Sequence(vec![Self::Until(format.close.into()), line_ends, self]);
        }
        let open = Self::Marker(format.open.into());
        let thinking = Self::Sequence(vec![open, Self::Until(format.close.into()), line_ends]);
        Self::Sequence(vec![Self::Optional(Box::new(thinking)), self])
    }

    /// The parts of this grammar that have a place in the request.
    pub(super) fn placed(&self) -> Vec<(&str, &Grammar)> {
        match self {
            Self::Placed { path, grammar } => vec![(path.as_str(), &**grammar)],
            Self::Sequence(parts) | Self::AnyOf(parts) => parts.iter().flat_map(Self::placed).collect(),
            Self::Optional(item) | Self::Repeated(item) => item.placed(),
            _ => Vec::new(),
        }
    }
}

/// Translates a grammar that is made of others.
pub(super) fn compose(grammar: &Grammar, codec: &TextCodec) -> Result<TopLevelGrammar> {
    let mut composer =
        Composer { codec, control: codec.control_token_ids(), rules: String::new(), parts: Vec::new(), bytes: 0 };
    let start = composer.expression(grammar)?;
    let lark = format!("start: {start}\n{}TEXT: /(.|\\n)*/\n", composer.rules);
    let mut whole = TopLevelGrammar::from_lark(lark);
    whole.grammars.append(&mut composer.parts);
    Ok(whole)
}

struct Composer<'a> {
    codec: &'a TextCodec,
    /// The ids that are no text.
    control: HashSet<u32>,
    /// Further rules of Lark.
    rules: String,
    /// Plain grammars, named by their position.
    parts: Vec<GrammarWithLexer>,
    /// Size of the plain grammars.
    bytes: usize,
}

impl Composer<'_> {
    /// The expression of Lark for a grammar.
    fn expression(&mut self, grammar: &Grammar) -> Result<String> {
        Ok(match grammar {
            Grammar::Sequence(parts) => format!("({})", self.expressions(parts)?.join(" ")),
            Grammar::AnyOf(parts) => format!("({})", self.expressions(parts)?.join(" | ")),
            Grammar::Optional(item) => format!("({})?", self.expression(item)?),
            Grammar::Repeated(item) => format!("({})*", self.expression(item)?),
            Grammar::Placed { grammar, .. } => self.expression(grammar)?,
            Grammar::Marker(marker) => self.token(marker).unwrap_or_else(|| lark_string(marker)),
            Grammar::Until(marker) => match self.token(marker) {
                Some(token) => format!("TEXT {token}"),
                None => {
                    let rule = format!("until{}", self.rules.len());
                    self.rules.push_str(&format!("{rule}[lazy]: TEXT {}\n", lark_string(marker)));
                    rule
                }
            },
            Grammar::AnyText => "TEXT".into(),
            Grammar::TextUnlike(regex) => {
                let rule = format!("TEXT_{}", self.rules.len());
                self.rules.push_str(&format!("{rule}: TEXT & ~/{}/\n", regex_to_lark(regex, "")));
                rule
            }
            Grammar::Choice(choices) if choices.len() == 1 => lark_string(&choices[0]),
            plain => {
                let name = format!("part{}", self.parts.len());
                for part in plain.to_llguidance(self.codec)?.grammars {
                    let lark = part.lark_grammar.as_ref().map_or(0, String::len);
                    self.bytes += lark + part.json_schema.as_ref().map_or(0, |schema| schema.to_string().len());
                    check_size(self.bytes, MAX_SCHEMA_BYTES)?;
                    self.parts.push(GrammarWithLexer { name: Some(name.clone()), ..part });
                }
                format!("@{name}")
            }
        })
    }

    fn expressions(&mut self, parts: &[Grammar]) -> Result<Vec<String>> {
        parts.iter().map(|part| self.expression(part)).collect()
    }

    /// The token of a marker, where it is one that text does not contain.
    fn token(&self, marker: &str) -> Option<String> {
        let id = self.codec.id_of(marker).filter(|id| self.control.contains(id));
        id.map(|id| format!("<[{id}]>"))
    }
}
