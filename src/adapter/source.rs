//! The directories from which adapters may be read.

use std::path::{Component, Path, PathBuf};

use super::{foreign, layout};
use crate::error::ErrorKind;
use crate::{Error, Result};

/// Where the source of an adapter may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SourceScope {
    /// Below the adapter root, if there is one, or below the checkpoint root.
    Roots,
    /// Anywhere: the operator chose the directory.
    Anywhere,
}

/// The adapter root and the checkpoint root.
pub(super) struct SourceRoots {
    /// The adapter root as it was given, and its canonical path.
    adapters: Option<(PathBuf, PathBuf)>,
    checkpoints: Option<PathBuf>,
}

impl SourceRoots {
    /// Finds the canonical path of the adapter root. Errors: the adapter root cannot be used.
    pub(super) fn new(adapters: Option<&Path>, checkpoints: Option<&Path>) -> Result<Self> {
        let canonical = |given: &Path| match given.canonicalize() {
            Ok(real) => Ok((given.to_owned(), real)),
            Err(e) => Err(Error::invalid(format!("the adapter root {} cannot be used: {e}", given.display()))
                .param("adapter_root")
                .path(given)
                .caused_by(e)),
        };
        Ok(Self { adapters: adapters.map(canonical).transpose()?, checkpoints: checkpoints.map(Path::to_owned) })
    }

    /// The canonical path of a source. Under [`SourceScope::Roots`], neither `..` nor a symlink leads out of the roots, and
    /// nothing outside them is touched. Errors: the source is outside the roots, or does not exist.
    pub(super) fn resolve(&self, source: &Path, scope: SourceScope) -> Result<PathBuf> {
        if source.as_os_str().is_empty() {
            return Err(Error::invalid("the source must be the path of an adapter directory, not empty"));
        }
        let forbidden = |what: &str| {
            let message = format!("{} {what}", source.display());
            Error::new(ErrorKind::Forbidden, message).code("adapter_path_forbidden")
        };
        let root = self.adapters.as_ref().filter(|_| scope == SourceScope::Roots);
        let inside = |path: &Path| {
            let Some((_, root)) = root else { return true };
            path.starts_with(root) || self.checkpoints.as_ref().is_some_and(|root| path.starts_with(root))
        };
        let path = match root {
            // A path may start with the root as it was given, through a symlink.
            Some((given, root)) => root.join(source.strip_prefix(given).unwrap_or(source)),
            None => source.to_owned(),
        };
        if !inside(&path) || (root.is_some() && path.components().any(|c| c == Component::ParentDir)) {
            return Err(forbidden("is outside the adapter root"));
        }
        let real = path.canonicalize().map_err(|e| foreign::missing(source, &e.to_string()))?;
        if !inside(&real) {
            return Err(forbidden("is a symlink that leaves the adapter root: copy the adapter below the root"));
        }
        if root.is_some() {
            for file in files(&real) {
                if file.canonicalize().is_ok_and(|file| !inside(&file)) {
                    let name = file.file_name().unwrap_or_default().to_string_lossy();
                    return Err(forbidden(&format!(
                        "has a file {name} that is a symlink and leaves the adapter root: copy the file itself into the folder"
                    )));
                }
            }
        }
        Ok(real)
    }
}

/// The files of a source that may be read.
fn files(source: &Path) -> Vec<PathBuf> {
    let gguf = |path: &PathBuf| path.extension().is_some_and(|end| end == "gguf");
    let ggufs = foreign::entries(source).unwrap_or_default().into_iter().filter(gguf);
    layout::FILES.iter().map(|file| source.join(file)).chain(ggufs).collect()
}
