//! Log-probabilities in OpenAI's and vLLM's forms.

use serde_json::{Map, Value, json};

use super::{Endpoint, ReplyContext};
use crate::engine::request::Logprobs;
use crate::server::stream::OutputToken;

impl ReplyContext {
    /// `logprobs` of a choice: null if the request does not ask for it.
    pub(super) fn logprobs_of(&self, tokens: &[OutputToken]) -> Value {
        let Some(alternatives) = self.logprobs else { return Value::Null };
        match self.endpoint {
            Endpoint::Completion => self.completion_logprobs(tokens, alternatives),
            Endpoint::Chat => json!({"content": self.token_logprobs(tokens, alternatives), "refusal": null}),
        }
    }

    /// Four parallel lists. Each entry of `top_logprobs` has the alternatives and the token itself.
    fn completion_logprobs(&self, tokens: &[OutputToken], alternatives: usize) -> Value {
        let top = tokens.iter().map(|token| match &token.logprobs {
            None => Value::Null,
            Some(logprobs) => self.by_token(token.id, logprobs, alternatives),
        });
        json!({
            "top_logprobs": top.collect::<Vec<_>>(),
            "tokens": tokens.iter().map(|t| self.token_name(t.id)).collect::<Vec<_>>(),
            "token_logprobs":
                tokens.iter().map(|t| t.logprobs.as_ref().map_or(Value::Null, |l| finite(l.logprob))).collect::<Value>(),
            "text_offset": tokens.iter().map(|t| t.offset).collect::<Vec<_>>(),
        })
    }

    /// Log-probabilities by the names of the tokens. Tokens that read alike have an entry each: the first has the name, and the
    /// token itself comes before its alternatives in this.
    fn by_token(&self, id: u32, logprobs: &Logprobs, alternatives: usize) -> Value {
        let own = self.token_name(id);
        let mut entries = Map::new();
        for &(other, logprob) in shown(logprobs, alternatives).iter().chain([&(id, logprobs.logprob)]) {
            let mut name = self.token_name(other);
            if other != id && (name == own || entries.contains_key(&name)) {
                name = id_name(other);
            }
            entries.entry(name).or_insert_with(|| finite(logprob));
        }
        entries.into()
    }

    /// An object for each token, with the alternatives.
    pub(in crate::server) fn token_logprobs(&self, tokens: &[OutputToken], alternatives: usize) -> Vec<Value> {
        let entry = |id: u32, logprob: f32| {
            json!({
                "token": self.token_name(id),
                "logprob": finite(logprob),
                "bytes": self.codec.token_bytes(id),
            })
        };
        let mut content = Vec::with_capacity(tokens.len());
        for token in tokens {
            let Some(logprobs) = &token.logprobs else { continue };
            let mut item = entry(token.id, logprobs.logprob);
            let top = shown(logprobs, alternatives).iter();
            item["top_logprobs"] = top.map(|&(id, logprob)| entry(id, logprob)).collect::<Vec<_>>().into();
            content.push(item);
        }
        content
    }

    /// vLLM's `prompt_logprobs`: for each token an object by id, with the token itself and the alternatives.
    pub(super) fn prompt_logprobs(&self, ids: &[u32], logprobs: &[Option<Logprobs>], alternatives: usize) -> Value {
        let entry = |id: u32, logprob: f32, rank: usize| json!({"logprob": finite(logprob), "rank": rank, "decoded_token": self.codec.token_string(id)});
        let token = |(id, logprobs): (&u32, &Option<Logprobs>)| {
            let Some(logprobs) = logprobs else { return Value::Null };
            let mut entries = Map::new();
            entries.insert(id.to_string(), entry(*id, logprobs.logprob, logprobs.rank as usize));
            for (rank, (other, logprob)) in logprobs.top.iter().take(alternatives).enumerate() {
                entries.entry(other.to_string()).or_insert_with(|| entry(*other, *logprob, rank + 1));
            }
            entries.into()
        };
        ids.iter().zip(logprobs).map(token).collect()
    }

    /// The name of a token: its text, or its bytes if they are a part of a character, or its id if the request wants that.
    fn token_name(&self, id: u32) -> String {
        if self.options.tokens_as_ids {
            return id_name(id);
        }
        let bytes = self.codec.token_bytes(id);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => format!("bytes:{}", bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>()),
        }
    }
}

/// The alternatives that are reported: the chosen ids, or else the likeliest.
fn shown(logprobs: &Logprobs, alternatives: usize) -> &[(u32, f32)] {
    match &logprobs.chosen[..] {
        [] => &logprobs.top[..alternatives.min(logprobs.top.len())],
        chosen => chosen,
    }
}

fn id_name(id: u32) -> String {
    format!("token_id:{id}")
}

/// JSON has no infinity: OpenAI and vLLM write -9999 for a token that cannot come.
pub(in crate::server) fn finite(logprob: f32) -> Value {
    // The shortest decimal that is this f32, not the 17 digits of its f64.
    let logprob = logprob.max(-9999.0);
    logprob.to_string().parse::<f64>().unwrap_or(-9999.0).into()
}
