//! `quiver sweep`: short runs that find the best learning rate, rank and target modules.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::Value;

use super::train::step_bar;
use super::train_settings::{SweptSettings, TrainSettings};
use crate::arch::ModelConfig;
use crate::config::BaseConfig;
use crate::fields::Fields;
use crate::finetune::local::{adapter_to_continue, read};
use crate::finetune::prepare::{Prepared, prepare};
use crate::finetune::settings;
use crate::finetune::sweep::{self as sweep_files, SweepRun};
use crate::lora::weights::AdapterWeights;
use crate::model::decoder::Decoder;
use crate::runtime::BaseModel;
use crate::train::data::Dataset;
use crate::train::job::JobReport;
use crate::train::spec::JobSpec;
use crate::train::sweep::{self, SweepOutcome};
use crate::{Error, Result};

/// Optimiser steps of a run by default.
const STEPS: u64 = 50;

/// Validations of a run by default.
const VALIDATIONS: u64 = 5;

/// Arguments of `quiver sweep`.
#[derive(Debug, Args)]
pub(super) struct SweepArgs {
    /// Training file, in the formats of `quiver train`
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// Validation file [default: every tenth example of the training file]
    #[arg(long, value_name = "FILE")]
    validation_file: Option<PathBuf>,
    /// Write sweep.csv, sweep.json and sweep.svg to this directory
    #[arg(long, value_name = "DIR", default_value = "sweep")]
    out: PathBuf,
    /// Learning rates
    #[arg(long, value_delimiter = ',', default_value = "1e-4,2e-4,5e-4")]
    lr: Vec<f64>,
    /// Ranks
    #[arg(long, value_name = "RANKS", value_delimiter = ',', default_value = "4,8,16")]
    r: Vec<u64>,
    /// Sets of modules, separated by semicolons
    #[arg(long, value_name = "NAMES;...", value_delimiter = ';', default_value = "all-linear")]
    target_modules: Vec<String>,
    /// Runs that are trained together, sharing passes over the base
    #[arg(long, value_name = "N", default_value_t = 4)]
    together: usize,
    #[command(flatten)]
    settings: TrainSettings,
    #[command(flatten)]
    base: BaseConfig,
}

impl SweepArgs {
    /// Trains all runs, and prints a table and the command that trains the best settings in full.
    pub(super) fn run(mut self) -> Result<()> {
        let full = self.combinations();
        self.shorten();
        let short = self.combinations();
        let Some(first) = short.first() else { return Err(Error::invalid("there is nothing to try")) };

        let BaseModel { codec, weights, .. } = BaseModel::load(&self.base)?;
        let longest = weights.config.max_position_embeddings;
        let file = read(&self.file)?;
        let valid = self.validation_file.as_deref().map(read).transpose()?;
        // The swept settings do not change how the files are read.
        let Prepared { train, valid, .. } = prepare(&codec, first, longest, &file, valid.as_deref())?;
        let runs =
            short.iter().map(|settings| run_of(settings, &weights.config, &train)).collect::<Result<Vec<_>>>()?;
        let (train, valid) = match valid {
            Some(valid) => (train.examples, valid.examples),
            None => sweep::hold_out(train.examples),
        };
        if train.is_empty() {
            return Err(Error::invalid("one example is too few: a sweep needs one to train on and one to validate on"));
        }
        println!("{} runs on {} examples, {} held out", runs.len(), train.len(), valid.len());
        std::fs::create_dir_all(&self.out)?;
        let bar = step_bar();
        let show = |report: &JobReport| match report {
            JobReport::Started { steps, .. } => bar.inc_length(*steps as u64),
            JobReport::Step(_) => bar.inc(1),
            _ => {}
        };
        let model = Arc::new(Decoder::new(weights)?);
        let outcomes = sweep::run(&model, runs, (&train, &valid), self.together, &self.out, show)?;
        bar.finish_and_clear();
        self.report(&full, &outcomes)
    }

    /// Every combination of the swept settings.
    fn points(&self) -> Vec<SweptSettings> {
        let mut points = Vec::new();
        for names in &self.target_modules {
            let target_modules: Vec<String> = names.split(',').map(|name| name.trim().to_owned()).collect();
            for &r in &self.r {
                let point = |&lr| SweptSettings { lr: Some(lr), r: Some(r), target_modules: target_modules.clone() };
                points.extend(self.lr.iter().map(point));
            }
        }
        points
    }

    /// Settings of every combination, as in requests to the fine-tuning API.
    fn combinations(&self) -> Vec<Value> {
        self.points().iter().map(|point| self.settings.json(point)).collect()
    }

    /// Limits the steps of the runs, validates regularly, and writes a checkpoint only at the end, which every run has.
    fn shorten(&mut self) {
        if self.settings.epochs.is_none() {
            self.settings.max_steps.get_or_insert(STEPS);
        }
        if let Some(steps) = self.settings.max_steps {
            self.settings.eval_every.get_or_insert((steps / VALIDATIONS).max(1));
        }
        self.settings.checkpoint_every = Some(i64::MAX as u64);
    }

    /// Prints and writes the outcomes, best first, and prints the command for the best. `settings` are those of the full jobs.
    fn report(&self, settings: &[Value], outcomes: &[SweepOutcome]) -> Result<()> {
        let points = self.points();
        let run = |i: usize| SweepRun {
            lr: points[i].lr.unwrap_or_default(),
            r: points[i].r.unwrap_or_default(),
            target_modules: points[i].target_modules.join(" "),
            settings: &settings[i],
            outcome: &outcomes[i],
        };
        let runs: Vec<SweepRun> = sweep::ranked(outcomes).into_iter().map(run).collect();
        println!("\n| lr | r | target modules | parameters | train loss | held-out loss |\n|---|---|---|---|---|---|");
        for run in &runs {
            let SweepRun { lr, r, target_modules, outcome, .. } = run;
            let (train, valid) = (run.train_loss(), run.valid_loss().unwrap_or_else(|| run.failure()));
            println!("| {lr} | {r} | {target_modules} | {} | {train} | {valid} |", outcome.parameters);
        }
        let chart = sweep_files::write(&self.out, &runs)?;
        println!("\ncurves  {}", chart.display());
        let best = sweep_files::best(&runs)?;
        let validation = self.validation_file.as_ref().map(|file| format!(" --validation-file {}", file.display()));
        println!(
            "best    quiver train --model {} --file {}{} --out DIR {}",
            self.base.model,
            self.file.display(),
            validation.unwrap_or_default(),
            flags(best).join(" ")
        );
        Ok(())
    }
}

/// The job of a run, with the adapter that it continues from.
fn run_of(settings: &Value, model: &ModelConfig, train: &Dataset) -> Result<(JobSpec, Option<AdapterWeights>)> {
    let spec = settings::spec(&Fields::of_body(settings)?, model.max_position_embeddings, Some(train))?;
    let from = adapter_to_continue(&spec, model)?;
    Ok((spec, from))
}

/// Settings as flags of `quiver train`, without those that shorten the runs of a sweep.
fn flags(settings: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut flags = Vec::new();
    let groups = ["hyperparameters", "lora", "training"].map(|group| settings[group].as_object());
    let seed = ("seed".to_owned(), settings["seed"].clone());
    let groups = groups.into_iter().flatten().flatten().map(|(name, value)| (name.clone(), value.clone()));
    for (name, value) in groups.chain([seed]) {
        let flag = format!("--{}", name.trim_start_matches("n_").replace('_', "-"));
        match value {
            Value::Null | Value::Bool(false) => {}
            _ if name == "max_steps" => {}
            Value::Bool(true) => flags.push(flag),
            Value::Array(list) => flags.extend([flag, list.iter().map(text).collect::<Vec<_>>().join(",")]),
            Value::Object(pairs) => {
                let pairs: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
                flags.extend([flag, pairs.join(",")]);
            }
            value => flags.extend([flag, text(&value)]),
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct SweepCommand {
        #[command(flatten)]
        args: SweepArgs,
    }

    #[derive(Parser)]
    struct TrainCommand {
        #[command(flatten)]
        swept: SweptSettings,
        #[command(flatten)]
        settings: TrainSettings,
    }

    #[test]
    fn every_combination_is_tried_and_its_flags_say_the_same() {
        let given = "sweep --file f --lr 1e-4,2e-4 --r 4,8,16 --target-modules all-linear;q_proj,v_proj --packing \
                     --batch-size 2 --optim adamw_8bit --use-rslora --dropout 0.1 --seed 3 --adalora init_r=12,target_r=8";
        let SweepCommand { args } = SweepCommand::parse_from(given.split_whitespace());
        let points = args.points();
        assert_eq!(points.len(), 12);
        assert_eq!((points[0].lr, points[0].r, points[11].r), (Some(1e-4), Some(4), Some(16)));
        assert_eq!(points[11].target_modules, ["q_proj", "v_proj"]);
        for point in [&points[0], &points[11]] {
            let settings = args.settings.json(point);
            let train = TrainCommand::parse_from(std::iter::once("train".to_owned()).chain(flags(&settings)));
            assert_eq!(train.settings.json(&train.swept), settings);
        }
    }
}
