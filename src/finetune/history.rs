//! The metrics of a job without a store, in a file of JSON lines.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::train::job::{JobReport, StepMetrics, Validation};
use crate::{Error, Result, files};

/// Name of the file in a job's directory.
const HISTORY: &str = "metrics.jsonl";

/// The metrics of all runs of a job, in memory and in a file. A resumed run reads the metrics of earlier runs from the file.
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
    fn json(self) -> Result<String> {
        serde_json::to_string(&self).map(|line| line + "\n").map_err(|e| Error::internal(e.to_string()))
    }

    fn step(self) -> usize {
        match self {
            Self::Step(metrics) => metrics.step,
            Self::Validation(validation) => validation.step,
        }
    }
}

impl MetricsHistory {
    /// The history of the job with the directory `dir`. It is empty until [`JobReport::Started`].
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join(HISTORY), steps: Vec::new(), validations: Vec::new() }
    }

    /// Adds the metrics of a report. [`JobReport::Started`] reads the metrics of earlier runs up to the step from which the job
    /// continues, and discards the rest. Errors: the file cannot be read or written.
    pub fn add(&mut self, report: &JobReport) -> Result<()> {
        let line = match *report {
            JobReport::Started { done, .. } => return self.restore(done),
            JobReport::Step(step) => HistoryLine::Step(step),
            JobReport::Validation(validation) => HistoryLine::Validation(validation),
            _ => return Ok(()),
        };
        self.push(line);
        Ok(append(&self.path, line.json()?.as_bytes())?)
    }

    fn push(&mut self, line: HistoryLine) {
        match line {
            HistoryLine::Step(step) => self.steps.push(step),
            HistoryLine::Validation(validation) => {
                // After a kill, a validation may run again after the same step.
                self.validations.retain(|v| v.step != validation.step);
                self.validations.push(validation);
            }
        }
    }

    fn restore(&mut self, done: usize) -> Result<()> {
        let text = match fs::read_to_string(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => String::new(),
            text => text?,
        };
        // A kill may have left the last line incomplete.
        let lines = text.lines().filter_map(|line| serde_json::from_str::<HistoryLine>(line).ok());
        let mut kept = String::new();
        for line in lines.filter(|line| line.step() <= done) {
            self.push(line);
            kept += &line.json()?;
        }
        Ok(files::replace(&self.path, |temporary| fs::write(temporary, kept))?)
    }
}

/// Appends to a file in one write, so that readers see whole records.
pub(super) fn append(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    File::options().create(true).append(true).open(path)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_resumed_run_keeps_the_metrics_up_to_its_first_step() {
        let dir = tempfile::tempdir().unwrap();
        let valid =
            |step| JobReport::Validation(Validation { step, valid_loss: 1.25, valid_mean_token_accuracy: 0.75 });
        let run = |done, reports: &[JobReport]| {
            let mut history = MetricsHistory::new(dir.path());
            history.add(&JobReport::Started { steps: 9, done, parameters: 1 }).unwrap();
            reports.iter().for_each(|report| history.add(report).unwrap());
            let validations: Vec<usize> = history.validations.iter().map(|v| v.step).collect();
            (history.steps.iter().map(|m| m.step).collect::<Vec<_>>(), validations)
        };
        let first = [step(1), step(2), valid(2), step(3), valid(3)];
        assert_eq!(run(0, &first), (vec![1, 2, 3], vec![2, 3]));
        append(&dir.path().join(HISTORY), b"{\"step\":{\"step\":1,\"train").unwrap();
        assert_eq!(run(2, &[valid(2), step(3)]), (vec![1, 2, 3], vec![2]));
        assert_eq!(run(3, &[]), (vec![1, 2, 3], vec![2]));
        assert_eq!(run(0, &[step(1)]), (vec![1], vec![]), "a job that starts from the beginning");
    }
}
