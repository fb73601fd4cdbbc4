//! TGI's and LoRAX's API: `POST /generate`, `/generate_stream` and `/`, and `GET /info`. A request becomes a completion, whose reply
//! is written in TGI's form.

mod input;
mod reply;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use self::reply::GenerateFormat;
use super::error_response::{self, ErrorResponse};
use super::extract::JsonBody;
use super::openai::MAX_BEST_OF;
use super::params::MAX_STOPS;
use super::response::Endpoint;
use super::{SharedApp, generate};
use crate::Error;
use crate::error::ErrorKind;

/// Names of a completion's fields in messages of errors, and what TGI calls them.
const NAMES: &[(&str, &str)] = &[
    ("`prompt`", "`inputs`"),
    ("`adapter`", "`parameters.adapter_id`"),
    ("`max_tokens`", "`parameters.max_new_tokens`"),
    ("`n`", "`parameters.best_of`"),
    ("`temperature`", "`parameters.temperature`"),
    ("`top_k`", "`parameters.top_k`"),
    ("`top_p`", "`parameters.top_p`"),
    ("`repetition_penalty`", "`parameters.repetition_penalty`"),
    ("`frequency_penalty`", "`parameters.frequency_penalty`"),
    ("`seed`", "`parameters.seed`"),
    ("`stop`", "`parameters.stop`"),
    ("`stop[", "`parameters.stop["),
    ("`ignore_eos`", "`parameters.ignore_eos_token`"),
    ("`truncate_prompt_tokens`", "`parameters.truncate`"),
    ("`structured_outputs.json`", "`parameters.grammar.value`"),
    ("`structured_outputs.regex`", "`parameters.grammar.value`"),
    ("`response_format", "`parameters.response_format"),
];

/// The routes, which differ in the form of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// `/generate`: an object.
    Generate,
    /// `/generate_stream`: events.
    Stream,
    /// `/`: events, or an array of one object.
    Root,
}

/// `POST /generate`.
pub(super) async fn generate(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    answer(app, &body, Route::Generate).await
}

/// `POST /generate_stream`.
pub(super) async fn generate_stream(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    answer(app, &body, Route::Stream).await
}

/// `POST /`.
pub(super) async fn root(State(app): State<SharedApp>, JsonBody(body): JsonBody) -> Result<Response, ErrorResponse> {
    answer(app, &body, Route::Root).await
}

async fn answer(app: SharedApp, body: &Value, route: Route) -> Result<Response, ErrorResponse> {
    let request = input::completion(body, route, &app.serving()?.base.names)?;
    let format = |context| Box::new(GenerateFormat::new(context, request.options)) as _;
    let reply = generate::answer(app, &request.completion, Endpoint::Completion, "gen-", format).await;
    reply.map_err(|e| e.renamed(NAMES))
}

/// `GET /info`: the base and the limits, under TGI's and LoRAX's names.
pub(super) async fn info(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let limits = serving.limits();
    Ok(Json(json!({
        "model_id": serving.base.name(),
        "model_sha": serving.base.fingerprint,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": limits.max_waiting,
        "max_best_of": limits.max_waiting.min(MAX_BEST_OF as usize),
        "max_stop_sequences": MAX_STOPS,
        "max_input_tokens": limits.max_model_len - 1,
        "max_input_length": limits.max_model_len - 1,
        "max_total_tokens": limits.max_model_len,
        "max_batch_size": limits.max_running,
        "max_client_batch_size": 1,
        "router": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "sha": null,
        "docker_label": null,
    })))
}

/// An error in TGI's form.
pub(super) fn error(error: &Error, request_id: &str) -> (StatusCode, Value) {
    let (status, kind) = match error.kind {
        ErrorKind::Invalid => (StatusCode::UNPROCESSABLE_ENTITY, "validation"),
        ErrorKind::Internal => (StatusCode::FAILED_DEPENDENCY, "generation"),
        ErrorKind::Overloaded => (error_response::status(error.kind), "overloaded"),
        ErrorKind::NotFound | ErrorKind::TooLarge | ErrorKind::HeadersTooLarge => {
            (error_response::status(error.kind), "validation")
        }
        other => (error_response::status(other), other.word()),
    };
    (status, json!({"error": error_response::client_message(error, request_id), "error_type": kind}))
}
