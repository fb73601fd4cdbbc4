//! The names of the registry: the generations under them, and the locks of names that are being loaded.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::Generation;
use super::manifest::ManifestEntry;
use crate::{Error, Result};

/// The names and the generations under them.
#[derive(Default)]
pub(super) struct NameTable {
    pub(super) loaded: BTreeMap<String, Arc<Generation>>,
    /// Manifest entries that are not loaded (yet). They stay in the manifest until the name is loaded or unloaded, so that
    /// a source that is missing at one start is not forgotten.
    pub(super) absent: BTreeMap<String, ManifestEntry>,
    /// Names that were unloaded although the adapters directory holds them: requests do not bring them back.
    pub(super) withdrawn: HashSet<String>,
    /// Defects of the manifest, until [`super::registry::Registry::restore`] reports them.
    pub(super) damaged: Vec<String>,
}

impl NameTable {
    /// The generation under a name. Errors: `NotFound` if no adapter has the name.
    pub(super) fn find(&self, name: &str) -> Result<&Arc<Generation>> {
        self.loaded.get(name).ok_or_else(|| not_found(name))
    }

    /// Puts a generation under its name, and retires the one that had it.
    pub(super) fn insert(&mut self, generation: Arc<Generation>) {
        self.withdrawn.remove(&generation.name);
        if let Some(old) = self.loaded.insert(generation.name.clone(), generation) {
            old.retire();
        }
    }
}

/// One lock for each name that is being loaded.
#[derive(Default)]
pub(super) struct NameLocks(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl NameLocks {
    /// The lock of a name. It is removed from the table once nobody needs it.
    pub(super) fn of<'a>(&'a self, name: &'a str) -> NameLock<'a> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        NameLock { locks: self, name, lock: locks.entry(name.to_owned()).or_default().clone() }
    }
}

/// The lock of a name.
pub(super) struct NameLock<'a> {
    locks: &'a NameLocks,
    name: &'a str,
    pub(super) lock: Arc<tokio::sync::Mutex<()>>,
}

impl Drop for NameLock<'_> {
    fn drop(&mut self) {
        let mut locks = self.locks.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Two references: the table's and this one.
        if Arc::strong_count(&self.lock) == 2 {
            locks.remove(self.name);
        }
    }
}

pub(super) fn not_found(name: &str) -> Error {
    Error::not_found(format!("no adapter named {name:?} is loaded")).code("adapter_not_found")
}
