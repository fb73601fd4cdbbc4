//! The layers around all routes: request id, log line, keys, CORS, error counts.

use std::any::Any;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::to_bytes;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, RequestId, SetRequestIdLayer};
use tower_http::trace::{DefaultOnFailure, DefaultOnResponse, TraceLayer};
use tracing::Level;

use super::error_response::{ErrorResponse, ReportedError};
use super::{SharedApp, hints};
use crate::error::{Error, ErrorKind, Result};

/// Limit on all header names and values of a request, bytes.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// The header of a request's id, which the response repeats.
const REQUEST_ID_HEADER: HeaderName = HeaderName::from_static("x-request-id");

/// The header in which Anthropic's clients send the key.
const API_KEY_HEADER: HeaderName = HeaderName::from_static("x-api-key");

/// Limit on a request's id, bytes: OpenAI's.
const MAX_REQUEST_ID_BYTES: usize = 512;

/// How long a browser may remember what it may send.
const CORS_MAX_AGE: Duration = Duration::from_secs(600);

/// Limit on the body of a refused request that is read and dropped, bytes.
const MAX_DISCARDED: usize = 256 * 1024;

/// Limit on the time that this takes.
const DISCARD_TIMEOUT: Duration = Duration::from_secs(2);

tokio::task_local! {
    /// The id of the request that a task answers.
    static REQUEST_ID: String;
}

/// The id of the request that this task answers: `x-request-id`, from the client or made here. Empty outside requests.
pub(super) fn request_id() -> String {
    REQUEST_ID.try_with(Clone::clone).unwrap_or_default()
}

/// Answers a request with [`request_id`] set.
async fn set_request_id(request: Request, next: Next) -> Response {
    let id = id_of(&request).unwrap_or_default();
    REQUEST_ID.scope(id, next.run(request)).await
}

fn id_of<B>(request: &axum::http::Request<B>) -> Option<String> {
    let id = request.extensions().get::<RequestId>()?.header_value();
    Some(String::from_utf8_lossy(id.as_bytes()).into_owned())
}

/// SHA-256 digests of the keys that open the server. They have one length, so comparing them takes the same time for every
/// key that a client sends.
pub(super) struct AccessKeys {
    api: Vec<[u8; 32]>,
    admin: Option<[u8; 32]>,
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

impl AccessKeys {
    /// Keeps the digests, not the keys.
    pub(super) fn new(api: &[String], admin: Option<&str>) -> Self {
        Self { api: api.iter().map(|key| digest(key)).collect(), admin: admin.map(digest) }
    }
}

/// Keys of a request: `Authorization: Bearer <key>`, and `x-api-key: <key>`, which Anthropic's clients send.
fn keys_of(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let texts = |name| headers.get_all(name).into_iter().filter_map(|value: &HeaderValue| value.to_str().ok());
    let bearer = texts(header::AUTHORIZATION).filter_map(|value| {
        let (scheme, key) = value.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key)
    });
    bearer.chain(texts(API_KEY_HEADER)).map(str::trim)
}

/// `Unauthorized` unless the request has one of `keys`. Compares with all of them, even after a match.
fn require_key<'a>(headers: &HeaderMap, keys: impl IntoIterator<Item = &'a [u8; 32]>, what: &str) -> Result<()> {
    let refuse = |message| Err(Error::new(ErrorKind::Unauthorized, message).code("invalid_api_key"));
    let mut sent = keys_of(headers).map(digest);
    let Some(key) = sent.next() else {
        return refuse(format!(
            "{what} needs a key: send the header `Authorization: Bearer <key>` or `x-api-key: <key>`"
        ));
    };
    if sent.any(|other| other != key) {
        return refuse(
            "the request has several keys that differ: send one, as `Authorization: Bearer <key>`".to_owned(),
        );
    }
    let found = keys.into_iter().fold(Choice::from(0), |found, known| found | known.ct_eq(&key));
    if found.into() { Ok(()) } else { refuse(format!("invalid key for {what}")) }
}

/// Attached to requests that the server sends to itself for a client whose key it has checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct InProcess;

/// For all routes but the admin and open ones: requires one of the API keys, if there are any.
pub(super) async fn require_api_key(State(app): State<SharedApp>, request: Request, next: Next) -> Response {
    if !app.keys.api.is_empty()
        && request.extensions().get::<InProcess>().is_none()
        && let Err(error) = require_key(request.headers(), &app.keys.api, "this server")
    {
        return refuse(request, error).await;
    }
    next.run(request).await
}

/// Admin routes: the admin key, or without one a client on this machine.
pub(super) async fn require_admin(State(app): State<SharedApp>, request: Request, next: Next) -> Response {
    let allowed = match &app.keys.admin {
        Some(key) => require_key(request.headers(), [key], "the admin routes"),
        None => require_loopback(&request),
    };
    match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(request, error).await,
    }
}

/// Answers a request whose body nobody has read. If a body is dropped unread, the connection closes, and the client's next request on
/// it fails. So a short body is read first, and after a long one the answer says that the connection closes.
async fn refuse(request: Request, error: Error) -> Response {
    let read = to_bytes(request.into_body(), MAX_DISCARDED);
    let whole = matches!(tokio::time::timeout(DISCARD_TIMEOUT, read).await, Ok(Ok(_)));
    let mut response = ErrorResponse::from(error).into_response();
    if !whole {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn require_loopback(request: &Request) -> Result<()> {
    let forbid = |message: &str| Err(Error::new(ErrorKind::Forbidden, message).code("admin_forbidden"));
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    if !peer.is_some_and(|ConnectInfo(peer)| peer.ip().to_canonical().is_loopback()) {
        return forbid("without --admin-key, the admin routes answer only clients on the same machine");
    }
    // A proxy on this machine sends requests for other clients, and a browser for the page that it shows.
    if ["forwarded", "x-forwarded-for", "x-real-ip", "origin"].iter().any(|name| request.headers().contains_key(*name))
    {
        return forbid("without --admin-key, the admin routes answer neither proxies nor web pages");
    }
    Ok(())
}

/// The layer that lets web pages of `origins` use the server, or none without origins. Browsers may send any header, such as
/// the key and those of OpenAI's client. Errors: `Invalid` for an origin that no header can hold.
pub(super) fn cors(origins: &[String]) -> Result<Option<CorsLayer>> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let values = origins.iter().map(|origin| {
            HeaderValue::from_str(origin).map_err(|e| Error::invalid(format!("--cors-origin {origin:?}: {e}")))
        });
        AllowOrigin::list(values.collect::<Result<Vec<_>>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::HEAD, Method::POST, Method::DELETE])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID_HEADER, header::RETRY_AFTER])
        .max_age(CORS_MAX_AGE);
    Ok(Some(layer))
}

/// Counts error responses, and refuses bad headers.
pub(super) async fn count_errors(State(app): State<SharedApp>, request: Request, next: Next) -> Response {
    let response = match check_headers(&request) {
        Ok(()) => next.run(request).await,
        Err(error) => refuse(request, error).await,
    };
    if let Some(ReportedError { error, adapter }) = response.extensions().get() {
        app.metrics.error(error.kind, adapter);
    }
    response
}

/// Errors: headers that are too long, or a request id that was refused.
fn check_headers(request: &Request) -> Result<()> {
    let bytes: usize = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADER_BYTES {
        let message = format!("the request headers have {bytes} bytes; at most {MAX_HEADER_BYTES} are allowed");
        return Err(Error::new(ErrorKind::HeadersTooLarge, message));
    }
    if request.extensions().get::<BadRequestId>().is_some() {
        let message = format!(
            "the header `x-request-id` must have 1 to {MAX_REQUEST_ID_BYTES} visible ASCII characters, without spaces"
        );
        return Err(Error::invalid(message).code("invalid_request_id"));
    }
    Ok(())
}

/// Answers an unknown path.
pub(super) async fn unknown_route(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let hint = hints::meant(path).map_or(String::new(), |route| format!(": use {route}"));
    let error = Error::not_found(format!("no such route: {method} {path}{hint}")).code("unknown_route");
    refuse(request, error).await
}

/// Answers a method that the route does not have.
pub(super) async fn wrong_method(request: Request) -> Response {
    let (method, path) = (request.method(), request.uri().path());
    let message = format!("{path} does not support the method {method}: the `allow` header lists those it does");
    refuse(request, Error::new(ErrorKind::MethodNotAllowed, message).code("method_not_allowed")).await
}

/// Marks a request whose id was refused.
#[derive(Clone)]
struct BadRequestId;

/// Takes away a request id that is not fit for logs and headers. The request gets one of ours, and is refused under it.
fn drop_bad_request_id(mut request: Request) -> Request {
    let good = |id: &HeaderValue| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    if request.headers().get(REQUEST_ID_HEADER).is_some_and(|id| !good(id)) {
        request.headers_mut().remove(REQUEST_ID_HEADER);
        request.extensions_mut().insert(BadRequestId);
    }
    request
}

/// Adds the outermost layers: request ids in and out, a log line for each request, panics to internal errors.
pub(super) fn observe<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    let span = |request: &axum::http::Request<_>| tracing::info_span!("request", id = id_of(request), method = %request.method(), path = request.uri().path());
    router.layer(
        ServiceBuilder::new()
            .map_request(drop_bad_request_id)
            .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
            .layer(
                TraceLayer::new_for_http()
                    .make_span_with(span)
                    .on_response(DefaultOnResponse::new().level(Level::INFO))
                    .on_failure(DefaultOnFailure::new().level(Level::WARN)),
            )
            .layer(PropagateRequestIdLayer::x_request_id())
            .layer(from_fn(set_request_id))
            .layer(CatchPanicLayer::custom(panicked)),
    )
}

fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    let message = format!("a handler panicked: {}", message.unwrap_or("(no message)"));
    ErrorResponse::from(Error::internal(message)).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::routing::get;
    use serde_json::Value;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_internal_error_without_its_message() {
        let routes = Router::new().route("/", get(|| async { panic!("the secret") as () }));
        let request = Request::builder().uri("/").header("x-request-id", "mine").body(Body::empty()).unwrap();
        let response = observe(routes).oneshot(request).await.unwrap();
        assert_eq!((response.status().as_u16(), &response.headers()["x-request-id"]), (500, &"mine".parse().unwrap()));
        let body = to_bytes(response.into_body(), 1 << 10).await.unwrap();
        let error = serde_json::from_slice::<Value>(&body).unwrap()["error"].take();
        assert_eq!(error["message"], "internal error; the server's log has the details under request id mine");
        assert_eq!(error["type"], "server_error");
    }
}
