//! `quiver train`: a fine-tuning job without a server. Same settings, same trainer, same adapter.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::adapter::peft;
use crate::arch::ModelConfig;
use crate::config::BaseConfig;
use crate::engine::BackgroundWork;
use crate::finetune::history::MetricsHistory;
use crate::finetune::prepare::{Prepared, prepare, provenance};
use crate::finetune::{results, settings, tensorboard};
use crate::lora::weights::AdapterWeights;
use crate::model::decoder::Decoder;
use crate::runtime::BaseModel;
use crate::text::codec::TextCodec;
use crate::train::data::AlpacaEnding;
use crate::train::job::{Command, Job, JobReport, StepMetrics};
use crate::train::spec::{JobSpec, LoraInit, LrSchedule, OptimizerKind};
use crate::train::state;
use crate::train::trainer::Trainer;
use crate::{Error, Result};

/// Examples that a dry run shows.
const SHOWN: usize = 3;

/// Rows of the table at the end.
const ROWS: usize = 12;

/// What to learn, how, and where to put it.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// What to learn from: JSON Lines of OpenAI chats, prompts and completions, Alpaca, ShareGPT or text
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// What to measure on
    #[arg(long, value_name = "FILE")]
    validation_file: Option<PathBuf>,
    /// Where the adapter goes
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Go on with what was interrupted in --out; give the same settings
    #[arg(long)]
    resume: bool,
    /// Show the first examples and what training would take, and do nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    point: Point,
    #[command(flatten)]
    base: BaseConfig,
}

/// The settings that a sweep varies.
#[derive(Debug, Clone, Default, Args)]
pub struct Point {
    /// Learning rate [default: 2e-4]
    #[arg(long, help_heading = "Training")]
    pub lr: Option<f64>,
    /// Rank [default: 16]
    #[arg(long, value_name = "RANK", help_heading = "Adapter")]
    pub r: Option<u64>,
    /// Linears to change, separated by commas [default: all-linear]
    #[arg(long, value_name = "NAMES", value_delimiter = ',', help_heading = "Adapter")]
    pub target_modules: Vec<String>,
}

/// The other settings of a job; what is left out is chosen as the API chooses it.
#[derive(Debug, Args)]
#[command(next_help_heading = "Training")]
pub struct Settings {
    /// Passes over the file [default: 3; more for few examples]
    #[arg(long, value_name = "N")]
    pub epochs: Option<u64>,
    /// Stop after this many optimiser steps
    #[arg(long, value_name = "N")]
    pub max_steps: Option<u64>,
    /// Examples of a pass [default: by the number of examples, 4 to 16]
    #[arg(long, value_name = "N")]
    batch_size: Option<u64>,
    /// Passes of an optimiser step [default: 1]
    #[arg(long, value_name = "N")]
    gradient_accumulation: Option<u64>,
    /// What happens to the learning rate after the warm-up [default: linear]
    #[arg(long)]
    scheduler: Option<LrSchedule>,
    /// Optimiser steps of warm-up
    #[arg(long, value_name = "N")]
    warmup_steps: Option<u64>,
    /// The same as a share of all steps [default: 0.03]
    #[arg(long, value_name = "SHARE")]
    warmup_ratio: Option<f64>,
    /// AdamW's weight decay [default: 0]
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest norm of the gradients [default: 1]
    #[arg(long)]
    clip: Option<f64>,
    /// The optimiser [default: adamw]
    #[arg(long)]
    optim: Option<OptimizerKind>,
    /// Longest example; longer ones are cut at the end [default: 2048]
    #[arg(long, value_name = "TOKENS")]
    max_length: Option<u64>,
    /// Let examples share rows
    #[arg(long)]
    packing: bool,
    /// Train on prompts too
    #[arg(long)]
    train_on_inputs: bool,
    /// How Alpaca prompts end [default: colon]
    #[arg(long)]
    alpaca_ending: Option<AlpacaEnding>,
    /// Optimiser steps between checkpoints [default: an epoch]
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<u64>,
    /// Optimiser steps between validations [default: a checkpoint]
    #[arg(long, value_name = "N")]
    pub eval_every: Option<u64>,
    /// End after this many validations without a better loss
    #[arg(long, value_name = "N")]
    early_stopping: Option<u64>,
    /// Adapter directory to continue from
    #[arg(long, value_name = "DIR")]
    from_checkpoint: Option<String>,
    /// Seeds values, order and dropout [default: 42]
    #[arg(long)]
    seed: Option<u64>,
    /// Scale times rank [default: twice the rank]
    #[arg(long, help_heading = "Adapter")]
    alpha: Option<f64>,
    /// Share of inputs left out at random [default: 0]
    #[arg(long, help_heading = "Adapter")]
    dropout: Option<f64>,
    /// Scale by alpha / sqrt(r)
    #[arg(long, help_heading = "Adapter")]
    use_rslora: bool,
    /// Learning rate of B over that of A (LoRA+)
    #[arg(long, value_name = "RATIO", help_heading = "Adapter")]
    loraplus_lr_ratio: Option<f64>,
    /// Train magnitude and direction apart (DoRA)
    #[arg(long, help_heading = "Adapter")]
    use_dora: bool,
    /// Values to start from [default: default]
    #[arg(long, help_heading = "Adapter")]
    init: Option<LoraInit>,
    /// Choose ranks by importance (AdaLoRA), with settings such as init_r=12,target_r=8,tinit=20,tfinal=60,deltaT=1
    #[arg(
        long,
        value_name = "KEY=VALUE,...",
        num_args = 0..=1,
        default_missing_value = "",
        value_parser = pairs,
        help_heading = "Adapter"
    )]
    adalora: Option<Map<String, Value>>,
}

/// `a=1,b=2` as an object of numbers.
fn pairs(text: &str) -> Result<Map<String, Value>, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=')?;
        Some((key.to_owned(), serde_json::from_str::<serde_json::Number>(value).ok()?.into()))
    };
    let pairs = text.split(',').filter(|part| !part.is_empty());
    pairs.map(pair).collect::<Option<_>>().ok_or_else(|| "must be KEY=NUMBER, separated by commas".to_owned())
}

impl Settings {
    /// As a request to the API has them.
    pub fn json(&self, point: &Point) -> Value {
        let target_modules = match &point.target_modules[..] {
            [] => Value::Null,
            [all] if all == "all-linear" => json!(all),
            names => json!(names),
        };
        json!({
            "hyperparameters": {"n_epochs": self.epochs, "batch_size": self.batch_size},
            "seed": self.seed,
            "lora": {
                "r": point.r,
                "alpha": self.alpha,
                "dropout": self.dropout,
                "target_modules": target_modules,
                "use_rslora": self.use_rslora,
                "loraplus_lr_ratio": self.loraplus_lr_ratio,
                "use_dora": self.use_dora,
                "init": self.init,
                "adalora": self.adalora,
            },
            "training": {
                "lr": point.lr,
                "scheduler": self.scheduler,
                "warmup_steps": self.warmup_steps,
                "warmup_ratio": self.warmup_ratio,
                "weight_decay": self.weight_decay,
                "clip": self.clip,
                "optim": self.optim,
                "gradient_accumulation": self.gradient_accumulation,
                "max_length": self.max_length,
                "packing": self.packing,
                "train_on_inputs": self.train_on_inputs,
                "alpaca_ending": self.alpaca_ending,
                "max_steps": self.max_steps,
                "checkpoint_every": self.checkpoint_every,
                "eval_every": self.eval_every,
                "early_stopping": self.early_stopping,
                "from_checkpoint": self.from_checkpoint,
            },
        })
    }
}

impl TrainArgs {
    /// Trains, and says where the adapter is.
    pub fn run(self) -> Result<()> {
        let BaseModel { files, codec, weights, .. } = BaseModel::load(&self.base)?;
        let longest = weights.config.max_position_embeddings;
        let train = read(&self.file)?;
        let valid = self.validation_file.as_deref().map(read).transpose()?;
        let prepared = prepare(&codec, &self.settings.json(&self.point), longest, &train, valid.as_deref())?;
        announce(&prepared);
        if self.dry_run {
            return show(&prepared, &codec);
        }
        let dir = self.out.join("checkpoints");
        if !self.resume && dir.exists() {
            return Err(Error::invalid(format!(
                "{} has checkpoints already: pass --resume to go on with them, or another --out",
                self.out.display()
            )));
        }
        std::fs::create_dir_all(&dir)?;
        let from = continued(&prepared.spec, &weights.config)?;
        let (told, reports) = channel();
        let job = Job {
            id: "train".into(),
            provenance: provenance(&files.name, &weights.fingerprint, &codec, &prepared.train)?,
            train: prepared.train.examples,
            valid: prepared.valid.map(|valid| valid.examples).unwrap_or_default(),
            spec: prepared.spec,
            from,
            resume: state::exists(&dir),
            dir: dir.clone(),
            // The receiver lives as long as the loop that trains.
            report: tensorboard::with_events(&self.out, move |report| drop(told.send(report))),
        };
        let (commands, inbox) = channel();
        let trainer = Trainer::new(Arc::new(Decoder::new(weights)?), inbox)?;
        let _interrupts = on_interrupt(move |command| drop(commands.send(command)), Command::Start(Box::new(job)))?;
        let run = follow(trainer, &reports, MetricsHistory::new(&dir))?;
        self.finish(&run)?;
        // Not before all is in its place: without its state it would begin anew after a kill.
        state::remove(&dir)
    }

    /// Puts the last checkpoint where it was asked for.
    fn finish(&self, run: &Run) -> Result<()> {
        let Some(last) = &run.adapter else {
            let again = "interrupted; the same command with --resume goes on from here";
            return Err(Error::invalid(again));
        };
        for entry in std::fs::read_dir(last)? {
            let entry = entry?;
            std::fs::copy(entry.path(), self.out.join(entry.file_name()))?;
        }
        results::write(&self.out, &run.history.steps, &run.history.validations)?;
        run.print();
        println!("\nadapter   {}", self.out.display());
        println!("serve it  quiver serve --adapter NAME={}", self.out.display());
        Ok(())
    }
}

/// A file of examples.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Error::invalid(format!("{} cannot be read: {e}", path.display())))
}

/// The adapter that a job continues from.
pub fn continued(spec: &JobSpec, model: &ModelConfig) -> Result<Option<AdapterWeights>> {
    let read = |dir: &String| Ok(peft::read(Path::new(dir), model)?.0);
    spec.from_checkpoint.as_ref().map(read).transpose()
}

/// Says what will be done.
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

/// Shows the first examples.
fn show(prepared: &Prepared, codec: &TextCodec) -> Result<()> {
    println!("\nexamples, with what is trained between ⟦ and ⟧:");
    for example in prepared.train.preview(SHOWN, codec)? {
        println!("\n{}\n{:?}", example.text, example.token_ids);
    }
    Ok(())
}

/// Sends `first`, and a pause when the user interrupts. The runtime waits for that as long as it lives.
fn on_interrupt(send: impl Fn(Command) + Send + 'static, first: Command) -> Result<tokio::runtime::Runtime> {
    let Command::Start(job) = &first else { return Err(Error::internal("the first command starts a job")) };
    let id = job.id.clone();
    send(first);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.spawn(async move {
        // Without it, an interrupt just ends the process.
        if tokio::signal::ctrl_c().await.is_ok() {
            eprintln!("\ninterrupted: keeping the state (again: leave at once)");
            send(Command::Pause(id));
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        }
    });
    Ok(runtime)
}

/// What came of a job.
struct Run {
    /// Time without what went before an interruption.
    took: Duration,
    /// Steps that went before.
    done: usize,
    /// All figures, those before an interruption too.
    history: MetricsHistory,
    /// The last checkpoint, once all is done.
    adapter: Option<PathBuf>,
}

/// A bar of steps, on a terminal.
pub fn step_bar() -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    bar.set_style(
        ProgressStyle::with_template("{wide_bar} step {pos}/{len} {msg} {elapsed} of {eta}")
            .expect("a constant template"),
    );
    bar
}

/// Runs the trainer to the job's end, with a bar.
fn follow(mut trainer: Trainer, reports: &Receiver<JobReport>, history: MetricsHistory) -> Result<Run> {
    let (began, mut last) = (Instant::now(), None);
    let mut run = Run { took: Duration::ZERO, done: 0, history, adapter: None };
    let bar = step_bar();
    let say = |line: String| bar.suspend(|| println!("{line}"));
    loop {
        let worked = trainer.run_slice() || trainer.settle();
        for report in reports.try_iter() {
            run.history.add(&report)?;
            match report {
                JobReport::Started { steps, done, parameters } => {
                    run.done = done;
                    bar.set_length(steps as u64);
                    bar.set_position(done as u64);
                    say(format!("training  {parameters} values, {steps} steps, {done} done"));
                }
                JobReport::Step(m) => {
                    bar.set_position(m.step as u64);
                    bar.set_message(format!("loss {:.3}, {:.0} tok/s", m.train_loss, m.tokens as f64 / m.seconds));
                }
                JobReport::Validation(v) => say(format!("step {}: held-out loss {:.4}", v.step, v.valid_loss)),
                JobReport::Checkpoint(checkpoint) | JobReport::Resumed(checkpoint) => last = Some(checkpoint.dir),
                JobReport::Succeeded => run.adapter = last.take(),
                JobReport::Failed(error) => return Err(error),
                JobReport::Paused | JobReport::Cancelled => {}
            }
        }
        if !worked {
            bar.finish_and_clear();
            run.took = began.elapsed();
            return Ok(run);
        }
    }
}

impl Run {
    /// A table of losses.
    fn print(&self) {
        println!("\n| step | train loss | token accuracy | held-out loss | learning rate |\n|---|---|---|---|---|");
        let MetricsHistory { steps, validations, .. } = &self.history;
        let rows = steps.chunks(steps.len().div_ceil(ROWS).max(1));
        for row in rows {
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
        let tokens: usize = steps.iter().filter(|m| m.step > self.done).map(|m| m.tokens).sum();
        let seconds = self.took.as_secs_f64();
        println!("\n{tokens} tokens in {seconds:.1} s: {:.0} tok/s", tokens as f64 / seconds);
    }
}
