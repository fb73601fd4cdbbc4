//! Turns the engine's events into text: whole characters only, cut at stop strings, each token with its text.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tracing::Instrument;

use super::metrics::SequenceMetrics;
use super::params::TextOptions;
use super::stop::StopMatcher;
use crate::engine::request::{Event, FinishReason, Logprobs};
use crate::text::codec::TextCodec;
use crate::text::reasoning::ReasoningFormat;
use crate::text::tools::{OutputParser, OutputPart, ToolFormat, Tools};
use crate::{Error, Result};

/// A generated or echoed token, and where its text begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct OutputToken {
    /// Its id.
    pub(super) id: u32,
    /// Characters of text before it.
    pub(super) offset: usize,
    /// Present if asked for, except for the first token of a prompt.
    pub(super) logprobs: Option<Logprobs>,
}

/// The stop string or stop id that ended a sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StopReason {
    /// A stop string of the request.
    Text(String),
    /// An id of `stop_token_ids`.
    Token(u32),
}

/// How a sequence ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FinishDetails {
    /// Its finish reason.
    pub(super) reason: FinishReason,
    /// The stop string or id, if one ended it.
    pub(super) stop: Option<StopReason>,
    /// The token that ended it, whose text is not part of the output.
    pub(super) end_token: Option<u32>,
    /// The log-probabilities of that token, if asked for.
    pub(super) end_logprobs: Option<Logprobs>,
    /// Tokens generated, including those behind a stop string and the token that ended the sequence.
    pub(super) completion_tokens: usize,
    /// Those of them that belong to the thinking.
    pub(super) reasoning_tokens: usize,
    /// Prompt tokens found in the prefix cache.
    pub(super) cached_tokens: usize,
}

/// The new part of one sequence's output.
#[derive(Debug, Default, PartialEq)]
pub(super) struct OutputDelta {
    /// Log-probabilities of the prompt, in the first delta, if asked for.
    pub(super) prompt: Option<Vec<Option<Logprobs>>>,
    /// Text to append.
    pub(super) text: String,
    /// The same text as parts of an assistant's message, as far as they are certain. Empty without an [`AnswerFormat`].
    pub(super) parts: Vec<OutputPart>,
    /// Tokens generated so far.
    pub(super) generated: usize,
    /// The tokens whose text is now complete in the output.
    pub(super) tokens: Vec<OutputToken>,
    /// Set in the last delta.
    pub(super) finish: Option<FinishDetails>,
}

/// A sequence that the engine has admitted.
pub(super) struct RunningSequence {
    /// The engine's events for it.
    pub(super) events: UnboundedReceiver<Event>,
    /// Its clocks and counters.
    pub(super) metrics: SequenceMetrics,
}

impl OutputDelta {
    /// Whether a client can see anything of it.
    fn is_visible(&self) -> bool {
        self.prompt.is_some()
            || !self.text.is_empty()
            || !self.parts.is_empty()
            || !self.tokens.is_empty()
            || self.finish.is_some()
    }
}

/// How an assistant's message is found in an output.
#[derive(Debug, Clone)]
pub(super) struct AnswerFormat {
    /// The tools that may be called, and the form of the calls.
    pub(super) tools: Option<(ToolFormat, Arc<Tools>)>,
    /// The form of the thinking.
    pub(super) reasoning: Option<ReasoningFormat>,
    /// The prompt has opened the thinking.
    pub(super) starts_in_reasoning: bool,
}

impl AnswerFormat {
    fn parser(&self) -> OutputParser {
        let tools = self.tools.as_ref().map(|(format, tools)| (*format, &**tools));
        OutputParser::new(tools, self.reasoning, self.starts_in_reasoning)
    }
}

/// How the tokens of a request's sequences become an output.
#[derive(Debug, Clone)]
pub(super) struct OutputOptions {
    /// How tokens become text.
    pub(super) text: TextOptions,
    /// Stop strings are ignored in the text of the first `min_tokens` tokens.
    pub(super) min_tokens: usize,
    /// For chats: how the text becomes a message.
    pub(super) answer: Option<AnswerFormat>,
}

/// The output deltas of sequences as they come, each with the index of its sequence. Dropping the stream drops the
/// receivers, which tells the engine to cancel.
pub(super) fn output_deltas(
    codec: &Arc<TextCodec>,
    options: &OutputOptions,
    sequences: Vec<RunningSequence>,
) -> UnboundedReceiverStream<(usize, Result<OutputDelta>)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (index, sequence) in sequences.into_iter().enumerate() {
        let (codec, sender) = (codec.clone(), sender.clone());
        let TextOptions { stops, include_stop, skip_special_tokens } = options.text.clone();
        let mut assembler = Assembler::new(StopMatcher::new(stops, include_stop), options.min_tokens);
        assembler.message = options.answer.as_ref().map(MessageAssembler::new);
        let follow = async move {
            tokio::select! {
                () = sender.closed() => {}
                () = follow(&codec, skip_special_tokens, assembler, sequence, index, &sender) => {}
            }
        };
        // With the request's span, so that log lines from here have its id.
        tokio::spawn(follow.in_current_span());
    }
    UnboundedReceiverStream::new(receiver)
}

async fn follow(
    codec: &TextCodec,
    skip_special_tokens: bool,
    mut assembler: Assembler,
    sequence: RunningSequence,
    index: usize,
    sender: &UnboundedSender<(usize, Result<OutputDelta>)>,
) {
    let RunningSequence { mut events, mut metrics } = sequence;
    // The parser needs the markers, and takes them out of the message.
    let markers = assembler.message.as_ref().map_or(&[][..], |message| message.parser.markers());
    let mut text = codec.stream_keeping(skip_special_tokens, markers);
    loop {
        let event = events.recv().await.unwrap_or_else(|| Event::Failed(Error::internal("the engine stopped")));
        let delta = match event {
            Event::Scheduled { cached_tokens } => {
                metrics.scheduled();
                assembler.cached_tokens = cached_tokens;
                continue;
            }
            Event::Prompt(logprobs) => Ok(OutputDelta { prompt: Some(logprobs), ..OutputDelta::default() }),
            // Requests for text ask for none.
            Event::Pooled(_) => continue,
            Event::Token { id, logprobs } => {
                metrics.token();
                text.push(id).map(|text| assembler.token(&text, id, logprobs))
            }
            Event::Finished { reason, end_token, end_logprobs, requested_stop } => {
                end_token.iter().for_each(|_| metrics.end_token());
                text.finish().map(|tail| {
                    let mut delta = assembler.finish(&tail, reason, end_token, requested_stop);
                    if let Some(finish) = &mut delta.finish {
                        finish.end_logprobs = end_logprobs.filter(|_| finish.end_token.is_some());
                    }
                    delta
                })
            }
            Event::Failed(error) => Err(error),
        };
        let done = match &delta {
            Ok(OutputDelta { finish, .. }) => finish.as_ref().map(|finish| metrics.finish(finish.reason)).is_some(),
            Err(error) => {
                metrics.fail(error.kind);
                true
            }
        };
        let worth_sending = delta.as_ref().map_or(true, OutputDelta::is_visible);
        if (worth_sending && sender.send((index, delta)).is_err()) || done {
            return;
        }
    }
}

/// Releases text once no stop string can begin in it, and each token together with the end of its text.
struct Assembler {
    /// Finds stop strings.
    matcher: StopMatcher,
    /// Stop strings are ignored in the text of the first `min_tokens` tokens.
    min_tokens: usize,
    /// Tokens generated so far.
    generated: usize,
    /// Prompt tokens found in the prefix cache.
    cached_tokens: usize,
    /// Characters of text so far.
    received: usize,
    /// Characters of text released.
    released: usize,
    /// Tokens whose text is not all released, each with the character where its text ends.
    held: VecDeque<(usize, OutputToken)>,
    /// For chats.
    message: Option<MessageAssembler>,
}

/// Makes parts of a message from released text, and counts the tokens of the thinking.
struct MessageAssembler {
    parser: OutputParser,
    /// Whether any thinking came.
    reasoned: bool,
    /// Tokens generated when the first part after the thinking came.
    body_from: Option<usize>,
}

impl MessageAssembler {
    fn new(format: &AnswerFormat) -> Self {
        Self { parser: format.parser(), reasoned: format.starts_in_reasoning, body_from: None }
    }

    /// The parts of the next text. `ended`: no text follows. `generated`: tokens so far.
    fn parts(&mut self, text: &str, ended: bool, generated: usize) -> Vec<OutputPart> {
        let mut parts = self.parser.push(text);
        if ended {
            parts.extend(self.parser.finish());
        }
        for part in &parts {
            match part {
                OutputPart::Reasoning(_) => self.reasoned = true,
                _ if self.body_from.is_none() => self.body_from = Some(generated),
                _ => {}
            }
        }
        parts
    }

    /// Tokens of the thinking among `generated`, its markers included.
    fn reasoning_tokens(&self, generated: usize) -> usize {
        // The token with which the body begins is not part of the thinking.
        if self.reasoned { self.body_from.map_or(generated, |from| from.saturating_sub(1)) } else { 0 }
    }
}

impl Assembler {
    fn new(matcher: StopMatcher, min_tokens: usize) -> Self {
        Self {
            matcher,
            min_tokens,
            generated: 0,
            cached_tokens: 0,
            received: 0,
            released: 0,
            held: VecDeque::new(),
            message: None,
        }
    }

    /// Takes the next token and the text that it completed.
    fn token(&mut self, text: &str, id: u32, logprobs: Option<Logprobs>) -> OutputDelta {
        let offset = self.received;
        self.generated += 1;
        self.received += text.chars().count();
        self.held.push_back((self.received, OutputToken { id, offset, logprobs }));
        let mut delta = self.scan(text);
        self.complete(&mut delta);
        delta
    }

    /// Adds what follows from the rest of a delta: the parts of a message, and counts.
    fn complete(&mut self, delta: &mut OutputDelta) {
        delta.generated = self.generated;
        let Some(message) = &mut self.message else { return };
        delta.parts = message.parts(&delta.text, delta.finish.is_some(), self.generated);
        if let Some(finish) = &mut delta.finish {
            finish.reasoning_tokens = message.reasoning_tokens(self.generated);
        }
    }

    /// Takes the end of the sequence and its last text, and releases the rest. `end_token` ended it; `requested_stop`: the request
    /// asked for that.
    fn finish(
        &mut self,
        tail: &str,
        reason: FinishReason,
        end_token: Option<u32>,
        requested_stop: bool,
    ) -> OutputDelta {
        self.received += tail.chars().count();
        let mut delta = self.scan(tail);
        if delta.finish.is_none() {
            delta.text.push_str(&self.matcher.finish());
            delta.tokens.extend(self.held.drain(..).map(|(_, token)| token));
            delta.finish = Some(FinishDetails {
                reason,
                stop: end_token.filter(|_| requested_stop).map(StopReason::Token),
                end_token,
                end_logprobs: None,
                completion_tokens: self.generated + usize::from(end_token.is_some()),
                reasoning_tokens: 0,
                cached_tokens: self.cached_tokens,
            });
        }
        self.complete(&mut delta);
        delta
    }

    fn scan(&mut self, text: &str) -> OutputDelta {
        if self.generated <= self.min_tokens {
            return self.release(text.to_owned());
        }
        let scanned = self.matcher.push(text);
        let mut delta = self.release(scanned.text);
        if let Some(stop) = scanned.stop {
            // A token that began before the cut has text in the answer.
            let inside = self.held.iter().take_while(|(_, token)| token.offset < self.released).count();
            delta.tokens.extend(self.held.drain(..inside).map(|(_, token)| token));
            delta.finish = Some(FinishDetails {
                reason: FinishReason::Stop,
                stop: Some(StopReason::Text(self.matcher.stop(stop).to_owned())),
                end_token: None,
                end_logprobs: None,
                completion_tokens: self.generated,
                reasoning_tokens: 0,
                cached_tokens: self.cached_tokens,
            });
        }
        delta
    }

    fn release(&mut self, text: String) -> OutputDelta {
        self.released += text.chars().count();
        let out = self.held.iter().take_while(|(end, _)| *end <= self.released).count();
        let tokens = self.held.drain(..out).map(|(_, token)| token).collect();
        OutputDelta { text, tokens, ..OutputDelta::default() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Text, ids of tokens and the finish of a whole run.
    fn run(stops: &[&str], min_tokens: usize, tokens: &[&str]) -> (String, Vec<u32>, FinishDetails) {
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut assembler = Assembler::new(StopMatcher::new(stops, false), min_tokens);
        let (mut text, mut ids) = (String::new(), vec![]);
        for (id, token) in tokens.iter().enumerate() {
            let delta = assembler.token(token, id as u32, None);
            text.push_str(&delta.text);
            ids.extend(delta.tokens.iter().map(|t| t.id));
            if let Some(finish) = delta.finish {
                return (text, ids, finish);
            }
        }
        let delta = assembler.finish("", FinishReason::Length, None, false);
        text.push_str(&delta.text);
        ids.extend(delta.tokens.iter().map(|t| t.id));
        (text, ids, delta.finish.expect("the end has a finish"))
    }

    #[test]
    fn tokens_follow_their_text() {
        let (text, ids, finish) = run(&["stop"], 0, &["a", " s", "to", "p b"]);
        assert_eq!((text.as_str(), &ids[..]), ("a ", &[0, 1][..]));
        assert_eq!((finish.reason, finish.completion_tokens), (FinishReason::Stop, 4));
        assert_eq!(finish.stop, Some(StopReason::Text("stop".into())));

        let (text, ids, finish) = run(&["stop"], 0, &["a", " s", "to"]);
        assert_eq!((text.as_str(), &ids[..]), ("a sto", &[0, 1, 2][..]));
        assert_eq!((finish.reason, finish.stop), (FinishReason::Length, None));
    }

    #[test]
    fn a_token_waits_for_all_of_its_text() {
        let mut assembler = Assembler::new(StopMatcher::new(vec!["xy".into()], false), 0);
        let delta = assembler.token("ax", 0, None);
        assert_eq!((delta.text.as_str(), delta.tokens.len()), ("a", 0));
        let delta = assembler.token("z", 1, None);
        assert_eq!((delta.text.as_str(), delta.tokens.len()), ("xz", 2));
        assert_eq!(delta.tokens[1].offset, 2);
    }

    #[test]
    fn stop_strings_wait_for_min_tokens() {
        let (text, ids, _) = run(&["b"], 2, &["a", "b", "a", "b", "c"]);
        assert_eq!((text.as_str(), &ids[..]), ("aba", &[0, 1, 2][..]));
    }

    proptest! {
        #[test]
        fn text_is_the_tokens_text_up_to_the_stop(tokens in proptest::collection::vec("[abé]{0,3}", 0..12)) {
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let (text, ids, finish) = run(&["ab", "éé"], 0, &tokens);
            let whole = tokens.concat();
            prop_assert!(whole.starts_with(&text));
            prop_assert_eq!(finish.reason == FinishReason::Stop, whole.contains("ab") || whole.contains("éé"));
            // The tokens given out are the first ones, and they cover the text.
            prop_assert_eq!(&ids, &(0..ids.len() as u32).collect::<Vec<_>>());
            prop_assert!(tokens[..ids.len()].concat().len() >= text.len());
            if finish.reason == FinishReason::Length {
                prop_assert_eq!((text, ids.len()), (whole, tokens.len()));
            }
        }
    }
}
