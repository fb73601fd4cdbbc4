//! `quiver train`: a fine-tuning job without a server, with the settings, trainer and adapters of the API.

use std::io::IsTerminal;
use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::train_settings::{SweptSettings, TrainSettings};
use crate::Result;
use crate::config::BaseConfig;
use crate::finetune::history::MetricsHistory;
use crate::finetune::local::{FinishedJob, LocalJob, read};
use crate::finetune::prepare::{Prepared, prepare};
use crate::finetune::settings;
use crate::runtime::BaseModel;
use crate::text::codec::TextCodec;
use crate::train::job::{JobReport, StepMetrics};

/// Examples that a dry run shows.
const PREVIEWED: usize = 3;

/// Rows of the final table.
const TABLE_ROWS: usize = 12;

/// Arguments of `quiver train`.
#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Training file: JSON Lines of OpenAI chats, prompts and completions, Alpaca, ShareGPT or text
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Validation file, in the same formats
    #[arg(long, value_name = "FILE")]
    validation_file: Option<PathBuf>,
    /// Write the adapter to this directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Continue an interrupted job in --out; pass the same settings
    #[arg(long)]
    resume: bool,
    /// Show the first examples and an estimate of the training time, and train nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    settings: TrainSettings,
    #[command(flatten)]
    swept: SweptSettings,
    #[command(flatten)]
    base: BaseConfig,
}

impl TrainArgs {
    /// Trains, and prints a table of losses and the adapter's directory.
    pub(super) fn run(self) -> Result<()> {
        let base = BaseModel::load(&self.base)?;
        let longest = base.weights.config.max_position_embeddings;
        let train = read(&self.file)?;
        let valid = self.validation_file.as_deref().map(read).transpose()?;
        let prepared = prepare(&base.codec, &self.settings.json(&self.swept), longest, &train, valid.as_deref())?;
        announce(&prepared);
        if self.dry_run {
            return preview(&prepared, &base.codec);
        }
        let job = LocalJob::start(base, prepared, &self.out, self.resume)?;
        let _interrupts = on_interrupt(job.pause())?;
        let progress = TrainProgress { bar: step_bar() };
        let job = job.run(|report| progress.show(report))?;
        progress.bar.finish_and_clear();
        job.install()?;
        print_losses(&job);
        println!("\nadapter   {}", self.out.display());
        println!("serve it  quiver serve --adapter NAME={}", self.out.display());
        job.remove_state()
    }
}

/// Prints the data and the settings.
fn announce(prepared: &Prepared) {
    let (spec, counts) = (&prepared.spec, &prepared.train.statistics);
    let (hyperparameters, lora, training) = settings::describe(spec);
    println!(
        "data      {} examples, {} tokens, {} of them trained",
        counts.examples, counts.tokens, counts.trained_tokens
    );
    if let Some(valid) = &prepared.valid {
        println!("held out  {} examples", valid.statistics.examples);
    }
    prepared.remarks().iter().for_each(|note| println!("note      {note}"));
    for (name, settings) in [("passes", hyperparameters), ("adapter", lora), ("training", training)] {
        println!("{name:<9} {settings}");
    }
    println!("estimate  {}", prepared.train.estimate(spec, None));
}

/// Prints the first examples.
fn preview(prepared: &Prepared, codec: &TextCodec) -> Result<()> {
    println!("\nexamples, with trained spans between ⟦ and ⟧:");
    for example in prepared.train.preview(PREVIEWED, codec)? {
        println!("\n{}\n{:?}", example.text, example.token_ids);
    }
    Ok(())
}

/// Calls `pause` on the first ctrl-C and ends the process on the second, as long as the returned runtime lives.
fn on_interrupt(pause: impl Fn() + Send + 'static) -> Result<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(async move {
        // If ctrl-C cannot be caught, it ends the process.
        if tokio::signal::ctrl_c().await.is_ok() {
            eprintln!("\ninterrupted: saving the state (press again to exit at once)");
            pause();
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        }
    });
    Ok(runtime)
}

/// A progress bar of optimiser steps, hidden if stderr is not a terminal.
pub(super) fn step_bar() -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} step {pos}/{len} {msg} {elapsed} of {eta}")
            .expect("a constant template"),
    );
    bar
}

/// Shows a job's reports.
struct TrainProgress {
    bar: ProgressBar,
}

impl TrainProgress {
    fn show(&self, report: &JobReport) {
        let (bar, say) = (&self.bar, |line: String| self.bar.suspend(|| println!("{line}")));
        match report {
            JobReport::Started { steps, done, parameters } => {
                bar.set_length(*steps as u64);
                bar.set_position(*done as u64);
                say(format!("training  {parameters} parameters, {steps} steps, {done} done"));
            }
            JobReport::Step(m) => {
                bar.set_position(m.step as u64);
                bar.set_message(format!("loss {:.3}, {:.0} tok/s", m.train_loss, m.tokens as f64 / m.seconds));
            }
            JobReport::Validation(v) => say(format!("step {}: held-out loss {:.4}", v.step, v.valid_loss)),
            _ => {}
        }
    }
}

/// Prints a table of losses and the speed.
fn print_losses(job: &FinishedJob) {
    println!("\n| step | train loss | token accuracy | held-out loss | learning rate |\n|---|---|---|---|---|");
    let MetricsHistory { steps, validations, .. } = &job.history;
    for row in steps.chunks(steps.len().div_ceil(TABLE_ROWS).max(1)) {
        let mean = |of: fn(&StepMetrics) -> f64| row.iter().map(of).sum::<f64>() / row.len() as f64;
        let last = &row[row.len() - 1];
        let valid = validations.iter().rev().find(|v| row[0].step <= v.step && v.step <= last.step);
        println!(
            "| {} | {:.4} | {:.3} | {} | {:.2e} |",
            last.step,
            mean(|m| m.train_loss),
            mean(|m| m.train_mean_token_accuracy),
            valid.map_or(String::new(), |v| format!("{:.4}", v.valid_loss)),
            last.learning_rate
        );
    }
    let tokens: usize = steps.iter().filter(|m| m.step > job.done).map(|m| m.tokens).sum();
    let seconds = job.took.as_secs_f64();
    println!("\n{tokens} tokens in {seconds:.1} s: {:.0} tok/s", tokens as f64 / seconds);
}
