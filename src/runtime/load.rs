//! Reads the base model and the adapters that the settings name.

use candle_core::Device;

use super::progress::LoadProgress;
use crate::adapter::registry::{LoadOptions, Registry};
use crate::config::{BaseConfig, LoadFormat, NamedPath, ServeConfig};
use crate::gpu::OpenOptions;
use crate::hub::ModelFiles;
use crate::model::weights::Weights;
use crate::ops::pool;
use crate::text::codec::TextCodec;
use crate::{Result, gpu, hub};

/// A base model in memory, with its tokenizer and chat template.
pub(crate) struct BaseModel {
    /// Files it was read from.
    pub(crate) files: ModelFiles,
    /// Converts text to tokens and back.
    pub(crate) codec: TextCodec,
    /// Its matrices.
    pub(crate) weights: Weights,
    /// Device that holds the weights.
    pub(crate) device: Device,
}

impl BaseModel {
    /// Applies the settings of the process (device, threads), then finds, downloads if needed, and reads the model. Shows
    /// progress. Blocks.
    pub(crate) fn load(config: &BaseConfig) -> Result<Self> {
        let device = gpu::open(config.device, OpenOptions { deterministic: config.deterministic })?;
        if let Some(threads) = config.threads {
            pool::set_threads(threads);
        }
        let files = match config.load_format {
            LoadFormat::Auto => {
                hub::resolve(&config.model, &config.cache_dir.clone().unwrap_or_else(hub::default_cache), true)?
            }
            LoadFormat::Dummy => hub::shape(&config.model)?,
        };
        let codec = TextCodec::load(&files)?;
        let progress = LoadProgress::new(&files.name);
        let weights = Weights::load(&files, config.quantize, &device, |share| progress.show(share))?;
        progress.finish();
        Ok(Self { files, codec, weights, device })
    }
}

/// Loads the adapters of `--adapters`, `--adapter` and the manifest. An adapter that `--adapter` names must load; the
/// failures of others are logged.
pub(super) async fn load_adapters(config: &ServeConfig, registry: &Registry) -> Result<()> {
    if let Some(dir) = config.adapters_dir() {
        registry.load_directory(dir).await?;
    }
    for NamedPath { name, path } in &config.adapter {
        registry.load(name, path, LoadOptions::REPLACE).await.map_err(|mut e| {
            e.message = format!("--adapter {name}={path}: {}", e.message);
            e
        })?;
    }
    registry.restore().await;
    Ok(())
}
