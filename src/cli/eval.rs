//! `quiver eval`: loss and scores of the base and its adapters on a file.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, json};

use super::{block_on, start_logs};
use crate::config::ServeConfig;
use crate::engine::request::SamplingParams;
use crate::eval::{self, EvalScores};
use crate::runtime::Runtime;
use crate::train::data::{self, AlpacaEnding, DataOptions};
use crate::{Error, Result};

/// Arguments of `quiver eval`.
#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Held-out examples, in the formats of `quiver train`
    file: PathBuf,
    /// Evaluate only these adapters, separated by commas; "base" is the base alone [default: the base and all loaded adapters]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    only: Vec<String>,
    /// Use only this many examples
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Longest generated answer, tokens; 0 generates no answers and measures the loss only
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    max_tokens: usize,
    /// Temperature of generated answers; 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Seed of generated answers, for a temperature above 0
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Ending of Alpaca prompts
    #[arg(long, value_enum, default_value = "colon")]
    alpaca_ending: AlpacaEnding,
    /// Write the scores to this file, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeConfig,
}

/// Name of the base alone in `--only` and in the table.
const BASE: &str = "base";

impl EvalArgs {
    /// Evaluates and prints a table.
    pub(super) fn run(self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(Error::invalid(format!("--temperature must be 0 or more, not {}", self.temperature)));
        }
        start_logs(&self.serve)?;
        block_on(self.evaluate())
    }

    async fn evaluate(self) -> Result<()> {
        let path = self.file.display();
        let of_file = |e: &dyn std::fmt::Display| Error::invalid(format!("{path}: {e}"));
        let bytes = std::fs::read(&self.file).map_err(|e| of_file(&e))?;
        let runtime = Runtime::load(&self.serve).await?;
        let options = DataOptions {
            max_length: runtime.engine.config().max_model_len,
            train_on_inputs: false,
            alpaca_ending: self.alpaca_ending,
        };
        let dataset = data::parse(&bytes, &runtime.codec, &options).map_err(|e| of_file(&e))?;
        let examples = &dataset.examples[..dataset.examples.len().min(self.limit.unwrap_or(usize::MAX))];
        let sampling = SamplingParams {
            temperature: self.temperature,
            seed: Some(self.seed),
            max_tokens: self.max_tokens,
            ..SamplingParams::default()
        };
        let names = match &self.only[..] {
            [] => {
                let adapters = runtime.registry.list().into_iter().map(|adapter| adapter.name);
                std::iter::once(BASE.to_owned()).chain(adapters).collect()
            }
            names => names.to_vec(),
        };
        let leases = names.iter().map(|name| match name.as_str() {
            BASE => Ok(Vec::new()),
            name => Ok(vec![(runtime.registry.lease(name)?, 1.0)]),
        });
        let leases = leases.collect::<Result<Vec<_>>>()?;
        let mut scores = Map::new();
        println!("{HEAD}");
        for (name, adapters) in names.iter().zip(&leases) {
            let result = eval::evaluate(&runtime.engine, &runtime.codec, adapters, examples, &sampling).await?;
            println!("{}", row(name, &result));
            scores.insert(name.clone(), json!(result));
        }
        if let Some(out) = &self.out {
            let report = json!({
                "file": path.to_string(), "format": dataset.format, "alpaca_ending": dataset.alpaca_ending,
                "model": runtime.base.name(), "examples": examples.len(), "max_tokens": self.max_tokens,
                "temperature": self.temperature, "seed": self.seed, "scores": scores,
            });
            std::fs::write(out, format!("{report:#}\n"))?;
        }
        Ok(())
    }
}

/// Header of the table, in Markdown.
const HEAD: &str = "| model | loss | perplexity | token accuracy | exact match | F1 | BLEU | ROUGE-1 | ROUGE-2 | ROUGE-L |\n\
                    |---|---|---|---|---|---|---|---|---|---|";

/// Row of the table, with shares in percent.
fn row(name: &str, scores: &EvalScores) -> String {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let text = scores.text.as_ref().map(|t| [t.exact_match, t.f1, t.bleu, t.rouge1, t.rouge2, t.rouge_l].map(percent));
    format!(
        "| {name} | {:.4} | {:.2} | {} | {} |",
        scores.loss,
        scores.perplexity,
        percent(scores.token_accuracy),
        text.unwrap_or_else(|| std::array::from_fn(|_| "-".into())).join(" | ")
    )
}
