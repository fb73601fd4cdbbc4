//! Metrics of a running job as a TensorBoard event file.
//!
//! The format is written here without a crate: an event is a few bytes of protobuf in a frame with checksums, and the crates for
//! it depend on an image library or a second protobuf implementation.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::history::append;
use crate::train::job::{JobReport, ReportFn};

/// TensorBoard reads every file with `tfevents` in its name. A job has one file, to which a resumed run appends.
const EVENTS: &str = "events.out.tfevents.quiver";

/// Wraps `report` such that metrics also go to an event file in `dir`. Training continues if the file cannot be written.
pub fn with_events(dir: &Path, mut report: impl FnMut(JobReport) + Send + 'static) -> ReportFn {
    let (path, mut broken) = (dir.join(EVENTS), false);
    Box::new(move |received| {
        if let Some(events) = events(&received).filter(|_| !broken)
            && let Err(error) = append(&path, &events)
        {
            tracing::warn!(error = %format_args!("{error:#}"), path = %path.display(), "the TensorBoard file cannot be written; no more events are added");
            broken = true;
        }
        report(received);
    })
}

/// The events for a report, framed; `None` if TensorBoard shows nothing of it.
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
            // SessionLog.status = START: TensorBoard drops events of this step and later ones, which an interruption has undone.
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

/// An `Event` (wall_time = 1, step = 2, then `content`) in a TFRecord frame: length and data, each with its checksum.
fn event(step: usize, content: &[u8]) -> Vec<u8> {
    // A clock before 1970 counts as 1970.
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut data = vec![1 << 3 | 1];
    data.extend(time.to_le_bytes());
    data.push(2 << 3);
    data.extend(varint(step));
    data.extend(content);
    let length = (data.len() as u64).to_le_bytes();
    let checksum = |bytes: &[u8]| crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    [&length[..], &checksum(&length), &data, &checksum(&data)].concat()
}

/// A length-delimited protobuf field: text or a message.
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

/// CRC-32C (Castagnoli), bit by bit, as events are short.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::train::job::{StepMetrics, Validation};

    /// The fields of a protobuf message: number and content. Fixed-size numbers are returned as bytes.
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

    #[test]
    fn events_are_what_tensorboard_reads() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "the check value of CRC-32C");
        let dir = tempfile::tempdir().unwrap();
        let step = JobReport::Step(StepMetrics {
            step: 299,
            train_loss: 1.5,
            train_mean_token_accuracy: 0.25,
            learning_rate: 0.5,
            grad_norm: 2.0,
            tokens: 128,
            trained_tokens: 100,
            seconds: 2.0,
        });
        let mut report = with_events(dir.path(), |_| ());
        report(JobReport::Started { steps: 300, done: 298, parameters: 1 });
        report(step);
        report(JobReport::Validation(Validation { step: 299, valid_loss: 1.25, valid_mean_token_accuracy: 0.75 }));
        report(JobReport::Succeeded);

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
