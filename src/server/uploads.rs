//! `/v1/uploads`: a file that a client sends in parts, which may arrive at once and in any order.

use std::fs::{self, File};
use std::io::{self, Read};
use std::sync::Arc;

use axum::Json;
use axum::extract::multipart::MultipartRejection;
use axum::extract::{Multipart, State};
use md5::{Digest, Md5};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use super::SharedApp;
use super::error_response::ErrorResponse;
use super::extract::{JsonBody, PathParam};
use super::files::{self, NewFile};
use crate::error::{AtPath, Error, ErrorKind, Result};
use crate::fields::{self, Fields};
use crate::finetune::record::{FileObject, new_id, now};
use crate::finetune::store::{ObjectKind, Store};
use crate::hub::hex;

/// Limit on the bytes of a part.
const MAX_PART: u64 = 64 << 20;

/// Limit on the body of a part: its bytes, and the frame of the multipart form.
pub(super) const MAX_PART_BODY: usize = MAX_PART as usize + (64 << 10);

/// Limit on the parts of an upload.
const MAX_PARTS: usize = 1024;

/// Limit on uploads that have not ended.
const MAX_PENDING: usize = 64;

/// Seconds for which an upload takes parts.
const LIFETIME: u64 = 3600;

/// Seconds after its end for which the state of an upload is still told.
const REMEMBERED: u64 = 24 * 3600;

/// Status of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum UploadStatus {
    Pending,
    Completed,
    Cancelled,
    Expired,
}

/// An upload, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct UploadRecord {
    id: String,
    /// Bytes of the whole file.
    bytes: u64,
    created_at: u64,
    expires_at: u64,
    filename: String,
    purpose: String,
    /// Seconds from its completion after which the file expires.
    expires_after: Option<u64>,
    status: UploadStatus,
    parts: Vec<PartRecord>,
    /// Once it is completed.
    file: Option<FileObject>,
}

/// A part that was received.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct PartRecord {
    id: String,
    bytes: u64,
}

impl UploadRecord {
    fn object(&self) -> Value {
        json!({
            "id": self.id,
            "object": "upload",
            "bytes": self.bytes,
            "created_at": self.created_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": self.status,
            "expires_at": self.expires_at,
            "file": self.file,
        })
    }

    /// Errors: the upload has ended.
    fn check_pending(&self) -> Result<()> {
        let status = match self.status {
            UploadStatus::Pending if self.expires_at > now() => return Ok(()),
            UploadStatus::Pending | UploadStatus::Expired => "expired: start a new one",
            UploadStatus::Completed => "completed",
            UploadStatus::Cancelled => "cancelled",
        };
        let message = format!("upload {} is {status}", self.id);
        Err(Error::invalid(message).param("upload_id").code("invalid_upload_status"))
    }

    /// Notes a part. Errors: the upload has ended or has no room for the part.
    fn add(&mut self, part: PartRecord) -> Result<()> {
        self.check_pending()?;
        let refuse = |message: String| Err(Error::invalid(message).param("data").code("invalid_value"));
        if self.parts.len() == MAX_PARTS {
            return refuse(format!("the upload has {MAX_PARTS} parts already, the most it may have"));
        }
        // A client whose connection broke sends a part again, so the parts may have more bytes than the file.
        let (received, most) = (self.received(), self.bytes + MAX_PART);
        if received + part.bytes > most {
            return refuse(format!(
                "the parts of the upload would have {} bytes; at most {most} are stored for a file of {} bytes",
                received + part.bytes,
                self.bytes
            ));
        }
        self.parts.push(part);
        Ok(())
    }

    fn received(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// Checks that `ids` name parts of this upload, which together have as many bytes as the file.
    fn check_parts(&self, ids: &[String]) -> Result<()> {
        let refuse = |message: String| Err(Error::invalid(message).param("part_ids").code("invalid_value"));
        let mut bytes = 0;
        for (i, id) in ids.iter().enumerate() {
            let Some(part) = self.parts.iter().find(|part| part.id == *id) else {
                return refuse(format!("`part_ids[{i}]`: upload {} has no part {id:?}", self.id));
            };
            if ids[..i].contains(id) {
                return refuse(format!("`part_ids[{i}]`: part {id:?} is named twice"));
            }
            bytes += part.bytes;
        }
        if bytes != self.bytes {
            return refuse(format!(
                "the parts have {bytes} bytes, but the upload was created for a file of {} bytes",
                self.bytes
            ));
        }
        Ok(())
    }
}

/// `POST /v1/uploads`.
pub(super) async fn create(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let fields = Fields::of_body(&body)?;
    fields::check_only(&fields, &["bytes", "filename", "mime_type", "purpose", "expires_after"])?;
    let bytes = fields.required("bytes", fields.integer("bytes", 1..=i64::MAX)?, "the size of the file")? as u64;
    if bytes > app.max_file as u64 {
        let message =
            format!("`bytes` is {bytes}; this server takes files of up to {} bytes (--max-file)", app.max_file);
        return Err(Error::new(ErrorKind::TooLarge, message).param("bytes").code("file_too_large").into());
    }
    let filename = fields.required("filename", fields.string("filename")?, "the name of the file")?;
    // Contents are stored as bytes whatever their type.
    fields.required("mime_type", fields.string("mime_type")?, "the MIME type of the file")?;
    let NewFile { filename, purpose, expires_after } = NewFile::read(&fields, filename.to_owned())?;
    let created_at = now();
    let upload = UploadRecord {
        id: new_id("upload_"),
        bytes,
        created_at,
        expires_at: created_at + LIFETIME,
        filename,
        purpose,
        expires_after,
        status: UploadStatus::Pending,
        parts: Vec::new(),
        file: None,
    };
    let begin = move |store: &Store| {
        let pending = |upload: &UploadRecord| upload.check_pending().is_ok();
        if store.all(ObjectKind::Upload, "")?.iter().filter(|upload| pending(upload)).count() >= MAX_PENDING {
            let message = format!("{MAX_PENDING} uploads are pending: complete or cancel one of them first");
            return Err(Error::new(ErrorKind::Overloaded, message).code("too_many_uploads"));
        }
        let dir = store.upload_dir(&upload.id);
        fs::create_dir_all(&dir).at(dir)?;
        store.put(ObjectKind::Upload, &upload.id, "", &upload)?;
        Ok(upload.object())
    };
    Ok(Json(serving.jobs.store().run(begin).await?))
}

/// `POST /v1/uploads/{id}/parts`: multipart with `data`.
pub(super) async fn add_part(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    multipart: Result<Multipart, MultipartRejection>,
) -> Result<Json<Value>, ErrorResponse> {
    let store = app.serving()?.jobs.store();
    // Before the body is read.
    let upload = find(store, &id).await?;
    upload.check_pending()?;
    let content = receive_part(multipart, store).await?;
    let keep = move |store: &Store| {
        let part = PartRecord { id: new_id("part_"), bytes: content.as_file().metadata().at(content.path())?.len() };
        let object = json!({"id": part.id, "object": "upload.part", "created_at": now(), "upload_id": upload.id});
        let path = store.upload_dir(&upload.id).join(&part.id);
        store.update(ObjectKind::Upload, &upload.id, "upload_id", |upload: &mut UploadRecord| upload.add(part))?;
        content.persist(&path).map_err(|e| e.error).at(path)?;
        Ok(object)
    };
    Ok(Json(store.run(keep).await?))
}

async fn find(store: &Arc<Store>, id: &str) -> Result<UploadRecord> {
    let id = id.to_owned();
    store.run(move |store| store.get(ObjectKind::Upload, &id, "upload_id")).await
}

async fn receive_part(multipart: Result<Multipart, MultipartRejection>, store: &Store) -> Result<NamedTempFile> {
    let mut parts = multipart.map_err(|e| {
        let message = format!("send the bytes as multipart/form-data with the part `data`: {}", e.body_text());
        Error::invalid(message).code("invalid_multipart")
    })?;
    let named = |error: Error| if error.kind == ErrorKind::TooLarge { part_too_large() } else { error };
    let mut content = None;
    while let Some(part) = parts.next_field().await.map_err(|e| named(files::invalid_multipart(e)))? {
        match part.name() {
            Some("data") if content.is_none() => {
                content = Some(files::receive(part, store.receive_file()?).await.map_err(named)?);
            }
            name => {
                let name = name.unwrap_or_default();
                let message = format!("the body must have one part, `data`, and not another `{name}`");
                return Err(Error::invalid(message).param(name).code("unknown_field"));
            }
        }
    }
    let content = content
        .ok_or_else(|| Error::invalid("the part `data` is missing").param("data").code("missing_required_parameter"))?;
    match content.as_file().metadata().at(content.path())?.len() {
        0 => Err(Error::invalid("the part `data` is empty").param("data").code("invalid_value")),
        bytes if bytes > MAX_PART => Err(part_too_large()),
        _ => Ok(content),
    }
}

fn part_too_large() -> Error {
    let message = format!("the part `data` has more than {MAX_PART} bytes: send the file in smaller parts");
    Error::new(ErrorKind::TooLarge, message).param("data").code("part_too_large")
}

/// `POST /v1/uploads/{id}/complete`: puts the parts together in the order of `part_ids`.
pub(super) async fn complete(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let fields = Fields::of_body(&body)?;
    fields::check_only(&fields, &["part_ids", "md5"])?;
    let list = fields.required("part_ids", fields.array("part_ids")?, "the ids of the parts, in order")?;
    let ids = list
        .iter()
        .enumerate()
        .map(|(i, id)| {
            let id = id.as_str().ok_or_else(|| fields::wrong(&format!("part_ids[{i}]"), "a string", id))?;
            Ok(id.to_owned())
        })
        .collect::<Result<Vec<_>>>()?;
    let md5 = fields.string("md5")?.map(str::to_owned);
    let codec = serving.codec.clone();
    let finish = move |store: &Store| {
        let upload: UploadRecord = store.get(ObjectKind::Upload, &id, "upload_id")?;
        upload.check_pending()?;
        upload.check_parts(&ids)?;
        let content = join(store, &id, &ids, md5.as_deref())?;
        let UploadRecord { filename, purpose, expires_after, .. } = upload;
        let file = NewFile { filename, purpose, expires_after }.store(store, &codec, content)?;
        let completed = store.update(ObjectKind::Upload, &id, "upload_id", |upload: &mut UploadRecord| {
            upload.check_pending()?;
            (upload.status, upload.file) = (UploadStatus::Completed, Some(file.clone()));
            Ok(())
        });
        match completed {
            Ok(upload) => {
                remove_parts(store, &id)?;
                Ok(upload.object())
            }
            // Another request has ended it meanwhile.
            Err(error) => {
                store.remove_file(&file.id)?;
                Err(error)
            }
        }
    };
    Ok(Json(serving.jobs.store().run(finish).await?))
}

/// The parts as one file. Errors: its MD5 is not `md5`.
fn join(store: &Store, upload: &str, parts: &[String], md5: Option<&str>) -> Result<NamedTempFile> {
    let mut whole = store.receive_file()?;
    let mut hash = Md5::new();
    for part in parts {
        let path = store.upload_dir(upload).join(part);
        let mut file = File::open(&path).at(&path)?;
        let copied = match md5 {
            Some(_) => io::copy(&mut Hashed { file, hash: &mut hash }, &mut whole),
            None => io::copy(&mut file, whole.as_file_mut()),
        };
        copied.at(path)?;
    }
    let Some(md5) = md5 else { return Ok(whole) };
    let found = hex(&hash.finalize());
    if md5.eq_ignore_ascii_case(&found) {
        return Ok(whole);
    }
    let message = format!("`md5` must be the MD5 of the file in hexadecimal: the parts have {found}");
    Err(Error::invalid(message).param("md5").code("checksum_mismatch"))
}

/// A file that hashes what is read of it.
struct Hashed<'a> {
    file: File,
    hash: &'a mut Md5,
}

impl Read for Hashed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

/// `POST /v1/uploads/{id}/cancel`.
pub(super) async fn cancel(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let end = move |store: &Store| {
        let upload = store.update(ObjectKind::Upload, &id, "upload_id", |upload: &mut UploadRecord| {
            upload.check_pending()?;
            upload.status = UploadStatus::Cancelled;
            Ok(())
        })?;
        remove_parts(store, &id)?;
        Ok(upload.object())
    };
    Ok(Json(app.serving()?.jobs.store().run(end).await?))
}

fn remove_parts(store: &Store, id: &str) -> Result<()> {
    let dir = store.upload_dir(id);
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).at(dir),
        _ => Ok(()),
    }
}

/// Ends uploads that have expired, and forgets those that ended long ago.
pub(super) fn sweep(store: &Store) -> Result<()> {
    for upload in store.all::<UploadRecord>(ObjectKind::Upload, "")? {
        if upload.expires_at > now() {
            continue;
        }
        if upload.status == UploadStatus::Pending {
            store.update(ObjectKind::Upload, &upload.id, "upload_id", |upload: &mut UploadRecord| {
                // It may have been completed since the list was read.
                if upload.status == UploadStatus::Pending {
                    upload.status = UploadStatus::Expired;
                }
                Ok(())
            })?;
        }
        remove_parts(store, &upload.id)?;
        if upload.expires_at + REMEMBERED <= now() {
            store.delete(ObjectKind::Upload, &upload.id)?;
        }
    }
    Ok(())
}
