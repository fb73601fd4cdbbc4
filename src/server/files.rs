//! `/v1/files`: files of clients, and result files of jobs and batches.

use std::io::Write;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::multipart::{Field, MultipartError, MultipartRejection};
use axum::extract::{Multipart, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use tokio_util::io::ReaderStream;

use super::batches::record::BatchRecord;
use super::error_response::ErrorResponse;
use super::extract::{PathParam, QueryParams};
use super::{Serving, SharedApp};
use crate::error::{AtPath, Error, ErrorKind, Result};
use crate::fields::{self, Fields};
use crate::finetune::record::{FINE_TUNE, FINE_TUNE_RESULTS, FileObject, JobRecord, new_id, now};
use crate::finetune::results;
use crate::finetune::store::{ObjectKind, Store};
use crate::text::codec::TextCodec;
use crate::train::data::{self, AlpacaEnding, DataOptions};

/// Purposes of files that clients may upload.
const PURPOSES: [&str; 6] = [FINE_TUNE, super::batches::BATCH, "user_data", "evals", "assistants", "vision"];

/// Maximum and default of files on a page of the list.
const MAX_PAGE: usize = 10_000;

/// Limit on the bytes of a part that is not the file.
const MAX_FIELD: usize = 1024;

/// Limit on the characters of a file's name.
const MAX_NAME: usize = 512;

/// Seconds after which a file may expire, as in OpenAI's API: an hour to 30 days.
const EXPIRY: std::ops::RangeInclusive<i64> = 3600..=2_592_000;

/// A file that a client wants to store.
#[derive(Debug)]
pub(super) struct NewFile {
    /// Its name.
    pub(super) filename: String,
    /// One of [`PURPOSES`].
    pub(super) purpose: String,
    /// Seconds after which it expires.
    pub(super) expires_after: Option<u64>,
}

impl NewFile {
    /// Reads `purpose` and `expires_after`.
    pub(super) fn read(fields: &Fields, filename: String) -> Result<Self> {
        let allowed = || PURPOSES.map(|purpose| format!("\"{purpose}\"")).join(", ");
        let purpose = fields.required("purpose", fields.string("purpose")?, &format!("one of {}", allowed()))?;
        if !PURPOSES.contains(&purpose) {
            return Err(fields::wrong("purpose", &format!("one of {}", allowed()), &purpose.into()));
        }
        if filename.is_empty() || filename.chars().count() > MAX_NAME {
            let message = format!("the name of the file must have 1 to {MAX_NAME} characters");
            return Err(Error::invalid(message).param("filename").code("invalid_value"));
        }
        Ok(Self { filename, purpose: purpose.to_owned(), expires_after: expires_after(fields, "expires_after")? })
    }

    /// Stores the file. A training file that cannot be trained on gets the status `error`; a job that uses it fails with the
    /// reason, which is where OpenAI's clients look for it.
    pub(super) fn store(self, store: &Store, codec: &TextCodec, content: NamedTempFile) -> Result<FileObject> {
        let bytes = content.as_file().metadata().at(content.path())?.len();
        let mut file = FileObject::new(new_id("file-"), bytes, self.filename, &self.purpose);
        file.expires_at = self.expires_after.map(|seconds| file.created_at + seconds);
        if self.purpose == FINE_TUNE {
            let bytes = std::fs::read(content.path()).at(content.path())?;
            // A job's settings decide where examples are cut. Only errors that no setting avoids are found here.
            let options =
                DataOptions { max_length: usize::MAX, train_on_inputs: false, alpaca_ending: AlpacaEnding::default() };
            if let Err(error) = data::parse(&bytes, codec, &options) {
                file.status = "error".into();
                file.status_details = Some(error.public_message(&format!("file {}", file.id)).into_owned());
            }
        }
        store.add_file(&file, content)?;
        Ok(file)
    }
}

/// Reads the object `name`: seconds from the creation of a file to its end.
pub(super) fn expires_after(fields: &Fields, name: &str) -> Result<Option<u64>> {
    let Some(after) = fields.object(name)? else { return Ok(None) };
    fields::check_only(&after, &["anchor", "seconds"])?;
    match after.required("anchor", after.string("anchor")?, "\"created_at\"")? {
        "created_at" => {}
        other => return Err(fields::wrong(&after.path_of("anchor"), "\"created_at\"", &other.into())),
    }
    let seconds = after.required("seconds", after.integer("seconds", EXPIRY)?, "the seconds until the file expires")?;
    Ok(Some(seconds as u64))
}

/// `POST /v1/files`: multipart with `purpose`, `file` and `expires_after[...]`.
pub(super) async fn upload(
    State(app): State<SharedApp>,
    multipart: Result<Multipart, MultipartRejection>,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let (fields, file) = read_form(multipart, serving.jobs.store()).await?;
    let missing = || Error::invalid("the part `file` is missing").param("file").code("missing_required_parameter");
    let (filename, content) = file.ok_or_else(missing)?;
    let new = NewFile::read(&Fields::of_body(&Value::Object(fields))?, filename)?;
    let codec = serving.codec.clone();
    let file = serving.jobs.store().run(move |store| new.store(store, &codec, content)).await?;
    Ok(Json(json!(file)))
}

/// The parts of an upload: its fields as a JSON object, and the name and the content of the file.
type UploadForm = (Map<String, Value>, Option<(String, NamedTempFile)>);

async fn read_form(multipart: Result<Multipart, MultipartRejection>, store: &Store) -> Result<UploadForm> {
    let mut parts = multipart.map_err(|e| {
        let message =
            format!("send the file as multipart/form-data with the parts `purpose` and `file`: {}", e.body_text());
        Error::invalid(message).code("invalid_multipart")
    })?;
    let (mut fields, mut expiry, mut file) = (Map::new(), Map::new(), None);
    while let Some(part) = parts.next_field().await.map_err(invalid_multipart)? {
        let name = part.name().unwrap_or_default().to_owned();
        let twice = match name.as_str() {
            "purpose" => fields.insert(name.clone(), field_text(part, &name).await?.into()).is_some(),
            "expires_after[anchor]" => expiry.insert("anchor".into(), field_text(part, &name).await?.into()).is_some(),
            "expires_after[seconds]" => {
                let text = field_text(part, &name).await?;
                let seconds = text.parse::<i64>().map_or(Value::String(text), Value::from);
                expiry.insert("seconds".into(), seconds).is_some()
            }
            "file" => {
                let filename = part.file_name().filter(|name| !name.is_empty()).unwrap_or("file").to_owned();
                file.replace((filename, receive(part, store.receive_file()?).await?)).is_some()
            }
            _ => {
                let message = format!(
                    "unknown part `{name}`: the parts are `purpose`, `file`, `expires_after[anchor]` and \
                     `expires_after[seconds]`"
                );
                return Err(Error::invalid(message).param(name).code("unknown_field"));
            }
        };
        if twice {
            return Err(Error::invalid(format!("the part `{name}` was sent twice")).param(name).code("invalid_value"));
        }
    }
    if !expiry.is_empty() {
        fields.insert("expires_after".into(), expiry.into());
    }
    Ok((fields, file))
}

/// The text of a short part.
async fn field_text(mut part: Field<'_>, name: &str) -> Result<String> {
    let refuse = |what: String| Error::invalid(format!("the part `{name}` {what}")).param(name).code("invalid_value");
    let mut bytes = Vec::new();
    while let Some(chunk) = part.chunk().await.map_err(invalid_multipart)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD {
            return Err(refuse(format!("has more than {MAX_FIELD} bytes")));
        }
    }
    String::from_utf8(bytes).map_err(|_| refuse("is not UTF-8".into()))
}

/// Writes the content of a part to `file`.
pub(super) async fn receive(mut part: Field<'_>, mut file: NamedTempFile) -> Result<NamedTempFile> {
    // Writing to the page cache is fast enough for an async thread.
    while let Some(chunk) = part.chunk().await.map_err(invalid_multipart)? {
        file.write_all(&chunk).at(file.path())?;
    }
    Ok(file)
}

/// The error of a body that is not multipart or is too large.
pub(super) fn invalid_multipart(e: MultipartError) -> Error {
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
    let keep =
        move |file: &FileObject| !file.expired() && purpose.as_ref().is_none_or(|purpose| *purpose == file.purpose);
    let (files, more) = store(&app)?.run(move |store| store.page(ObjectKind::File, "", &page, keep)).await?;
    Ok(Json(super::finetune::list_object(files.iter().map(|file| json!(file)).collect(), more)))
}

/// `GET /v1/files/{id}`.
pub(super) async fn get(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(json!(store(&app)?.run(move |store| store.file(&id, "file_id")).await?)))
}

/// `GET /v1/files/{id}/content`. With `format=csv`, a job's metrics as CSV, without their base64.
pub(super) async fn content(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    query: QueryParams,
) -> Result<Response, ErrorResponse> {
    let as_csv = match query.get("format") {
        None => false,
        Some("csv") => true,
        Some(other) => return Err(fields::wrong("format", "\"csv\"", &other.into()).into()),
    };
    if as_csv {
        let csv = store(&app)?.run(move |store| metrics_csv(store, &id)).await?;
        return Ok(([(header::CONTENT_TYPE, "text/csv")], csv).into_response());
    }
    let open = move |store: &Store| {
        let file = store.file(&id, "file_id")?;
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

fn metrics_csv(store: &Store, id: &str) -> Result<Vec<u8>> {
    let file = store.file(id, "file_id")?;
    if file.purpose != FINE_TUNE_RESULTS || file.filename != results::METRICS_FILE {
        let message = format!("`format` is for the file {} of a fine-tuning job", results::METRICS_FILE);
        return Err(Error::invalid(message).param("format").code("invalid_value"));
    }
    let path = store.file_path(id);
    results::decode_metrics(&std::fs::read(&path).at(path)?)
}

/// `DELETE /v1/files/{id}`. Errors: `Conflict` while a job or a batch still needs the file.
pub(super) async fn delete(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let remove = move |store: &Store| {
        store.file(&id, "file_id")?;
        if let Some(user) = user(store, &id)? {
            let message = format!("file {id} is in use by {user}");
            return Err(Error::new(ErrorKind::Conflict, message).param("file_id").code("file_in_use"));
        }
        store.remove_file(&id)?;
        Ok(json!({"id": id, "object": "file", "deleted": true}))
    };
    Ok(Json(store(&app)?.run(remove).await?))
}

/// The job or the batch that still needs a file, and its status, in words.
fn user(store: &Store, id: &str) -> Result<Option<String>> {
    let trains = |job: &JobRecord| {
        !job.status.ended() && (job.training_file == id || job.validation_file.as_deref() == Some(id))
    };
    if let Some(job) = store.all(ObjectKind::Job, "")?.into_iter().find(trains) {
        return Ok(Some(format!("job {}, which is {}", job.id, job.status.word())));
    }
    let reads = |batch: &BatchRecord| !batch.status.ended() && batch.input_file_id == id;
    let batch = store.all(ObjectKind::Batch, "")?.into_iter().find(reads);
    Ok(batch.map(|batch| format!("batch {}, which is {}", batch.id, batch.status.word())))
}

/// Removes files that have expired, unless a job or a batch still needs them.
pub(super) fn sweep(store: &Store) -> Result<()> {
    for file in store.expired_files()? {
        if user(store, &file.id)?.is_none() {
            store.remove_file(&file.id)?;
            tracing::info!(file = file.id, late_s = now().saturating_sub(file.expires_at.unwrap_or(0)), "file expired");
        }
    }
    Ok(())
}

fn store(app: &SharedApp) -> Result<&Arc<Store>> {
    app.serving().map(|serving: &Arc<Serving>| serving.jobs.store())
}
