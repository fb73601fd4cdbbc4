//! `quiver serve`: binds the port, loads the model, serves, and drains at the end.

use std::net::SocketAddr;
use std::sync::Arc;

use bytesize::ByteSize;
use tokio::net::TcpListener;
use tokio::runtime::Handle;

use super::start_logs;
use crate::config::ServeConfig;
use crate::finetune::context::JobContext;
use crate::finetune::jobs::Jobs;
use crate::finetune::store::Store;
use crate::model::kv::KvCache;
use crate::ops::quant::kernel_name;
use crate::runtime::LoadedModel;
use crate::server::{self, App, HttpConfig, Serving};
use crate::{Error, Result};

/// Serves until SIGTERM or ctrl-C.
pub(super) fn run(config: ServeConfig) -> Result<()> {
    start_logs(&config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(serve(config));
    // A load that still runs on a blocking thread must not delay the exit.
    runtime.shutdown_background();
    result
}

async fn serve(config: ServeConfig) -> Result<()> {
    let app = App::new(&HttpConfig {
        api_keys: config.api_key.clone(),
        admin_key: config.admin_key.clone(),
        cors_origins: config.cors_origin.clone(),
        max_body: config.max_body,
        max_file: config.max_file,
    })?;
    // Without --state-dir, files and jobs last as long as the server.
    let temporary = tempfile::Builder::new().prefix("quiver-").tempdir()?;
    let store = Arc::new(Store::open(config.state_dir.as_deref().unwrap_or(temporary.path()))?);
    // Bound before the load, so that a port in use fails at once and /live answers while the model loads.
    let listener = bind(&config).await?;
    let address = listener.local_addr()?;
    let mut server = tokio::spawn(server::serve(listener, app.clone(), stop_signal(), config.drain_timeout));
    let ended = |result: std::result::Result<Result<()>, tokio::task::JoinError>| {
        result.map_err(|e| Error::internal(e.to_string()))?
    };
    tokio::select! {
        loaded = load(&config, &app, store, address) => loaded?,
        result = &mut server => return ended(result),
    }
    tracing::info!(%address, "ready");
    ended(server.await)
}

/// Loads the model and makes the server ready.
async fn load(config: &ServeConfig, app: &App, store: Arc<Store>, address: SocketAddr) -> Result<()> {
    let loaded = LoadedModel::load(config, Some(store.jobs_dir())).await?;
    announce(config, &loaded, address);
    let runtime = Arc::new(loaded.start(config).await?);
    let context = JobContext {
        runtime: runtime.clone(),
        max_running: config.max_training_jobs,
        store,
        persistent: config.state_dir.is_some(),
    };
    app.set_serving(Serving { runtime, jobs: Jobs::start(context, Handle::current())? });
    Ok(())
}

/// Prints the loaded model, the use of memory, and a request to try.
fn announce(config: &ServeConfig, loaded: &LoadedModel, address: SocketAddr) {
    let LoadedModel { base, registry, plan, .. } = loaded;
    let adapters = registry.list();
    let kernels = if base.device.is_cuda() { "CUDA" } else { kernel_name() };
    println!("model     {}: weights {}, {kernels} kernels", base.files.name, ByteSize(base.weight_bytes as u64));
    println!(
        "memory    KV cache {} ({} tokens, {} per sequence), adapter slots {}, adapters in host memory {}",
        ByteSize(plan.kv_bytes as u64),
        plan.kv_blocks * KvCache::BLOCK_SIZE,
        plan.max_model_len,
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

/// Binds the listener. Errors: a message that says what to do.
async fn bind(config: &ServeConfig) -> Result<TcpListener> {
    let (host, port) = (config.host.as_str(), config.port);
    TcpListener::bind((host, port)).await.map_err(|e| {
        Error::invalid(match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                format!("port {port} on {host} is in use: stop the other program, or choose another port with --port")
            }
            std::io::ErrorKind::PermissionDenied => {
                format!("no permission to listen on port {port}: choose a port above 1023 with --port")
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

/// Waits for SIGTERM or ctrl-C.
#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                terminate.recv().await;
            }
            // Without a SIGTERM handler, only ctrl-C stops the server.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}

/// Waits for ctrl-C.
#[cfg(not(unix))]
async fn signal() {
    // If ctrl-C cannot be caught, the server runs until it is killed.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending().await
    }
}
