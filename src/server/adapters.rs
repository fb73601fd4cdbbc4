//! Routes that manage adapters: our admin routes, vLLM's load and unload, llama.cpp's list.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::SharedApp;
use super::error_response::{ErrorResponse, client_message, status, with_status};
use super::extract::{JsonBody, PathParam};
use super::middleware::request_id;
use crate::adapter::registry::{AdapterInfo, LoadOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::fields::{self, Fields};
use crate::time::unix_seconds;

fn object(info: &AdapterInfo) -> Value {
    let mut object = json!(info);
    object["object"] = "adapter".into();
    object["loaded_at"] = unix_seconds(info.loaded_at).into();
    object
}

/// `GET /admin/adapters`.
pub(super) async fn list(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let data: Vec<Value> = app.serving()?.registry.list().iter().map(object).collect();
    Ok(Json(json!({"object": "list", "data": data})))
}

/// `GET /admin/adapters/{name}`.
pub(super) async fn get(
    State(app): State<SharedApp>,
    PathParam(name): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.registry.get(&name)?)))
}

/// `PUT /admin/adapters/{name}` with `{source, pinned}`: loads an adapter, or replaces it with a new generation.
pub(super) async fn put(
    State(app): State<SharedApp>,
    PathParam(name): PathParam,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let body = Fields::of_body(&body)?;
    fields::check_only(&body, &["source", "pinned"])?;
    let source = body.required("source", body.string("source")?, "the directory of the adapter")?;
    let pinned = body.boolean("pinned")?.unwrap_or(false);
    Ok(Json(object(&serving.registry.load(&name, source, LoadOptions { pinned, replace: true }).await?)))
}

/// `DELETE /admin/adapters/{name}`: unloads it. The answer has the bytes freed now, and those that running requests hold.
pub(super) async fn delete(
    State(app): State<SharedApp>,
    PathParam(name): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let unloaded = app.serving()?.registry.unload(&name)?;
    let mut object = json!(unloaded);
    object["name"] = name.into();
    object["object"] = "adapter.deleted".into();
    Ok(Json(object))
}

/// `POST /admin/adapters/{name}/pin`: keeps it in its slot.
pub(super) async fn pin(
    State(app): State<SharedApp>,
    PathParam(name): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.registry.set_pinned(&name, true)?)))
}

/// `POST /admin/adapters/{name}/unpin`.
pub(super) async fn unpin(
    State(app): State<SharedApp>,
    PathParam(name): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.registry.set_pinned(&name, false)?)))
}

/// `POST /v1/load_lora_adapter`, answered like vLLM. Unknown fields are ignored: the Kubernetes LoRA syncer sends some.
pub(super) async fn vllm_load(
    State(app): State<SharedApp>,
    body: Result<JsonBody, ErrorResponse>,
) -> Result<Response, ErrorResponse> {
    let serving = app.serving()?;
    let run = async {
        let JsonBody(body) = body.map_err(|response| *response.error)?;
        let body = Fields::of_body(&body)?;
        let both = "Both 'lora_name' and 'lora_path' must be provided.";
        let name = body.string("lora_name")?.filter(|s| !s.is_empty());
        let path = body.string("lora_path")?.filter(|s| !s.is_empty());
        let (Some(name), Some(path)) = (name, path) else { return Err(Error::invalid(both)) };
        let replace = body.boolean("load_inplace")?.unwrap_or(false);
        match serving.registry.load(name, path, LoadOptions { pinned: false, replace }).await {
            Ok(_) => Ok(format!("Success: LoRA adapter '{name}' added successfully.")),
            Err(e) if e.kind == ErrorKind::Conflict => Err(Error::invalid(format!(
                "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set \
                 'load_inplace' to True."
            ))),
            Err(e) if e.kind == ErrorKind::NotFound => {
                let message = format!("Loading lora {name} failed: No adapter found for {path} ({})", e.message);
                Err(Error::not_found(message))
            }
            Err(e) => Err(e),
        }
    };
    Ok(vllm_answer(run.await))
}

/// `POST /v1/unload_lora_adapter`, answered like vLLM.
pub(super) async fn vllm_unload(
    State(app): State<SharedApp>,
    body: Result<JsonBody, ErrorResponse>,
) -> Result<Response, ErrorResponse> {
    let serving = app.serving()?;
    let run = || {
        let JsonBody(body) = body.map_err(|response| *response.error)?;
        let body = Fields::of_body(&body)?;
        let Some(name) = body.string("lora_name")?.filter(|s| !s.is_empty()) else {
            return Err(Error::invalid("'lora_name' needs to be provided to unload a LoRA adapter."));
        };
        match serving.registry.unload(name) {
            Ok(_) => Ok(format!("Success: LoRA adapter '{name}' removed successfully.")),
            Err(e) if e.kind == ErrorKind::NotFound => {
                Err(Error::not_found(format!("The lora adapter '{name}' cannot be found.")))
            }
            Err(e) => Err(e),
        }
    };
    Ok(vllm_answer(run()))
}

/// Plain text on success; on errors vLLM's body, with its type words and the status as `code`.
fn vllm_answer(result: Result<String>) -> Response {
    let error = match result {
        Ok(text) => return text.into_response(),
        Err(error) => error,
    };
    let word = match error.kind {
        ErrorKind::NotFound => "NotFoundError",
        ErrorKind::Internal => "InternalServerError",
        _ => "InvalidUserInput",
    };
    let message = client_message(&error, &request_id());
    let code = status(error.kind).as_u16();
    let body = json!({"error": {"message": message, "type": word, "param": null, "code": code}});
    with_status(&error, String::new(), Json(body))
}

/// `GET /lora-adapters`, in llama.cpp's form. `scale` is 0: an adapter applies only to requests that name it.
pub(super) async fn llama_cpp_list(State(app): State<SharedApp>) -> Result<Json<Value>, ErrorResponse> {
    let entry = |(id, info): (usize, &AdapterInfo)| json!({"id": id, "path": info.source, "scale": 0.0, "task_name": info.name, "prompt_prefix": ""});
    Ok(Json(app.serving()?.registry.list().iter().enumerate().map(entry).collect()))
}

#[cfg(test)]
mod tests {
    use axum::body::to_bytes;

    use super::*;

    #[tokio::test]
    async fn vllms_body_hides_internal_errors() {
        let body = async |error: Error| {
            let bytes = to_bytes(vllm_answer(Err(error)).into_body(), 1 << 10).await.unwrap();
            serde_json::from_slice::<Value>(&bytes).unwrap()["error"].take()
        };
        let shown = body(Error::invalid("'lora_name' is missing")).await;
        assert_eq!((&shown["message"], &shown["code"]), (&json!("'lora_name' is missing"), &json!(400)));
        let hidden = body(Error::internal("/secret")).await;
        assert_eq!((&hidden["type"], &hidden["code"]), (&json!("InternalServerError"), &json!(500)));
        assert!(hidden["message"].as_str().unwrap().starts_with("internal error;"), "{hidden}");
    }
}
