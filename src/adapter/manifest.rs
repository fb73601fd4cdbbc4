//! The manifest in the state directory: which adapters to bring back after a restart.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result, files};

/// One adapter as it was when the manifest was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ManifestEntry {
    /// The name requests use.
    pub name: String,
    /// Directory to read it from.
    pub source: PathBuf,
    /// Whether it was pinned.
    pub pinned: bool,
    /// Generation id, to notice when the content has changed since.
    pub generation: String,
}

/// A file that is replaced as a whole.
#[derive(Debug)]
pub struct Manifest {
    path: PathBuf,
}

impl Manifest {
    /// The manifest of a state directory, which is made if it is not there.
    pub fn open(state_dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(state_dir)
            .map_err(|e| Error::invalid(format!("the state directory {} cannot be used: {e}", state_dir.display())))?;
        Ok(Self { path: state_dir.join("adapters.json") })
    }

    /// The entries, and for each damaged one what was wrong. A file that is no manifest at all is set aside, so that
    /// the next save does not destroy what a person might still recover from it.
    pub fn read(&self) -> (Vec<ManifestEntry>, Vec<String>) {
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

    /// Replaces it with one of all entries.
    pub fn write(&self, entries: &[ManifestEntry]) -> Result<()> {
        let text = format!("{:#}\n", json!({"version": 1, "adapters": entries}));
        files::replace(&self.path, |made| std::fs::write(made, text))
            .map_err(|e| Error::internal(format!("{} cannot be written: {e}", self.path.display())))
    }

    fn set_aside(&self, why: &str) -> String {
        let aside = self.path.with_extension("json.damaged");
        let what = match std::fs::rename(&self.path, &aside) {
            Ok(()) => format!("it was moved to {}", aside.display()),
            Err(e) => format!("it could not be moved aside: {e}"),
        };
        format!("{} cannot be used ({why}); {what}", self.path.display())
    }
}
