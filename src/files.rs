//! Atomic replacement of files and directories.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Replaces the file or directory at `path` by the one that `write` makes at the temporary path it is given.
///
/// A reader finds the old content or all of the new, even after a kill or a power cut. While a directory is replaced, there
/// may be none for a moment. If `write` fails, nothing changes. Errors: those of `write`, and those of the file system.
pub fn replace<E: From<io::Error>>(path: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut name = OsString::from(".new-");
    name.push(path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?);
    // A killed process may have left it. Only one process at a time writes this path.
    match fs::remove_dir_all(parent.join(&name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    // Removed with its content on every return.
    let work = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir_in(parent)?;
    let made = work.path().join("made");
    write(&made)?;
    sync(&made)?;
    if made.is_dir() && path.is_dir() {
        // Moved before it is removed: a kill must not leave half of it at `path`.
        fs::rename(path, work.path().join("old"))?;
    }
    Ok(fs::rename(&made, path)?)
}

/// Flushes a file, or all files of a directory, to the disk.
fn sync(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        fs::read_dir(path)?.try_for_each(|entry| sync(&entry?.path()))?;
    }
    // Opened for reading, because a copied file may be read-only.
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_only_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let (file, folder) = (dir.path().join("file"), dir.path().join("folder"));
        let written = |what: &'static str| move |made: &Path| fs::write(made, what);
        let filled = |what: &'static str| {
            move |made: &Path| {
                fs::create_dir(made)?;
                fs::write(made.join(what), what)
            }
        };
        for what in ["old", "new"] {
            replace(&file, written(what)).unwrap();
            replace(&folder, filled(what)).unwrap();
        }
        let full = |made: &Path| {
            written("half")(made)?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        };
        assert_eq!(replace(&file, full).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(replace(&folder, written("a file where a folder is")).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "new");
        let names = |dir: &Path| fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
        assert_eq!(names(&folder), ["new"]);
        assert_eq!(names(dir.path()).len(), 2, "{:?}", names(dir.path()));
    }
}
