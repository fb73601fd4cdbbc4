//! What every request passes: request id, log line, key, error counts.

use std::any::Any;
use std::net::SocketAddr;

use axum::Router;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::trace::{DefaultOnFailure, DefaultOnResponse, TraceLayer};
use tracing::Level;

use super::SharedApp;
use super::failure::{Failed, Failure};
use crate::error::{Error, ErrorKind, Result};

/// All header names and values of a request, bytes.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// Digests of the keys that open the server: of one length, so that comparing them takes the same time whatever came.
pub struct Keys {
    api: Vec<[u8; 32]>,
    admin: Option<[u8; 32]>,
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl Keys {
    /// Keeps the digests, not the keys.
    pub fn new(api: &[String], admin: Option<&str>) -> Self {
        Self { api: api.iter().map(|key| digest(key)).collect(), admin: admin.map(digest) }
    }
}

/// The key of a request: `Authorization: Bearer <key>`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, key) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

/// 401 unless the request has one of `keys`. Looks at all of them, whichever fits.
fn require_key<'a>(headers: &HeaderMap, keys: impl IntoIterator<Item = &'a [u8; 32]>, what: &str) -> Result<()> {
    let refuse = |message| Err(Error::new(ErrorKind::Unauthorized, message).code("invalid_api_key"));
    let Some(key) = bearer(headers) else {
        return refuse(format!("{what} needs a key: send the header `Authorization: Bearer <key>`"));
    };
    let key = digest(key);
    let found = keys.into_iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&key));
    if found.into() { Ok(()) } else { refuse(format!("this key does not open {what}")) }
}

/// Inference: one of the API keys, where there are any.
pub async fn require_api_key(State(app): State<SharedApp>, request: Request, next: Next) -> Result<Response, Failure> {
    if !app.keys.api.is_empty() {
        require_key(request.headers(), &app.keys.api, "this server")?;
    }
    Ok(next.run(request).await)
}

/// Admin routes: the admin key, or without one a client on this machine.
pub async fn require_admin(State(app): State<SharedApp>, request: Request, next: Next) -> Result<Response, Failure> {
    match &app.keys.admin {
        Some(key) => require_key(request.headers(), [key], "the admin routes")?,
        None => require_loopback(&request)?,
    }
    Ok(next.run(request).await)
}

fn require_loopback(request: &Request) -> Result<()> {
    let forbid = |message: &str| Err(Error::new(ErrorKind::Forbidden, message).code("admin_forbidden"));
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    if !peer.is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback()) {
        return forbid("without --admin-key, the admin routes answer only to clients on the same machine");
    }
    // A proxy on this machine speaks for others, and so does a browser for the page it shows.
    if ["forwarded", "x-forwarded-for", "x-real-ip", "origin"].iter().any(|name| request.headers().contains_key(*name))
    {
        return forbid("without --admin-key, the admin routes answer neither proxies nor web pages");
    }
    Ok(())
}

/// Counts error responses, and refuses headers that are too long.
pub async fn count_errors(State(app): State<SharedApp>, request: Request, next: Next) -> Response {
    let bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    let response = if bytes > MAX_HEADER_BYTES {
        let message = format!("the request headers have {bytes} bytes, and {MAX_HEADER_BYTES} are allowed");
        Failure::from(Error::new(ErrorKind::HeadersTooLarge, message)).into_response()
    } else {
        next.run(request).await
    };
    if let Some(Failed { kind, adapter }) = response.extensions().get() {
        app.metrics.error(*kind, adapter);
    }
    response
}

/// 404 for a path that is none of ours.
pub async fn unknown_route(method: Method, uri: Uri) -> Failure {
    Error::not_found(format!("no such route: {method} {}", uri.path())).code("unknown_route").into()
}

/// 405 for a path of ours.
pub async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{} does not answer {method}: see the `allow` header", uri.path());
    Error::new(ErrorKind::MethodNotAllowed, message).code("method_not_allowed").into()
}

/// The outermost layers: request ids in and out, a log line a request, panics to 500.
pub fn observe(router: Router<SharedApp>) -> Router<SharedApp> {
    let span = |request: &axum::http::Request<_>| {
        let id = request.extensions().get::<RequestId>().and_then(|id| id.header_value().to_str().ok());
        tracing::info_span!("request", id, method = %request.method(), path = request.uri().path())
    };
    router.layer(
        ServiceBuilder::new()
            .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(span)
                    .on_response(DefaultOnResponse::new().level(Level::INFO))
                    .on_failure(DefaultOnFailure::new().level(Level::WARN)),
            )
            .layer(PropagateRequestIdLayer::x_request_id())
            .layer(CatchPanicLayer::custom(panicked)),
    )
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    tracing::error!(panic = message, "a handler panicked");
    Failure::from(Error::internal("a fault in this server; its log has the details")).into_response()
}
