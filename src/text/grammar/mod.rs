//! Structured output: grammars, JSON schemas and regular expressions over the output's text, as constraints on its tokens.
//!
//! `llguidance` compiles a grammar and computes token masks: an Earley parser over a lexer of derivatives, which walks the
//! tokenizer's trie. [`trie`] makes the trie from the model's [`TextCodec`], [`gbnf`] translates llama.cpp's grammars, and
//! [`compose`] joins grammars, as the calls of tools need it.

mod closed;
mod compose;
mod gbnf;
mod trie;

use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::{ParserFactory, TokenParser};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, oneshot};

use super::codec::TextCodec;
use crate::engine::constraint::{STACK_BYTES, TokenConstraint, TokenMask};
use crate::{Error, Result};

/// Limit on the bytes of a schema's JSON or of the strings of a choice.
const MAX_SCHEMA_BYTES: usize = 512 << 10;

/// Limit on the bytes of a grammar or of a regular expression.
const MAX_GRAMMAR_BYTES: usize = 64 << 10;

/// Limit on the strings of a choice.
const MAX_CHOICES: usize = 4096;

/// Compiled grammars that are kept.
const CACHED_GRAMMARS: usize = 32;

/// Grammars that are compiled at once.
const CONCURRENT_COMPILES: usize = 2;

/// Limit on the time that compiling takes. The compiler itself is bounded by work, not by time.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(10);

/// Limit on the states of a sequence's lexer, of 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 20_000;

/// White space in JSON, as llama.cpp allows it: without such bounds, small models write line ends until `max_tokens`.
const JSON_WHITESPACE: &str = r" |\n{1,2}[ \t]{0,20}";

/// What the text of an output must match from beginning to end.
#[derive(Debug, Clone)]
pub enum Grammar {
    /// JSON that matches a schema. The properties of an object come in the schema's order. An object that lists properties has no
    /// others, unless the schema says so.
    Json {
        /// The schema.
        schema: Value,
        /// The white space between JSON's tokens.
        whitespace: JsonWhitespace,
    },
    /// A regular expression in Rust's syntax, without look-around.
    Regex(String),
    /// One of these strings.
    Choice(Vec<String>),
    /// A grammar in llama.cpp's GBNF, which has rules of the form `name ::= ...`, or else in llguidance's variant of Lark.
    Text(String),
    /// These, one after another.
    Sequence(Vec<Grammar>),
    /// One of these.
    AnyOf(Vec<Grammar>),
    /// Nothing, or this.
    Optional(Box<Grammar>),
    /// This any number of times, also none.
    Repeated(Box<Grammar>),
    /// The special token that is spelt so, or else this text.
    Marker(String),
    /// Any text up to the first such marker, and the marker.
    Until(String),
    /// Any text.
    AnyText,
    /// Any text that this regular expression does not match as a whole.
    TextUnlike(String),
    /// A grammar that a field of the request gives.
    Placed {
        /// The field's path, for errors.
        path: String,
        /// The grammar.
        grammar: Box<Grammar>,
    },
}

/// The white space between JSON's tokens.
#[derive(Debug, Clone, Default)]
pub enum JsonWhitespace {
    /// A space, or one or two line ends and up to 20 spaces and tabs.
    #[default]
    Any,
    /// None.
    None,
    /// What this regular expression matches.
    Pattern(String),
}

/// Compiles grammars for one tokenizer.
pub struct GrammarCompiler {
    codec: Arc<TextCodec>,
    /// The tokenizer's trie, which the first grammar makes.
    factory: OnceLock<Result<ParserFactory>>,
    /// Compiled grammars by the hash of their content, the last used one first.
    cache: Mutex<Vec<([u8; 32], Arc<CompiledGrammar>)>>,
    permits: Arc<Semaphore>,
}

/// A grammar that is ready to constrain sequences.
pub struct CompiledGrammar {
    /// The state before the first token, from which each sequence starts.
    start: Mutex<TokenParser>,
}

impl GrammarCompiler {
    /// A compiler for the tokens of `codec`. It does nothing until the first grammar comes.
    pub fn new(codec: Arc<TextCodec>) -> Self {
        let permits = Arc::new(Semaphore::new(CONCURRENT_COMPILES));
        Self { codec, factory: OnceLock::new(), cache: Mutex::default(), permits }
    }

    /// Compiles a grammar on another thread, or takes it from the cache. Errors: `Invalid` if the grammar is malformed, too
    /// large or not supported.
    pub async fn compile(self: &Arc<Self>, grammar: Grammar) -> Result<Arc<CompiledGrammar>> {
        let hash = move || {
            let key: [u8; 32] = Sha256::digest(format!("{grammar:?}")).into();
            (key, grammar)
        };
        let (key, grammar) = tokio::task::spawn_blocking(hash).await.map_err(|e| Error::internal(e.to_string()))?;
        if let Some(hit) = self.cached(&key) {
            return Ok(hit);
        }
        let permit = self.permits.clone().acquire_owned().await.map_err(|e| Error::internal(e.to_string()))?;
        let compiler = self.clone();
        let compile = on_thread(move || {
            // Compiling cannot be interrupted: a grammar that takes too long keeps its permit.
            let _permit = permit;
            if let Some(hit) = compiler.cached(&key) {
                return Ok(hit);
            }
            let compiled = Arc::new(compiler.compile_now(&grammar)?);
            let mut cache = compiler.cache();
            cache.truncate(CACHED_GRAMMARS - 1);
            cache.insert(0, (key, compiled.clone()));
            Ok(compiled)
        });
        let timeout = COMPILE_TIMEOUT.as_secs();
        let late = |_| Error::invalid(format!("it takes longer than {timeout} s to compile: simplify it"));
        tokio::time::timeout(COMPILE_TIMEOUT, compile).await.map_err(late)?
    }

    /// Compiles a grammar on this thread, without the cache. Errors: as [`GrammarCompiler::compile`].
    pub fn compile_now(&self, grammar: &Grammar) -> Result<CompiledGrammar> {
        let began = Instant::now();
        let start = self.parser(grammar).map_err(|error| self.placed_fault(grammar).unwrap_or(error))?;
        tracing::debug!(ms = began.elapsed().as_millis(), "compiled a grammar");
        Ok(CompiledGrammar { start: Mutex::new(start) })
    }

    /// The state before the first token.
    fn parser(&self, grammar: &Grammar) -> Result<TokenParser> {
        let factory = self.factory.get_or_init(|| self.make_factory()).as_ref().map_err(Clone::clone)?;
        let mut start = factory.create_parser(grammar.to_llguidance(&self.codec)?).map_err(refused)?;
        start.start_without_prompt();
        // A grammar without a first token is found here, and the parts of the lexer that every sequence needs are made once.
        start.compute_mask().map_err(refused)?;
        Ok(start)
    }

    /// The fault of a part of a refused grammar, with the field that gives the part.
    fn placed_fault(&self, grammar: &Grammar) -> Option<Error> {
        grammar.placed().into_iter().find_map(|(path, part)| {
            let mut error = self.parser(part).err()?;
            error.message = format!("`{path}`: {}", error.message);
            Some(error.param(path).code("invalid_value"))
        })
    }

    fn make_factory(&self) -> Result<ParserFactory> {
        let env = trie::tok_env(self.codec.clone());
        let mut factory = ParserFactory::new_simple(&env)
            .map_err(|e| Error::internal(format!("the tokenizer has no trie for grammars: {e}")))?;
        factory.quiet();
        let limits = factory.limits_mut();
        limits.max_lexer_states = MAX_LEXER_STATES;
        limits.verbose_errors = false;
        Ok(factory)
    }

    /// A cached grammar, which becomes the last used one.
    fn cached(&self, key: &[u8; 32]) -> Option<Arc<CompiledGrammar>> {
        let mut cache = self.cache();
        let at = cache.iter().position(|(other, _)| other == key)?;
        cache[..=at].rotate_right(1);
        Some(cache[0].1.clone())
    }

    fn cache(&self) -> MutexGuard<'_, Vec<([u8; 32], Arc<CompiledGrammar>)>> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CompiledGrammar {
    /// The constraint of one sequence.
    pub fn constraint(self: &Arc<Self>) -> Box<dyn TokenConstraint> {
        Box::new(GrammarConstraint { grammar: self.clone(), parser: None })
    }
}

/// A sequence's state in a grammar.
struct GrammarConstraint {
    grammar: Arc<CompiledGrammar>,
    /// Copied from the grammar when the first mask is computed, because that takes a moment.
    parser: Option<TokenParser>,
}

impl TokenConstraint for GrammarConstraint {
    fn compute_mask(&mut self) -> Result<TokenMask> {
        let start = || self.grammar.start.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        let parser = self.parser.get_or_insert_with(start);
        let mask = parser.compute_mask().map_err(|e| failed(parser, e))?;
        Ok(TokenMask::from_words(mask.as_slice().to_vec()))
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        let parser = self.parser.as_mut().ok_or_else(|| Error::internal("a token came before its mask"))?;
        parser.consume_token(token).map_err(|e| failed(parser, e))?;
        parser.check_stop().map_err(|e| failed(parser, e))
    }
}

impl Grammar {
    /// JSON that matches a schema, with any white space.
    pub fn json(schema: Value) -> Self {
        Self::Json { schema, whitespace: JsonWhitespace::Any }
    }

    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::json(json!({"type": "object"}))
    }

    fn to_llguidance(&self, codec: &TextCodec) -> Result<TopLevelGrammar> {
        let lark = |text: String| Ok(TopLevelGrammar::from_lark(text));
        match self {
            Self::Json { schema, whitespace } => {
                check_size(schema.to_string().len(), MAX_SCHEMA_BYTES)?;
                Ok(TopLevelGrammar::from_json_schema(with_whitespace(closed::close_objects(schema), whitespace)?))
            }
            Self::Regex(regex) => {
                check_size(regex.len(), MAX_GRAMMAR_BYTES)?;
                Ok(TopLevelGrammar::from_regex(without_anchors(regex)))
            }
            Self::Choice(choices) => {
                check_size(choices.iter().map(String::len).sum(), MAX_SCHEMA_BYTES)?;
                if choices.is_empty() || choices.len() > MAX_CHOICES {
                    return Err(Error::invalid(format!(
                        "1 to {MAX_CHOICES} choices are allowed, not {}",
                        choices.len()
                    )));
                }
                let choices: Vec<_> = choices.iter().map(|choice| lark_string(choice)).collect();
                lark(format!("start: CHOICE\nCHOICE: {}\n", choices.join(" | ")))
            }
            Self::Text(text) => {
                check_size(text.len(), MAX_GRAMMAR_BYTES)?;
                lark(if gbnf::is_gbnf(text) { gbnf::to_lark(text)? } else { text.clone() })
            }
            _ => compose::compose(self, codec),
        }
    }
}

fn check_size(bytes: usize, most: usize) -> Result<()> {
    if bytes > most {
        return Err(Error::invalid(format!("at most {most} bytes are allowed, not {bytes}")));
    }
    Ok(())
}

/// A schema with llguidance's options for white space. They replace options in the schema, which could turn the enforcement off.
fn with_whitespace(schema: Value, whitespace: &JsonWhitespace) -> Result<Value> {
    const OPTIONS: &str = "x-guidance";
    let mut object = match schema {
        Value::Object(object) => object,
        Value::Bool(true) => Map::new(),
        _ => return Err(Error::invalid("a JSON schema is an object")),
    };
    let options = match whitespace {
        JsonWhitespace::Any => json!({"whitespace_pattern": JSON_WHITESPACE}),
        JsonWhitespace::None => json!({"whitespace_flexible": false}),
        JsonWhitespace::Pattern(pattern) => json!({"whitespace_pattern": pattern}),
    };
    object.insert(OPTIONS.into(), options);
    Ok(object.into())
}

/// A regular expression without `^` at its beginning and `$` at its end: it must match the whole output anyway.
fn without_anchors(regex: &str) -> &str {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let escapes = |rest: &str| rest.len() - rest.trim_end_matches('\\').len();
    regex.strip_suffix('$').filter(|rest| escapes(rest) % 2 == 0).unwrap_or(regex)
}

/// A string literal of Lark, which has JSON's escapes.
fn lark_string(text: &str) -> String {
    Value::from(text).to_string().replace('\x7f', "\\u007f")
}

/// The compiler refuses a grammar.
fn refused(error: impl Display) -> Error {
    Error::invalid(message_of(error))
}

/// A sequence's state has failed.
fn failed(parser: &TokenParser, error: impl Display) -> Error {
    let message = message_of(error);
    match parser.stop_reason() {
        StopReason::LexerTooComplex | StopReason::ParserTooComplex => {
            Error::invalid(format!("the grammar or schema is too complex: {message}"))
        }
        _ => Error::internal(format!("a grammar's state failed: {message}")),
    }
}

/// llguidance's message, without the backtrace that it adds to its own faults.
fn message_of(error: impl Display) -> String {
    const MAX_CHARS: usize = 1000;
    let message = error.to_string();
    let end = ["\n<backtrace>", "\n<non-verbose/>"].iter().filter_map(|tail| message.find(tail)).min();
    message[..end.unwrap_or(message.len())].chars().take(MAX_CHARS).collect()
}

/// Runs `work` on a thread of its own, with a large stack.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, result) = oneshot::channel();
    // If nobody receives it, the client has gone.
    let send = move || drop(sender.send(work()));
    thread::Builder::new().name("grammar".into()).stack_size(STACK_BYTES).spawn(send)?;
    result.await.map_err(|_| Error::internal("the compiler of grammars failed; see the server's log"))?
}

#[cfg(test)]
pub(super) mod tests;
