//! Errors as HTTP responses: the status, OpenAI's body, and the labels for the metrics. The only place that maps
//! [`ErrorKind`] to HTTP.

use std::borrow::Cow;

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::middleware::request_id;
use crate::error::{Error, ErrorKind};

/// Seconds after which a client may try again: a queue of decode steps drains in less, a load may take a few tries.
const RETRY_AFTER: &str = "1";

/// An error on its way to the client. Boxed, so that results of handlers stay small.
#[derive(Debug)]
pub(super) struct ErrorResponse {
    /// The error that is reported.
    pub(super) error: Box<Error>,
    /// `adapter` label of the metrics: empty until the request's adapter is known.
    pub(super) adapter: String,
}

/// Attached to error responses for [`super::middleware::count_errors`] and [`in_form`].
#[derive(Debug, Clone)]
pub(super) struct ReportedError {
    /// The error, whose kind is a label of the metrics.
    pub(super) error: Error,
    /// Label `adapter`.
    pub(super) adapter: String,
}

/// The status and the body of an error in the form of one API. It gets the id of the request.
pub(super) type ErrorForm = fn(&Error, &str) -> (StatusCode, Value);

impl ErrorResponse {
    /// The error with a message that names fields as another API does: each name of `names` is replaced by the one after it.
    pub(super) fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        for (name, other) in names {
            self.error.message = self.error.message.replace(name, other);
        }
        self
    }
}

/// For the routes of another API: writes the error responses of the handlers and layers inside in the API's own form.
pub(super) async fn in_form(State(form): State<ErrorForm>, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let Some(ReportedError { error, .. }) = response.extensions().get() else { return response };
    let (status, body) = form(error, &request_id());
    let (mut parts, _) = response.into_parts();
    parts.status = status;
    parts.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(parts, body.to_string().into())
}

impl From<Error> for ErrorResponse {
    fn from(error: Error) -> Self {
        Self { error: Box::new(error), adapter: String::new() }
    }
}

impl From<BytesRejection> for ErrorResponse {
    fn from(rejection: BytesRejection) -> Self {
        let error = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Error::new(ErrorKind::TooLarge, "the request body is larger than this server allows (--max-body)")
                    .code("body_too_large")
            }
            // The client closed the connection or broke off: nobody will read this.
            _ => Error::invalid(rejection.body_text()).code("unreadable_body"),
        };
        error.into()
    }
}

impl IntoResponse for ErrorResponse {
    fn into_response(self) -> Response {
        let body = body(&self.error, &request_id());
        with_status(&self.error, self.adapter, Json(body))
    }
}

/// A response around any body, with the status, headers and metric labels of an error, which is logged if it is internal.
pub(super) fn with_status(error: &Error, adapter: String, body: impl IntoResponse) -> Response {
    log_internal(error, &request_id());
    let mut response = (status(error.kind), body).into_response();
    let headers = response.headers_mut();
    match error.kind {
        ErrorKind::Overloaded | ErrorKind::Unavailable => {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
        }
        ErrorKind::Unauthorized => {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        _ => {}
    }
    response.extensions_mut().insert(ReportedError { error: error.clone(), adapter });
    response
}

/// OpenAI's body: `{"error": {"message", "type", "param", "code"}}`.
pub(super) fn body(error: &Error, request_id: &str) -> Value {
    json!({"error": {
        "message": client_message(error, request_id),
        "type": type_word(error.kind),
        "param": error.param,
        "code": error.code,
    }})
}

/// Writes an internal error to the log, under the request id that the client gets instead of the message.
pub(super) fn log_internal(error: &Error, request_id: &str) {
    if error.kind == ErrorKind::Internal {
        tracing::error!(request_id, error = %format_args!("{error:#}"), "internal error");
    }
}

/// The message that the client gets: for an internal error, the request id under which [`log_internal`] wrote it.
pub(super) fn client_message<'a>(error: &'a Error, request_id: &str) -> Cow<'a, str> {
    error.public_message(&format!("request id {request_id}"))
}

/// The HTTP status.
pub(super) fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorKind::Forbidden => StatusCode::FORBIDDEN,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        ErrorKind::Overloaded => StatusCode::TOO_MANY_REQUESTS,
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// OpenAI's `type`.
fn type_word(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Unauthorized => "authentication_error",
        ErrorKind::Forbidden => "permission_error",
        ErrorKind::Overloaded => "rate_limit_error",
        ErrorKind::Unavailable | ErrorKind::Internal => "server_error",
        ErrorKind::Invalid
        | ErrorKind::NotFound
        | ErrorKind::MethodNotAllowed
        | ErrorKind::Conflict
        | ErrorKind::TooLarge
        | ErrorKind::HeadersTooLarge => "invalid_request_error",
    }
}
