//! What a job leaves to be looked at: a TensorBoard file while it runs; its figures as CSV and a plot of its losses at the end,
//! over all of its runs.
//!
//! The TensorBoard file is written here: an event is a dozen bytes of protobuf in a checksummed frame, and the crates that
//! write them bring an image library or a second protobuf.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::plot::Chart;
use crate::train::job::{JobReport, StepMetrics, Validation};
use crate::{Error, Result, files};

/// A job's figures in a directory.
pub const CSV: &str = "training_metrics.csv";
/// A plot of a job's losses in a directory.
pub const PLOT: &str = "loss.svg";
/// TensorBoard reads whatever has `tfevents` in its name. One file a job: a run that goes on appends to it.
const EVENTS: &str = "events.out.tfevents.quiver";

/// A job's figures where no store has them: a line each.
const HISTORY: &str = "metrics.jsonl";

/// A job's figures, in a file too, so that a run that goes on has those of the runs before.
pub struct MetricsHistory {
    path: PathBuf,
    /// Of all steps, in order.
    pub steps: Vec<StepMetrics>,
    /// Of all validations, in order.
    pub validations: Vec<Validation>,
}

/// A line of the file.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HistoryLine {
    Step(StepMetrics),
    Validation(Validation),
}

impl HistoryLine {
    fn line(self) -> Result<String> {
        serde_json::to_string(&self).map(|line| line + "\n").map_err(|e| Error::internal(e.to_string()))
    }
}

impl MetricsHistory {
    /// The history of the job whose directory is `dir`, empty until a run starts.
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join(HISTORY), steps: Vec::new(), validations: Vec::new() }
    }

    /// Adds what is reported. A start brings back the figures up to the step from which it goes on. Errors: the file cannot be
    /// read or written.
    pub fn take(&mut self, report: &JobReport) -> Result<()> {
        let row = match *report {
            JobReport::Started { done, .. } => return self.go_on(done),
            JobReport::Step(step) => HistoryLine::Step(step),
            JobReport::Validation(validation) => HistoryLine::Validation(validation),
            _ => return Ok(()),
        };
        self.add(row);
        Ok(append(&self.path, row.line()?.as_bytes())?)
    }

    fn add(&mut self, row: HistoryLine) {
        match row {
            HistoryLine::Step(step) => self.steps.push(step),
            HistoryLine::Validation(validation) => {
                // One that a kill undid is done again at the same step.
                self.validations.retain(|v| v.step != validation.step);
                self.validations.push(validation);
            }
        }
    }

    fn go_on(&mut self, done: usize) -> Result<()> {
        let text = match fs::read_to_string(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
            text => text?,
        };
        // The last line of a run that was killed may be cut off.
        let rows = text.lines().filter_map(|line| serde_json::from_str::<HistoryLine>(line).ok());
        let mut kept = String::new();
        for row in rows {
            let (HistoryLine::Step(StepMetrics { step, .. }) | HistoryLine::Validation(Validation { step, .. })) = row;
            if step <= done {
                self.add(row);
                kept += &row.line()?;
            }
        }
        Ok(files::replace(&self.path, |made| fs::write(made, kept))?)
    }
}

/// `report`, which goes to a TensorBoard file in `dir` too. A file that cannot be written is no reason to stop training.
pub fn watched(dir: &Path, mut report: impl FnMut(JobReport) + Send + 'static) -> Box<dyn FnMut(JobReport) + Send> {
    let (path, mut broken) = (dir.join(EVENTS), false);
    Box::new(move |told| {
        if let Some(events) = events(&told).filter(|_| !broken)
            && let Err(error) = append(&path, &events)
        {
            tracing::warn!(error = %format_args!("{error:#}"), path = %path.display(), "no more events for TensorBoard");
            broken = true;
        }
        report(told);
    })
}

/// Writes [`CSV`] and [`PLOT`] into `dir`.
pub fn write(dir: &Path, steps: &[StepMetrics], validations: &[Validation]) -> Result<()> {
    fs::write(dir.join(CSV), csv(steps, validations))?;
    let train = steps.iter().map(|m| (m.step as f64, m.train_loss)).collect();
    let mut lines = vec![("training".to_owned(), train)];
    if !validations.is_empty() {
        lines.push(("held out".to_owned(), curve(validations)));
    }
    fs::write(dir.join(PLOT), losses("Loss", lines).svg()?)?;
    Ok(())
}

/// Step and loss of each validation.
pub fn curve(validations: &[Validation]) -> Vec<(f64, f64)> {
    validations.iter().map(|v| (v.step as f64, v.valid_loss)).collect()
}

/// A chart of losses over steps, by name.
pub fn losses(title: &str, mut lines: Vec<(String, Vec<(f64, f64)>)>) -> Chart {
    // A run that diverged is drawn as far as it can be.
    lines.iter_mut().for_each(|(_, points)| points.retain(|(_, loss)| loss.is_finite()));
    let (x, y) = ("step".to_owned(), "nats a token".to_owned());
    Chart { title: title.to_owned(), x, y, tight: true, lines, ..Chart::default() }
}

/// Figures of all steps, OpenAI's columns first.
fn csv(steps: &[StepMetrics], validations: &[Validation]) -> String {
    let mut csv = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate,grad_norm,tokens,\
                   trained_tokens,seconds\n"
        .to_owned();
    for m in steps {
        let valid = validations.iter().find(|v| v.step == m.step);
        let shown = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let (loss, accuracy) = (valid.map(|v| v.valid_loss), valid.map(|v| v.valid_mean_token_accuracy));
        csv += &format!(
            "{},{},{},{},{},{},{},{},{},{}\n",
            m.step,
            m.train_loss,
            m.train_mean_token_accuracy,
            shown(loss),
            shown(accuracy),
            m.learning_rate,
            m.grad_norm,
            m.tokens,
            m.trained_tokens,
            m.seconds
        );
    }
    csv
}

/// Frames for what is reported, if it has a place in TensorBoard.
fn events(report: &JobReport) -> Option<Vec<u8>> {
    let scalars = |step: usize, values: &[(&str, f64)]| {
        let mut summary = Vec::new();
        for (tag, value) in values {
            // Summary.Value: tag = 1, simple_value = 2 (float).
            let mut one = message(1, tag.as_bytes());
            one.push(2 << 3 | 5);
            one.extend((*value as f32).to_le_bytes());
            summary.extend(message(1, &one));
        }
        event(step, &message(5, &summary))
    };
    match report {
        JobReport::Started { done, .. } => {
            let version = event(0, &message(3, b"brain.Event:2"));
            // SessionLog.status = START: what an interruption undid, from this step on, does not count.
            let start = event(done + 1, &message(7, &[1 << 3, 1]));
            Some([version, start].concat())
        }
        JobReport::Step(m) => Some(scalars(
            m.step,
            &[
                ("train_loss", m.train_loss),
                ("train_accuracy", m.train_mean_token_accuracy),
                ("learning_rate", m.learning_rate.into()),
                ("grad_norm", m.grad_norm.into()),
                ("tokens_per_second", m.tokens as f64 / m.seconds.max(1e-9)),
            ],
        )),
        JobReport::Validation(v) => {
            Some(scalars(v.step, &[("valid_loss", v.valid_loss), ("valid_accuracy", v.valid_mean_token_accuracy)]))
        }
        _ => None,
    }
}

/// An `Event` (wall_time = 1, step = 2, and `what`) in a frame of TFRecord: length and data, each with its checksum.
fn event(step: usize, what: &[u8]) -> Vec<u8> {
    // A clock before 1970 gives 1970.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut data = vec![1 << 3 | 1];
    data.extend(time.to_le_bytes());
    data.push(2 << 3);
    data.extend(varint(step));
    data.extend(what);
    let length = (data.len() as u64).to_le_bytes();
    let checksum = |bytes: &[u8]| crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    [&length[..], &checksum(&length), &data, &checksum(&data)].concat()
}

/// A field of protobuf with a length: text, or a message.
fn message(field: u8, content: &[u8]) -> Vec<u8> {
    [&[field << 3 | 2][..], &varint(content.len()), content].concat()
}

fn varint(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while n >= 0x80 {
        bytes.push(n as u8 | 0x80);
        n >>= 7;
    }
    bytes.push(n as u8);
    bytes
}

/// CRC-32C (Castagnoli), a bit at a time: events are short.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// In one write, so that a reader finds whole frames and lines.
fn append(path: &Path, what: &[u8]) -> std::io::Result<()> {
    File::options().create(true).append(true).open(path)?.write_all(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fields of a message: number and what it holds, numbers of 4 and 8 bytes as they stand.
    fn fields(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut fields = Vec::new();
        while let [key, rest @ ..] = bytes {
            let number = |rest: &[u8]| {
                let end = rest.iter().position(|b| b & 0x80 == 0).unwrap();
                let value = rest[..=end].iter().rev().fold(0, |n, b| n << 7 | usize::from(b & 0x7f));
                (value, end + 1)
            };
            let (skipped, length) = match key & 7 {
                0 => (0, number(rest).1),
                1 => (0, 8),
                2 => (number(rest).1, number(rest).0),
                5 => (0, 4),
                other => panic!("wire type {other}"),
            };
            fields.push((key >> 3, rest[skipped..][..length].to_vec()));
            bytes = &rest[skipped + length..];
        }
        fields
    }

    fn step(step: usize) -> JobReport {
        JobReport::Step(StepMetrics {
            step,
            train_loss: 1.5,
            train_mean_token_accuracy: 0.25,
            learning_rate: 0.5,
            grad_norm: 2.0,
            tokens: 128,
            trained_tokens: 100,
            seconds: 2.0,
        })
    }

    #[test]
    fn a_run_that_goes_on_has_the_figures_up_to_where_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let valid =
            |step| JobReport::Validation(Validation { step, valid_loss: 1.25, valid_mean_token_accuracy: 0.75 });
        let run = |done, told: &[JobReport]| {
            let mut history = MetricsHistory::new(dir.path());
            history.take(&JobReport::Started { steps: 9, done, parameters: 1 }).unwrap();
            told.iter().for_each(|report| history.take(report).unwrap());
            let validations: Vec<usize> = history.validations.iter().map(|v| v.step).collect();
            (history.steps.iter().map(|m| m.step).collect::<Vec<_>>(), validations)
        };
        let first = [step(1), step(2), valid(2), step(3), valid(3)];
        assert_eq!(run(0, &first), (vec![1, 2, 3], vec![2, 3]));
        append(&dir.path().join(HISTORY), b"{\"step\":{\"step\":1,\"train").unwrap();
        assert_eq!(run(2, &[valid(2), step(3)]), (vec![1, 2, 3], vec![2]));
        assert_eq!(run(3, &[]), (vec![1, 2, 3], vec![2]));
        assert_eq!(run(0, &[step(1)]), (vec![1], vec![]), "a job that begins anew");
    }

    #[test]
    fn events_are_what_tensorboard_reads() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of CRC-32C");
        let dir = tempfile::tempdir().unwrap();
        let mut told = watched(dir.path(), |_| ());
        told(JobReport::Started { steps: 300, done: 298, parameters: 1 });
        told(step(299));
        told(JobReport::Validation(Validation { step: 299, valid_loss: 1.25, valid_mean_token_accuracy: 0.75 }));
        told(JobReport::Succeeded);

        let file = fs::read(dir.path().join(EVENTS)).unwrap();
        let (mut left, mut read) = (&file[..], Vec::new());
        while !left.is_empty() {
            let length = u64::from_le_bytes(left[..8].try_into().unwrap()) as usize;
            read.push(fields(&left[12..][..length]));
            left = &left[12 + length + 4..];
        }
        assert_eq!(read.len(), 4);
        assert_eq!(read[0][2], (3, b"brain.Event:2".to_vec()));
        assert_eq!(read[1][1..], [(2, vec![0xab, 2]), (7, vec![8, 1])], "from step 299 on");
        let scalars = |event: &[(u8, Vec<u8>)]| {
            let values = fields(&event[2].1).into_iter().map(|(_, value)| fields(&value));
            let float = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
            values.map(|v| (String::from_utf8(v[0].1.clone()).unwrap(), float(&v[1].1))).collect::<Vec<_>>()
        };
        let expected = [
            ("train_loss", 1.5),
            ("train_accuracy", 0.25),
            ("learning_rate", 0.5),
            ("grad_norm", 2.0),
            ("tokens_per_second", 64.0),
        ];
        assert_eq!(scalars(&read[2]), expected.map(|(tag, value)| (tag.to_owned(), value)));
        assert_eq!(scalars(&read[3])[0], ("valid_loss".to_owned(), 1.25));
    }
}
