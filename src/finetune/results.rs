//! The results of a job besides its adapter: its metrics as CSV, and a plot of its losses.

use std::fs;
use std::path::Path;

use base64::prelude::{BASE64_STANDARD, Engine};

use crate::plot::Chart;
use crate::train::job::{StepMetrics, Validation};
use crate::{Error, Result};

/// File name of the metrics.
pub const CSV: &str = "training_metrics.csv";
/// File name of the plot.
pub const PLOT: &str = "loss.svg";
/// Name of the metrics as a file of the API.
pub const METRICS_FILE: &str = "step_metrics.csv";

/// The metrics as the content of a file of the API. OpenAI's server sends them in base64, and its examples decode them.
pub fn encode_metrics(csv: &[u8]) -> Vec<u8> {
    BASE64_STANDARD.encode(csv).into_bytes()
}

/// The CSV of such a content. Errors: it is not base64.
pub fn decode_metrics(content: &[u8]) -> Result<Vec<u8>> {
    BASE64_STANDARD.decode(content).map_err(|e| Error::internal(format!("the metrics of a job are damaged: {e}")))
}

/// Writes [`CSV`] and [`PLOT`] into `dir`. Errors: they cannot be written.
pub fn write(dir: &Path, steps: &[StepMetrics], validations: &[Validation]) -> Result<()> {
    fs::write(dir.join(CSV), csv(steps, validations))?;
    let train = steps.iter().map(|m| (m.step as f64, m.train_loss)).collect();
    let mut lines = vec![("training".to_owned(), train)];
    if !validations.is_empty() {
        lines.push(("held out".to_owned(), curve(validations)));
    }
    fs::write(dir.join(PLOT), loss_chart("Loss", lines).svg()?)?;
    Ok(())
}

/// The held-out loss as points of a chart: step and loss of each validation.
pub fn curve(validations: &[Validation]) -> Vec<(f64, f64)> {
    validations.iter().map(|v| (v.step as f64, v.valid_loss)).collect()
}

/// A chart of losses over steps, with one named line for each run or data set.
pub fn loss_chart(title: &str, mut lines: Vec<(String, Vec<(f64, f64)>)>) -> Chart {
    // A diverged run has losses that cannot be drawn.
    lines.iter_mut().for_each(|(_, points)| points.retain(|(_, loss)| loss.is_finite()));
    let (x, y) = ("step".to_owned(), "nats a token".to_owned());
    Chart { title: title.to_owned(), x, y, tight: true, lines, ..Chart::default() }
}

/// Metrics of all steps, with the columns of OpenAI's API first.
fn csv(steps: &[StepMetrics], validations: &[Validation]) -> String {
    let mut csv = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,learning_rate,grad_norm,tokens,\
                   trained_tokens,seconds\n"
        .to_owned();
    for m in steps {
        let valid = validations.iter().find(|v| v.step == m.step);
        let cell = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        let (loss, accuracy) = (valid.map(|v| v.valid_loss), valid.map(|v| v.valid_mean_token_accuracy));
        csv += &format!(
            "{},{},{},{},{},{},{},{},{},{}\n",
            m.step,
            m.train_loss,
            m.train_mean_token_accuracy,
            cell(loss),
            cell(accuracy),
            m.learning_rate,
            m.grad_norm,
            m.tokens,
            m.trained_tokens,
            m.seconds
        );
    }
    csv
}
