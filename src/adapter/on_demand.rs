//! The adapters directory: what lies in it is loaded at start, and what is put into it later when a request names it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::layout::Layout;
use super::names::NameLocks;
use super::registry::{LoadOptions, PARALLEL_LOADS, Registry};
use super::source::SourceScope;
use super::{Lease, foreign};
use crate::error::ErrorKind;
use crate::{Error, Result};

/// How long a failed load is remembered: requests for a broken adapter must not read it again each time.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Loads that requests cause.
pub(super) struct OnDemand {
    /// The adapters directory.
    dir: Option<PathBuf>,
    /// Bounds the loads that run at once.
    permits: Semaphore,
    /// Held by the request that loads an adapter, while others wait for it.
    locks: NameLocks,
    /// Failed loads, by name. Only names of folders in the directory get here.
    failed: Mutex<HashMap<String, (Instant, Error)>>,
}

impl OnDemand {
    pub(super) fn new(dir: Option<PathBuf>) -> Self {
        Self { dir, permits: Semaphore::new(PARALLEL_LOADS), locks: NameLocks::default(), failed: Mutex::default() }
    }

    /// The source of an adapter in the directory. `None` for a name that is not that of a visible entry, so that no name leads
    /// out of the directory.
    pub(super) fn source(&self, name: &str) -> Option<PathBuf> {
        let dir = self.dir.as_ref()?;
        if name.is_empty() || name.starts_with('.') || name.contains(['/', '\\', '\0']) {
            return None;
        }
        source_in(dir, name)
    }

    /// The error of a load that failed a moment ago.
    fn recent_failure(&self, name: &str) -> Option<Error> {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.retain(|_, (at, _)| at.elapsed() < RETRY_AFTER);
        failed.get(name).map(|(_, error)| error.clone())
    }

    fn remember(&self, name: &str, error: &Error) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.insert(name.to_owned(), (Instant::now(), error.clone()));
    }
}

/// The adapter of this name in `dir`: a folder, or a GGUF file.
fn source_in(dir: &Path, name: &str) -> Option<PathBuf> {
    let file = dir.join(format!("{name}.gguf"));
    let folder = dir.join(name);
    match Layout::of_folder(&folder) {
        Some(_) => Some(folder),
        None => file.is_file().then_some(file),
    }
}

/// The adapters in `dir` by name, sorted.
pub(super) fn adapters_in(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let name = |path: PathBuf| {
        let file = foreign::file_name(&path);
        let name = match path.is_file() {
            true => file.strip_suffix(".gguf")?.to_owned(),
            false => file,
        };
        (!name.starts_with('.')).then(|| source_in(dir, &name).map(|source| (name, source)))?
    };
    let mut found: Vec<_> = foreign::all_entries(dir)?.into_iter().filter_map(name).collect();
    found.sort();
    found.dedup();
    Ok(found)
}

impl Registry {
    /// Whether a request may name this adapter: it is loaded, or the adapters directory has it.
    pub fn offers(&self, name: &str) -> bool {
        self.get(name).is_ok() || self.offered(name).is_some()
    }

    /// Where the adapters directory has an adapter that is not loaded.
    fn offered(&self, name: &str) -> Option<PathBuf> {
        (!self.lock().withdrawn.contains(name)).then(|| self.0.on_demand.source(name))?
    }

    /// Takes a lease on the current generation of `name`. An adapter that is not loaded and lies in the adapters directory is
    /// loaded first, once for all requests that wait for it. Errors: those of [`Registry::lease`] and [`Registry::load`].
    pub async fn lease_or_load(&self, name: &str) -> Result<Lease> {
        let missing = match self.lease(name) {
            Ok(lease) => return Ok(lease),
            Err(missing) => missing,
        };
        let Some(source) = self.offered(name) else { return Err(missing) };
        let name_lock = self.0.on_demand.locks.of(name);
        let _guard = name_lock.lock.lock().await;
        // Another request may have loaded it, or failed, since.
        if let Ok(lease) = self.lease(name) {
            return Ok(lease);
        }
        if let Some(error) = self.0.on_demand.recent_failure(name) {
            return Err(error);
        }
        let _permit = self.0.on_demand.permits.acquire().await.map_err(|e| Error::internal(e.to_string()))?;
        match self.load_unsaved(name, &source, SourceScope::Anywhere, LoadOptions::default()).await {
            Ok(_) => self.save(),
            Err(e) if e.kind == ErrorKind::Conflict => {}
            Err(error) => {
                // Clients get the error, and they must not learn the path.
                let real = source.canonicalize().unwrap_or_else(|_| source.clone());
                let mut e = error.hide_path(&source, "its directory").hide_path(&real, "its directory");
                e.message = format!("adapter {name:?} in the adapters directory cannot be loaded: {}", e.message);
                e.param = None;
                tracing::warn!("{e:#}");
                self.0.on_demand.remember(name, &e);
                return Err(e);
            }
        }
        self.lease(name)
    }
}
