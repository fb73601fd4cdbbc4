//! The default model in an engine, without HTTP.

use std::path::Path;
use std::sync::Arc;

use candle_core::Device;
use quiver::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use quiver::engine::cuda::Steps;
use quiver::engine::request::{Event, FinishReason, Logprobs, Request, SamplingParams};
use quiver::engine::runner::ModelRunner;
use quiver::engine::{Engine, EngineConfig};
use quiver::hub::{self, ModelFiles};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::Weights;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

/// Downloads the default model into the user's cache, unless it is there.
pub fn files() -> ModelFiles {
    hub::resolve("smollm2-135m-instruct", &hub::default_cache(), false).expect("the default model can be fetched")
}

/// An engine that runs SmolLM2, and its adapters.
pub struct SmolLm2 {
    /// Runs requests.
    pub engine: Engine,
    /// The adapters.
    pub registry: Registry,
    /// Runs async calls.
    runtime: tokio::runtime::Runtime,
}

impl SmolLm2 {
    /// Loads the model on a device, with `slot_budget` bytes for adapter slots and no adapters.
    pub fn start(device: &Device, slot_budget: usize) -> Self {
        let weights = Weights::load(&files(), None, device, |_| {}).expect("the model loads");
        let config = RegistryConfig {
            device: device.clone(),
            adapter_root: None,
            checkpoint_root: None,
            state_dir: None,
            host_budget: 1 << 30,
            slot_budget,
            ..RegistryConfig::default()
        };
        let registry = Registry::new(Arc::new(weights.config.clone()), config).expect("a registry");
        let model = Decoder::new(weights).expect("a model");
        let num_blocks = 512;
        let mut kv = KvCache::new(model.config(), num_blocks, device).expect("memory for keys and values");
        let tiers = registry.tiers().expect("loader threads");
        let mut steps = Steps::on(device, model.config(), 128, 16, 16 * 129).expect("memory for steps");
        if let Some(steps) = &mut steps {
            steps.capture(&model, &mut kv, tiers.pool(), |_| {}).expect("graphs");
        }
        let engine = Engine::start(
            ModelRunner { kv, tiers, model: Arc::new(model), steps },
            EngineConfig {
                block_size: KvCache::BLOCK_SIZE,
                num_blocks,
                max_batch_tokens: 128,
                max_running: 16,
                max_waiting: 2000,
                max_model_len: 2048,
                eos_token_ids: vec![2],
                prefix_cache: true,
            },
            None,
        )
        .expect("an engine");
        Self { engine, registry, runtime: tokio::runtime::Runtime::new().expect("a runtime") }
    }

    /// Loads an adapter directory under a name.
    pub fn load(&self, name: &str, source: &Path) {
        let source = source.to_str().expect("UTF-8");
        self.runtime.block_on(self.registry.load(name, source, LoadOptions::REPLACE)).expect("the adapter loads");
    }

    /// Submits a request, whose reply is read later.
    pub fn submit(&self, prompt: &[u32], params: SamplingParams, adapters: &[(&str, f32)]) -> Reply {
        let (events, receiver) = unbounded_channel();
        let lease = |(name, weight): &(&str, f32)| (self.registry.lease(name).expect("loaded"), *weight);
        let adapters = adapters.iter().map(lease).collect();
        let request = Request { adapters, ..Request::new("test", prompt.to_vec(), params, events) };
        self.engine.submit(request).expect("room in the queue");
        Reply(receiver)
    }
}

/// A reply that is still being generated.
pub struct Reply(UnboundedReceiver<Event>);

/// A complete reply.
#[derive(Debug, PartialEq)]
pub struct Collected {
    /// Log-probabilities of the prompt tokens, if requested.
    pub prompt: Vec<Option<Logprobs>>,
    /// Generated token ids.
    pub tokens: Vec<u32>,
    /// Log-probabilities of the generated tokens, if requested.
    pub logprobs: Vec<Option<Logprobs>>,
    /// Reason of its end.
    pub reason: FinishReason,
}

impl Reply {
    /// Waits for the end of the reply. Panics if the request failed.
    pub fn collect(mut self) -> Collected {
        let (mut prompt, mut tokens, mut logprobs) = (Vec::new(), Vec::new(), Vec::new());
        loop {
            match self.0.blocking_recv().expect("an end before the channel closes") {
                Event::Scheduled { .. } | Event::Pooled(_) => {}
                Event::Prompt(p) => prompt = p,
                Event::Token { id, logprobs: l } => {
                    tokens.push(id);
                    logprobs.push(l);
                }
                Event::Finished { reason, .. } => return Collected { prompt, tokens, logprobs, reason },
                Event::Failed(error) => panic!("the request failed: {error}"),
            }
        }
    }
}
