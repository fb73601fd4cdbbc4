//! Errors on the wire: OpenAI's envelope, with what the metrics need beside it.

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::error::{Error, ErrorKind};

/// Seconds after which a client may try again: a queue of decode steps drains in less, a load may take a few tries.
const RETRY_AFTER: &str = "1";

/// An error on its way to the client.
#[derive(Debug)]
pub struct Failure {
    /// What went wrong.
    pub error: Error,
    /// `adapter` label of the metrics: empty until the request's adapter is known.
    pub adapter: String,
}

/// What the error-counting layer finds in a response.
#[derive(Debug, Clone)]
pub struct Failed {
    /// Label `kind`.
    pub kind: ErrorKind,
    /// Label `adapter`.
    pub adapter: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, adapter: String::new() }
    }
}

impl From<BytesRejection> for Failure {
    fn from(rejection: BytesRejection) -> Self {
        let kind = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ErrorKind::TooLarge,
            // The client went away or broke off: nobody will read this.
            _ => ErrorKind::Invalid,
        };
        let message = match kind {
            ErrorKind::TooLarge => "the request body is larger than this server allows (--max-body)".into(),
            _ => rejection.body_text(),
        };
        Error::new(kind, message)
            .code(if kind == ErrorKind::TooLarge { "body_too_large" } else { "unreadable_body" })
            .into()
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut response = respond(&self.error, Json(self.error.body()));
        response.extensions_mut().insert(Failed { kind: self.error.kind, adapter: self.adapter });
        response
    }
}

/// A response with the status and headers of an error around any body.
pub fn respond(error: &Error, body: impl IntoResponse) -> Response {
    let status = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, body).into_response();
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
    response
}
