//! `quiver sweep`: which learning rate, rank and linears learn best.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::train::{Point, Settings, continued, read, step_bar};
use crate::config::BaseConfig;
use crate::fields::Fields;
use crate::finetune::prepare::{Prepared, prepare};
use crate::finetune::{results, settings};
use crate::model::decoder::Decoder;
use crate::runtime::BaseModel;
use crate::train::job::JobReport;
use crate::train::sweep::{self, SweepOutcome};
use crate::{Error, Result};

/// Optimiser steps of a run for which nothing is said.
const STEPS: u64 = 50;

/// Validations of a run for which nothing is said.
const VALIDATIONS: u64 = 5;

/// Runs in the plot: more cannot be told apart.
const PLOTTED: usize = 7;

/// What to learn from, and what to try.
#[derive(Debug, Args)]
pub struct SweepArgs {
    /// What to learn from, as `quiver train` takes it
    #[arg(long, value_name = "FILE")]
    file: PathBuf,
    /// What to measure on [default: every tenth example of the file]
    #[arg(long, value_name = "FILE")]
    validation_file: Option<PathBuf>,
    /// Where sweep.csv, sweep.json and sweep.svg go
    #[arg(long, value_name = "DIR", default_value = "sweep")]
    out: PathBuf,
    /// Learning rates
    #[arg(long, value_delimiter = ',', default_value = "1e-4,2e-4,5e-4")]
    lr: Vec<f64>,
    /// Ranks
    #[arg(long, value_name = "RANKS", value_delimiter = ',', default_value = "4,8,16")]
    r: Vec<u64>,
    /// Sets of linears, separated by semicolons
    #[arg(long, value_name = "NAMES;...", value_delimiter = ';', default_value = "all-linear")]
    target_modules: Vec<String>,
    /// Runs that share passes over the base
    #[arg(long, value_name = "N", default_value_t = 4)]
    together: usize,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    base: BaseConfig,
}

impl SweepArgs {
    /// Trains all, and prints a table and the command that trains the best in full.
    pub fn run(mut self) -> Result<()> {
        let full: Vec<Value> = self.points().iter().map(|point| self.settings.json(point)).collect();
        if self.settings.epochs.is_none() {
            self.settings.max_steps.get_or_insert(STEPS);
        }
        if let Some(steps) = self.settings.max_steps {
            self.settings.eval_every.get_or_insert((steps / VALIDATIONS).max(1));
        }
        // Only at the end, where there always is one: nobody wants these adapters.
        self.settings.checkpoint_every = Some(i64::MAX as u64);
        let short = self.points().into_iter().map(|point| self.settings.json(&point)).collect::<Vec<_>>();
        let Some(first) = short.first() else { return Err(Error::invalid("there is nothing to try")) };

        let BaseModel { codec, weights, .. } = BaseModel::load(&self.base)?;
        let longest = weights.config.max_position_embeddings;
        let file = read(&self.file)?;
        let valid = self.validation_file.as_deref().map(read).transpose()?;
        // How the files are read does not depend on what is tried.
        let Prepared { train, valid, .. } = prepare(&codec, first, longest, &file, valid.as_deref())?;
        let run = |settings: &Value| {
            let spec = settings::spec(&Fields::of_body(settings)?, longest, Some(&train))?;
            let from = continued(&spec, &weights.config)?;
            Ok((spec, from))
        };
        let runs = short.iter().map(run).collect::<Result<Vec<_>>>()?;
        let (train, valid) = match valid {
            Some(valid) => (train.examples, valid.examples),
            None => sweep::hold_out(train.examples),
        };
        if train.is_empty() {
            return Err(Error::invalid("one example is too few to learn from and to measure on"));
        }
        println!("{} runs on {} examples, {} held out", runs.len(), train.len(), valid.len());
        std::fs::create_dir_all(&self.out)?;
        let bar = step_bar();
        let told = |report: &JobReport| match report {
            JobReport::Started { steps, .. } => bar.inc_length(*steps as u64),
            JobReport::Step(_) => bar.inc(1),
            _ => {}
        };
        let model = Arc::new(Decoder::new(weights)?);
        let outcomes = sweep::run(&model, runs, (&train, &valid), self.together, &self.out, told)?;
        bar.finish_and_clear();
        self.report(&full, &outcomes)
    }

    /// Every combination.
    fn points(&self) -> Vec<Point> {
        let mut points = Vec::new();
        for names in &self.target_modules {
            let target_modules: Vec<String> = names.split(',').map(|name| name.trim().to_owned()).collect();
            for &r in &self.r {
                let point = |&lr| Point { lr: Some(lr), r: Some(r), target_modules: target_modules.clone() };
                points.extend(self.lr.iter().map(point));
            }
        }
        points
    }

    /// Prints and writes what came of the `settings`, best first.
    fn report(&self, settings: &[Value], outcomes: &[SweepOutcome]) -> Result<()> {
        let points = self.points();
        let ranked = sweep::ranked(outcomes);
        let name = |i: usize| {
            let point = &points[i];
            let (lr, r) = (point.lr.unwrap_or_default(), point.r.unwrap_or_default());
            (lr, r, point.target_modules.join(" "))
        };
        println!("\n| lr | r | target modules | values | train loss | held-out loss |\n|---|---|---|---|---|---|");
        let mut csv = "lr,r,target_modules,parameters,train_loss,valid_loss\n".to_owned();
        let (mut runs, mut lines) = (Vec::new(), Vec::new());
        for &i in &ranked {
            let (outcome, (lr, r, targets)) = (&outcomes[i], name(i));
            let train = outcome.steps.last().map_or(String::new(), |m| format!("{:.4}", m.train_loss));
            let failed = || outcome.error.as_ref().map_or("diverged".to_owned(), |error| error.message.clone());
            let valid = outcome.loss().map(|loss| format!("{loss:.4}"));
            println!(
                "| {lr} | {r} | {targets} | {} | {train} | {} |",
                outcome.parameters,
                valid.clone().unwrap_or_else(failed)
            );
            csv += &format!("{lr},{r},{targets},{},{train},{}\n", outcome.parameters, valid.unwrap_or_default());
            runs.push(json!({
                "settings": settings[i], "parameters": outcome.parameters, "valid_loss": outcome.loss(),
                "error": outcome.error.as_ref().map(|error| &error.message),
                "steps": outcome.steps, "validations": outcome.validations,
            }));
            lines.push((format!("lr {lr}, r {r}, {targets}"), results::curve(&outcome.validations)));
        }
        lines.truncate(PLOTTED);
        let best = ranked.first().copied().filter(|&i| outcomes[i].loss().is_some());
        let best = best.ok_or_else(|| Error::invalid("no run came to its end with a held-out loss"));
        let report = json!({"best": best.as_ref().ok().map(|&i| &settings[i]), "runs": runs});
        std::fs::write(self.out.join("sweep.csv"), csv)?;
        std::fs::write(self.out.join("sweep.json"), format!("{report:#}\n"))?;
        std::fs::write(self.out.join("sweep.svg"), results::loss_chart("Held-out loss", lines).svg()?)?;
        println!("\ncurves  {}", self.out.join("sweep.svg").display());
        let validation = self.validation_file.as_ref().map(|file| format!(" --validation-file {}", file.display()));
        println!(
            "best    quiver train --model {} --file {}{} --out DIR {}",
            self.base.model,
            self.file.display(),
            validation.unwrap_or_default(),
            flags(&settings[best?]).join(" ")
        );
        Ok(())
    }
}

/// Settings, as flags of `quiver train`. What cut the runs of the sweep short is not among them.
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
    struct Sweep {
        #[command(flatten)]
        args: SweepArgs,
    }

    #[derive(Parser)]
    struct Train {
        #[command(flatten)]
        point: Point,
        #[command(flatten)]
        settings: Settings,
    }

    #[test]
    fn every_combination_is_tried_and_its_flags_say_the_same() {
        let given = "sweep --file f --lr 1e-4,2e-4 --r 4,8,16 --target-modules all-linear;q_proj,v_proj --packing \
                     --batch-size 2 --optim adamw_8bit --use-rslora --dropout 0.1 --seed 3 --adalora init_r=12,target_r=8";
        let Sweep { args } = Sweep::parse_from(given.split_whitespace());
        let points = args.points();
        assert_eq!(points.len(), 12);
        assert_eq!((points[0].lr, points[0].r, points[11].r), (Some(1e-4), Some(4), Some(16)));
        assert_eq!(points[11].target_modules, ["q_proj", "v_proj"]);
        for point in [&points[0], &points[11]] {
            let settings = args.settings.json(point);
            let train = Train::parse_from(std::iter::once("train".to_owned()).chain(flags(&settings)));
            assert_eq!(train.settings.json(&train.point), settings);
        }
    }
}
