//! From settings to a running engine: model, adapters, memory, graphs. What `serve` puts HTTP before, and `bench` times.

pub mod memory;

use std::cell::Cell;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use candle_core::Device;
use indicatif::{ProgressBar, ProgressStyle};

use crate::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use crate::adapter::tiers::Tiers;
use crate::arch::ModelConfig;
use crate::config::{BaseConfig, LoadFormat, NamedPath, ServeConfig};
use crate::engine::cuda::Steps;
use crate::engine::runner::ModelRunner;
use crate::engine::{BackgroundTask, Engine, EngineConfig};
use crate::hub::ModelFiles;
use crate::model::decoder::Decoder;
use crate::model::kv::KvCache;
use crate::model::weights::Weights;
use crate::ops::pool;
use crate::text::prompt::TextCodec;
use crate::train::job::Command;
use crate::train::trainer::Trainer;
use crate::{Error, Result, gpu, hub};

/// A running engine and what belongs to it.
pub struct Backend {
    /// Runs requests.
    pub engine: Engine,
    /// Holds adapters.
    pub registry: Registry,
    /// Turns text into tokens and back.
    pub codec: TextCodec,
    /// Names of the base, the first one its own.
    pub names: Vec<String>,
    /// Where the model came from.
    pub files: ModelFiles,
    /// Shape of the base.
    pub shape: Arc<ModelConfig>,
    /// Of its tensors.
    pub fingerprint: String,
    /// To the trainer beside the engine.
    pub commands: Sender<Command>,
    /// Where memory went.
    pub plan: MemoryPlan,
    /// Bytes of the base that a step reads.
    pub step_bytes: usize,
    /// Where it runs.
    pub device: Device,
}

/// A base model in memory, and its texts.
pub struct Base {
    /// Where it came from.
    pub files: ModelFiles,
    /// Turns text into tokens and back.
    pub codec: TextCodec,
    /// Its matrices.
    pub weights: Weights,
    /// Where they are.
    pub device: Device,
}

impl Base {
    /// Finds and reads the model, with a bar on a terminal, elsewhere with lines in the log. Blocks.
    pub fn load(config: &BaseConfig) -> Result<Self> {
        let device = gpu::open(config.device)?;
        if config.deterministic {
            gpu::be_deterministic();
        }
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
        let progress = Progress::new(&files.name);
        let weights = Weights::load(&files, config.quantize, &device, |share| progress.show(share))?;
        progress.bar.finish_and_clear();
        Ok(Self { files, codec, weights, device })
    }
}

/// What is known once the model is in memory.
pub struct Loaded {
    /// Where it came from.
    pub files: ModelFiles,
    /// Holds the adapters that were asked for.
    pub registry: Registry,
    /// Bytes of its matrices.
    pub weight_bytes: usize,
    /// Where memory goes.
    pub plan: MemoryPlan,
    /// Where it runs.
    pub device: Device,
}

impl Backend {
    /// Longest pause that training may put between two tokens of an answer by default, on the CPU and on a GPU. On a CPU a
    /// decoder block of a training step takes tens of milliseconds, and a chunk of a prompt more than that.
    const MAX_DELAY: [Duration; 2] = [Duration::from_millis(250), Duration::from_millis(50)];

    /// Loads and starts everything; heavy work runs on blocking threads. `loaded_now` is told when the model is in memory,
    /// before the last preparations of a GPU. `checkpoint_root` is where the trainer's adapters lie.
    pub async fn load(
        config: &ServeConfig,
        checkpoint_root: Option<PathBuf>,
        loaded_now: impl FnOnce(&Loaded),
    ) -> Result<Self> {
        let base = config.base.clone();
        let Base { files, codec, weights, device } = blocking(move || Base::load(&base)).await?;
        let (weight_bytes, step_bytes) = (weights.bytes(), weights.step_bytes());
        let names = match &config.served_model_name[..] {
            [] => vec![files.name.clone()],
            names => names.to_vec(),
        };
        let registry = Registry::new(
            Arc::new(weights.config.clone()),
            RegistryConfig {
                device: device.clone(),
                adapter_root: config.adapter_root.clone(),
                checkpoint_root,
                state_dir: config.state_dir.clone(),
                host_budget: config.host_adapter_memory,
                slot_budget: config.adapter_memory,
                reserved_names: names.clone(),
            },
        )?;
        load_adapters(config, &registry).await?;
        let fingerprint = weights.fingerprint.clone();
        let model = Arc::new(Decoder::new(weights)?);
        if codec.vocab_size() > model.config().vocab_size {
            return Err(Error::invalid(format!(
                "the tokenizer has {} ids and the model {} embeddings: they do not belong together",
                codec.vocab_size(),
                model.config().vocab_size
            )));
        }
        let tiers = registry.tiers()?;
        let plan = MemoryPlan::new(config, model.config(), &device)?;
        let loaded = Loaded { files, registry, weight_bytes, plan, device };
        loaded_now(&loaded);
        let (commands, inbox) = channel();
        let background = BackgroundTask {
            work: Box::new(Trainer::new(model.clone(), inbox)?),
            share: config.train_share,
            max_delay: config.train_max_delay.unwrap_or(Self::MAX_DELAY[usize::from(loaded.device.is_cuda())]),
        };
        let shape = Arc::new(model.config().clone());
        let (loaded, runner) = blocking(move || {
            let runner = loaded.plan.runner(model, tiers, &loaded.device)?;
            Ok((loaded, runner))
        })
        .await?;
        let Loaded { files, registry, plan, device, .. } = loaded;
        let engine = Engine::start(
            runner,
            EngineConfig {
                block_size: KvCache::BLOCK_SIZE,
                num_blocks: plan.kv_blocks,
                max_batch_tokens: plan.max_batch_tokens,
                max_running: config.max_running,
                max_waiting: config.max_waiting,
                max_model_len: plan.max_model_len,
                eos_token_ids: codec.eos_token_ids().to_vec(),
                prefix_cache: !config.no_prefix_cache,
            },
            Some(background),
        )?;
        Ok(Self { engine, registry, codec, names, files, shape, fingerprint, commands, plan, step_bytes, device })
    }
}

/// Runs heavy work beside the async threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::internal(e.to_string()))?
}

/// How much of a model is loaded: a bar on a terminal, elsewhere lines in the log.
struct Progress {
    /// In thousandths; hidden where stderr is no terminal.
    bar: ProgressBar,
    /// When the log had the last line.
    logged: Cell<Instant>,
}

impl Progress {
    /// Time between lines of the log: models that load at once have none.
    const LOG_EVERY: Duration = Duration::from_secs(5);

    fn new(name: &str) -> Self {
        let bar = if std::io::stderr().is_terminal() {
            let style = ProgressStyle::with_template("loading {msg} {wide_bar} {percent}% {elapsed}")
                .expect("a constant template");
            ProgressBar::new(1000).with_style(style).with_message(name.to_owned())
        } else {
            ProgressBar::hidden()
        };
        Self { bar, logged: Cell::new(Instant::now()) }
    }

    /// Takes the share that is there, in [0, 1].
    fn show(&self, share: f32) {
        self.bar.set_position((share * 1000.0) as u64);
        if self.bar.is_hidden() && self.logged.get().elapsed() >= Self::LOG_EVERY {
            self.logged.set(Instant::now());
            tracing::info!("{:.0}% of the weights are loaded", 100.0 * share);
        }
    }
}

/// Where memory goes.
pub struct MemoryPlan {
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// Rows of a step.
    pub max_batch_tokens: usize,
    /// Sequences that run at once.
    pub max_running: usize,
    /// Blocks of the KV cache.
    pub kv_blocks: usize,
    /// Bytes of those.
    pub kv_bytes: usize,
}

impl MemoryPlan {
    /// Sequences of full length that the KV cache holds by default.
    const FULL_SEQUENCES: usize = 8;
    /// Bytes of a GPU left for training by default, at most.
    const TRAIN_MEMORY: usize = 16 << 30;
    /// Rows of a step by default, on the CPU and on a GPU.
    const BATCH_TOKENS: [usize; 2] = [512, 4096];

    /// Fits the KV cache into its budget. Errors: no room for one sequence of full length.
    fn new(config: &ServeConfig, model: &ModelConfig, device: &Device) -> Result<Self> {
        let max_model_len = config.max_model_len.unwrap_or(model.max_position_embeddings);
        if max_model_len > model.max_position_embeddings {
            return Err(Error::invalid(format!(
                "--max-model-len {max_model_len}: this model was made for at most {} tokens",
                model.max_position_embeddings
            )));
        }
        let default_tokens = Self::BATCH_TOKENS[usize::from(device.is_cuda())];
        let max_batch_tokens = config.max_batch_tokens.unwrap_or(default_tokens).max(config.max_running);
        let block = KvCache::bytes_per_block(model, device);
        // One token more than the longest sequence has room for, where the next one would go.
        let full = (max_model_len + 1).div_ceil(KvCache::BLOCK_SIZE);
        let budget = match (config.kv_memory, gpu::free_memory(device)?) {
            (Some(bytes), None) => bytes,
            (None, None) => (Self::FULL_SEQUENCES * full * block).min(memory::machine().0 as usize / 4),
            (asked, Some(free)) => {
                let training = config.train_memory.unwrap_or((free / 4).min(Self::TRAIN_MEMORY));
                let left = free.saturating_sub(scratch(model, max_batch_tokens) + training);
                if let Some(asked) = asked.filter(|asked| *asked > left) {
                    return Err(Error::invalid(format!(
                        "--kv-memory {}, but the GPU has only {} left for it",
                        ByteSize(asked as u64),
                        ByteSize(left as u64)
                    )));
                }
                asked.unwrap_or(left)
            }
        };
        // Slots are numbered with 32 bits.
        let kv_blocks = (budget / block).min(u32::MAX as usize / KvCache::BLOCK_SIZE);
        if kv_blocks < full {
            return Err(Error::invalid(format!(
                "one sequence of {max_model_len} tokens needs {} of KV cache and {} are set aside: raise --kv-memory or lower \
                 --max-model-len",
                ByteSize((full * block) as u64),
                ByteSize((kv_blocks * block) as u64)
            )));
        }
        let max_running = config.max_running;
        Ok(Self { max_model_len, max_batch_tokens, max_running, kv_blocks, kv_bytes: kv_blocks * block })
    }

    /// Makes what runs forward passes within the plan.
    fn runner(&self, model: Arc<Decoder>, tiers: Tiers, device: &Device) -> Result<ModelRunner> {
        let mut kv = KvCache::new(model.config(), self.kv_blocks, device)?;
        let full = (self.max_model_len + 1).div_ceil(KvCache::BLOCK_SIZE);
        let mut steps =
            Steps::on(device, model.config(), self.max_batch_tokens, self.max_running, self.max_running * full)?;
        if let Some(steps) = &mut steps {
            steps.record(&model, &mut kv, tiers.pool(), |_| {})?;
        }
        Ok(ModelRunner { model, kv, tiers, steps })
    }
}

/// Bytes of a GPU that a step's own tensors may take: the largest matrix as bf16, activations of all rows, and a margin for
/// graphs and the libraries.
fn scratch(model: &ModelConfig, rows: usize) -> usize {
    let widest = (2 * model.intermediate_size).max(model.heads().qkv_width());
    let matrix = 2 * widest * model.hidden_size;
    let activations = rows * (4 * 2 * widest + 8 * 4 * model.hidden_size);
    let logits = 4 * 512 * model.vocab_size;
    matrix + activations + logits + (2 << 30)
}

/// The adapters of --adapters, --adapter and the manifest. One that was asked for by name must load; the rest is reported.
async fn load_adapters(config: &ServeConfig, registry: &Registry) -> Result<()> {
    let default = Path::new("adapters");
    if let Some(dir) = config.adapters.as_deref().or(default.is_dir().then_some(default)) {
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
