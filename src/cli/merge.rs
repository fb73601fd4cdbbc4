//! `quiver merge`: merges an adapter into the base and measures the loss of quality.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{block_on, start_logs};
use crate::adapter::reader;
use crate::config::ServeConfig;
use crate::merge::{self, MergeFormat, MergeLosses};
use crate::runtime::BaseModel;
use crate::{Error, Result};

/// Arguments of `quiver merge`.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// Directory of the adapter, or a name from --adapter or --adapters
    #[arg(value_name = "NAME|DIR")]
    source: String,
    /// Write the merged model to this path
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Format of the merged model
    #[arg(long, value_enum)]
    format: MergeFormat,
    /// Held-out examples, on which to compare the base, the base with the adapter and the merged model; required for 4 bits
    #[arg(long, value_name = "FILE", required_if_eq("format", "gguf-q4_1"))]
    file: Option<PathBuf>,
    /// Use only this many examples
    #[arg(long, value_name = "N", requires = "file")]
    limit: Option<usize>,
    #[command(flatten)]
    serve: ServeConfig,
}

impl MergeArgs {
    /// Merges, measures and prints a table.
    pub(super) fn run(self) -> Result<()> {
        start_logs(&self.serve)?;
        let adapter = self.directory()?;
        {
            // Dropped before the models are measured.
            let BaseModel { files, weights, .. } = BaseModel::load(&self.serve.base)?;
            let adapter = reader::read(&adapter, &weights.config)?.weights;
            merge::write(&files, &weights, &adapter, self.format, &self.out)?;
        }
        println!("{}", self.out.display());
        match &self.file {
            Some(file) => {
                let losses = block_on(merge::compare(&self.serve, &adapter, &self.out, file, self.limit))?;
                println!("{}", table(&losses));
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Directory of the adapter.
    fn directory(&self) -> Result<PathBuf> {
        let named = self.serve.adapter.iter().find(|a| a.name == self.source).map(|a| PathBuf::from(&a.path));
        let folder = self.serve.adapters.as_deref().unwrap_or(Path::new("adapters"));
        let places = [named, Some(PathBuf::from(&self.source)), Some(folder.join(&self.source))];
        places.into_iter().flatten().find(|dir| dir.join("adapter_config.json").is_file()).ok_or_else(|| {
            Error::not_found(format!(
                "adapter {:?} is neither a directory with adapter_config.json nor a name in --adapter or {}",
                self.source,
                folder.display()
            ))
        })
    }
}

/// Table of the losses and of the share of the adapter's gain that merging lost.
fn table(losses: &MergeLosses) -> String {
    let MergeLosses { base, adapter, merged } = losses;
    let lost = match base - adapter {
        gain if gain > 0.0 => format!("{:.1}%", 100.0 * (merged - adapter) / gain),
        _ => "the adapter gains nothing here".into(),
    };
    format!(
        "| model | loss | share of the gain lost |\n|---|---|---|\n| base | {base:.4} | - |\n\
         | base with adapter | {adapter:.4} | 0% |\n| merged | {merged:.4} | {lost} |"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_share_is_of_the_gain() {
        let table = |base, adapter, merged| table(&MergeLosses { base, adapter, merged });
        assert!(table(4.0, 2.0, 3.0).ends_with("| merged | 3.0000 | 50.0% |"));
        assert!(table(2.0, 2.0, 3.0).ends_with("| merged | 3.0000 | the adapter gains nothing here |"));
    }
}
