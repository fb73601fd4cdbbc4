//! `/v1/responses`: OpenAI's Responses API. A request is translated into a chat, which [`generate`] answers in the form of
//! [`ResponsesFormat`].

mod input;
mod reply;
mod request;
mod store;

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use self::reply::ResponsesFormat;
use self::request::ResponseRequest;
pub(super) use self::store::ResponseStore;
use self::store::StoredResponse;
use super::SharedApp;
use super::error_response::ErrorResponse;
use super::extract::{JsonBody, PathParam, QueryParams};
use super::field_table::RESPONSES;
use super::finetune::list_object;
use super::generate;
use super::response::Endpoint;
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// Default and maximum of `limit` for lists of items.
const ITEMS_PER_PAGE: (usize, usize) = (20, 100);

/// What ids of responses begin with.
const ID_PREFIX: &str = "resp_";

/// The id of the response to a request with this `request_id`.
fn response_id(request_id: &str) -> String {
    format!("{ID_PREFIX}{request_id}")
}

/// A new id of an item, such as `msg_...`.
fn new_item_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

/// `POST /v1/responses`.
pub(super) async fn create(State(app): State<SharedApp>, JsonBody(body): JsonBody) -> Result<Response, ErrorResponse> {
    let body = Fields::of_body(&body)?;
    RESPONSES.check(&body)?;
    let ResponseRequest { chat, repeated, conversation, store, names } = ResponseRequest::parse(&body, &app.responses)?;
    let kept = store.then(|| app.responses.clone());
    let format = |context| Box::new(ResponsesFormat::new(context, repeated, conversation, kept)) as _;
    let answer = generate::answer(app, &chat, Endpoint::Chat, ID_PREFIX, format).await;
    answer.map_err(|response| ErrorResponse { error: Box::new(names.rename(*response.error)), ..response })
}

/// `GET /v1/responses/{id}`.
pub(super) async fn get(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    query: QueryParams,
) -> Result<Response, ErrorResponse> {
    for (name, value) in query.iter() {
        match name {
            // A stored response has all that it was created with.
            "include" | "include[]" | "include_obfuscation" => {}
            "stream" if value == "false" => {}
            "stream" | "starting_after" => {
                let message = format!("`{name}`: a stored response is not streamed again; leave it out");
                return Err(Error::invalid(message).param(name).code("unsupported_parameter").into());
            }
            _ => return Err(unknown_parameter(name).into()),
        }
    }
    let stored = stored(&app, &id)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], stored.response.to_string()).into_response())
}

/// `DELETE /v1/responses/{id}`.
pub(super) async fn delete(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    if !app.responses.remove(&id) {
        return Err(not_found(&id).into());
    }
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// `GET /v1/responses/{id}/input_items`, newest first unless `order=asc`.
pub(super) async fn input_items(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    query: QueryParams,
) -> Result<Json<Value>, ErrorResponse> {
    let known = ["after", "limit", "order", "include", "include[]"];
    if let Some((name, _)) = query.iter().find(|(name, _)| !known.contains(name)) {
        return Err(unknown_parameter(name).into());
    }
    let page = query.page(ITEMS_PER_PAGE.0, ITEMS_PER_PAGE.1)?;
    let mut items = stored(&app, &id)?.input()?;
    if !page.ascending {
        items.reverse();
    }
    if let Some(after) = &page.after {
        let at = items.iter().position(|item| item["id"] == **after);
        let at =
            at.ok_or_else(|| fields::wrong("after", "the id of an item of this response", &after.as_str().into()))?;
        items.drain(..=at);
    }
    let more = items.len() > page.limit;
    items.truncate(page.limit);
    Ok(Json(list_object(items, more)))
}

/// `POST /v1/responses/{id}/cancel`: refused, because only background responses can be cancelled, and there are none.
pub(super) async fn cancel(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Response, ErrorResponse> {
    stored(&app, &id)?;
    let message = "only a response with `background`: true can be cancelled, which this server does not support; a response that \
                   is being generated ends when the client closes the connection";
    Err(Error::invalid(message).code("unsupported_operation").into())
}

fn stored(app: &SharedApp, id: &str) -> Result<std::sync::Arc<StoredResponse>> {
    app.responses.get(id).ok_or_else(|| not_found(id))
}

fn not_found(id: &str) -> Error {
    let message = format!(
        "there is no stored response {id:?}; it may have been deleted, evicted (the server keeps the responses that were used \
         last), or created with `store`: false"
    );
    Error::not_found(message).param("response_id").code("response_not_found")
}

fn unknown_parameter(name: &str) -> Error {
    let name: String = name.chars().take(64).collect();
    Error::invalid(format!("unknown query parameter `{name}`: remove it")).param(name).code("unknown_parameter")
}
