//! The HTTP server: shared state, routes, shutdown.
//!
//! A request passes through [`openai`] (fields), [`select_adapter`] (leases), [`generate`] (submission to the engine),
//! [`stream`] (text and stop strings) and [`response`] (OpenAI's objects). [`error_response`] turns errors into answers.

mod adapters;
mod batches;
mod chat;
mod embeddings;
mod error_response;
mod extract;
mod field_table;
mod files;
mod finetune;
mod generate;
mod hints;
mod info;
mod messages;
mod metrics;
mod middleware;
mod openai;
mod params;
mod response;
mod responses;
mod select_adapter;
mod stop;
mod stream;
mod structured;
mod tgi;
mod tokenize;
mod uploads;

use std::future::Future;
use std::net::SocketAddr;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::from_fn_with_state;
use axum::routing::{delete, get, post};
use axum::serve::ListenerExt;
use tokio::net::TcpListener;
use tower_http::cors::CorsLayer;

use crate::engine::EngineConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::finetune::jobs::Jobs;
use crate::runtime::Runtime;
use error_response::ErrorForm;
pub use field_table::fields_page;
use metrics::Metrics;
use middleware::AccessKeys;
use responses::ResponseStore;

/// How often expired files and uploads are removed.
const SWEEP: Duration = Duration::from_secs(60);

/// Settings of the HTTP server.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Keys for inference; if empty, no key is needed.
    pub api_keys: Vec<String>,
    /// Key for the admin routes; without one, only clients on this machine may use them.
    pub admin_key: Option<String>,
    /// Origins of the web pages that may use the server, or `*` for all; if empty, browsers refuse them.
    pub cors_origins: Vec<String>,
    /// Limit on request bodies, bytes.
    pub max_body: usize,
    /// Limit on uploaded files, bytes.
    pub max_file: usize,
}

/// A loaded model and everything that serves it.
pub struct Serving {
    /// The model, its adapters and the engine.
    pub runtime: Arc<Runtime>,
    /// The fine-tuning jobs.
    pub jobs: Jobs,
}

impl Deref for Serving {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        &self.runtime
    }
}

impl Serving {
    /// Limits of the engine.
    fn limits(&self) -> &EngineConfig {
        self.engine.config()
    }

    /// Refuses a request with more sequences than the queue can hold; `param` is the field to lower.
    fn check_sequences(&self, sequences: usize, param: &str) -> Result<()> {
        let most = self.limits().max_waiting;
        if sequences <= most {
            return Ok(());
        }
        let message = format!(
            "this request makes {sequences} sequences (prompts times choices), but this server takes {most} at once: split it"
        );
        Err(Error::invalid(message).param(param).code("too_many_sequences"))
    }
}

/// State that all handlers share.
pub struct App {
    keys: AccessKeys,
    cors: Option<CorsLayer>,
    max_body: usize,
    max_file: usize,
    metrics: Metrics,
    responses: Arc<ResponseStore>,
    /// Set once the model is loaded.
    serving: OnceLock<Arc<Serving>>,
    draining: AtomicBool,
    batches: batches::BatchQueue,
    /// `created` of the base in `/v1/models`.
    started: SystemTime,
}

/// The state as handlers get it.
pub type SharedApp = Arc<App>;

impl App {
    /// A server without a model: it answers, but is not ready.
    pub fn new(config: &HttpConfig) -> Result<SharedApp> {
        Ok(Arc::new(Self {
            keys: AccessKeys::new(&config.api_keys, config.admin_key.as_deref()),
            cors: middleware::cors(&config.cors_origins)?,
            max_body: config.max_body,
            max_file: config.max_file,
            metrics: Metrics::new()?,
            responses: Arc::default(),
            serving: OnceLock::new(),
            draining: AtomicBool::new(false),
            batches: batches::BatchQueue::default(),
            started: SystemTime::now(),
        }))
    }

    /// Makes the server ready. Only the first call has an effect: a server keeps its model.
    pub fn set_serving(&self, serving: Serving) {
        let _ = self.serving.set(Arc::new(serving));
    }

    /// Waits for the model.
    async fn loaded(&self) -> Arc<Serving> {
        loop {
            match self.serving.get() {
                Some(serving) => return serving.clone(),
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// The loaded model. Errors: `Unavailable` while it loads and while the server shuts down.
    fn serving(&self) -> Result<&Arc<Serving>> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Unavailable, "the server is shutting down"));
        }
        self.serving.get().ok_or_else(loading)
    }
}

/// The error until the model is loaded.
fn loading() -> Error {
    let message = "the model is loading: GET /health and GET /ready answer 200 once it is loaded";
    Error::new(ErrorKind::Unavailable, message).code("model_loading")
}

/// All routes with their keys, limits, logs and request ids.
fn router(app: SharedApp) -> Router {
    let inference = Router::new()
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/{id}", get(responses::get).delete(responses::delete))
        .route("/v1/responses/{id}/input_items", get(responses::input_items))
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*id}", get(info::model).delete(finetune::delete_model))
        .route("/v1/files", post(files::upload).layer(DefaultBodyLimit::max(app.max_file)).get(files::list))
        .route("/v1/files/{id}", get(files::get).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/uploads", post(uploads::create))
        .route("/v1/uploads/{id}/parts", post(uploads::add_part).layer(DefaultBodyLimit::max(uploads::MAX_PART_BODY)))
        .route("/v1/uploads/{id}/complete", post(uploads::complete))
        .route("/v1/uploads/{id}/cancel", post(uploads::cancel))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::get))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/fine_tuning/jobs", post(finetune::create).get(finetune::list))
        .route("/v1/fine_tuning/jobs/{id}", get(finetune::get))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(finetune::cancel))
        .route("/v1/fine_tuning/jobs/{id}/pause", post(finetune::pause))
        .route("/v1/fine_tuning/jobs/{id}/resume", post(finetune::resume))
        .route("/v1/fine_tuning/jobs/{id}/events", get(finetune::events))
        .route("/v1/fine_tuning/jobs/{id}/checkpoints", get(finetune::checkpoints))
        .route(
            "/v1/fine_tuning/checkpoints/{id}/permissions",
            get(finetune::permissions).post(finetune::refuse_permission),
        )
        .route("/v1/fine_tuning/checkpoints/{id}/permissions/{permission}", delete(finetune::refuse_permission))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::tokenizer_info))
        .route("/lora-adapters", get(adapters::llama_cpp_list))
        .route_layer(from_fn_with_state(app.clone(), middleware::require_api_key));
    let anthropic = Router::new()
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens));
    let anthropic = in_form_of(&app, anthropic, messages::error);
    let tgi = Router::new()
        .route("/", post(tgi::root))
        .route("/generate", post(tgi::generate))
        .route("/generate_stream", post(tgi::generate_stream))
        .route("/info", get(tgi::info));
    let tgi = in_form_of(&app, tgi, tgi::error);
    let admin = Router::new()
        .route("/admin/adapters", get(adapters::list))
        .route("/admin/adapters/{name}", get(adapters::get).put(adapters::put).delete(adapters::delete))
        .route("/admin/adapters/{name}/pin", post(adapters::pin))
        .route("/admin/adapters/{name}/unpin", post(adapters::unpin))
        .route("/v1/load_lora_adapter", post(adapters::vllm_load))
        .route("/v1/unload_lora_adapter", post(adapters::vllm_unload))
        .route_layer(from_fn_with_state(app.clone(), middleware::require_admin));
    let open = Router::new()
        .route("/health", get(info::health))
        .route("/live", get(info::live))
        .route("/ready", get(info::ready))
        .route("/version", get(info::version))
        .route("/metrics", get(info::metrics));
    // Answered here already, so that the next layer is around it: a browser asks by OPTIONS, a method that no route has.
    let mut public =
        inference.merge(anthropic).merge(tgi).merge(open).method_not_allowed_fallback(middleware::wrong_method);
    if let Some(cors) = &app.cors {
        // Around the keys: a browser asks what it may send before it sends a key.
        public = public.layer(cors.clone());
    }
    let router = public
        .merge(admin)
        .fallback(middleware::unknown_route)
        .method_not_allowed_fallback(middleware::wrong_method)
        .layer(DefaultBodyLimit::max(app.max_body))
        .layer(from_fn_with_state(app.clone(), middleware::count_errors));
    middleware::observe(router).with_state(app)
}

/// The work of the server besides requests: runs batches, and removes what has expired.
async fn background(app: SharedApp, router: Router) {
    let sweep = async {
        let serving = app.loaded().await;
        loop {
            let swept = serving.jobs.store().run(|store| files::sweep(store).and(uploads::sweep(store))).await;
            if let Err(error) = swept {
                tracing::error!(error = %format_args!("{error:#}"), "expired files cannot be removed");
            }
            tokio::time::sleep(SWEEP).await;
        }
    };
    tokio::join!(batches::run(app.clone(), router), sweep);
}

/// Inference routes of another API, whose errors have the API's form.
fn in_form_of(app: &SharedApp, routes: Router<SharedApp>, form: ErrorForm) -> Router<SharedApp> {
    routes
        .route_layer(from_fn_with_state(app.clone(), middleware::require_api_key))
        .route_layer(from_fn_with_state(form, error_response::in_form))
}

/// Serves until `stop` resolves. Then it accepts no new connections or requests, and returns when the running requests have
/// ended, or after `drain_timeout`.
pub async fn serve(
    listener: TcpListener,
    app: SharedApp,
    stop: impl Future<Output = ()> + Send + 'static,
    drain_timeout: Duration,
) -> Result<()> {
    let stopped = Arc::new(tokio::sync::Notify::new());
    let router = router(app.clone());
    let background = tokio::spawn(background(app.clone(), router.clone()));
    let on_stop = {
        let (app, stopped) = (app.clone(), stopped.clone());
        async move {
            stop.await;
            app.draining.store(true, Ordering::Relaxed);
            // Batches continue at the next start.
            background.abort();
            stopped.notify_one();
        }
    };
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    // A token is a small packet. Nagle's algorithm would hold it back until the last one is acknowledged, up to 40 ms.
    let listener = listener.tap_io(|connection| {
        if let Err(e) = connection.set_nodelay(true) {
            tracing::warn!("TCP_NODELAY: {e}");
        }
    });
    let server = axum::serve(listener, service).with_graceful_shutdown(on_stop);
    let finish = async {
        server.await?;
        if let Some(serving) = app.serving.get() {
            // Before the engine stops: checkpoints that are being published still run probes on it.
            serving.jobs.stop().await;
            serving.engine.drain().await;
        }
        Ok(())
    };
    let give_up = async {
        stopped.notified().await;
        tracing::info!(timeout_s = drain_timeout.as_secs_f64(), "shutting down: waiting for running requests");
        tokio::time::sleep(drain_timeout).await;
    };
    tokio::select! {
        result = finish => result,
        () = give_up => {
            tracing::warn!("drain timeout: running requests are aborted");
            Ok(())
        }
    }
}
