//! `/v1/batches`: requests in a file, answered while the engine has nothing else to do.
//!
//! `record` is a batch as it is stored, [`input`] reads its requests, `output` writes the answers, and [`runner`] runs the
//! requests through the server's own routes.

mod input;
mod output;
pub(super) mod record;
mod runner;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use axum::Json;
use axum::extract::State;
use serde_json::Value;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::SharedApp;
use super::error_response::ErrorResponse;
use super::extract::{JsonBody, PathParam, QueryParams};
use super::files::expires_after;
use super::finetune::{list_object, metadata};
use crate::error::{Error, ErrorKind, Result};
use crate::fields::{self, Fields};
use crate::finetune::record::{new_id, now};
use crate::finetune::store::{ObjectKind, Store};
use record::{BatchRecord, BatchStatus, RequestCounts, WINDOW, WINDOW_SECONDS};
pub(super) use runner::run;

/// Purpose of a file of requests.
pub(super) const BATCH: &str = "batch";

/// Routes whose requests a batch may hold.
const ENDPOINTS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"];

/// Limit on batches that have not ended.
const MAX_UNFINISHED: usize = 100;

/// Default and limit of batches on a page of the list.
const PAGE: usize = 20;
const MAX_PAGE: usize = 100;

/// What the routes and the runner share of the batches.
#[derive(Default)]
pub(super) struct BatchQueue {
    /// Tells the runner about a new batch.
    created: Notify,
    /// The batches that the runner has taken up, with what stops them.
    running: Mutex<HashMap<String, CancellationToken>>,
}

impl BatchQueue {
    fn running(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
        // Entries are whole, so those of a thread that panicked can be used.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `POST /v1/batches`.
pub(super) async fn create(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let store = app.serving()?.jobs.store();
    let batch = read(&Fields::of_body(&body)?)?;
    let batch = store.run(move |store| add(store, batch)).await?;
    app.batches.created.notify_one();
    Ok(Json(batch.object()))
}

fn read(fields: &Fields) -> Result<BatchRecord> {
    let known = ["input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"];
    fields::check_only(fields, &known)?;
    let file = fields.required("input_file_id", fields.string("input_file_id")?, "the id of an uploaded file")?;
    let allowed = format!("one of {}", ENDPOINTS.map(|endpoint| format!("\"{endpoint}\"")).join(", "));
    let endpoint = fields.required("endpoint", fields.string("endpoint")?, &allowed)?;
    if !ENDPOINTS.contains(&endpoint) {
        return Err(fields::wrong("endpoint", &allowed, &endpoint.into()));
    }
    let window = fields.required("completion_window", fields.string("completion_window")?, "\"24h\"")?;
    if window != WINDOW {
        return Err(fields::wrong("completion_window", "\"24h\"", &window.into()));
    }
    let created_at = now();
    Ok(BatchRecord {
        id: new_id("batch_"),
        endpoint: endpoint.to_owned(),
        input_file_id: file.to_owned(),
        metadata: metadata(fields)?,
        output_expires_after: expires_after(fields, "output_expires_after")?,
        status: BatchStatus::Validating,
        errors: Vec::new(),
        counts: RequestCounts::default(),
        output_id: new_id("file-"),
        error_id: new_id("file-"),
        created_at,
        expires_at: created_at + WINDOW_SECONDS,
        in_progress_at: None,
        finalizing_at: None,
        completed_at: None,
        failed_at: None,
        expired_at: None,
        cancelling_at: None,
        cancelled_at: None,
    })
}

fn add(store: &Store, batch: BatchRecord) -> Result<BatchRecord> {
    store.file_for(&batch.input_file_id, "input_file_id", BATCH)?;
    let open = store.all::<BatchRecord>(ObjectKind::Batch, "")?.iter().filter(|batch| !batch.status.ended()).count();
    if open >= MAX_UNFINISHED {
        let message = format!("{MAX_UNFINISHED} batches have not ended: wait for one of them, or cancel it");
        return Err(Error::new(ErrorKind::Overloaded, message).code("too_many_batches"));
    }
    store.put(ObjectKind::Batch, &batch.id, "", &batch)?;
    Ok(batch)
}

/// `GET /v1/batches`, newest first.
pub(super) async fn list(State(app): State<SharedApp>, query: QueryParams) -> Result<Json<Value>, ErrorResponse> {
    let page = query.page(PAGE, MAX_PAGE)?;
    let read = move |store: &Store| store.page(ObjectKind::Batch, "", &page, |_: &BatchRecord| true);
    let (batches, more) = app.serving()?.jobs.store().run(read).await?;
    Ok(Json(list_object(batches.iter().map(BatchRecord::object).collect(), more)))
}

/// `GET /v1/batches/{id}`.
pub(super) async fn get(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Json<Value>, ErrorResponse> {
    let read = move |store: &Store| store.get::<BatchRecord>(ObjectKind::Batch, &id, "batch_id");
    Ok(Json(app.serving()?.jobs.store().run(read).await?.object()))
}

/// `POST /v1/batches/{id}/cancel`. Requests that run are finished; no other is started.
pub(super) async fn cancel(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let change = |batch: &mut BatchRecord| match batch.status {
        BatchStatus::Validating | BatchStatus::InProgress => {
            batch.enter(BatchStatus::Cancelling);
            Ok(())
        }
        BatchStatus::Cancelling | BatchStatus::Cancelled => Ok(()),
        status => {
            let message = format!("batch {} is {} and cannot be cancelled", batch.id, status.word());
            Err(Error::invalid(message).param("batch_id").code("invalid_batch_status"))
        }
    };
    let store = app.serving()?.jobs.store();
    let batch = store.run(move |store| store.update(ObjectKind::Batch, &id, "batch_id", change)).await?;
    if let Some(stop) = app.batches.running().get(&batch.id) {
        stop.cancel();
    }
    Ok(Json(batch.object()))
}
