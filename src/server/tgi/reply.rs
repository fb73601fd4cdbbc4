//! Replies in TGI's form: an object with all text, or an event for each token.

use axum::response::sse::Event as SseEvent;
use serde_json::{Value, json};

use super::input::GenerateOptions;
use crate::engine::request::{FinishReason, Logprobs};
use crate::server::generate::ReplyFormat;
use crate::server::response::{CompletionOutput, ReplyContext, UsageInfo, finite};
use crate::server::stream::{FinishDetails, OutputDelta, OutputToken, StopReason};
use crate::{Error, Result};

/// Writes the reply to one request.
pub(super) struct GenerateFormat {
    context: ReplyContext,
    options: GenerateOptions,
    /// The text of a stream so far.
    text: TokenTexts,
    /// The last token of a stream. It waits for the next one, because the event of the last token has the whole text, and because
    /// the text of a token ends where the next one's begins.
    held: Option<OutputToken>,
    /// Events sent.
    sent: usize,
}

/// Cuts a text into the texts of its tokens. Joined, they are the text.
#[derive(Debug, Default)]
struct TokenTexts {
    text: String,
    /// Bytes of `text` that have been cut off.
    cut: usize,
}

impl TokenTexts {
    /// The next text of so many characters, or to the end.
    fn next(&mut self, characters: Option<usize>) -> String {
        let rest = &self.text[self.cut..];
        let end = characters.and_then(|n| rest.char_indices().nth(n)).map_or(rest.len(), |(at, _)| at);
        self.cut += end;
        rest[..end].to_owned()
    }

    /// The texts of all tokens.
    fn all(text: &str, tokens: &[OutputToken]) -> Vec<String> {
        let mut texts = Self { text: text.to_owned(), cut: 0 };
        let ends = tokens.iter().skip(1).map(|token| Some(token.offset)).chain([None]);
        let next = |(token, end): (&OutputToken, Option<usize>)| texts.next(end.map(|end| end - token.offset));
        tokens.iter().zip(ends).map(next).collect()
    }
}

/// TGI's `finish_reason`.
fn finish_reason(finish: &FinishDetails) -> &'static str {
    match (finish.reason, &finish.stop) {
        (FinishReason::Length, _) => "length",
        (FinishReason::Stop, Some(StopReason::Text(_))) => "stop_sequence",
        (FinishReason::Stop, _) => "eos_token",
    }
}

impl GenerateFormat {
    /// A writer for the reply to one request.
    pub(super) fn new(context: ReplyContext, options: GenerateOptions) -> Self {
        Self { context, options, text: TokenTexts::default(), held: None, sent: 0 }
    }

    fn full_text(&self, text: &str) -> String {
        format!("{}{text}", self.options.full_text_of.as_deref().unwrap_or_default())
    }

    /// A token, with LoRAX's alternatives.
    fn token(&self, id: u32, text: &str, logprobs: Option<&Logprobs>) -> Value {
        let codec = &self.context.codec;
        let mut token = json!({
            "id": id,
            "text": text,
            "logprob": logprobs.map_or(Value::Null, |logprobs| finite(logprobs.logprob)),
            "special": codec.is_special(id),
        });
        if let Some(alternatives) = self.options.alternatives {
            let alternative = |&(id, logprob): &(u32, f32)| json!({"id": id, "text": codec.token_string(id), "logprob": finite(logprob)});
            let top = logprobs.map_or(&[][..], |logprobs| &logprobs.top);
            token["alternative_tokens"] = top.iter().take(alternatives).map(alternative).collect();
        }
        token
    }

    /// TGI's alternatives of a token, if asked for.
    fn top_tokens(&self, logprobs: Option<&Logprobs>) -> Option<Value> {
        let codec = &self.context.codec;
        let top = logprobs.map_or(&[][..], |logprobs| &logprobs.top);
        let token = |&(id, logprob): &(u32, f32)| json!({"id": id, "text": codec.token_string(id), "logprob": finite(logprob), "special": codec.is_special(id)});
        Some(top.iter().take(self.options.top_tokens?).map(token).collect())
    }

    /// One output: its text, and its details.
    fn sequence(&self, output: CompletionOutput) -> Result<(String, Value)> {
        let finish = output.finish.ok_or_else(|| Error::internal("an output has no end"))?;
        let texts = TokenTexts::all(&output.text, &output.tokens);
        let end = finish.end_token.map(|id| (id, self.context.codec.token_string(id), finish.end_logprobs.as_ref()));
        let tokens = output.tokens.iter().zip(texts).map(|(token, text)| (token.id, text, token.logprobs.as_ref()));
        let all: Vec<_> = tokens.chain(end).collect();
        let mut details = json!({
            "finish_reason": finish_reason(&finish),
            "prompt_tokens": self.context.prompt_tokens(),
            "input_length": self.context.prompt_tokens(),
            "generated_tokens": finish.completion_tokens,
            "seed": self.options.seed,
            "prefill": self.prefill(&output.prompt),
            "tokens": all.iter().map(|(id, text, logprobs)| self.token(*id, text, *logprobs)).collect::<Value>(),
        });
        if self.options.top_tokens.is_some() {
            details["top_tokens"] = all.iter().filter_map(|(_, _, logprobs)| self.top_tokens(*logprobs)).collect();
        }
        Ok((self.full_text(&output.text), details))
    }

    /// The prompt's tokens; empty unless asked for.
    fn prefill(&self, logprobs: &[Option<Logprobs>]) -> Value {
        let Some(ids) = self.context.prompts.first().filter(|_| self.options.prefill) else { return json!([]) };
        let token = |(id, logprobs): (&u32, &Option<Logprobs>)| {
            let logprob = logprobs.as_ref().map_or(Value::Null, |logprobs| finite(logprobs.logprob));
            json!({"id": id, "text": self.context.codec.token_string(*id), "logprob": logprob})
        };
        ids.iter().zip(logprobs).map(token).collect()
    }

    /// The event of a token. `last`: with the whole text and the details.
    fn event(&mut self, token: &OutputToken, text: &str, last: Option<&FinishDetails>) -> SseEvent {
        self.sent += 1;
        let mut event = json!({
            "index": self.sent,
            "token": self.token(token.id, text, token.logprobs.as_ref()),
            "generated_text": null,
            "details": null,
        });
        if let Some(top) = self.top_tokens(token.logprobs.as_ref()) {
            event["top_tokens"] = top;
        }
        if let Some(finish) = last {
            event["generated_text"] = self.full_text(&self.text.text).into();
            event["details"] = json!({
                "finish_reason": finish_reason(finish),
                "generated_tokens": finish.completion_tokens,
                "prompt_tokens": self.context.prompt_tokens(),
                "input_length": self.context.prompt_tokens(),
                "seed": self.options.seed,
                "adapter": self.context.adapter,
                "adapter_generation": self.context.generation,
            });
        }
        SseEvent::default().data(event.to_string())
    }

    /// The event of the token held back. `next`: the token after it.
    fn release(&mut self, next: Option<&OutputToken>, last: Option<&FinishDetails>) -> Option<SseEvent> {
        let token = self.held.take()?;
        let text = self.text.next(next.map(|next| next.offset - token.offset));
        Some(self.event(&token, &text, last))
    }
}

impl ReplyFormat for GenerateFormat {
    fn whole(&mut self, mut outputs: Vec<CompletionOutput>, _usage: &UsageInfo) -> Result<Value> {
        outputs.sort_by(|a, b| b.score().total_cmp(&a.score()));
        let mut sequences =
            outputs.into_iter().map(|output| self.sequence(output)).collect::<Result<Vec<_>>>()?.into_iter();
        let (text, mut details) = sequences.next().ok_or_else(|| Error::internal("a reply has no output"))?;
        let others = sequences.map(|(text, mut details)| {
            details["generated_text"] = text.into();
            details
        });
        let others: Vec<Value> = others.collect();
        let mut reply = json!({
            "generated_text": text,
            "adapter": self.context.adapter,
            "adapter_generation": self.context.generation,
        });
        if self.options.details {
            if !others.is_empty() {
                details["best_of_sequences"] = others.into();
            }
            reply["details"] = details;
        }
        Ok(if self.options.in_array { json!([reply]) } else { reply })
    }

    fn opening(&mut self, _choices: usize) -> Vec<SseEvent> {
        Vec::new()
    }

    fn delta(&mut self, _index: usize, delta: OutputDelta) -> Vec<SseEvent> {
        let mut events = Vec::new();
        self.text.text.push_str(&delta.text);
        for token in delta.tokens {
            events.extend(self.release(Some(&token), None));
            self.held = Some(token);
        }
        let Some(finish) = delta.finish else { return events };
        match finish.end_token {
            None => events.extend(self.release(None, Some(&finish))),
            Some(id) => {
                events.extend(self.release(None, None));
                let end = OutputToken { id, offset: 0, logprobs: finish.end_logprobs.clone() };
                let text = self.context.codec.token_string(id);
                events.push(self.event(&end, &text, Some(&finish)));
            }
        }
        events
    }

    fn ending(&mut self, _usage: &UsageInfo) -> Vec<SseEvent> {
        Vec::new()
    }

    fn failure(&mut self, error: &Error, request_id: &str) -> Vec<SseEvent> {
        vec![SseEvent::default().data(super::error(error, request_id).1.to_string())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_tokens_join_to_the_text() {
        let token = |offset| OutputToken { id: 0, offset, logprobs: None };
        // The second token is the first half of `é`, and the last one goes on behind the end.
        let tokens = [token(0), token(2), token(2), token(3)];
        assert_eq!(TokenTexts::all("abéc", &tokens), ["ab", "", "é", "c"]);
        assert_eq!(TokenTexts::all("", &[token(0)]), [""]);
        assert_eq!(TokenTexts::all("ab", &[]), Vec::<String>::new());
    }

    #[test]
    fn a_stop_string_cuts_tokens() {
        let token = |offset| OutputToken { id: 0, offset, logprobs: None };
        assert_eq!(TokenTexts::all("a", &[token(0), token(1), token(3)]), ["a", "", ""]);
    }
}
