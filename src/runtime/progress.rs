//! Progress of a load: a bar on a terminal, otherwise lines in the log.

use std::cell::Cell;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Interval between log lines. A model that loads faster logs none.
const LOG_EVERY: Duration = Duration::from_secs(5);

/// Shows how much of a model's weights is loaded.
pub(super) struct LoadProgress {
    /// Counts thousandths; hidden if stderr is not a terminal.
    bar: ProgressBar,
    /// Time of the last log line.
    logged: Cell<Instant>,
}

impl LoadProgress {
    pub(super) fn new(model: &str) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("loading {msg} {wide_bar} {percent}% {elapsed}")
                .expect("a constant template");
            ProgressBar::new(1000).with_style(style).with_message(model.to_owned())
        } else {
            ProgressBar::hidden()
        };
        Self { bar, logged: Cell::new(Instant::now()) }
    }

    /// Shows the loaded share, in [0, 1].
    pub(super) fn show(&self, share: f32) {
        self.bar.set_position((share * 1000.0) as u64);
        if self.bar.is_hidden() && self.logged.get().elapsed() >= LOG_EVERY {
            self.logged.set(Instant::now());
            tracing::info!("{:.0}% of the weights are loaded", 100.0 * share);
        }
    }

    /// Removes the bar.
    pub(super) fn finish(self) {
        self.bar.finish_and_clear();
    }
}
