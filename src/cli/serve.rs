//! `quiver serve`: bind, load, announce, serve, drain.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Arc;

use tokio::net::TcpListener;
use tracing_subscriber::EnvFilter;

use crate::adapter::registry::{Registry, RegistryConfig};
use crate::config::{LogFormat, NamedPath, ServeConfig};
use crate::model::weights::Weights;
use crate::server::prompt::TextCodec;
use crate::server::{self, App, HttpConfig};
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
        loaded = load(&config, &app) => loaded?,
        result = &mut server => return ended(result),
    }
    tracing::info!(%address, "ready");
    ended(server.await)
}

/// Brings the model up and makes the server ready. Heavy work runs on blocking threads, so that /health answers meanwhile.
async fn load(config: &ServeConfig, app: &App) -> Result<()> {
    let (model, quantize) = (config.model.clone(), config.quantize);
    let cache = config.cache_dir.clone().unwrap_or_else(hub::default_cache);
    let read = move || {
        let files = hub::resolve(&model, &cache, true)?;
        let codec = TextCodec::load(&files)?;
        let weights = Weights::load(&files, quantize, |_| {})?;
        Ok::<_, Error>((files, codec, weights))
    };
    let (files, codec, weights) =
        tokio::task::spawn_blocking(read).await.map_err(|e| Error::internal(e.to_string()))??;
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
    let _ = (app, codec);
    Err(Error::internal("the engine is not there yet"))
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
