//! Extractors for handlers. They refuse requests with OpenAI's error body, where axum's own answer in plain text.

use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use serde_json::Value;

use super::error_response::ErrorResponse;
use crate::fields;
use crate::finetune::store::PageQuery;
use crate::{Error, Result as OurResult};

/// The body as JSON, whatever its content type says. Errors: `TooLarge` over the limit; `Invalid` with the position if
/// malformed.
pub(super) struct JsonBody(pub(super) Value);

impl<S: Send + Sync> FromRequest<S> for JsonBody {
    type Rejection = ErrorResponse;

    async fn from_request(request: Request, state: &S) -> Result<Self, ErrorResponse> {
        let body = Bytes::from_request(request, state).await?;
        Ok(Self(fields::parse(&body)?))
    }
}

/// The one parameter of a path, percent-decoded.
pub(super) struct PathParam(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for PathParam {
    type Rejection = ErrorResponse;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ErrorResponse> {
        let Path(name) = Path::from_request_parts(parts, state).await.map_err(|e| Error::invalid(e.body_text()))?;
        Ok(Self(name))
    }
}

/// The parameters after the `?`, in order.
pub(super) struct QueryParams(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for QueryParams {
    type Rejection = ErrorResponse;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ErrorResponse> {
        let query = axum::extract::Query::from_request_parts(parts, state).await;
        let axum::extract::Query(pairs) = query.map_err(|e| Error::invalid(e.body_text()))?;
        Ok(Self(pairs))
    }
}

impl QueryParams {
    /// All parameters.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// The last value of a name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.iter().filter(|(other, _)| *other == name).map(|(_, value)| value).last()
    }

    /// Reads `after`, `limit` and `order`: which page of a list is wanted. `limit` is the default, `most` its maximum.
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
