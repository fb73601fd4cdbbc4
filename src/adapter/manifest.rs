//! The manifest in the state directory lists the adapters to restore after a restart.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result, files};

/// An adapter at the time the manifest was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ManifestEntry {
    /// The name that requests use.
    pub(super) name: String,
    /// The directory from which to read it.
    pub(super) source: PathBuf,
    /// Whether it was pinned.
    pub(super) pinned: bool,
    /// Its generation, to detect that the content has changed since.
    pub(super) generation: String,
}

/// The manifest file, which is always replaced as a whole.
#[derive(Debug)]
pub(super) struct Manifest {
    path: PathBuf,
}

impl Manifest {
    /// The manifest of a state directory, which is created if it does not exist.
    pub(super) fn open(state_dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(state_dir).map_err(|e| {
            let message = format!("the state directory {} cannot be used: {e}", state_dir.display());
            Error::invalid(message).path(state_dir).caused_by(e)
        })?;
        Ok(Self { path: state_dir.join("adapters.json") })
    }

    /// The entries, and a message for each damaged entry. A file that cannot be read as a manifest is moved aside, so that the
    /// next write does not destroy what a person could still recover from it.
    pub(super) fn read(&self) -> (Vec<ManifestEntry>, Vec<String>) {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Default::default(),
            Err(e) => return (Vec::new(), vec![self.set_aside(&e.to_string())]),
        };
        let list = match serde_json::from_str::<Value>(&text) {
            Ok(mut value) => value.get_mut("adapters").map(Value::take),
            Err(e) => return (Vec::new(), vec![self.set_aside(&e.to_string())]),
        };
        let Some(Value::Array(list)) = list else {
            return (Vec::new(), vec![self.set_aside("it has no list named \"adapters\"")]);
        };
        let mut entries = Vec::new();
        let mut damaged = Vec::new();
        for (i, value) in list.into_iter().enumerate() {
            match serde_json::from_value::<ManifestEntry>(value) {
                Ok(entry) => entries.push(entry),
                Err(e) => damaged.push(format!("{}: entry {i} is damaged: {e}", self.path.display())),
            }
        }
        (entries, damaged)
    }

    /// Replaces the manifest by one with these entries.
    pub(super) fn write(&self, entries: &[ManifestEntry]) -> Result<()> {
        let text = format!("{:#}\n", json!({"version": 1, "adapters": entries}));
        files::replace(&self.path, |made| std::fs::write(made, text)).map_err(|e| {
            Error::internal(format!("{} cannot be written: {e}", self.path.display())).path(&self.path).caused_by(e)
        })
    }

    fn set_aside(&self, why: &str) -> String {
        let aside = self.path.with_extension("json.damaged");
        let outcome = match std::fs::rename(&self.path, &aside) {
            Ok(()) => format!("it was moved to {}", aside.display()),
            Err(e) => format!("it could not be moved aside: {e}"),
        };
        format!("{} cannot be used ({why}); {outcome}", self.path.display())
    }
}
