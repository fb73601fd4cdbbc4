//! From a record to tokens and a mask of those to train on.
//!
//! An answer follows exactly the tokens that the server makes from the same prompt. Only the tokens of the answer and the end
//! token that stops generation are trained on. The mask is made by position, never by token id: the id of the end token may
//! also pad, open or separate turns.

use super::Example;
use super::record::TrainingRecord;
use crate::text::codec::TextCodec;
use crate::text::messages::ChatPrompt;
use crate::{Error, Result};

/// The examples of a record: one, or one for each answer if the chat template changes earlier turns when a conversation
/// continues. With `inputs`, the loss covers prompts too.
///
/// # Errors
/// `Invalid`: the template rejects the messages, or writes an answer in another way than it opens one.
pub(super) fn examples(record: &TrainingRecord, codec: &TextCodec, inputs: bool) -> Result<Vec<Example>> {
    let mut examples = match record {
        TrainingRecord::Text(text) => {
            let mut tokens = codec.encode_prompt(text, true)?;
            append_end(&mut tokens, codec);
            vec![Example { trained: vec![true; tokens.len()], tokens }]
        }
        TrainingRecord::Pair { prompt, completion } => {
            let mut example = Example::default();
            let (prompt, answer) = prompt_and_answer(codec, prompt, &format!("{prompt}{completion}"), true)?;
            example.extend(&prompt, inputs);
            example.extend(&answer, true);
            vec![example]
        }
        TrainingRecord::Chat { chat, trained } => chat_examples(chat, trained, codec, inputs)?,
    };
    for example in &mut examples {
        // Nothing precedes the first token to predict it from.
        example.trained[0] = false;
    }
    Ok(examples)
}

/// The examples of a conversation. An answer continues the example of the answers before it as long as its prompt does.
fn chat_examples(chat: &ChatPrompt, trained: &[bool], codec: &TextCodec, inputs: bool) -> Result<Vec<Example>> {
    let mut examples: Vec<Example> = Vec::new();
    for turn in (0..trained.len()).filter(|&turn| trained[turn]) {
        let opened = rendered(codec, chat.cut(turn, true))?;
        let written = rendered(codec, chat.cut(turn + 1, false))?;
        if !written.starts_with(&opened) {
            return Err(Error::invalid(format!(
                "`messages[{turn}]`: the model's chat template opens an answer in one way and writes it in another, \
                 so training would not match serving; use prompt and completion instead"
            )));
        }
        let (prompt, answer) = prompt_and_answer(codec, &opened, &written, false)?;
        let seen = match examples.last() {
            Some(last) if prompt.starts_with(&last.tokens) => last.tokens.len(),
            _ => {
                examples.push(Example::default());
                0
            }
        };
        let example = examples.last_mut().expect("one was pushed if there was none");
        example.extend(&prompt[seen..], inputs);
        example.extend(&answer, true);
    }
    Ok(examples)
}

/// The text of a prompt as the server renders it.
fn rendered(codec: &TextCodec, chat: ChatPrompt) -> Result<String> {
    codec.render_chat(&codec.fit_tools(chat))
}

/// The server's tokens for `prompt`, and the tokens that complete it to `whole`, with an end token. If the tokeniser would merge
/// text across the end of the prompt, the answer is tokenised on its own.
fn prompt_and_answer(codec: &TextCodec, prompt: &str, whole: &str, special: bool) -> Result<(Vec<u32>, Vec<u32>)> {
    let ids = codec.encode_prompt(prompt, special)?;
    let mut all = codec.encode(whole, special)?;
    let mut answer =
        if all.starts_with(&ids) { all.split_off(ids.len()) } else { codec.encode(&whole[prompt.len()..], false)? };
    append_end(&mut answer, codec);
    Ok((ids, answer))
}

/// Appends the model's end token, unless there is one already. A template may have written a newline after it.
fn append_end(tokens: &mut Vec<u32>, codec: &TextCodec) {
    let ends = codec.eos_token_ids();
    let last = tokens.iter().rev().find(|&&id| !codec.token_string(id).trim().is_empty());
    if !last.is_some_and(|id| ends.contains(id)) {
        tokens.extend(ends.first());
    }
}

impl Example {
    fn extend(&mut self, tokens: &[u32], trained: bool) {
        self.tokens.extend_from_slice(tokens);
        self.trained.resize(self.tokens.len(), trained);
    }
}
