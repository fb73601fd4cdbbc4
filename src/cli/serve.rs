//! `quiver serve`: bind, load, announce, serve, drain.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytesize::ByteSize;
use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use super::doctor;
use crate::adapter::registry::{Registry, RegistryConfig};
use crate::config::{LogFormat, NamedPath, ServeConfig};
use crate::engine::runner::ModelRunner;
use crate::engine::{Engine, EngineConfig};
use crate::model::ModelConfig;
use crate::model::kv::KvCache;
use crate::model::llama::Llama;
use crate::model::weights::Weights;
use crate::ops::{pool, quant::kernel_name};
use crate::server::prompt::TextCodec;
use crate::server::{self, App, HttpConfig, Serving};
use crate::{Error, Result, hub};

/// Serves until SIGTERM or ctrl-C.
pub fn run(config: ServeConfig) -> Result<()> {
    start_logs(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(config));
    // A load that is still running on a blocking thread must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn serve(config: ServeConfig) -> Result<()> {
    let app = App::new(&HttpConfig {
        api_keys: config.api_key.clone(),
        admin_key: config.admin_key.clone(),
        max_body: config.max_body,
    })?;
    // Before the model, so that a port in use shows at once and /health answers while it loads.
    let listener = bind(&config).await?;
    let address = listener.local_addr()?;
    let mut server = tokio::spawn(server::serve(listener, app.clone(), stop_signal(), config.drain_timeout));
    let ended = |result: std::result::Result<Result<()>, tokio::task::JoinError>| {
        result.map_err(|e| Error::internal(e.to_string()))?
    };
    tokio::select! {
        loaded = load(&config, &app, address) => loaded?,
        result = &mut server => return ended(result),
    }
    tracing::info!(%address, "ready");
    ended(server.await)
}

/// Brings the model up and makes the server ready. Heavy work runs on blocking threads, so that /health answers meanwhile.
async fn load(config: &ServeConfig, app: &App, address: SocketAddr) -> Result<()> {
    let (model, quantize) = (config.model.clone(), config.quantize);
    let cache = config.cache_dir.clone().unwrap_or_else(hub::default_cache);
    let read = move || {
        let files = hub::resolve(&model, &cache, true)?;
        let codec = TextCodec::load(&files)?;
        let weights = Weights::load(&files, quantize, |_| {})?;
        Ok::<_, Error>((files, codec, weights))
    };
    if let Some(threads) = config.threads {
        pool::set_threads(threads);
    }
    let (files, codec, weights) =
        tokio::task::spawn_blocking(read).await.map_err(|e| Error::internal(e.to_string()))??;
    let weight_bytes = weights.bytes();
    let names = match &config.served_model_name[..] {
        [] => vec![files.name.clone()],
        names => names.to_vec(),
    };
    let registry = Registry::new(
        Arc::new(weights.config.clone()),
        RegistryConfig {
            adapter_root: config.adapter_root.clone(),
            state_dir: config.state_dir.clone(),
            host_budget: config.host_adapter_memory,
            slot_budget: config.adapter_memory,
            reserved_names: names.clone(),
        },
    )?;
    load_adapters(config, &registry).await?;
    let model = Llama::new(weights)?;
    if codec.vocab_size() > model.config().vocab_size {
        return Err(Error::invalid(format!(
            "the tokenizer has {} ids and the model {} embeddings: they do not belong together",
            codec.vocab_size(),
            model.config().vocab_size
        )));
    }
    let plan = MemoryPlan::new(config, model.config())?;
    plan.announce(config, &files.name, weight_bytes, &registry, address);
    let engine = Engine::start(
        ModelRunner { kv: KvCache::new(model.config(), plan.kv_blocks)?, tiers: registry.tiers()?, model },
        EngineConfig {
            block_size: KvCache::BLOCK_SIZE,
            num_blocks: plan.kv_blocks,
            max_batch_tokens: config.max_batch_tokens.max(config.max_running),
            max_running: config.max_running,
            max_waiting: config.max_waiting,
            max_model_len: plan.max_model_len,
            eos_token_ids: codec.eos_token_ids().to_vec(),
            prefix_cache: !config.no_prefix_cache,
        },
    )?;
    app.set_serving(Serving {
        engine,
        registry,
        codec: Arc::new(codec),
        names,
        root: files.path().to_owned(),
        max_model_len: plan.max_model_len,
        max_waiting: config.max_waiting,
        block_size: KvCache::BLOCK_SIZE,
        slot_budget: config.adapter_memory,
    });
    Ok(())
}

/// Where memory goes.
struct MemoryPlan {
    /// Longest prompt plus output.
    max_model_len: usize,
    /// Blocks of the KV cache.
    kv_blocks: usize,
    /// Bytes of those.
    kv_bytes: usize,
}

impl MemoryPlan {
    /// Sequences of full length that the KV cache holds by default.
    const FULL_SEQUENCES: usize = 8;

    /// Fits the KV cache into its budget. Errors: no room for one sequence of full length.
    fn new(config: &ServeConfig, model: &ModelConfig) -> Result<Self> {
        let max_model_len = config.max_model_len.unwrap_or(model.max_position_embeddings);
        if max_model_len > model.max_position_embeddings {
            return Err(Error::invalid(format!(
                "--max-model-len {max_model_len}: this model was made for at most {} tokens",
                model.max_position_embeddings
            )));
        }
        let block = KvCache::bytes_per_block(model);
        // One token more than the longest sequence has room for, where the next one would go.
        let full = (max_model_len + 1).div_ceil(KvCache::BLOCK_SIZE);
        let default = || (Self::FULL_SEQUENCES * full * block).min(doctor::memory().0 as usize / 4);
        let kv_blocks = config.kv_memory.unwrap_or_else(default) / block;
        if kv_blocks < full {
            return Err(Error::invalid(format!(
                "one sequence of {max_model_len} tokens needs {} of KV cache and {} are set aside: raise --kv-memory or lower \
                 --max-model-len",
                ByteSize((full * block) as u64),
                ByteSize((kv_blocks * block) as u64)
            )));
        }
        Ok(Self { max_model_len, kv_blocks, kv_bytes: kv_blocks * block })
    }

    /// Says what was loaded and where memory goes, and how to try it.
    fn announce(
        &self,
        config: &ServeConfig,
        model: &str,
        weight_bytes: usize,
        registry: &Registry,
        address: SocketAddr,
    ) {
        let adapters = registry.list();
        println!("model     {model}: weights {}, {} kernel", ByteSize(weight_bytes as u64), kernel_name());
        println!(
            "memory    KV cache {} ({} tokens, {} a sequence), adapter slots {}, adapters on the host {}",
            ByteSize(self.kv_bytes as u64),
            self.kv_blocks * KvCache::BLOCK_SIZE,
            self.max_model_len,
            ByteSize(config.adapter_memory as u64),
            ByteSize(config.host_adapter_memory as u64)
        );
        let names: Vec<&str> = adapters.iter().map(|a| a.name.as_str()).take(20).collect();
        let more = if adapters.len() > names.len() { ", ..." } else { "" };
        println!("adapters  {}: {}{more}", adapters.len(), names.join(", "));
        let adapter = names.first().map_or(String::new(), |name| format!("\"adapter\": \"{name}\", "));
        let key = if config.api_key.is_empty() { "" } else { " -H 'authorization: Bearer YOUR-KEY'" };
        println!("\ntry it:\n");
        println!(
            "curl http://{address}/v1/completions -H 'content-type: application/json'{key} \\\n  -d '{{{adapter}\"prompt\": \"The lantern is\", \
             \"max_tokens\": 40}}'\n",
        );
    }
}

/// The adapters of --adapters, --adapter and the manifest. One that was asked for by name must load; the rest is reported.
async fn load_adapters(config: &ServeConfig, registry: &Registry) -> Result<()> {
    let default = Path::new("adapters");
    if let Some(dir) = config.adapters.as_deref().or(default.is_dir().then_some(default)) {
        registry.load_directory(dir).await?;
    }
    for NamedPath { name, path } in &config.adapter {
        registry.load(name, path, false, true).await.map_err(|mut e| {
            e.message = format!("--adapter {name}={path}: {}", e.message);
            e
        })?;
    }
    registry.restore().await;
    Ok(())
}

async fn bind(config: &ServeConfig) -> Result<TcpListener> {
    let (host, port) = (config.host.as_str(), config.port);
    TcpListener::bind((host, port)).await.map_err(|e| {
        Error::invalid(match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("port {port} on {host} is in use: stop what listens there, or choose another with --port")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("port {port} needs more rights: choose one above 1023 with --port")
            }
            _ => format!("cannot listen on {host}:{port}: {e}"),
        })
    })
}

/// Resolves on SIGTERM or ctrl-C; the second one ends the process at once.
async fn stop_signal() {
    signal().await;
    tokio::spawn(async {
        signal().await;
        std::process::exit(130);
    });
}

#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                terminate.recv().await;
            }
            // Without it only ctrl-C stops the server.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}

#[cfg(not(unix))]
async fn signal() {
    // Without a signal to wait for there is nothing left but to run on.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending().await
    }
}

fn start_logs(config: &ServeConfig) -> Result<()> {
    let filter = EnvFilter::try_new(&config.log_level)
        .map_err(|e| Error::invalid(format!("--log-level {:?}: {e}", config.log_level)))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}
