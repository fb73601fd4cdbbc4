//! What handlers take from a request, refused in OpenAI's envelope where axum would answer in plain text.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde_json::Value;

use super::failure::Failure;
use super::fields;
use crate::Error;

/// A body that is JSON, whatever its content type says. 413 over the limit, 400 with the position when malformed.
pub struct Json(pub Value);

impl<S: Send + Sync> FromRequest<S> for Json {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        let body = Bytes::from_request(request, state).await?;
        Ok(Self(fields::parse(&body)?))
    }
}

/// The name at the end of a path, percent-decoded.
pub struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let Path(name) = Path::from_request_parts(parts, state).await.map_err(|e| Error::invalid(e.body_text()))?;
        Ok(Self(name))
    }
}
