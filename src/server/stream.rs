//! Engine events to text: whole characters only, stop strings cut, tokens aligned with the text they made.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tracing::Instrument;

use super::params::TextOptions;
use super::stop::StopMatcher;
use crate::engine::request::{Event, FinishReason, Logprobs};
use crate::server::metrics::Track;
use crate::text::codec::TextCodec;
use crate::{Error, Result};

/// A token and where its text begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    /// Its id.
    pub(super) id: u32,
    /// Characters of text before it.
    pub(super) offset: usize,
    /// When asked for; the first token of a prompt has none.
    pub(super) logprobs: Option<Logprobs>,
}

/// What ended a sequence, besides its length or the model's own end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop id.
    Token(u32),
}

/// The end of a sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finish {
    /// Why.
    pub(super) reason: FinishReason,
    /// Which stop string or id, if one did it.
    pub(super) stop: Option<StopReason>,
    /// Tokens generated, those behind a stop string included.
    pub(super) completion_tokens: usize,
    /// Prompt tokens found in the prefix cache; 0 when a stop string ended the sequence.
    pub(super) cached_tokens: usize,
}

/// News of one sequence.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Piece {
    /// Log-probabilities of the prompt, once and first, when asked for.
    pub(super) prompt: Option<Vec<Option<Logprobs>>>,
    /// Text to append.
    pub(super) text: String,
    /// The tokens whose text is out now.
    pub(super) tokens: Vec<Token>,
    /// The last piece has it.
    pub(super) finish: Option<Finish>,
}

/// Follows sequences and gives out their pieces as they come, each with the index of its sequence. Dropping the stream
/// drops the receivers, which tells the engine to cancel.
pub(super) fn pieces(
    codec: &Arc<TextCodec>,
    options: &TextOptions,
    min_tokens: usize,
    sequences: Vec<(UnboundedReceiver<Event>, Track)>,
) -> UnboundedReceiverStream<(usize, Result<Piece>)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    for (index, (events, track)) in sequences.into_iter().enumerate() {
        let (codec, sender) = (codec.clone(), sender.clone());
        let assembler = Assembler::new(StopMatcher::new(options.stops.clone(), options.include_stop), min_tokens);
        let skip_special_tokens = options.skip_special_tokens;
        let follow = async move {
            tokio::select! {
                () = sender.closed() => {}
                () = follow(&codec, skip_special_tokens, assembler, events, track, index, &sender) => {}
            }
        };
        // The request's span goes along, so that log lines from here have its id.
        tokio::spawn(follow.in_current_span());
    }
    UnboundedReceiverStream::new(receiver)
}

async fn follow(
    codec: &TextCodec,
    skip_special_tokens: bool,
    mut assembler: Assembler,
    mut events: UnboundedReceiver<Event>,
    mut track: Track,
    index: usize,
    sender: &UnboundedSender<(usize, Result<Piece>)>,
) {
    let mut text = codec.stream(skip_special_tokens);
    loop {
        let event = events.recv().await.unwrap_or_else(|| Event::Failed(Error::internal("the engine stopped")));
        let piece = match event {
            Event::Scheduled => {
                track.scheduled();
                continue;
            }
            Event::Prompt(logprobs) => Ok(Piece { prompt: Some(logprobs), ..Piece::default() }),
            Event::Token { id, logprobs } => {
                track.token();
                text.push(id).map(|text| assembler.token(&text, id, logprobs))
            }
            Event::Finished { reason, cached_tokens, stop_token } => {
                text.finish().map(|tail| assembler.finish(&tail, reason, cached_tokens, stop_token))
            }
            Event::Failed(error) => Err(error),
        };
        let done = match &piece {
            Ok(Piece { finish, .. }) => finish.as_ref().map(|finish| track.finish(finish.reason)).is_some(),
            Err(error) => {
                track.fail(error.kind);
                true
            }
        };
        let worth_sending = piece.as_ref().map_or(true, |piece| *piece != Piece::default());
        if (worth_sending && sender.send((index, piece)).is_err()) || done {
            return;
        }
    }
}

/// Joins the text of tokens with stop strings: lets out text once it is decided, and each token with the last of its text.
struct Assembler {
    /// Finds stop strings.
    matcher: StopMatcher,
    /// Stop strings count only in text of later tokens.
    min_tokens: usize,
    /// Tokens so far.
    generated: usize,
    /// Characters of text so far, and how many of them are out.
    received: usize,
    released: usize,
    /// Tokens whose text is not all out, each with the character where its text ends.
    held: VecDeque<(usize, Token)>,
}

impl Assembler {
    fn new(matcher: StopMatcher, min_tokens: usize) -> Self {
        Self { matcher, min_tokens, generated: 0, received: 0, released: 0, held: VecDeque::new() }
    }

    /// The next token with the text it completed.
    fn token(&mut self, text: &str, id: u32, logprobs: Option<Logprobs>) -> Piece {
        let offset = self.received;
        self.generated += 1;
        self.received += text.chars().count();
        self.held.push_back((self.received, Token { id, offset, logprobs }));
        self.scan(text)
    }

    /// The end, with the text that was still undecided.
    fn finish(&mut self, tail: &str, reason: FinishReason, cached_tokens: usize, stop: Option<u32>) -> Piece {
        self.received += tail.chars().count();
        let mut piece = self.scan(tail);
        if piece.finish.is_none() {
            piece.text.push_str(&self.matcher.finish());
            piece.tokens.extend(self.held.drain(..).map(|(_, token)| token));
            piece.finish = Some(Finish {
                reason,
                stop: stop.map(StopReason::Token),
                completion_tokens: self.generated,
                cached_tokens,
            });
        }
        piece
    }

    fn scan(&mut self, text: &str) -> Piece {
        if self.generated <= self.min_tokens {
            return self.release(text.to_owned());
        }
        let scanned = self.matcher.push(text);
        let mut piece = self.release(scanned.text);
        if let Some(stop) = scanned.stop {
            // A token that began before the cut has text in the answer.
            let inside = self.held.iter().take_while(|(_, token)| token.offset < self.released).count();
            piece.tokens.extend(self.held.drain(..inside).map(|(_, token)| token));
            piece.finish = Some(Finish {
                reason: FinishReason::Stop,
                stop: Some(StopReason::Text(self.matcher.stop(stop).to_owned())),
                completion_tokens: self.generated,
                cached_tokens: 0,
            });
        }
        piece
    }

    fn release(&mut self, text: String) -> Piece {
        self.released += text.chars().count();
        let out = self.held.iter().take_while(|(end, _)| *end <= self.released).count();
        let tokens = self.held.drain(..out).map(|(_, token)| token).collect();
        Piece { text, tokens, ..Piece::default() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Text, ids of tokens and the finish of a whole run.
    fn run(stops: &[&str], min_tokens: usize, tokens: &[&str]) -> (String, Vec<u32>, Finish) {
        let stops = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut assembler = Assembler::new(StopMatcher::new(stops, false), min_tokens);
        let (mut text, mut ids) = (String::new(), vec![]);
        for (id, token) in tokens.iter().enumerate() {
            let piece = assembler.token(token, id as u32, None);
            text.push_str(&piece.text);
            ids.extend(piece.tokens.iter().map(|t| t.id));
            if let Some(finish) = piece.finish {
                return (text, ids, finish);
            }
        }
        let piece = assembler.finish("", FinishReason::Length, 0, None);
        text.push_str(&piece.text);
        ids.extend(piece.tokens.iter().map(|t| t.id));
        (text, ids, piece.finish.expect("the end has a finish"))
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
        let piece = assembler.token("ax", 0, None);
        assert_eq!((piece.text.as_str(), piece.tokens.len()), ("a", 0));
        let piece = assembler.token("z", 1, None);
        assert_eq!((piece.text.as_str(), piece.tokens.len()), ("xz", 2));
        assert_eq!(piece.tokens[1].offset, 2);
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
