//! What handlers take from a request, refused in OpenAI's envelope where axum would answer in plain text.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde_json::Value;

use super::error_response::ErrorResponse;
use crate::fields;
use crate::finetune::store::PageQuery;
use crate::{Error, Result as OurResult};

/// A body that is JSON, whatever its content type says. 413 over the limit, 400 with the position when malformed.
pub(super) struct Json(pub(super) Value);

impl<S: Send + Sync> FromRequest<S> for Json {
    type Rejection = ErrorResponse;

    async fn from_request(request: Request, state: &S) -> Result<Self, ErrorResponse> {
        let body = Bytes::from_request(request, state).await?;
        Ok(Self(fields::parse(&body)?))
    }
}

/// The name at the end of a path, percent-decoded.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ErrorResponse;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ErrorResponse> {
        let Path(name) = Path::from_request_parts(parts, state).await.map_err(|e| Error::invalid(e.body_text()))?;
        Ok(Self(name))
    }
}

/// The parameters behind the `?`, in order.
pub(super) struct Query(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = ErrorResponse;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ErrorResponse> {
        let query = axum::extract::Query::from_request_parts(parts, state).await;
        let axum::extract::Query(pairs) = query.map_err(|e| Error::invalid(e.body_text()))?;
        Ok(Self(pairs))
    }
}

impl Query {
    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The last one of a name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.iter().filter(|(other, _)| *other == name).map(|(_, value)| value).last()
    }

    /// Which part of a list is wanted: `after`, `limit`, `order`.
    pub(super) fn page(&self, limit: usize, most: usize) -> OurResult<PageQuery> {
        let wrong = |name: &str, allowed: &str, got: &str| fields::wrong(name, allowed, &got.into());
        let limit = match self.get("limit") {
            None => limit,
            Some(text) => text
                .parse()
                .ok()
                .filter(|n| (1..=most).contains(n))
                .ok_or_else(|| wrong("limit", &format!("an integer from 1 to {most}"), text))?,
        };
        let ascending = match self.get("order") {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(other) => return Err(wrong("order", "\"asc\" or \"desc\"", other)),
        };
        Ok(PageQuery { after: self.get("after").map(str::to_owned), limit, ascending })
    }
}
