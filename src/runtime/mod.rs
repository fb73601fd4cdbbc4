//! The runtime: a base model with its adapters and the engine that runs them.
//!
//! [`LoadedModel::load`] reads the base and the adapters and plans memory; [`LoadedModel::start`] makes the [`Runtime`],
//! which `serve`, `bench`, `eval` and `merge` start from. The server and its fine-tuning jobs share one runtime, so this
//! module lies below both: a job scores its probes on the runtime's engine and publishes to its registry.

mod load;
pub(crate) mod memory;
mod progress;
mod sampling_defaults;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use candle_core::Device;

use crate::adapter::ServedBase;
use crate::adapter::registry::{Registry, RegistryConfig};
use crate::adapter::tiers::Tiers;
use crate::arch::ModelConfig;
use crate::config::{GenerationConfig, ServeConfig};
use crate::engine::cuda::Steps;
use crate::engine::request::SamplingParams;
use crate::engine::runner::ModelRunner;
use crate::engine::{BackgroundTask, Engine, EngineConfig};
use crate::error::blocking;
use crate::hub::ModelFiles;
use crate::model::decoder::Decoder;
use crate::model::kv::KvCache;
use crate::model::weights::Weights;
use crate::text::codec::TextCodec;
use crate::text::grammar::GrammarCompiler;
use crate::train::job::Command;
use crate::train::trainer::Trainer;
use crate::{Error, Result};
pub(crate) use load::BaseModel;
use memory::MemoryPlan;

/// A running engine with its model, adapters and trainer.
pub struct Runtime {
    /// The base model.
    pub base: BaseInfo,
    /// Converts text to tokens and back.
    pub codec: Arc<TextCodec>,
    /// Compiles grammars for structured output.
    pub grammars: Arc<GrammarCompiler>,
    /// The adapters.
    pub registry: Registry,
    /// Runs requests.
    pub engine: Engine,
    /// Sends commands to the trainer on the engine's thread.
    pub trainer: Sender<Command>,
}

/// Description of the resident base model.
pub struct BaseInfo {
    /// Names that requests may use, at least one; responses use the first.
    pub names: Vec<String>,
    /// Files it was read from.
    pub files: ModelFiles,
    /// Its shape.
    pub shape: Arc<ModelConfig>,
    /// Hash of its tensors.
    pub fingerprint: String,
    /// Device that holds it.
    pub device: Device,
    /// Sampling parameters of requests that do not give them.
    pub sampling: SamplingParams,
    /// Bytes of its matrices.
    pub weight_bytes: usize,
    /// Bytes of the matrices that a decode step reads.
    pub step_bytes: usize,
}

impl BaseInfo {
    fn new(config: &ServeConfig, files: ModelFiles, device: Device, weights: &Weights) -> Result<Self> {
        let names = match &config.served_model_name[..] {
            [] => vec![files.name.clone()],
            names => names.to_vec(),
        };
        let sampling = match config.generation_config {
            GenerationConfig::Auto => sampling_defaults::read(&files)?,
            GenerationConfig::None => SamplingParams::default(),
        };
        Ok(Self {
            names,
            files,
            shape: Arc::new(weights.config.clone()),
            fingerprint: weights.fingerprint.clone(),
            device,
            weight_bytes: weights.bytes(),
            step_bytes: weights.step_bytes(),
            sampling,
        })
    }

    /// What adapters' claims about their base are compared with: the model's own name, its file's, and those that it is served
    /// under.
    fn identity(&self, chat_template: Option<String>) -> ServedBase {
        let stem = self.files.path().file_stem().map(|stem| stem.to_string_lossy().into_owned());
        let names = std::iter::once(self.files.name.clone()).chain(self.names.clone()).chain(stem);
        ServedBase { names: names.collect(), fingerprint: self.fingerprint.clone(), chat_template }
    }

    /// The name in responses.
    pub fn name(&self) -> &str {
        &self.names[0]
    }

    /// Refuses a tokenizer with more ids than the model has embeddings.
    fn check_tokenizer(&self, codec: &TextCodec) -> Result<()> {
        let (ids, embeddings) = (codec.vocab_size(), self.shape.vocab_size);
        if ids <= embeddings {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the tokenizer has {ids} ids but the model only {embeddings} embeddings: they do not belong together"
        )))
    }
}

/// What huggingface_hub's client sends as `model` where it was given a URL. TGI, which serves one model, ignores the name. Here they
/// mean the base, and no adapter may have them.
pub(crate) const NAMES_OF_ANY_MODEL: [&str; 2] = ["tgi", "dummy"];

/// A base model and its adapters in memory, with a plan for the rest of the memory. The engine does not run yet.
pub(crate) struct LoadedModel {
    /// The base model.
    pub(crate) base: BaseInfo,
    /// The adapters.
    pub(crate) registry: Registry,
    /// Sizes of the KV cache and of a step.
    pub(crate) plan: MemoryPlan,
    codec: TextCodec,
    model: Arc<Decoder>,
    tiers: Tiers,
}

impl Runtime {
    /// Loads the model and starts the engine, for commands that train nothing.
    pub(crate) async fn load(config: &ServeConfig) -> Result<Self> {
        LoadedModel::load(config, None).await?.start(config).await
    }
}

impl LoadedModel {
    /// Reads the base and its adapters and plans memory. Heavy work runs on blocking threads. Adapters may also be loaded from
    /// below `checkpoint_root`, where fine-tuning jobs write them.
    pub(crate) async fn load(config: &ServeConfig, checkpoint_root: Option<PathBuf>) -> Result<Self> {
        let settings = config.base.clone();
        let BaseModel { files, codec, weights, device } = blocking(move || BaseModel::load(&settings)).await?;
        let base = BaseInfo::new(config, files, device, &weights)?;
        let registry = Registry::new(base.shape.clone(), registry_config(config, &base, &codec, checkpoint_root))?;
        load::load_adapters(config, &registry).await?;
        let model = Arc::new(Decoder::new(weights)?);
        base.check_tokenizer(&codec)?;
        // The slots take their memory here, before the plan divides the rest.
        let tiers = registry.tiers()?;
        let plan = MemoryPlan::new(config, &base.shape, &base.device)?;
        Ok(Self { base, registry, plan, codec, model, tiers })
    }

    /// Allocates the KV cache, captures CUDA graphs on a GPU, and starts the engine with the trainer as its background task.
    pub(crate) async fn start(self, config: &ServeConfig) -> Result<Runtime> {
        let Self { base, registry, plan, codec, model, tiers } = self;
        let (trainer, commands) = channel();
        let training = BackgroundTask {
            work: Box::new(Trainer::new(model.clone(), commands)?),
            share: config.train_share,
            max_delay: config.train_max_delay.unwrap_or(DeviceDefaults::of(&base.device).train_max_delay),
        };
        let limits = EngineConfig {
            block_size: KvCache::BLOCK_SIZE,
            num_blocks: plan.kv_blocks,
            max_batch_tokens: plan.max_batch_tokens,
            max_running: plan.max_running,
            max_waiting: config.max_waiting,
            max_model_len: plan.max_model_len,
            eos_token_ids: codec.eos_token_ids().to_vec(),
            prefix_cache: !config.no_prefix_cache,
        };
        let device = base.device.clone();
        let runner = blocking(move || runner(model, tiers, &plan, &device)).await?;
        let engine = Engine::start(runner, limits, Some(training))?;
        let codec = Arc::new(codec);
        let grammars = Arc::new(GrammarCompiler::new(codec.clone()));
        Ok(Runtime { base, codec, grammars, registry, engine, trainer })
    }
}

/// Limits and directories of the adapters.
fn registry_config(
    config: &ServeConfig,
    base: &BaseInfo,
    codec: &TextCodec,
    checkpoint_root: Option<PathBuf>,
) -> RegistryConfig {
    RegistryConfig {
        device: base.device.clone(),
        adapter_root: config.adapter_root.clone(),
        checkpoint_root,
        directory: config.adapters_dir().map(Path::to_owned),
        state_dir: config.state_dir.clone(),
        host_budget: config.host_adapter_memory,
        slot_budget: config.adapter_memory,
        reserved_names: base.names.iter().cloned().chain(NAMES_OF_ANY_MODEL.map(str::to_owned)).collect(),
        base: base.identity(codec.template_source().map(str::to_owned)),
        strict_base: config.strict_base,
    }
}

/// Makes the runner of forward passes within a memory plan.
fn runner(model: Arc<Decoder>, tiers: Tiers, plan: &MemoryPlan, device: &Device) -> Result<ModelRunner> {
    let mut kv = KvCache::new(model.config(), plan.kv_blocks, device)?;
    let mut steps =
        Steps::on(device, model.config(), plan.max_batch_tokens, plan.max_running, plan.max_running_blocks())?;
    if let Some(steps) = &mut steps {
        steps.capture(&model, &mut kv, tiers.pool(), |_| {})?;
    }
    Ok(ModelRunner { model, kv, tiers, steps })
}

/// Defaults of settings that depend on the device.
struct DeviceDefaults {
    /// `--max-batch-tokens`.
    max_batch_tokens: usize,
    /// `--train-max-delay`. On a CPU, a decoder block of a training step takes tens of milliseconds, and a chunk of a prompt
    /// takes longer.
    train_max_delay: Duration,
}

impl DeviceDefaults {
    const CPU: Self = Self { max_batch_tokens: 512, train_max_delay: Duration::from_millis(250) };
    const GPU: Self = Self { max_batch_tokens: 4096, train_max_delay: Duration::from_millis(50) };

    fn of(device: &Device) -> &'static Self {
        if device.is_cuda() { &Self::GPU } else { &Self::CPU }
    }
}
