//! Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`. A request becomes a chat, whose reply is written
//! in Anthropic's form.

mod blocks;
mod input;
mod reply;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use self::reply::MessagesFormat;
use super::error_response::{self, ErrorResponse};
use super::extract::JsonBody;
use super::field_table::{COUNT_TOKENS, MESSAGES};
use super::response::Endpoint;
use super::select_adapter::LeasedAdapters;
use super::{SharedApp, chat, generate};
use crate::error::{ErrorKind, blocking};
use crate::fields::Fields;
use crate::{Error, Result};

/// Names of a chat's fields in messages of errors, and what Anthropic's API calls them. Longer names come first.
const NAMES: &[(&str, &str)] = &[
    ("].function.parameters", "].input_schema"),
    ("].function.", "]."),
    ("].function`", "]`"),
    ("`tool_choice.function.name`", "`tool_choice.name`"),
    ("`response_format.json_schema.schema`", "`output_config.format.schema`"),
    ("`reasoning_effort`", "`output_config.effort`"),
    ("`stop`", "`stop_sequences`"),
    ("`stop[", "`stop_sequences["),
];

/// `POST /v1/messages`.
pub(super) async fn create(State(app): State<SharedApp>, JsonBody(body): JsonBody) -> Result<Response, ErrorResponse> {
    let fields = Fields::of_body(&body)?;
    MESSAGES.check(&fields)?;
    let request = input::message(&fields, &app.serving()?.codec)?;
    let show_thinking = request.show_thinking;
    let format = |context| Box::new(MessagesFormat::new(context, show_thinking)) as _;
    generate::answer(app, &request.chat, Endpoint::Chat, "msg_", format).await.map_err(|e| e.renamed(NAMES))
}

/// `POST /v1/messages/count_tokens`: the length of the prompt, which may be longer than the context.
pub(super) async fn count_tokens(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let fields = Fields::of_body(&body)?;
    COUNT_TOKENS.check(&fields)?;
    let serving = app.serving()?;
    let adapters = LeasedAdapters::select(&fields, &serving.base.names, &serving.registry).await?;
    let codec = serving.codec.clone();
    let count = async {
        let chat = input::prompt(&fields, &codec)?.chat;
        let prompt = chat::parse(&Fields::of_body(&chat)?, &codec)?.prompt;
        let work = move || Ok(codec.encode_prompt(&codec.render_chat(&prompt)?, false)?.len());
        blocking(work).await
    };
    let counted: Result<usize> = count.await;
    let tokens = counted.map_err(|e| ErrorResponse { error: Box::new(e), adapter: adapters.label }.renamed(NAMES))?;
    Ok(Json(json!({"input_tokens": tokens})))
}

/// An error in Anthropic's form. Its API has the status 529 where this server has 503.
pub(super) fn error(error: &Error, request_id: &str) -> (StatusCode, Value) {
    let message = error_response::client_message(error, request_id);
    (error_response::status(error.kind), reply::error(type_word(error.kind), &message, request_id))
}

/// Anthropic's `type`.
fn type_word(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unauthorized => "authentication_error",
        ErrorKind::Forbidden => "permission_error",
        ErrorKind::NotFound => "not_found_error",
        ErrorKind::TooLarge => "request_too_large",
        ErrorKind::Overloaded => "rate_limit_error",
        ErrorKind::Unavailable => "overloaded_error",
        ErrorKind::Internal => "api_error",
        ErrorKind::Invalid | ErrorKind::MethodNotAllowed | ErrorKind::Conflict | ErrorKind::HeadersTooLarge => {
            "invalid_request_error"
        }
    }
}
