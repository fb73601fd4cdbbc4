//! Training and validation files, to examples.

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

/// A text to learn from, as tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// All tokens, prompt and completion.
    pub tokens: Vec<u32>,
    /// Whether each token is trained on: predicted from those before it. The first one never is.
    pub trained: Vec<bool>,
}

/// How a file is read.
#[derive(Debug, Clone)]
pub struct DataOptions {
    /// Longest example, tokens; longer ones are cut at the end.
    pub max_length: usize,
    /// Whether prompts are trained on too.
    pub train_on_inputs: bool,
    /// How Alpaca prompts end.
    pub alpaca_ending: AlpacaEnding,
}

/// A file, read.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// In the order of the file.
    pub examples: Vec<Example>,
    pub format: DataFormat,
    /// To be kept with an adapter trained on this: its prompts must end so.
    pub alpaca_ending: Option<AlpacaEnding>,
    pub statistics: DatasetStatistics,
}

/// Counts of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct DatasetStatistics {
    /// Records of the file.
    pub records: usize,
    /// Examples made from them.
    pub examples: usize,
    /// Tokens of the examples.
    pub tokens: usize,
    /// Of those, trained on.
    pub trained_tokens: usize,
    /// Examples cut at `max_length`.
    pub truncated: usize,
    /// Records and examples of which nothing was left to train.
    pub dropped: usize,
}

/// Errors of a file that are listed; the others are counted.
const LISTED: usize = 10;

/// Reads a file: JSON objects one a line, or one array of them. The format is that of the first record, and all must have it.
///
/// # Errors
/// `Invalid`, code `invalid_training_file`: it is not text or empty; records are wrong (the first ten are listed with
/// their line, key and what is allowed); nothing in it would be trained.
pub fn parse(bytes: &[u8], codec: &TextCodec, options: &DataOptions) -> Result<Dataset> {
    let bad = |message: String| Error::invalid(message).code("invalid_training_file");
    let text = std::str::from_utf8(bytes).map_err(|e| {
        let line = bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count() + 1;
        bad(format!("line {line}: not UTF-8"))
    })?;
    let records = records(text.trim_start_matches('\u{feff}')).map_err(bad)?;
    if records.is_empty() {
        return Err(bad("the file is empty: it needs at least one record".into()));
    }
    // What is no JSON says nothing about the format; where all is none, all are wrong in any.
    let first = records.iter().find_map(|(place, record)| Some((place, record.as_ref().ok()?)));
    let (format, read_as) = match first {
        Some((place, first)) => {
            let format = DataFormat::of(first).map_err(|e| bad(format!("{place}: {e}")))?;
            (format, format!(" (read as {}, the format of the first)", format.words()))
        }
        None => (DataFormat::Text, String::new()),
    };
    let mut data = Dataset {
        examples: Vec::new(),
        format,
        alpaca_ending: (format == DataFormat::Alpaca).then_some(options.alpaca_ending),
        statistics: DatasetStatistics { records: records.len(), ..DatasetStatistics::default() },
    };
    let mut errors = Vec::new();
    for (place, record) in records {
        let read = |record: Value| {
            let record = format.read(&record, options.alpaca_ending)?;
            tokens::examples(&record, codec, options.train_on_inputs)
        };
        match record.and_then(read) {
            Ok(examples) => data.add(examples, options.max_length),
            Err(e) => errors.push(format!("{place}: {e}")),
        }
    }
    if !errors.is_empty() {
        let more = errors.len().saturating_sub(LISTED);
        let records = data.statistics.records;
        let mut message = format!("{} of {records} records are wrong{read_as}:", errors.len());
        errors.truncate(LISTED);
        errors.iter().for_each(|error| message.extend(["\n", error]));
        if more > 0 {
            message.push_str(&format!("\nand {more} more"));
        }
        return Err(bad(message));
    }
    if data.examples.is_empty() {
        return Err(bad(format!(
            "nothing to train on: none of {} records has an answer of weight 1 that begins within {} tokens",
            data.statistics.records, options.max_length
        )));
    }
    Ok(data)
}

/// A record and where it stands.
type NumberedRecord = (String, Result<Value>);

/// Cuts a file into records. The error is about the file as a whole.
fn records(text: &str) -> Result<Vec<NumberedRecord>, String> {
    if text.trim_start().starts_with('[') {
        let list: Vec<Value> = serde_json::from_str(text).map_err(|e| format!("the file is not valid JSON: {e}"))?;
        return Ok(list.into_iter().enumerate().map(|(i, v)| (format!("record {}", i + 1), Ok(v))).collect());
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    // The line is named with the record.
    let why = |e: serde_json::Error| e.to_string().replace("at line 1 column", "at column");
    let read = |line| serde_json::from_str(line).map_err(|e| Error::invalid(format!("not valid JSON: {}", why(e))));
    Ok(lines.map(|(i, line)| (format!("line {}", i + 1), read(line))).collect())
}

impl Dataset {
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

    /// The first `n` examples as the trainer sees them.
    pub fn preview(&self, n: usize, codec: &TextCodec) -> Result<Vec<ExamplePreview>> {
        self.examples.iter().take(n).map(|example| ExamplePreview::new(example, codec)).collect()
    }

    /// What a job over this file takes. `tokens_per_second` is a measured speed, where there is one.
    pub fn estimate(&self, spec: &JobSpec, tokens_per_second: Option<f64>) -> Estimate {
        let counts = &self.statistics;
        let rows = if spec.packing { counts.tokens.div_ceil(spec.max_length) } else { counts.examples };
        let epoch = rows.div_ceil(spec.batch_size * spec.gradient_accumulation);
        let steps = spec.max_steps.unwrap_or(spec.epochs * epoch);
        let tokens = counts.tokens * steps / epoch;
        Estimate { steps, tokens, seconds: tokens_per_second.map(|speed| tokens as f64 / speed) }
    }
}

/// An example, to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExamplePreview {
    pub token_ids: Vec<u32>,
    /// Which of them are trained.
    pub trained: Vec<bool>,
    /// Their text, special tokens included, with what is trained between `⟦` and `⟧`.
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

/// What a job will take, about: packing may need a row more.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Estimate {
    /// Optimiser steps.
    pub steps: usize,
    /// Tokens that go through the model, all epochs.
    pub tokens: usize,
    /// At a measured speed, with nothing else to do.
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
