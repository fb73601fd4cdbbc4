//! Files, uploads, batches, jobs and their events in the state directory: JSON objects in one SQLite table; contents of files,
//! parts of uploads and the jobs' directories next to it.
//!
//! With SQLite, a process that is killed leaves either the old or the new state, and the state is easy to inspect (`sqlite3
//! training.sqlite "select doc from objects"`). Every call blocks: async code uses `Store::run`.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::blocking;
use crate::{Error, Result};

/// Kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ObjectKind {
    /// An uploaded file, or a result of a job or a batch.
    File,
    /// An upload of a file in parts.
    Upload,
    /// A batch of requests.
    Batch,
    /// A fine-tuning job.
    Job,
    /// An event of a job.
    Event,
    /// A checkpoint of a job.
    Checkpoint,
    /// Metrics of an optimiser step of a job.
    Step,
    /// Metrics of a validation of a job.
    Validation,
}

impl ObjectKind {
    fn word(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Upload => "upload",
            Self::Batch => "batch",
            Self::Job => "job",
            Self::Event => "event",
            Self::Checkpoint => "checkpoint",
            Self::Step => "step",
            Self::Validation => "validation",
        }
    }
}

/// A page of a list.
#[derive(Debug, Clone, Default)]
pub(crate) struct PageQuery {
    /// Id of the last object of the page before.
    pub after: Option<String>,
    /// Most objects of the page.
    pub limit: usize,
    /// Oldest first, instead of newest first.
    pub ascending: bool,
}

/// The store of files, uploads, batches and jobs.
pub struct Store {
    db: Mutex<Connection>,
    dir: PathBuf,
}

impl Store {
    /// Opens the store in `dir`, or creates it. Errors: the directory cannot be used; another process uses it.
    pub fn open(dir: &Path) -> Result<Self> {
        let fail = |e: &dyn std::fmt::Display| {
            Error::invalid(format!("the state directory {} cannot be used for training: {e}", dir.display())).path(dir)
        };
        for part in ["files", "jobs", "uploads"] {
            std::fs::create_dir_all(dir.join(part)).map_err(|e| fail(&e))?;
        }
        // An absolute path, so that adapters are found from any working directory.
        let dir = dir.canonicalize().map_err(|e| fail(&e))?;
        let db = Connection::open(dir.join("training.sqlite")).map_err(|e| fail(&e))?;
        db.busy_timeout(std::time::Duration::from_secs(1)).map_err(|e| fail(&e))?;
        // An exclusive lock: two servers on one directory would run each other's jobs.
        db.execute_batch(
            "PRAGMA locking_mode = EXCLUSIVE;
             PRAGMA journal_mode = WAL;
             PRAGMA synchronous = NORMAL;
             CREATE TABLE IF NOT EXISTS objects (
                 seq INTEGER PRIMARY KEY AUTOINCREMENT,
                 kind TEXT NOT NULL,
                 id TEXT NOT NULL UNIQUE,
                 parent TEXT NOT NULL,
                 doc TEXT NOT NULL
             );
             CREATE INDEX IF NOT EXISTS by_parent ON objects (kind, parent, seq);",
        )
        .map_err(|e| match e.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy) => fail(&"another server uses it"),
            _ => fail(&e),
        })?;
        let store = Self { db: Mutex::new(db), dir };
        store.remove_unfinished_files().map_err(|e| fail(&e))?;
        Ok(store)
    }

    /// Runs blocking work from async code.
    pub(crate) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let store = self.clone();
        blocking(move || work(&store)).await
    }

    /// Adds an object, or replaces the one with that id. `parent` is the job of an event, checkpoint, step or validation, and
    /// empty otherwise.
    pub(crate) fn put<T: Serialize>(&self, kind: ObjectKind, id: &str, parent: &str, doc: &T) -> Result<()> {
        put(&self.db(), kind, id, parent, doc)
    }

    /// An object, if it exists.
    pub(crate) fn find<T: DeserializeOwned>(&self, kind: ObjectKind, id: &str) -> Result<Option<T>> {
        find(&self.db(), kind, id)
    }

    /// Changes an object without a parent, with no other change in between, and returns it. Errors: as [`Self::get`]; an error
    /// of `change`, after which the object is as before.
    pub(crate) fn update<T: Serialize + DeserializeOwned>(
        &self,
        kind: ObjectKind,
        id: &str,
        param: &str,
        change: impl FnOnce(&mut T) -> Result<()>,
    ) -> Result<T> {
        let db = self.db();
        let mut doc = find(&db, kind, id)?.ok_or_else(|| not_found(kind, id, param))?;
        change(&mut doc)?;
        put(&db, kind, id, "", &doc)?;
        Ok(doc)
    }

    /// An object. Errors: not found, with `param`.
    pub(crate) fn get<T: DeserializeOwned>(&self, kind: ObjectKind, id: &str, param: &str) -> Result<T> {
        self.find(kind, id)?.ok_or_else(|| not_found(kind, id, param))
    }

    /// Removes an object. False if it did not exist.
    pub(crate) fn delete(&self, kind: ObjectKind, id: &str) -> Result<bool> {
        let removed = self.db().execute("DELETE FROM objects WHERE id = ?1 AND kind = ?2", [id, kind.word()]);
        removed.map(|rows| rows > 0).map_err(failed)
    }

    /// A page of the objects of `parent` for which `keep` is true, and whether there are more. Errors: unknown `after`.
    pub(crate) fn page<T: DeserializeOwned>(
        &self,
        kind: ObjectKind,
        parent: &str,
        page: &PageQuery,
        keep: impl Fn(&T) -> bool,
    ) -> Result<(Vec<T>, bool)> {
        let db = self.db();
        let last = match &page.after {
            None if page.ascending => 0,
            None => i64::MAX,
            Some(id) => db
                .query_row("SELECT seq FROM objects WHERE id = ?1 AND kind = ?2", [id, kind.word()], |row| row.get(0))
                .optional()
                .map_err(failed)?
                .ok_or_else(|| {
                    Error::invalid(format!("`after` must be the id of a {} in this list, not {id:?}", kind.word()))
                        .param("after")
                        .code("invalid_value")
                })?,
        };
        let (compare, order) = if page.ascending { (">", "ASC") } else { ("<", "DESC") };
        let query = format!(
            "SELECT doc FROM objects WHERE kind = ?1 AND parent = ?2 AND seq {compare} ?3 ORDER BY seq {order}"
        );
        let mut query = db.prepare_cached(&query).map_err(failed)?;
        let mut rows = query.query(params![kind.word(), parent, last]).map_err(failed)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next().map_err(failed)? {
            let object = read(row.get_ref(0).and_then(|doc| Ok(doc.as_str()?)).map_err(failed)?)?;
            if !keep(&object) {
                continue;
            }
            if found.len() == page.limit {
                return Ok((found, true));
            }
            found.push(object);
        }
        Ok((found, false))
    }

    /// All objects of `parent`, oldest first.
    pub(crate) fn all<T: DeserializeOwned>(&self, kind: ObjectKind, parent: &str) -> Result<Vec<T>> {
        let all = PageQuery { after: None, limit: usize::MAX, ascending: true };
        self.page(kind, parent, &all, |_| true).map(|(objects, _)| objects)
    }

    /// Path of a file's content.
    pub(crate) fn file_path(&self, id: &str) -> PathBuf {
        self.files_dir().join(id)
    }

    /// Directory of the contents of files.
    pub(crate) fn files_dir(&self) -> PathBuf {
        self.dir.join("files")
    }

    /// Directory of the parts of an upload.
    pub(crate) fn upload_dir(&self, id: &str) -> PathBuf {
        self.dir.join("uploads").join(id)
    }

    /// Directory of a job's checkpoints and state.
    pub(crate) fn job_dir(&self, id: &str) -> PathBuf {
        self.jobs_dir().join(id)
    }

    /// Directory of the directories of all jobs.
    pub(crate) fn jobs_dir(&self) -> PathBuf {
        self.dir.join("jobs")
    }

    fn db(&self) -> MutexGuard<'_, Connection> {
        // Statements are atomic, so the connection of a thread that panicked can be used.
        self.db.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn put<T: Serialize>(db: &Connection, kind: ObjectKind, id: &str, parent: &str, doc: &T) -> Result<()> {
    let doc = serde_json::to_string(doc).map_err(|e| Error::internal(e.to_string()))?;
    // Updates the row instead of replacing it, so that the object keeps its place in lists.
    db.prepare_cached(
        "INSERT INTO objects (kind, id, parent, doc) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET doc = excluded.doc",
    )
    .and_then(|mut put| put.execute(params![kind.word(), id, parent, doc]))
    .map_err(failed)?;
    Ok(())
}

fn find<T: DeserializeOwned>(db: &Connection, kind: ObjectKind, id: &str) -> Result<Option<T>> {
    let doc = db
        .prepare_cached("SELECT doc FROM objects WHERE id = ?1 AND kind = ?2")
        .and_then(|mut find| find.query_row(params![id, kind.word()], |row| row.get::<_, String>(0)).optional())
        .map_err(failed)?;
    doc.map(|doc: String| read(&doc)).transpose()
}

/// The error of an object that is not there.
pub(super) fn not_found(kind: ObjectKind, id: &str, param: &str) -> Error {
    let what = if kind == ObjectKind::Job { "fine-tuning job" } else { kind.word() };
    Error::not_found(format!("there is no {what} {id:?}")).param(param)
}

fn read<T: DeserializeOwned>(doc: &str) -> Result<T> {
    serde_json::from_str(doc)
        .map_err(|e| Error::internal(format!("an object in the state directory is damaged: {e}")).caused_by(e))
}

fn failed(e: rusqlite::Error) -> Error {
    Error::internal(format!("the state directory cannot be read or written: {e}")).caused_by(e)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn objects_survive_and_lists_are_paged() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for i in 0..5 {
            store.put(ObjectKind::Event, &format!("e{i}"), "job", &json!({"i": i})).unwrap();
        }
        store.put(ObjectKind::Event, "other", "another job", &json!({"i": 9})).unwrap();
        store.put(ObjectKind::Event, "e2", "job", &json!({"i": 2, "again": true})).unwrap();
        assert!(store.delete(ObjectKind::Event, "e0").unwrap() && !store.delete(ObjectKind::Event, "e0").unwrap());
        assert!(Store::open(dir.path()).err().unwrap().message.contains("another server"));
        drop(store);

        let store = Store::open(dir.path()).unwrap();
        let page = |after: Option<&str>, limit, ascending| {
            let page = PageQuery { after: after.map(str::to_owned), limit, ascending };
            let (found, more) = store.page::<Value>(ObjectKind::Event, "job", &page, |doc| doc["i"] != 3).unwrap();
            (found.iter().map(|doc| doc["i"].as_u64().unwrap()).collect::<Vec<_>>(), more)
        };
        assert_eq!(page(None, 2, false), (vec![4, 2], true));
        assert_eq!(page(Some("e2"), 2, false), (vec![1], false));
        assert_eq!(page(None, 3, true), (vec![1, 2, 4], false));
        assert_eq!(page(Some("e1"), 1, true), (vec![2], true));
        let unknown = PageQuery { after: Some("x".into()), limit: 1, ascending: false };
        assert_eq!(
            store.page::<Value>(ObjectKind::Event, "job", &unknown, |_| true).err().unwrap().param.unwrap(),
            "after"
        );
        assert_eq!(store.find::<Value>(ObjectKind::Event, "e2").unwrap().unwrap()["again"], true);
        assert!(store.find::<Value>(ObjectKind::File, "e2").unwrap().is_none(), "an id of another kind");
        assert_eq!(store.get::<Value>(ObjectKind::Job, "x", "id").err().unwrap().kind, ErrorKind::NotFound);
    }

    #[test]
    fn a_refused_change_leaves_the_object_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.put(ObjectKind::Batch, "b", "", &json!({"n": 1})).unwrap();
        let change = |n: i64, result: Result<()>| {
            store.update::<Value>(ObjectKind::Batch, "b", "batch_id", |doc| {
                doc["n"] = n.into();
                result
            })
        };
        assert!(change(2, Err(Error::invalid("no"))).is_err());
        assert_eq!(store.find::<Value>(ObjectKind::Batch, "b").unwrap().unwrap()["n"], 1);
        assert_eq!(change(3, Ok(())).unwrap()["n"], 3);
        assert_eq!(store.find::<Value>(ObjectKind::Batch, "b").unwrap().unwrap()["n"], 3);
        let missing = store.update::<Value>(ObjectKind::Batch, "x", "batch_id", |_| Ok(()));
        assert_eq!(missing.err().unwrap().param.unwrap(), "batch_id");
    }
}
