//! Files in the store: their contents, and their end by deletion or expiry.

use std::fs;
use std::io::ErrorKind::NotFound;

use tempfile::NamedTempFile;

use super::record::FileObject;
use super::store::{ObjectKind, Store, not_found};
use crate::error::{AtPath, Error, Result};

/// Start of the names of contents that are being received.
const RECEIVING: &str = ".receiving-";

impl Store {
    /// A file that has not expired, if there is one.
    pub(crate) fn find_file(&self, id: &str) -> Result<Option<FileObject>> {
        let file: Option<FileObject> = self.find(ObjectKind::File, id)?;
        Ok(file.filter(|file| !file.expired()))
    }

    /// A file that has not expired. Errors: not found, with `param`.
    pub(crate) fn file(&self, id: &str, param: &str) -> Result<FileObject> {
        self.find_file(id)?.ok_or_else(|| not_found(ObjectKind::File, id, param))
    }

    /// The file that the field `param` of a request names. Errors: `Invalid` if there is none, or it has another purpose.
    pub(crate) fn file_for(&self, id: &str, param: &str, purpose: &str) -> Result<FileObject> {
        let refuse = |message: String, code| Error::invalid(message).param(param).code(code);
        let file = self.find_file(id)?;
        let file = file.ok_or_else(|| refuse(format!("`{param}`: there is no file {id:?}"), "file_not_found"))?;
        if file.purpose != purpose {
            let message = format!("`{param}` must be a file of purpose \"{purpose}\", not {:?}", file.purpose);
            return Err(refuse(message, "invalid_value"));
        }
        Ok(file)
    }

    /// An empty temporary file for a content that is being received.
    pub(crate) fn receive_file(&self) -> Result<NamedTempFile> {
        tempfile::Builder::new().prefix(RECEIVING).tempfile_in(self.files_dir()).at(self.files_dir())
    }

    /// Adds a file with a content from [`Self::receive_file`].
    pub(crate) fn add_file(&self, file: &FileObject, content: NamedTempFile) -> Result<()> {
        let path = self.file_path(&file.id);
        content.persist(&path).map_err(|e| e.error).at(path)?;
        self.put(ObjectKind::File, &file.id, "", file)
    }

    /// Removes a file and its content.
    pub(crate) fn remove_file(&self, id: &str) -> Result<()> {
        self.delete(ObjectKind::File, id)?;
        let path = self.file_path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != NotFound => Err(e).at(path),
            _ => Ok(()),
        }
    }

    /// Files that have expired and are still stored.
    pub(crate) fn expired_files(&self) -> Result<Vec<FileObject>> {
        Ok(self.all::<FileObject>(ObjectKind::File, "")?.into_iter().filter(FileObject::expired).collect())
    }

    /// Removes the contents that a killed process was receiving. Call it before the first request.
    pub(super) fn remove_unfinished_files(&self) -> std::io::Result<()> {
        for entry in fs::read_dir(self.files_dir())? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(RECEIVING) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::FINE_TUNE;
    use super::*;

    #[test]
    fn an_expired_file_is_only_found_by_the_sweep() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for (id, expires_at) in [("gone", Some(1)), ("kept", Some(u64::MAX)), ("endless", None)] {
            let file = FileObject { expires_at, ..FileObject::new(id.into(), 0, "a".into(), FINE_TUNE) };
            store.add_file(&file, store.receive_file().unwrap()).unwrap();
        }
        assert_eq!(store.file("gone", "file_id").err().unwrap().param.unwrap(), "file_id");
        assert!(store.file("kept", "").is_ok() && store.file("endless", "").is_ok());
        let expired = store.expired_files().unwrap();
        assert_eq!(expired.iter().map(|file| file.id.as_str()).collect::<Vec<_>>(), ["gone"]);
        store.remove_file("gone").unwrap();
        assert!(store.expired_files().unwrap().is_empty() && !store.file_path("gone").exists());
    }

    #[test]
    fn a_content_that_a_killed_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let (_, left) = store.receive_file().unwrap().keep().unwrap();
        let whole = FileObject::new("whole".into(), 0, "a".into(), FINE_TUNE);
        store.add_file(&whole, store.receive_file().unwrap()).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert!(!left.exists() && store.file_path("whole").exists());
    }
}
