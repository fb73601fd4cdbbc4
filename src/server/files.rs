//! `/v1/files`: training files, checked when they are uploaded, and result files of jobs.

use std::io::Write;

use axum::Json;
use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError, MultipartRejection};
use axum::extract::{Multipart, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use tempfile::NamedTempFile;
use tokio_util::io::ReaderStream;

use super::error_response::ErrorResponse;
use super::extract::{PathParam, QueryParams};
use super::{Serving, SharedApp};
use crate::error::{AtPath, Error, ErrorKind, Result};
use crate::finetune::record::{FileObject, JobRecord, new_id};
use crate::finetune::store::{ObjectKind, Store};
use crate::train::data::{self, AlpacaEnding, DataOptions};

/// Purpose of a training file.
pub(super) const FINE_TUNE: &str = "fine-tune";

/// Maximum and default of files on a page of the list.
const MAX_PAGE: usize = 10_000;

/// `POST /v1/files`: multipart with `purpose` and `file`. Refuses a file that cannot be trained on, and names its lines.
pub(super) async fn upload(
    State(app): State<SharedApp>,
    multipart: Result<Multipart, MultipartRejection>,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let mut parts = multipart.map_err(|e| {
        let message =
            format!("send the file as multipart/form-data with the parts `purpose` and `file`: {}", e.body_text());
        Error::invalid(message).code("invalid_multipart")
    })?;
    let (mut purpose, mut file) = (None, None);
    while let Some(part) = parts.next_field().await.map_err(invalid_multipart)? {
        match part.name() {
            Some("purpose") => purpose = Some(part.text().await.map_err(invalid_multipart)?),
            Some("file") => file = Some(receive(part, serving.jobs.store()).await?),
            other => {
                let name = other.unwrap_or_default();
                let message = format!("unknown part `{name}`: the parts are `purpose` and `file`");
                return Err(Error::invalid(message).param(name).code("unknown_field").into());
            }
        }
    }
    let missing = |param: &str| {
        Error::invalid(format!("the part `{param}` is missing")).param(param).code("missing_required_parameter")
    };
    match purpose.ok_or_else(|| missing("purpose"))?.as_str() {
        FINE_TUNE => {}
        other => {
            let message = format!("`purpose` must be \"{FINE_TUNE}\", not {other:?}");
            return Err(Error::invalid(message).param("purpose").code("invalid_value").into());
        }
    }
    let (filename, content) = file.ok_or_else(|| missing("file"))?;
    let codec = serving.codec.clone();
    let keep = move |store: &Store| {
        let bytes = std::fs::read(content.path()).at(content.path())?;
        // A job's settings decide where examples are cut. Only errors that no setting avoids are refused here.
        let options =
            DataOptions { max_length: usize::MAX, train_on_inputs: false, alpaca_ending: AlpacaEnding::default() };
        data::parse(&bytes, &codec, &options).map_err(|e| e.param("file"))?;
        let file = FileObject::new(new_id("file-"), bytes.len() as u64, filename, FINE_TUNE);
        let path = store.file_path(&file.id);
        content.persist(&path).map_err(|e| e.error).at(path)?;
        store.put(ObjectKind::File, &file.id, "", &file)?;
        Ok(file)
    };
    Ok(Json(json!(serving.jobs.store().run(keep).await?)))
}

/// Writes the content of a part to disk, and returns its name and the file.
async fn receive(mut part: Field<'_>, store: &Store) -> Result<(String, NamedTempFile)> {
    let name = part.file_name().filter(|name| !name.is_empty()).unwrap_or("file").to_owned();
    let mut file = NamedTempFile::new_in(store.files_dir()).at(store.files_dir())?;
    // Writing to the page cache is fast enough for an async thread.
    while let Some(chunk) = part.chunk().await.map_err(invalid_multipart)? {
        file.write_all(&chunk).at(file.path())?;
    }
    Ok((name, file))
}

fn invalid_multipart(e: MultipartError) -> Error {
    match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Error::new(ErrorKind::TooLarge, "the file is larger than this server allows (--max-file)")
                .param("file")
                .code("file_too_large")
        }
        _ => Error::invalid(format!("invalid multipart body: {}", e.body_text())).code("invalid_multipart"),
    }
}

/// `GET /v1/files`, newest first unless `order=asc`.
pub(super) async fn list(State(app): State<SharedApp>, query: QueryParams) -> Result<Json<Value>, ErrorResponse> {
    let page = query.page(MAX_PAGE, MAX_PAGE)?;
    let purpose = query.get("purpose").map(str::to_owned);
    let keep = move |file: &FileObject| purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose);
    let (files, more) = store(&app)?.run(move |store| store.page(ObjectKind::File, "", &page, keep)).await?;
    Ok(Json(super::finetune::list_object(files.iter().map(|file| json!(file)).collect(), more)))
}

/// `GET /v1/files/{id}`.
pub(super) async fn get(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Json<Value>, ErrorResponse> {
    let file: FileObject = store(&app)?.run(move |store| store.get(ObjectKind::File, &id, "file_id")).await?;
    Ok(Json(json!(file)))
}

/// `GET /v1/files/{id}/content`.
pub(super) async fn content(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Response, ErrorResponse> {
    let open = move |store: &Store| {
        let file: FileObject = store.get(ObjectKind::File, &id, "file_id")?;
        let path = store.file_path(&id);
        Ok((std::fs::File::open(&path).at(path)?, file))
    };
    let (content, file) = store(&app)?.run(open).await?;
    let content = ReaderStream::new(tokio::fs::File::from_std(content));
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, file.bytes.to_string()),
    ];
    Ok((headers, Body::from_stream(content)).into_response())
}

/// `DELETE /v1/files/{id}`. Errors: `Conflict` while a job still needs the file.
pub(super) async fn delete(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let remove = move |store: &Store| {
        let _: FileObject = store.get(ObjectKind::File, &id, "file_id")?;
        let needs = |job: &JobRecord| {
            !job.status.ended() && (job.training_file == id || job.validation_file.as_deref() == Some(&id))
        };
        if let Some(job) = store.all(ObjectKind::Job, "")?.iter().find(|job| needs(job)) {
            let message = format!("file {id} is in use by job {}, which is {}", job.id, job.status.word());
            return Err(Error::new(ErrorKind::Conflict, message).param("file_id").code("file_in_use"));
        }
        store.delete(ObjectKind::File, &id)?;
        let path = store.file_path(&id);
        std::fs::remove_file(&path).at(path)?;
        Ok(json!({"id": id, "object": "file", "deleted": true}))
    };
    Ok(Json(store(&app)?.run(remove).await?))
}

fn store(app: &SharedApp) -> Result<&std::sync::Arc<Store>> {
    app.serving().map(|serving: &std::sync::Arc<Serving>| serving.jobs.store())
}
