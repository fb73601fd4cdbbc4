//! Loss of a merged model, compared with the base and with the unmerged adapter.

use std::path::Path;

use crate::config::{NamedPath, ServeConfig};
use crate::engine::request::SamplingParams;
use crate::eval;
use crate::runtime::Runtime;
use crate::train::data::{self, AlpacaEnding, DataOptions};
use crate::{Error, Result};

/// Name of the adapter while it is measured.
const ADAPTER: &str = "to-be-merged";

/// Losses on held-out examples, nats per token.
pub(crate) struct MergeLosses {
    /// The base alone.
    pub(crate) base: f64,
    /// The base with the adapter.
    pub(crate) adapter: f64,
    /// The merged model.
    pub(crate) merged: f64,
}

/// Measures the loss of the base, of the adapter in directory `adapter` and of the merged model at `merged`, on the first `limit`
/// examples of a file. Loads one model after the other, with the settings of `config`.
///
/// # Errors
/// `Invalid`: the file, or a model that does not load. And those of [`eval::evaluate`].
pub(crate) async fn compare(
    config: &ServeConfig,
    adapter: &Path,
    merged: &Path,
    file: &Path,
    limit: Option<usize>,
) -> Result<MergeLosses> {
    let of_file = |e: &dyn std::fmt::Display| Error::invalid(format!("{}: {e}", file.display()));
    let bytes = std::fs::read(file).map_err(|e| of_file(&e))?;
    let sampling = SamplingParams { max_tokens: 0, ..SamplingParams::default() };
    let mut config = config.clone();
    config.adapter = vec![NamedPath { name: ADAPTER.into(), path: adapter.to_string_lossy().into_owned() }];
    // The adapter must not stay in the manifest.
    config.state_dir = None;
    // In a block, so that the base is dropped before the merged model loads.
    let (examples, base, adapter) = {
        let runtime = Runtime::load(&config).await?;
        let max_length = runtime.engine.config().max_model_len;
        let options = DataOptions { max_length, train_on_inputs: false, alpaca_ending: AlpacaEnding::Colon };
        let mut examples = data::parse(&bytes, &runtime.codec, &options).map_err(|e| of_file(&e))?.examples;
        examples.truncate(limit.unwrap_or(usize::MAX));
        let lease = [(runtime.registry.lease(ADAPTER)?, 1.0)];
        let base = eval::evaluate(&runtime.engine, &runtime.codec, &[], &examples, &sampling).await?;
        let adapter = eval::evaluate(&runtime.engine, &runtime.codec, &lease, &examples, &sampling).await?;
        (examples, base.loss, adapter.loss)
    };
    config.adapter.clear();
    config.base.model = merged.to_string_lossy().into_owned();
    config.base.quantize = None;
    let runtime = Runtime::load(&config).await?;
    let merged = eval::evaluate(&runtime.engine, &runtime.codec, &[], &examples, &sampling).await?.loss;
    Ok(MergeLosses { base, adapter, merged })
}
