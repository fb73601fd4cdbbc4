//! Runs batches: sends each request through the server's own routes, while interactive requests leave room.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Method, Request, StatusCode, header};
use serde_json::Value;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::input::{self, BatchLine};
use super::output::{self, LineAnswer};
use super::record::{BatchError, BatchRecord, BatchStatus};
use crate::engine::Engine;
use crate::error::{AtPath, Error, Result};
use crate::finetune::record::now;
use crate::finetune::store::{ObjectKind, Store};
use crate::server::error_response::body as error_body;
use crate::server::middleware::InProcess;
use crate::server::{Serving, SharedApp};

/// Batches whose requests run at the same time; the others wait in the order of their creation.
const MAX_ACTIVE: usize = 4;

/// How long a batch rests whose state cannot be saved.
const BROKEN: Duration = Duration::from_secs(10);

/// How often the runner looks whether the engine has room.
const POLL: Duration = Duration::from_millis(10);

/// The first and the longest pause before a request that the server had no room for is sent again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// What all batches share.
struct BatchRunner {
    app: SharedApp,
    serving: Arc<Serving>,
    router: Router,
    gate: LineGate,
    active: Semaphore,
}

/// Runs the batches of the store until the task is aborted: first those that the last process left unfinished.
pub(in crate::server) async fn run(app: SharedApp, router: Router) {
    let serving = app.loaded().await;
    let gate = LineGate::new(serving.limits().max_running);
    let runner = Arc::new(BatchRunner { app: app.clone(), serving, router, gate, active: Semaphore::new(MAX_ACTIVE) });
    // Dropped with the task, which ends the batches' tasks too.
    let mut tasks = JoinSet::new();
    loop {
        match runner.new_batches().await {
            Ok(new) => new.into_iter().for_each(|(id, stop)| drop(tasks.spawn(runner.clone().run_to_end(id, stop)))),
            Err(error) => tracing::error!(error = %format_args!("{error:#}"), "the batches cannot be read"),
        }
        tokio::select! {
            () = app.batches.created.notified() => {}
            Some(_) = tasks.join_next() => {}
        }
    }
}

/// Lets requests of batches start only while the engine has room that interactive requests do not need.
struct LineGate {
    /// One for each request of a batch that may run.
    places: Arc<Semaphore>,
    /// Held by the request that is next.
    turn: Mutex<()>,
    /// Requests of any kind in the engine from which on no request of a batch starts: half of its places.
    limit: usize,
}

impl LineGate {
    fn new(max_running: usize) -> Self {
        let limit = (max_running / 2).max(1);
        Self { places: Arc::new(Semaphore::new(limit)), turn: Mutex::new(()), limit }
    }

    /// Waits until a request may start. The permit is held while it runs.
    async fn admit(&self, engine: &Engine) -> OwnedSemaphorePermit {
        let place = self.places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let _turn = self.turn.lock().await;
        let stats = engine.stats();
        while stats.waiting.load(Relaxed) > 0 || stats.open.load(Relaxed) >= self.limit as u64 {
            sleep(POLL).await;
        }
        place
    }
}

/// Why a batch stops before its last request.
#[derive(Clone, Copy)]
enum EarlyEnd {
    Cancelled,
    Expired,
}

impl EarlyEnd {
    /// The final status, and the code and the message of the requests that did not run.
    fn describe(self) -> (BatchStatus, &'static str, &'static str) {
        match self {
            Self::Cancelled => {
                (BatchStatus::Cancelled, "batch_cancelled", "The batch was cancelled before this request ran.")
            }
            Self::Expired => (
                BatchStatus::Expired,
                "batch_expired",
                "This request could not be run before the completion window ended.",
            ),
        }
    }
}

/// The requests of a batch, while it runs.
struct RunningBatch {
    record: BatchRecord,
    file: Arc<File>,
    /// Requests that have not been started.
    left: VecDeque<BatchLine>,
    end: Option<EarlyEnd>,
}

impl BatchRunner {
    fn store(&self) -> &Arc<Store> {
        self.serving.jobs.store()
    }

    /// The batches that have not ended and are not running, and marks them as running.
    async fn new_batches(&self) -> Result<Vec<(String, CancellationToken)>> {
        let open = |store: &Store| -> Result<Vec<BatchRecord>> {
            Ok(store.all::<BatchRecord>(ObjectKind::Batch, "")?.into_iter().filter(|b| !b.status.ended()).collect())
        };
        let open = self.store().run(open).await?;
        let mut running = self.app.batches.running();
        let new = open.into_iter().filter(|batch| !running.contains_key(&batch.id)).map(|batch| batch.id);
        let new: Vec<_> = new.map(|id| (id, CancellationToken::new())).collect();
        running.extend(new.iter().cloned());
        Ok(new)
    }

    /// Runs a batch to its end. A batch that cannot be run, such as for a full disk, fails.
    async fn run_to_end(self: Arc<Self>, id: String, stop: CancellationToken) {
        if let Err(error) = self.clone().run_batch(&id, &stop).await {
            tracing::error!(batch = id, error = %format_args!("{error:#}"), "the batch failed");
            let message = error.public_message(&format!("batch {id}")).into_owned();
            let fault = input::of_file(error.code.unwrap_or("server_error"), message);
            if let Err(error) = self.fail(&id, vec![fault]).await {
                tracing::error!(batch = id, error = %format_args!("{error:#}"), "the state of the batch was not saved");
                // It is taken up again, but not at once: the disk may be full.
                sleep(BROKEN).await;
            }
        }
        self.app.batches.running().remove(&id);
    }

    async fn run_batch(self: Arc<Self>, id: &str, stop: &CancellationToken) -> Result<()> {
        let place = tokio::select! {
            place = self.active.acquire() => place.ok(),
            () = stop.cancelled() => None,
        };
        let Some(mut batch) = self.open(id).await? else { return Ok(()) };
        self.run_lines(&mut batch, stop).await?;
        drop(place);
        self.finish(batch).await
    }

    /// Reads and checks the requests of a batch, and finds those that were not answered before. `None` if the batch failed.
    async fn open(&self, id: &str) -> Result<Option<RunningBatch>> {
        let (id, max_body) = (id.to_owned(), self.app.max_body);
        let read = move |store: &Store| {
            let record: BatchRecord = store.get(ObjectKind::Batch, &id, "batch_id")?;
            let path = store.file_path(&record.input_file_id);
            let lines = input::read(&path, &record.endpoint, max_body)?;
            let (done, counts) = output::written(store, &record)?;
            Ok((record, Arc::new(File::open(&path).at(path)?), lines, done, counts))
        };
        let (record, file, lines, done, mut counts) = self.store().run(read).await?;
        let mut left: VecDeque<BatchLine> = match lines {
            Ok(lines) => lines.into(),
            Err(faults) => {
                self.fail(&record.id, faults).await?;
                return Ok(None);
            }
        };
        counts.total = left.len();
        left.retain(|line| !done.contains(&line.custom_id));
        let begin = move |batch: &mut BatchRecord| {
            batch.counts = counts;
            if batch.status == BatchStatus::Validating {
                batch.enter(BatchStatus::InProgress);
            }
            Ok(())
        };
        let record = self.update(&record.id, begin).await?;
        let end = (record.status == BatchStatus::Cancelling).then_some(EarlyEnd::Cancelled);
        Ok(Some(RunningBatch { record, file, left, end }))
    }

    /// Runs the requests that are left, until there are none, the batch is cancelled, or its window ends.
    async fn run_lines(self: &Arc<Self>, batch: &mut RunningBatch, stop: &CancellationToken) -> Result<()> {
        // Ends the pauses of requests that are to be sent again.
        let no_more = CancellationToken::new();
        let mut running = JoinSet::new();
        let gate = || self.gate.admit(&self.serving.engine);
        let mut admitted = Box::pin(gate());
        let deadline = sleep(Duration::from_secs(batch.record.expires_at.saturating_sub(now())));
        tokio::pin!(deadline);
        loop {
            if batch.end.is_some() {
                no_more.cancel();
                // Gives up the turn, which other batches wait for.
                admitted = Box::pin(gate());
            }
            if running.is_empty() && (batch.left.is_empty() || batch.end.is_some()) {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = stop.cancelled(), if batch.end.is_none() => batch.end = Some(EarlyEnd::Cancelled),
                () = &mut deadline, if batch.end.is_none() => batch.end = Some(EarlyEnd::Expired),
                Some(sent) = running.join_next() => {
                    let (line, answer) = sent.map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
                    self.keep(batch, line, answer?).await?;
                }
                place = &mut admitted, if batch.end.is_none() && !batch.left.is_empty() => {
                    if let Some(line) = batch.left.pop_front() {
                        let (runner, file) = (self.clone(), batch.file.clone());
                        let (endpoint, no_more) = (batch.record.endpoint.clone(), no_more.clone());
                        running.spawn(async move {
                            let answer = runner.send(&line, file, &endpoint, &no_more).await;
                            drop(place);
                            (line, answer)
                        });
                    }
                    admitted = Box::pin(gate());
                }
            }
        }
    }

    /// Writes the answer to a request. One that got none, because the batch ends early, is left.
    async fn keep(&self, batch: &mut RunningBatch, line: BatchLine, answer: Option<LineAnswer>) -> Result<()> {
        let Some(answer) = answer else {
            batch.left.push_back(line);
            return Ok(());
        };
        let (text, succeeded) = output::answered(&line.custom_id, &answer);
        let record = batch.record.clone();
        batch.record = self.store().run(move |store| output::write(store, &record, &[text], succeeded)).await?;
        Ok(())
    }

    /// Sends a request of a batch through the server's routes. A full queue is no answer: the request is sent again. `None` if
    /// the batch ends before there is an answer.
    async fn send(
        &self,
        line: &BatchLine,
        file: Arc<File>,
        endpoint: &str,
        no_more: &CancellationToken,
    ) -> Result<Option<LineAnswer>> {
        let read = line.clone();
        let body = self.store().run(move |_| read.body(&file)).await?;
        if body["stream"] == true {
            let error = Error::invalid("`stream` must be false in a batch: the answer is a line of a file");
            return Ok(Some(refused(&error.param("stream").code("invalid_value"))));
        }
        let body = body.to_string();
        until_answered(no_more, || self.call(endpoint, &body)).await
    }

    async fn call(&self, endpoint: &str, body: &str) -> Result<LineAnswer> {
        let request = Request::builder()
            .method(Method::POST)
            .uri(endpoint)
            .header(header::CONTENT_TYPE, "application/json")
            .extension(InProcess)
            .body(Body::from(body.to_owned()))
            .map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
        let response = self.router.clone().oneshot(request).await.unwrap_or_else(|never| match never {});
        if self.app.serving().is_err() {
            // The server is shutting down, which ends this task. The next process sends the request again.
            std::future::pending::<()>().await;
        }
        let (head, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.map_err(|e| Error::internal(e.to_string()).caused_by(e))?;
        let body = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        let request_id = head.headers.get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
        Ok(LineAnswer { status: head.status, request_id: request_id.to_owned(), body })
    }

    /// Makes the results of a batch files, and sets its final status.
    async fn finish(&self, batch: RunningBatch) -> Result<()> {
        let RunningBatch { record, left, end, .. } = batch;
        let status = match end {
            None => {
                let finalize = |batch: &mut BatchRecord| {
                    batch.enter(BatchStatus::Finalizing);
                    Ok(())
                };
                self.update(&record.id, finalize).await?;
                BatchStatus::Completed
            }
            Some(end) => {
                let (status, code, message) = end.describe();
                let lines: Vec<Value> =
                    left.iter().map(|line| output::not_run(&line.custom_id, code, message)).collect();
                if !lines.is_empty() {
                    let record = record.clone();
                    self.store().run(move |store| output::write(store, &record, &lines, false)).await?;
                }
                status
            }
        };
        let publish = move |store: &Store| {
            let record: BatchRecord = store.get(ObjectKind::Batch, &record.id, "batch_id")?;
            output::publish(store, &record)?;
            store.update(ObjectKind::Batch, &record.id, "batch_id", |batch: &mut BatchRecord| {
                batch.enter(status);
                Ok(())
            })
        };
        let batch = self.store().run(publish).await?;
        let counts = batch.counts;
        tracing::info!(
            batch = batch.id,
            status = status.word(),
            completed = counts.completed,
            failed = counts.failed,
            "batch ended"
        );
        Ok(())
    }

    /// Ends a batch with the faults of its file.
    async fn fail(&self, id: &str, faults: Vec<BatchError>) -> Result<()> {
        let fail = |batch: &mut BatchRecord| {
            batch.errors = faults;
            batch.enter(BatchStatus::Failed);
            Ok(())
        };
        let batch = self.update(id, fail).await?;
        self.store().run(move |store| output::discard(store, &batch)).await
    }

    async fn update(
        &self,
        id: &str,
        change: impl FnOnce(&mut BatchRecord) -> Result<()> + Send + 'static,
    ) -> Result<BatchRecord> {
        let id = id.to_owned();
        self.store().run(move |store| store.update(ObjectKind::Batch, &id, "batch_id", change)).await
    }
}

/// Calls until there is room for the request. `None` if `no_more` comes first.
async fn until_answered<F: Future<Output = Result<LineAnswer>>>(
    no_more: &CancellationToken,
    call: impl Fn() -> F,
) -> Result<Option<LineAnswer>> {
    let mut pause = RETRY.0;
    loop {
        let answer = call().await?;
        if answer.status != StatusCode::TOO_MANY_REQUESTS {
            return Ok(Some(answer));
        }
        tokio::select! {
            () = no_more.cancelled() => return Ok(None),
            () = sleep(pause) => pause = (2 * pause).min(RETRY.1),
        }
    }
}

/// The answer to a request that is refused without a call.
fn refused(error: &Error) -> LineAnswer {
    LineAnswer { status: StatusCode::BAD_REQUEST, request_id: String::new(), body: error_body(error, "") }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[tokio::test]
    async fn a_full_queue_is_no_answer() {
        let calls = AtomicUsize::new(0);
        let call = || {
            let full = calls.fetch_add(1, Relaxed) < 5;
            let status = if full { StatusCode::TOO_MANY_REQUESTS } else { StatusCode::OK };
            std::future::ready(Ok(LineAnswer { status, request_id: String::new(), body: Value::Null }))
        };
        let no_more = CancellationToken::new();
        assert_eq!(until_answered(&no_more, call).await.unwrap().unwrap().status, StatusCode::OK);
        assert_eq!(calls.load(Relaxed), 6);
        no_more.cancel();
        calls.store(0, Relaxed);
        assert!(until_answered(&no_more, call).await.unwrap().is_none());
    }
}
