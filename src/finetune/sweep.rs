//! Files of a sweep: the runs as CSV and JSON, and a chart of the best.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::results;
use crate::train::sweep::SweepOutcome;
use crate::{Error, Result};

/// Runs in the chart: more lines cannot be told apart.
const CHARTED: usize = 7;

/// A run of a sweep.
pub(crate) struct SweepRun<'a> {
    /// Learning rate.
    pub(crate) lr: f64,
    /// Rank.
    pub(crate) r: u64,
    /// Target modules, separated by spaces.
    pub(crate) target_modules: String,
    /// Settings of the full job, as in a request to the fine-tuning API.
    pub(crate) settings: &'a Value,
    /// Result of the run.
    pub(crate) outcome: &'a SweepOutcome,
}

impl SweepRun<'_> {
    /// The last training loss.
    pub(crate) fn train_loss(&self) -> String {
        self.outcome.steps.last().map_or(String::new(), |m| format!("{:.4}", m.train_loss))
    }

    /// The held-out loss; `None` if the run failed or diverged.
    pub(crate) fn valid_loss(&self) -> Option<String> {
        self.outcome.loss().map(|loss| format!("{loss:.4}"))
    }

    /// Why the run has no held-out loss.
    pub(crate) fn failure(&self) -> String {
        self.outcome.error.as_ref().map_or("diverged".to_owned(), |error| error.message.clone())
    }

    fn csv(&self) -> String {
        let Self { lr, r, target_modules, outcome, .. } = self;
        let (train, valid) = (self.train_loss(), self.valid_loss().unwrap_or_default());
        format!("{lr},{r},{target_modules},{},{train},{valid}\n", outcome.parameters)
    }

    fn json(&self) -> Value {
        let outcome = self.outcome;
        json!({
            "settings": self.settings, "parameters": outcome.parameters, "valid_loss": outcome.loss(),
            "error": outcome.error.as_ref().map(|error| &error.message),
            "steps": outcome.steps, "validations": outcome.validations,
        })
    }
}

/// Settings of the best of the runs, which are ranked best first. Errors: no run has a held-out loss.
pub(crate) fn best<'a>(runs: &[SweepRun<'a>]) -> Result<&'a Value> {
    let best = runs.first().filter(|run| run.outcome.loss().is_some()).map(|run| run.settings);
    best.ok_or_else(|| Error::invalid("no run has a held-out loss: all failed or diverged"))
}

/// Writes `sweep.csv`, `sweep.json` and `sweep.svg` into `dir`. Returns the path of the chart.
pub(crate) fn write(dir: &Path, runs: &[SweepRun]) -> Result<PathBuf> {
    let csv: String = runs.iter().map(SweepRun::csv).collect();
    let report = json!({"best": best(runs).ok(), "runs": runs.iter().map(SweepRun::json).collect::<Vec<_>>()});
    let line = |run: &SweepRun| {
        let SweepRun { lr, r, target_modules, .. } = run;
        (format!("lr {lr}, r {r}, {target_modules}"), results::curve(&run.outcome.validations))
    };
    let lines = runs.iter().take(CHARTED).map(line).collect();
    std::fs::write(dir.join("sweep.csv"), "lr,r,target_modules,parameters,train_loss,valid_loss\n".to_owned() + &csv)?;
    std::fs::write(dir.join("sweep.json"), format!("{report:#}\n"))?;
    let chart = dir.join("sweep.svg");
    std::fs::write(&chart, results::loss_chart("Held-out loss", lines).svg()?)?;
    Ok(chart)
}
