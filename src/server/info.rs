//! Routes about the server: health, version, metrics, models.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error_response::ErrorResponse;
use super::extract::PathParam;
use super::select_adapter::adapter_of_base;
use super::{App, Serving, SharedApp, loading};
use crate::Error;
use crate::adapter::registry::AdapterInfo;
use crate::server::metrics::ScrapeInput;
use crate::time::unix_seconds;

/// `GET /live`: 200 as long as the process answers.
pub(super) async fn live() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// `GET /health`: 200 once the model is loaded, 503 before, as in vLLM and llama.cpp.
pub(super) async fn health(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    match app.serving.get() {
        Some(_) => Ok(Json(json!({"status": "ok"}))),
        None => Err(loading().into()),
    }
}

/// `GET /ready`: 200 once the model is loaded, 503 before that and while the server shuts down.
pub(super) async fn ready(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    Ok(Json(json!({"status": "ready", "model": serving.base.name()})))
}

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "server": env!("CARGO_PKG_NAME")}))
}

/// `GET /metrics`, in Prometheus's text format.
pub(super) async fn metrics(State(app): State<SharedApp>) -> Result<Response, ErrorResponse> {
    let page = match app.serving.get() {
        None => app.metrics.render(None)?,
        Some(serving) => app.metrics.render(Some(ScrapeInput {
            model: serving.base.name(),
            stats: serving.engine.stats(),
            adapters: &serving.registry.list(),
            tiers: serving.registry.stats(),
            nominal_slots: serving.registry.nominal_slots(),
            block_size: serving.limits().block_size,
            jobs: &serving.jobs.gauges(),
        }))?,
    };
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response())
}

/// `GET /v1/models`: the names of the base, then the adapters.
pub(super) async fn models(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let bases = serving.base.names.iter().map(|name| base_card(&app, serving, name));
    let adapters = serving.registry.list();
    let data: Vec<Value> = bases.chain(adapters.iter().map(|info| adapter_card(serving, info))).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /v1/models/{id}`. The name of a base may contain slashes.
pub(super) async fn model(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    if serving.base.names.contains(&id) {
        return Ok(Json(base_card(&app, serving, &id)));
    }
    // As in requests: the name itself first.
    let of_base = || serving.registry.get(adapter_of_base(&id, &serving.base.names).unwrap_or(&id));
    match serving.registry.get(&id).or_else(|_| of_base()) {
        Ok(info) => Ok(Json(adapter_card(serving, &info))),
        Err(_) => Err(no_model(&id).into()),
    }
}

/// `NotFound` for a model.
pub(super) fn no_model(id: &str) -> Error {
    Error::not_found(format!("The model `{id}` does not exist.")).param("model").code("model_not_found")
}

fn base_card(app: &App, serving: &Serving, name: &str) -> Value {
    card(serving, name, unix_seconds(app.started), json!(serving.base.files.name), Value::Null)
}

fn adapter_card(serving: &Serving, info: &AdapterInfo) -> Value {
    let mut card =
        card(serving, &info.name, unix_seconds(info.loaded_at), json!(info.source), json!(serving.base.name()));
    card["warnings"] = json!(info.warnings);
    card
}

/// vLLM's model card.
fn card(serving: &Serving, id: &str, created: u64, root: Value, parent: Value) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "quiver",
        "root": root,
        "parent": parent,
        "max_model_len": serving.limits().max_model_len,
        "permission": [{
            "id": format!("modelperm-{id}"),
            "object": "model_permission",
            "created": created,
            "allow_create_engine": false,
            "allow_sampling": true,
            "allow_logprobs": true,
            "allow_search_indices": false,
            "allow_view": true,
            "allow_fine_tuning": false,
            "organization": "*",
            "group": null,
            "is_blocking": false,
        }],
    })
}
