//! From the settings of a request to a [`JobSpec`]: given values are checked, values that are left out or "auto" are chosen.
//!
//! The API and the command line write the same JSON object, so both have the same names, limits and defaults:
//! `method.supervised.hyperparameters` (or `hyperparameters`), `seed`, `lora` and `training`.
//!
//! Chosen where nothing is given:
//!
//! | setting | value |
//! |---|---|
//! | epochs | 3; more for fewer than 34 examples (100 examples in all, at most 25 epochs); fewer above 8,333 (25,000 in all) |
//! | batch size | examples / 500, from 4 to 16, and at most the number of examples |
//! | learning rate | 2e-4 (as in QLoRA) times the multiplier |
//! | warm-up | 3% of the steps |
//! | `alpha` | twice the rank |
//! | AdaLoRA | ranks are removed from 10% of the steps until 30% are left |
//! | everything else | [`JobSpec::default`] |

use clap::ValueEnum;
use serde_json::{Value, json};

use super::record::shortest_floats;
use crate::arch::Module;
use crate::fields::{self, Fields};
use crate::train::data::{AlpacaEnding, DataOptions, Dataset};
use crate::train::spec::{AdaLoraConfig, JobSpec, LoraConfig, OptimizerConfig};
use crate::{Error, Result};

/// Top-level fields of a request that this module reads.
pub const FIELDS: [&str; 5] = ["method", "hyperparameters", "seed", "lora", "training"];

const HYPERPARAMETERS: [&str; 3] = ["n_epochs", "batch_size", "learning_rate_multiplier"];

const LORA: [&str; 9] =
    ["r", "alpha", "dropout", "target_modules", "use_rslora", "loraplus_lr_ratio", "use_dora", "init", "adalora"];

const ADALORA: [&str; 8] = ["init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"];

const TRAINING: [&str; 17] = [
    "lr",
    "scheduler",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "clip",
    "optim",
    "gradient_accumulation",
    "max_length",
    "packing",
    "train_on_inputs",
    "alpaca_ending",
    "max_steps",
    "checkpoint_every",
    "eval_every",
    "early_stopping",
    "from_checkpoint",
];

/// Learning rate for a multiplier of 1.
const LEARNING_RATE: f64 = 2e-4;

/// Largest rank. Larger ones are close to the full matrices of small models.
const MAX_RANK: i64 = 512;

/// The objects of a request that hold settings.
struct SettingGroups<'a> {
    hyperparameters: Option<Fields<'a>>,
    lora: Option<Fields<'a>>,
    training: Option<Fields<'a>>,
}

impl<'a> SettingGroups<'a> {
    /// Finds the objects in a request. Errors: unknown fields, by name.
    fn of(body: &Fields<'a>) -> Result<Self> {
        let (lora, training) = (body.object("lora")?, body.object("training")?);
        lora.iter().try_for_each(|lora| fields::check_only(lora, &LORA))?;
        training.iter().try_for_each(|training| fields::check_only(training, &TRAINING))?;
        let hyperparameters = hyperparameters(body)?;
        hyperparameters.iter().try_for_each(|given| fields::check_only(given, &HYPERPARAMETERS))?;
        Ok(Self { hyperparameters, lora, training })
    }
}

/// OpenAI's hyperparameters, in their current place (`method.supervised`) or their old one (top level).
fn hyperparameters<'a>(body: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    let old = body.object("hyperparameters")?;
    let Some(method) = body.object("method")? else { return Ok(old) };
    fields::check_only(&method, &["type", "supervised", "dpo", "reinforcement"])?;
    match method.required("type", method.string("type")?, "\"supervised\"")? {
        "supervised" => {}
        other => return Err(fields::wrong("method.type", "\"supervised\"", &other.into())),
    }
    let Some(supervised) = method.object("supervised")? else { return Ok(old) };
    fields::check_only(&supervised, &["hyperparameters"])?;
    match (supervised.object("hyperparameters")?, old) {
        (Some(_), Some(_)) => Err(Error::invalid(
            "`hyperparameters` is the old name of `method.supervised.hyperparameters`: give one of them",
        )
        .param("hyperparameters")),
        (new, old) => Ok(new.or(old)),
    }
}

/// The options for parsing the files of a request.
pub fn data_options(body: &Fields, spec: &JobSpec) -> Result<DataOptions> {
    let alpaca_ending = word::<AlpacaEnding>(&SettingGroups::of(body)?.training, "alpaca_ending")?.unwrap_or_default();
    Ok(DataOptions { max_length: spec.max_length, train_on_inputs: spec.train_on_inputs, alpaca_ending })
}

/// The settings of a request for its training file. Without `data`, all values are checked, and those that depend on the file
/// are provisional. `longest` bounds `max_length`: the server must be able to serve an example.
///
/// # Errors
/// `Invalid`, with the field: a value of a wrong type or out of range, an unknown field, settings that exclude each other.
pub fn spec(body: &Fields, longest: usize, data: Option<&Dataset>) -> Result<JobSpec> {
    let SettingGroups { hyperparameters, lora, training } = SettingGroups::of(body)?;
    let examples = data.map_or(1, |data| data.statistics.examples);
    let multiplier = auto(&hyperparameters, "learning_rate_multiplier", positive)?;
    let rate = number(&training, "lr", positive)?.unwrap_or(LEARNING_RATE) * multiplier.unwrap_or(1.0);
    let default = OptimizerConfig::default();
    let optimizer = OptimizerConfig {
        learning_rate: rate as f32,
        schedule: word(&training, "scheduler")?.unwrap_or(default.schedule),
        weight_decay: number(&training, "weight_decay", |v, path| fields::number(v, path, 0.0..=1.0))?
            .map_or(default.weight_decay, |decay| decay as f32),
        max_grad_norm: number(&training, "clip", positive)?.map_or(default.max_grad_norm, |norm| norm as f32),
        kind: word(&training, "optim")?.unwrap_or(default.kind),
        ..default
    };
    let default = JobSpec::default();
    let count = |name: &str, most: i64| integer(&training, name, 1, most);
    let mut spec = JobSpec {
        epochs: auto(&hyperparameters, "n_epochs", |v, path| fields::integer(v, path, 1..=50))?
            .map_or_else(|| epochs(examples), |n| n as usize),
        max_steps: count("max_steps", i64::MAX)?,
        batch_size: auto(&hyperparameters, "batch_size", |v, path| fields::integer(v, path, 1..=256))?
            .map_or_else(|| (examples / 500).clamp(4, 16).min(examples.max(1)), |n| n as usize),
        gradient_accumulation: count("gradient_accumulation", 1024)?.unwrap_or(default.gradient_accumulation),
        max_length: integer(&training, "max_length", 2, longest as i64)?.unwrap_or(longest.min(default.max_length)),
        packing: flag(&training, "packing")?,
        train_on_inputs: flag(&training, "train_on_inputs")?,
        seed: body.integer("seed", 0..=i64::from(i32::MAX))?.map_or(default.seed, |seed| seed as u64),
        lora: lora_config(&lora)?,
        optimizer,
        checkpoint_every: count("checkpoint_every", i64::MAX)?,
        eval_every: count("eval_every", i64::MAX)?,
        early_stopping: count("early_stopping", i64::MAX)?,
        from_checkpoint: training.as_ref().map_or(Ok(None), |t| t.string("from_checkpoint"))?.map(str::to_owned),
    };
    let steps = data.map_or(1, |data| data.estimate(&spec, None).steps);
    spec.optimizer.warmup_steps = warmup(&training, steps)?;
    spec.lora.adalora = lora.map_or(Ok(None), |lora| adalora(&lora, steps))?;
    check(&spec)?;
    Ok(spec)
}

/// The settings as the API shows them: `(hyperparameters, lora, training)`.
pub fn describe(spec: &JobSpec) -> (Value, Value, Value) {
    let optimizer = &spec.optimizer;
    let rate = shortest_floats(&optimizer.learning_rate);
    let multiplier = rate.as_f64().unwrap_or_default() / LEARNING_RATE;
    let hyperparameters = json!({
        "n_epochs": spec.epochs,
        "batch_size": spec.batch_size,
        "learning_rate_multiplier": (multiplier * 1e6).round() / 1e6,
    });
    let training = json!({
        "lr": rate,
        "scheduler": optimizer.schedule,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": shortest_floats(&optimizer.weight_decay),
        "clip": shortest_floats(&optimizer.max_grad_norm),
        "optim": optimizer.kind,
        "gradient_accumulation": spec.gradient_accumulation,
        "max_length": spec.max_length,
        "packing": spec.packing,
        "train_on_inputs": spec.train_on_inputs,
        "max_steps": spec.max_steps,
        "checkpoint_every": spec.checkpoint_every,
        "eval_every": spec.eval_every,
        "early_stopping": spec.early_stopping,
        "from_checkpoint": spec.from_checkpoint,
    });
    (hyperparameters, shortest_floats(&spec.lora), training)
}

/// Three, unless the file is very small or very large.
fn epochs(examples: usize) -> usize {
    match examples.max(1) {
        few @ ..34 => (100 / few).clamp(3, 25),
        n => (25_000 / n).clamp(1, 3),
    }
}

/// Everything but AdaLoRA, which depends on the number of steps.
fn lora_config(lora: &Option<Fields>) -> Result<LoraConfig> {
    let default = LoraConfig::default();
    let r = integer(lora, "r", 1, MAX_RANK)?.unwrap_or(default.r);
    let target_modules = field(lora, "target_modules", modules)?.unwrap_or(default.target_modules);
    Ok(LoraConfig {
        r,
        alpha: number(lora, "alpha", positive)?.map_or(2.0 * r as f32, |alpha| alpha as f32),
        dropout: number(lora, "dropout", |v, path| fields::number(v, path, 0.0..=0.9))?
            .map_or(default.dropout, |dropout| dropout as f32),
        target_modules,
        use_rslora: flag(lora, "use_rslora")?,
        loraplus_lr_ratio: number(lora, "loraplus_lr_ratio", positive)?.map(|ratio| ratio as f32),
        use_dora: flag(lora, "use_dora")?,
        init: word(lora, "init")?.unwrap_or(default.init),
        adalora: None,
    })
}

/// Modules under PEFT's names: a list, or `all-linear`.
fn modules(value: &Value, path: &str) -> Result<Vec<Module>> {
    let names = Module::BLOCK.iter().map(|m| json!(m).as_str().unwrap_or_default().to_owned()).collect::<Vec<_>>();
    let wrong = |got: &Value| {
        fields::wrong(path, &format!("\"all-linear\" or an array of some of {} (each once)", names.join(", ")), got)
    };
    match value {
        Value::String(all) if all == "all-linear" => Ok(Module::BLOCK.to_vec()),
        Value::Array(list) if !list.is_empty() => {
            let mut modules = Vec::new();
            for name in list {
                let module = serde_json::from_value::<Module>(name.clone()).ok();
                match module.filter(|m| Module::BLOCK.contains(m) && !modules.contains(m)) {
                    Some(module) => modules.push(module),
                    None => return Err(wrong(name)),
                }
            }
            modules.sort();
            Ok(modules)
        }
        other => Err(wrong(other)),
    }
}

fn adalora(lora: &Fields, steps: usize) -> Result<Option<AdaLoraConfig>> {
    let given = lora.object("adalora")?;
    let Some(ada) = &given else { return Ok(None) };
    fields::check_only(ada, &ADALORA)?;
    let default = AdaLoraConfig::default();
    let beta = |name: &str| number(&given, name, |v, path| fields::number(v, path, 0.0..=0.999));
    Ok(Some(AdaLoraConfig {
        init_r: integer(&given, "init_r", 1, MAX_RANK)?.unwrap_or(default.init_r),
        target_r: integer(&given, "target_r", 1, MAX_RANK)?.unwrap_or(default.target_r),
        tinit: integer(&given, "tinit", 0, i64::MAX)?.unwrap_or(steps / 10),
        tfinal: integer(&given, "tfinal", 0, i64::MAX)?.unwrap_or(steps * 3 / 10),
        delta_t: integer(&given, "deltaT", 1, i64::MAX)?.unwrap_or(default.delta_t),
        beta1: beta("beta1")?.map_or(default.beta1, |beta| beta as f32),
        beta2: beta("beta2")?.map_or(default.beta2, |beta| beta as f32),
        orth_reg_weight: number(&given, "orth_reg_weight", |v, path| fields::number(v, path, 0.0..=f64::INFINITY))?
            .map_or(default.orth_reg_weight, |weight| weight as f32),
    }))
}

/// Optimiser steps of warm-up.
fn warmup(training: &Option<Fields>, steps: usize) -> Result<usize> {
    let ratio = number(training, "warmup_ratio", |v, path| fields::number(v, path, 0.0..=1.0))?;
    match (integer(training, "warmup_steps", 0, i64::MAX)?, ratio) {
        (Some(_), Some(_)) => Err(Error::invalid(
            "`training.warmup_steps` and `training.warmup_ratio` set the same value: give one of them",
        )
        .param("training.warmup_ratio")),
        (Some(given), None) => Ok(given),
        (None, ratio) => Ok((ratio.unwrap_or(0.03) * steps as f64).ceil() as usize),
    }
}

/// Rejects settings that exclude each other.
fn check(spec: &JobSpec) -> Result<()> {
    let lora = &spec.lora;
    let conflict = |message: &str, param: &str| Err(Error::invalid(message).param(param).code("conflicting_settings"));
    match &lora.adalora {
        Some(_) if lora.use_dora || lora.use_rslora => {
            conflict("`lora.adalora` has its own scale: leave out `use_dora` and `use_rslora`", "lora.adalora")
        }
        Some(ada) if ada.target_r > ada.init_r => {
            conflict("`lora.adalora.target_r` must be at most `init_r`", "lora.adalora.target_r")
        }
        _ => Ok(()),
    }
}

/// A field of a group, if it is given.
fn field<T>(group: &Option<Fields>, name: &str, read: impl FnOnce(&Value, &str) -> Result<T>) -> Result<Option<T>> {
    let Some(group) = group else { return Ok(None) };
    group.get(name).map(|value| read(value, &group.path_of(name))).transpose()
}

/// A field that may be "auto", which is the same as leaving it out.
fn auto<T>(group: &Option<Fields>, name: &str, read: impl FnOnce(&Value, &str) -> Result<T>) -> Result<Option<T>> {
    let read = |value: &Value, path: &str| match value.as_str() {
        Some("auto") => Ok(None),
        _ => read(value, path).map(Some),
    };
    Ok(field(group, name, read)?.flatten())
}

fn number(group: &Option<Fields>, name: &str, read: impl FnOnce(&Value, &str) -> Result<f64>) -> Result<Option<f64>> {
    field(group, name, read)
}

fn integer(group: &Option<Fields>, name: &str, least: i64, most: i64) -> Result<Option<usize>> {
    field(group, name, |value, path| fields::integer(value, path, least..=most).map(|n| n as usize))
}

fn flag(group: &Option<Fields>, name: &str) -> Result<bool> {
    Ok(group.as_ref().map_or(Ok(None), |group| group.boolean(name))?.unwrap_or(false))
}

/// One of an enum's values, under the same names as on the command line.
fn word<T: ValueEnum>(group: &Option<Fields>, name: &str) -> Result<Option<T>> {
    field(group, name, |value, path| {
        let words = T::value_variants().iter().filter_map(|v| Some(v.to_possible_value()?.get_name().to_owned()));
        let allowed = format!("one of {}", words.collect::<Vec<_>>().join(", "));
        let read = value.as_str().and_then(|text| T::from_str(text, false).ok());
        read.ok_or_else(|| fields::wrong(path, &allowed, value))
    })
}

fn positive(value: &Value, path: &str) -> Result<f64> {
    let number = value.as_f64().filter(|n| *n > 0.0 && n.is_finite());
    number.ok_or_else(|| fields::wrong(path, "a number above 0", value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{DataFormat, DatasetStatistics};

    fn chosen(body: Value, examples: usize) -> Result<JobSpec> {
        let statistics = DatasetStatistics { examples, tokens: 10 * examples, ..DatasetStatistics::default() };
        let data = Dataset { examples: Vec::new(), format: DataFormat::Text, alpaca_ending: None, statistics };
        spec(&Fields::of_body(&body)?, 1000, Some(&data))
    }

    #[test]
    fn what_is_left_out_follows_the_file() {
        for (examples, epochs, batch, warmup) in
            [(1, 25, 1, 1), (10, 10, 4, 1), (33, 3, 4, 1), (1000, 3, 4, 23), (4000, 3, 8, 45), (30_000, 1, 16, 57)]
        {
            let spec = chosen(json!({"hyperparameters": {"n_epochs": "auto"}}), examples).unwrap();
            assert_eq!((spec.epochs, spec.batch_size), (epochs, batch), "{examples}");
            assert_eq!(spec.optimizer.warmup_steps, warmup, "{examples}");
            assert_eq!((spec.max_length, spec.lora.r, spec.lora.alpha), (1000, 16, 32.0));
        }
        let spec = chosen(json!({"training": {"max_steps": 50}, "lora": {"r": 4, "adalora": {}}}), 1000).unwrap();
        let ada = spec.lora.adalora.expect("asked for");
        assert_eq!((ada.init_r, ada.target_r, ada.tinit, ada.tfinal), (12, 8, 5, 15));
        assert_eq!(spec.lora.alpha, 8.0);
    }

    #[test]
    fn what_is_shown_chooses_the_same_again() {
        let body = json!({
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 1.7}}},
            "lora": {"dropout": 0.05, "target_modules": ["up_proj"], "loraplus_lr_ratio": 16, "init": "gaussian",
                     "adalora": {"beta1": 0.9}},
            "training": {"lr": 3e-4, "optim": "adamw_8bit", "warmup_ratio": 0.1, "clip": 0.3, "scheduler": "cosine"},
        });
        let first = chosen(body, 1000).unwrap();
        let (mut hyperparameters, lora, training) = describe(&first);
        assert_eq!((&training["lr"], &lora["adalora"]["beta1"]), (&json!(0.00051), &json!(0.9)));
        // The rate itself has the multiplier in it.
        assert_eq!(hyperparameters["learning_rate_multiplier"].take(), json!(2.55));
        let again = json!({"hyperparameters": hyperparameters, "lora": lora, "training": training});
        assert_eq!(chosen(again, 1000).unwrap(), first);
    }
}
