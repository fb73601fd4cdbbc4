//! `quiver merge`: an adapter into the base, and what that costs.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{block_on, start_logs};
use crate::adapter::peft;
use crate::config::{NamedPath, ServeConfig};
use crate::engine::request::SamplingParams;
use crate::eval;
use crate::merge::{self, MergeFormat};
use crate::runtime::{BaseModel, Runtime};
use crate::train::data::{self, AlpacaEnding, DataOptions};
use crate::{Error, Result};

/// What to merge and how to write it.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Directory of the adapter, or its name among those of --adapter and --adapters
    #[arg(value_name = "NAME|DIR")]
    source: String,
    /// Where the merged model goes
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[arg(long, value_enum)]
    format: MergeFormat,
    /// Held-out examples, on which the base, the adapter beside it and the merged model are compared; 4 bits need them
    #[arg(long, value_name = "FILE", required_if_eq("format", "gguf-q4_1"))]
    file: Option<PathBuf>,
    /// Stop after this many examples
    #[arg(long, value_name = "N", requires = "file")]
    limit: Option<usize>,
    #[command(flatten)]
    serve: ServeConfig,
}

/// Name of the adapter while it is measured.
const ADAPTER: &str = "to-be-merged";

impl MergeArgs {
    /// Merges, measures and prints a table.
    pub fn run(self) -> Result<()> {
        start_logs(&self.serve)?;
        let adapter = self.directory()?;
        {
            let BaseModel { files, weights, .. } = BaseModel::load(&self.serve.base)?;
            let (adapter, _) = peft::read(&adapter, &weights.config)?;
            merge::write(&files, &weights, &adapter, self.format, &self.out)?;
        }
        println!("{}", self.out.display());
        match &self.file {
            Some(file) => block_on(self.measure(file, adapter)),
            None => Ok(()),
        }
    }

    /// Where the adapter is.
    fn directory(&self) -> Result<PathBuf> {
        let named = self.serve.adapter.iter().find(|a| a.name == self.source).map(|a| PathBuf::from(&a.path));
        let folder = self.serve.adapters.as_deref().unwrap_or(Path::new("adapters"));
        let places = [named, Some(PathBuf::from(&self.source)), Some(folder.join(&self.source))];
        places.into_iter().flatten().find(|dir| dir.join("adapter_config.json").is_file()).ok_or_else(|| {
            Error::not_found(format!(
                "adapter {:?}: neither a directory with adapter_config.json nor a name in --adapter or {}",
                self.source,
                folder.display()
            ))
        })
    }

    async fn measure(&self, file: &Path, adapter: PathBuf) -> Result<()> {
        let of_file = |e: &dyn std::fmt::Display| Error::invalid(format!("{}: {e}", file.display()));
        let bytes = std::fs::read(file).map_err(|e| of_file(&e))?;
        let sampling = SamplingParams { max_tokens: 0, ..SamplingParams::default() };
        let mut serve = self.serve.clone();
        serve.adapter = vec![NamedPath { name: ADAPTER.into(), path: adapter.to_string_lossy().into_owned() }];
        // What is measured here is not to be remembered.
        serve.state_dir = None;
        let (examples, base, beside) = {
            let runtime = Runtime::load(&serve).await?;
            let max_length = runtime.engine.config().max_model_len;
            let options = DataOptions { max_length, train_on_inputs: false, alpaca_ending: AlpacaEnding::Colon };
            let mut examples = data::parse(&bytes, &runtime.codec, &options).map_err(|e| of_file(&e))?.examples;
            examples.truncate(self.limit.unwrap_or(usize::MAX));
            let lease = [(runtime.registry.lease(ADAPTER)?, 1.0)];
            let base = eval::evaluate(&runtime.engine, &runtime.codec, &[], &examples, &sampling).await?;
            let beside = eval::evaluate(&runtime.engine, &runtime.codec, &lease, &examples, &sampling).await?;
            (examples, base.loss, beside.loss)
        };
        serve.adapter.clear();
        serve.base.model = self.out.to_string_lossy().into_owned();
        serve.base.quantize = None;
        let runtime = Runtime::load(&serve).await?;
        let merged = eval::evaluate(&runtime.engine, &runtime.codec, &[], &examples, &sampling).await?.loss;
        println!("{}", table(base, beside, merged));
        Ok(())
    }
}

/// Losses, and what part of the adapter's gain merging lost.
fn table(base: f64, beside: f64, merged: f64) -> String {
    let lost = match base - beside {
        gain if gain > 0.0 => format!("{:.1}%", 100.0 * (merged - beside) / gain),
        _ => "the adapter gains nothing here".into(),
    };
    format!(
        "| model | loss | share of the gain lost |\n|---|---|---|\n| base | {base:.4} | - |\n\
         | adapter beside the base | {beside:.4} | 0% |\n| merged | {merged:.4} | {lost} |"
    )
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn the_share_is_of_the_gain() {
        assert!(table(4.0, 2.0, 3.0).ends_with("| merged | 3.0000 | 50.0% |"));
        assert!(table(2.0, 2.0, 3.0).ends_with("| merged | 3.0000 | the adapter gains nothing here |"));
    }
}
