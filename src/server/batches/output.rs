//! The result files of a batch: JSON lines, written while it runs, from which a batch continues after a kill.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::Path;

use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::record::{BatchRecord, RequestCounts};
use crate::error::{AtPath, Error, Result};
use crate::finetune::record::{FileObject, new_id, now};
use crate::finetune::store::{ObjectKind, Store};

/// Purpose of the result files.
const BATCH_OUTPUT: &str = "batch_output";

/// An answer to a request of a batch.
pub(super) struct LineAnswer {
    pub(super) status: StatusCode,
    pub(super) request_id: String,
    pub(super) body: Value,
}

/// The line of a request that was answered, and whether it belongs into the output file, not the error file.
pub(super) fn answered(custom_id: &str, answer: &LineAnswer) -> (Value, bool) {
    let response = json!({
        "status_code": answer.status.as_u16(), "request_id": answer.request_id, "body": answer.body,
    });
    (line(custom_id, response, Value::Null), answer.status.is_success())
}

/// The line of a request that did not run.
pub(super) fn not_run(custom_id: &str, code: &str, message: &str) -> Value {
    line(custom_id, Value::Null, json!({"code": code, "message": message}))
}

fn line(custom_id: &str, response: Value, error: Value) -> Value {
    json!({"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error})
}

/// Adds lines to the output file or the error file of a batch, and counts them in its record. Blocks.
pub(super) fn write(store: &Store, batch: &BatchRecord, lines: &[Value], succeeded: bool) -> Result<BatchRecord> {
    let path = store.file_path(if succeeded { &batch.output_id } else { &batch.error_id });
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    // In one write, so that a kill leaves whole lines or one half line at the end.
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .at(path)?;
    store.update(ObjectKind::Batch, &batch.id, "batch_id", |batch: &mut BatchRecord| {
        *(if succeeded { &mut batch.counts.completed } else { &mut batch.counts.failed }) += lines.len();
        Ok(())
    })
}

/// The ids of the requests that have a line in the result files of a batch, and their numbers. Removes a half line at the end of
/// a file. Blocks.
pub(super) fn written(store: &Store, batch: &BatchRecord) -> Result<(HashSet<String>, RequestCounts)> {
    let mut ids = HashSet::new();
    let completed = read_ids(&store.file_path(&batch.output_id), &mut ids)?;
    let failed = read_ids(&store.file_path(&batch.error_id), &mut ids)?;
    Ok((ids, RequestCounts { completed, failed, ..batch.counts }))
}

fn read_ids(path: &Path, ids: &mut HashSet<String>) -> Result<usize> {
    #[derive(Deserialize)]
    struct Id {
        custom_id: String,
    }
    let file = match File::options().read(true).write(true).open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(0),
        file => file.at(path)?,
    };
    let mut reader = BufReader::new(&file);
    let (mut whole, mut count, mut text) = (0, 0, Vec::new());
    loop {
        text.clear();
        let bytes = reader.read_until(b'\n', &mut text).at(path)?;
        if !text.ends_with(b"\n") {
            break;
        }
        let line: Id = serde_json::from_slice(&text)
            .map_err(|e| Error::internal(format!("a result file of a batch is damaged: {e}")).path(path))?;
        ids.insert(line.custom_id);
        (whole, count) = (whole + bytes as u64, count + 1);
    }
    file.set_len(whole).at(path)?;
    Ok(count)
}

/// Makes the result files of a batch files of the API. Blocks.
pub(super) fn publish(store: &Store, batch: &BatchRecord) -> Result<()> {
    for (id, name, lines) in batch.result_files() {
        if lines == 0 {
            continue;
        }
        let path = store.file_path(id);
        let bytes = std::fs::metadata(&path).at(path)?.len();
        let mut file = FileObject::new(id.to_owned(), bytes, name, BATCH_OUTPUT);
        file.expires_at = batch.output_expires_after.map(|seconds| now() + seconds);
        store.put(ObjectKind::File, id, "", &file)?;
    }
    Ok(())
}

/// Removes the result files of a batch that failed.
pub(super) fn discard(store: &Store, batch: &BatchRecord) -> Result<()> {
    store.remove_file(&batch.output_id)?;
    store.remove_file(&batch.error_id)
}
