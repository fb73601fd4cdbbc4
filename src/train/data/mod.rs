//! Training and validation files: from records in any of the published formats to examples, token by token.
//!
//! `record` reads a record, `tokens` makes examples of it, and `order` says which examples an optimiser step takes.

pub(super) mod order;
mod record;
#[cfg(test)]
mod tests;
mod tokens;

use std::fmt;

use serde::Serialize;
use serde_json::Value;

pub use record::{AlpacaEnding, DataFormat};

use super::spec::JobSpec;
use crate::text::codec::TextCodec;
use crate::{Error, Result};

/// A text to train on, as tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Example {
    /// All tokens, prompt and completion.
    pub tokens: Vec<u32>,
    /// Whether the loss covers each token. The first one is never covered, as nothing precedes it.
    pub trained: Vec<bool>,
}

/// Options for parsing a file.
#[derive(Debug, Clone)]
pub struct DataOptions {
    /// Longest example in tokens. Longer examples are cut at the end.
    pub max_length: usize,
    /// Whether the loss covers prompts too.
    pub train_on_inputs: bool,
    /// End of Alpaca prompts.
    pub alpaca_ending: AlpacaEnding,
}

/// A parsed file.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// In the order of the file.
    pub examples: Vec<Example>,
    pub format: DataFormat,
    /// The end of its Alpaca prompts. Requests to an adapter trained on the file must end the same way.
    pub alpaca_ending: Option<AlpacaEnding>,
    pub statistics: DatasetStatistics,
}

/// Counts of records, examples and tokens in a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DatasetStatistics {
    /// Records in the file.
    pub records: usize,
    /// Examples made from the records.
    pub examples: usize,
    /// Tokens of the examples.
    pub tokens: usize,
    /// Tokens that the loss covers.
    pub trained_tokens: usize,
    /// Examples cut at `max_length`.
    pub truncated: usize,
    /// Records and examples without a token to train on.
    pub dropped: usize,
}

/// Most wrong records that an error lists.
const MAX_LISTED: usize = 10;

/// Parses a file: one JSON object a line, or one array of objects. All records must have the format of the first.
///
/// # Errors
/// `Invalid`, code `invalid_training_file`: the file is empty or not UTF-8; records are wrong (the first ten are listed with
/// their line, their key and what is allowed); no token would be trained on.
pub fn parse(bytes: &[u8], codec: &TextCodec, options: &DataOptions) -> Result<Dataset> {
    let records = records(utf8(bytes)?)?;
    let format = format_of(&records)?;
    let mut data = Dataset {
        examples: Vec::new(),
        format: format.unwrap_or(DataFormat::Text),
        alpaca_ending: (format == Some(DataFormat::Alpaca)).then_some(options.alpaca_ending),
        statistics: DatasetStatistics { records: records.len(), ..DatasetStatistics::default() },
    };
    let mut errors = Vec::new();
    for (place, record) in records {
        let read = |record: Value| {
            let record = data.format.read(&record, options.alpaca_ending)?;
            tokens::examples(&record, codec, options.train_on_inputs)
        };
        match record.and_then(read) {
            Ok(examples) => data.add(examples, options.max_length),
            Err(e) => errors.push(format!("{place}: {e}")),
        }
    }
    let records = data.statistics.records;
    if !errors.is_empty() {
        return Err(wrong_records(errors, records, format));
    }
    if data.examples.is_empty() {
        return Err(nothing_to_train_on(data.statistics.truncated, records, options.max_length));
    }
    Ok(data)
}

/// The error of a file whose records are right, but have no token to train on. `cut` examples were longer than `max_length`.
fn nothing_to_train_on(cut: usize, records: usize, max_length: usize) -> Error {
    let why = match cut {
        0 => "every answer has the `weight` 0, or no text: give at least one answer the `weight` 1".to_owned(),
        _ => {
            format!("no answer begins within `max_length` ({max_length} tokens), so all of them are cut off: raise it")
        }
    };
    invalid_file(format!("nothing to train on in {records} records: {why}"))
}

fn invalid_file(message: String) -> Error {
    Error::invalid(message).code("invalid_training_file")
}

/// The text of a file, without a byte order mark.
fn utf8(bytes: &[u8]) -> Result<&str> {
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        invalid_file(format!("line {line}: not UTF-8"))
    })?;
    Ok(text.trim_start_matches('\u{feff}'))
}

/// The format of the first record that is valid JSON; `None` if there is none.
fn format_of(records: &[NumberedRecord]) -> Result<Option<DataFormat>> {
    let first = records.iter().find_map(|(place, record)| Some((place, record.as_ref().ok()?)));
    let format = first.map(|(place, first)| DataFormat::of(first).map_err(|e| invalid_file(format!("{place}: {e}"))));
    format.transpose()
}

/// The error of a file with wrong records: lists the first of them and counts the others.
fn wrong_records(mut errors: Vec<String>, records: usize, format: Option<DataFormat>) -> Error {
    let read_as = format.map_or(String::new(), |f| format!(" (read as {}, the format of the first)", f.name()));
    let mut message = format!("{} of {records} records are wrong{read_as}:", errors.len());
    let more = errors.len().saturating_sub(MAX_LISTED);
    errors.truncate(MAX_LISTED);
    errors.iter().for_each(|error| message.extend(["\n", error]));
    if more > 0 {
        message.push_str(&format!("\nand {more} more"));
    }
    invalid_file(message)
}

/// The place of a record in the file, for messages, and the record.
type NumberedRecord = (String, Result<Value>);

/// Splits a file into records, at least one. Errors concern the file as a whole; a record may be an error of its own.
fn records(text: &str) -> Result<Vec<NumberedRecord>> {
    let start = text.trim_start();
    if let Some(kind) = foreign_format(start) {
        return Err(invalid_file(format!(
            "this is {kind}, not JSON: a training file is one JSON object a line (JSONL), or one array of objects"
        )));
    }
    let records = if start.starts_with('[') { array_records(text)? } else { line_records(text) };
    match records.is_empty() {
        true => Err(invalid_file("the file is empty: it needs at least one record".into())),
        false => Ok(records),
    }
}

/// What a file is that is no JSON, by its beginning. `None` if it may be JSON with mistakes.
fn foreign_format(start: &str) -> Option<&'static str> {
    let line = start.lines().next()?;
    match line.chars().next()? {
        '{' | '[' => None,
        '<' => Some("HTML or XML"),
        _ if start.starts_with("version https://git-lfs") => Some("a Git LFS pointer: fetch the file itself"),
        _ if line.contains('\t') => Some("a table with tabs (TSV)"),
        _ if line.contains(',') && !line.contains(['{', '}']) => Some("a table (CSV)"),
        _ => None,
    }
}

fn array_records(text: &str) -> Result<Vec<NumberedRecord>> {
    let list: Vec<Value> =
        serde_json::from_str(text).map_err(|e| invalid_file(format!("the file is not valid JSON: {e}")))?;
    Ok(list.into_iter().enumerate().map(|(i, v)| (format!("record {}", i + 1), Ok(v))).collect())
}

fn line_records(text: &str) -> Vec<NumberedRecord> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    // The place of the record gives the line.
    let reason = |e: serde_json::Error| e.to_string().replace("at line 1 column", "at column");
    let read = |line| serde_json::from_str(line).map_err(|e| Error::invalid(format!("not valid JSON: {}", reason(e))));
    lines.map(|(i, line)| (format!("line {}", i + 1), read(line))).collect()
}

impl Dataset {
    /// Adds the examples of one record.
    fn add(&mut self, examples: Vec<Example>, max_length: usize) {
        let counts = &mut self.statistics;
        counts.dropped += usize::from(examples.is_empty());
        for mut example in examples {
            if example.tokens.len() > max_length {
                counts.truncated += 1;
                example.tokens.truncate(max_length);
                example.trained.truncate(max_length);
            }
            let trained = example.trained.iter().filter(|&&trained| trained).count();
            if trained == 0 {
                counts.dropped += 1;
                continue;
            }
            counts.examples += 1;
            counts.tokens += example.tokens.len();
            counts.trained_tokens += trained;
            self.examples.push(example);
        }
    }

    /// The first `n` examples as they are trained on, for the user to check. Errors: tokens cannot be decoded.
    pub(crate) fn preview(&self, n: usize, codec: &TextCodec) -> Result<Vec<ExamplePreview>> {
        self.examples.iter().take(n).map(|example| ExamplePreview::new(example, codec)).collect()
    }

    /// Steps, tokens and time of a job on this file. `tokens_per_second` is a measured speed, if there is one.
    pub(crate) fn estimate(&self, spec: &JobSpec, tokens_per_second: Option<f64>) -> Estimate {
        let counts = &self.statistics;
        let rows = if spec.packing { counts.tokens.div_ceil(spec.max_length) } else { counts.examples };
        let epoch = rows.div_ceil(spec.batch_size * spec.gradient_accumulation);
        let steps = spec.max_steps.unwrap_or(spec.epochs * epoch);
        let tokens = counts.tokens * steps / epoch;
        Estimate { steps, tokens, seconds: tokens_per_second.map(|speed| tokens as f64 / speed) }
    }
}

/// An example in readable form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct ExamplePreview {
    pub token_ids: Vec<u32>,
    /// Whether the loss covers each token.
    pub trained: Vec<bool>,
    /// The text with special tokens. The parts that the loss covers are between `⟦` and `⟧`.
    pub text: String,
}

impl ExamplePreview {
    fn new(example: &Example, codec: &TextCodec) -> Result<Self> {
        let mut stream = codec.stream(false);
        let mut text = String::new();
        let mut inside = false;
        for (&id, &trained) in example.tokens.iter().zip(&example.trained) {
            if trained != inside {
                text.push(if trained { '⟦' } else { '⟧' });
                inside = trained;
            }
            text.push_str(&stream.push(id)?);
        }
        text.push_str(&stream.finish()?);
        if inside {
            text.push('⟧');
        }
        Ok(Self { token_ids: example.tokens.clone(), trained: example.trained.clone(), text })
    }
}

/// Estimate of a job's work. Packing may need one more row an epoch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Estimate {
    /// Optimiser steps.
    pub steps: usize,
    /// Tokens of all epochs.
    pub tokens: usize,
    /// Time at a measured speed, without other work.
    pub seconds: Option<f64>,
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} steps over {} tokens", self.steps, self.tokens)?;
        match self.seconds {
            None => Ok(()),
            Some(seconds) if seconds < 120.0 => write!(f, ", about {seconds:.0} s"),
            Some(seconds) => write!(f, ", about {:.0} min", seconds / 60.0),
        }
    }
}
