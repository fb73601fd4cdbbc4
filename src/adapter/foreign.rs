//! Names what a file or a folder holds if it is no adapter that can be read, and says the way out.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::layout::Layout;
use crate::{Error, Result};

/// Most entries of a folder that are looked at.
const MAX_ENTRIES: usize = 1000;

/// Most names that a message lists.
const MAX_LISTED: usize = 8;

/// Bytes at the start of a file that tell its kind. A tar archive has its mark at byte 257.
const MAGIC_BYTES: u64 = 512;

/// The first bytes of a Git LFS pointer.
const LFS: &[u8] = b"version https://git-lfs";

const POINTER: &str = "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository";

const PICKLE: &str = "is a PyTorch pickle, which can run code when read: load it in its trainer and save it as safetensors (PEFT's \
                      save_pretrained does; in torchtune, a checkpointer with safetensors output)";

const ARCHIVE: &str = "is an archive: unpack it and give the folder that holds adapter_config.json";

/// The error of something that is not an adapter, or not one that can be read.
pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::invalid(message).code("adapter_unsupported")
}

/// The error of a place where there is no adapter.
pub(super) fn missing(source: &Path, what: &str) -> Error {
    Error::not_found(format!("no adapter in {}: {what}", source.display())).code("adapter_source_not_found")
}

/// The error of a file of tensors that cannot be opened. It names the file of another format that lies there instead.
pub(super) fn missing_tensors(dir: &Path, name: &str, error: &std::io::Error) -> Error {
    match foreign_file(dir) {
        Some(what) => unsupported(format!("{} has no {name}: {what}", dir.display())),
        None => missing(dir, &format!("{name} cannot be read: {error}")),
    }
}

/// What a file holds that is no file of an adapter, and the way out. `None` if nothing is known about it.
pub(super) fn name_file(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_string_lossy().to_lowercase();
    let ends = |ends: &[&str]| ends.iter().any(|end| name.ends_with(end));
    let start = start(path)?;
    let what = if start.starts_with(LFS) {
        POINTER
    } else if ends(&[".nemo"]) {
        "is a NeMo archive: export the adapter to Hugging Face's PEFT format with NeMo, and give the folder that this writes"
    } else if ends(&[".npz"]) {
        "is a NumPy archive, as old versions of MLX-LM wrote: a current mlx-lm writes adapters.safetensors"
    } else if ends(&[".pt", ".pth", ".bin", ".ckpt", ".pkl"]) {
        PICKLE
    } else if ends(&[".zip", ".tar", ".tgz", ".tar.gz"]) {
        ARCHIVE
    } else if ends(&[".safetensors"]) {
        "is a file of tensors: give its folder, which must hold adapter_config.json too"
    } else {
        by_start(&start)?
    };
    Some(format!("{} {what}", file_name(path)))
}

/// What a file is whose name promises something else.
pub(super) fn name_content(path: &Path) -> Option<String> {
    Some(format!("{} {}", file_name(path), by_start(&start(path)?)?))
}

fn start(path: &Path) -> Option<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path).ok()?.take(MAGIC_BYTES).read_to_end(&mut start).ok()?;
    Some(start)
}

fn by_start(start: &[u8]) -> Option<&'static str> {
    let archive = start.starts_with(b"PK") || start.starts_with(&[0x1f, 0x8b]) || start.get(257..262) == Some(b"ustar");
    match start {
        _ if start.starts_with(LFS) => Some(POINTER),
        _ if start.starts_with(&[0x80, 2]) => Some(PICKLE),
        _ if start.starts_with(b"GGUF") => Some("is a GGUF file: give its path, or a folder that holds only it"),
        _ if archive => Some(ARCHIVE),
        _ => None,
    }
}

/// The error of a file that is no adapter.
pub(super) fn file_error(path: &Path) -> Error {
    let what = name_file(path).unwrap_or_else(|| {
        format!(
            "{} is a file: give the folder that holds adapter_config.json, or a GGUF adapter",
            path.file_name().unwrap_or_default().to_string_lossy()
        )
    });
    unsupported(what).path(path)
}

/// The error of a folder in which no adapter lies: it says what lies there instead.
pub(super) fn folder_error(dir: &Path) -> Error {
    let shown = dir.display();
    let entries = match entries(dir) {
        Ok(entries) => entries,
        Err(e) => return missing(dir, &e.to_string()),
    };
    let holds = |name: &str| dir.join(name).is_file();
    if holds("adapter_model.safetensors") || holds("adapters.safetensors") {
        return unsupported(format!(
            "{shown} has the tensors of an adapter and no adapter_config.json, which has its ranks and scales: copy it from the \
             place where the adapter was saved"
        ));
    }
    let inside: Vec<String> = entries
        .iter()
        .filter(|entry| !entry.is_symlink() && Layout::of_folder(entry).is_some())
        .map(|entry| file_name(entry))
        .collect();
    if !inside.is_empty() {
        return missing(dir, &format!("it has adapters in its subfolders {}: give one of these", list(&inside)));
    }
    let model =
        |name: &str| name.starts_with("model") && name.ends_with(".safetensors") || name.ends_with(".index.json");
    if holds("config.json")
        && entries.iter().map(|entry| file_name(entry)).any(|name| model(&name) || name.starts_with("pytorch_model"))
    {
        return unsupported(format!(
            "{shown} holds a base model, not an adapter: serve it with --model, or give the folder that holds adapter_config.json"
        ));
    }
    match foreign_file(dir) {
        Some(what) => unsupported(format!("no adapter in {shown}: {what}")),
        None => missing(dir, "it holds no adapter_config.json and no GGUF adapter"),
    }
}

/// Names the first file of a folder that is of another format. It does not follow symlinks, which may leave the adapter root.
fn foreign_file(dir: &Path) -> Option<String> {
    let foreign = |path: &PathBuf| path.extension().is_some_and(|end| end != "safetensors" && end != "gguf");
    let files = entries(dir).ok()?.into_iter().filter(|path| foreign(path) && path.is_file() && !path.is_symlink());
    let bin = Some(dir.join("adapter_model.bin")).filter(|path| path.is_file());
    bin.into_iter().chain(files).find_map(|path| name_file(&path))
}

/// The first [`MAX_ENTRIES`] entries of a folder, sorted.
pub(super) fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    read_entries(dir, MAX_ENTRIES)
}

/// All entries of a folder, sorted.
pub(super) fn all_entries(dir: &Path) -> Result<Vec<PathBuf>> {
    read_entries(dir, usize::MAX)
}

fn read_entries(dir: &Path, most: usize) -> Result<Vec<PathBuf>> {
    let unreadable =
        |e: std::io::Error| Error::invalid(format!("{} cannot be read: {e}", dir.display())).path(dir).caused_by(e);
    let entries = std::fs::read_dir(dir).map_err(unreadable)?.take(most).map(|entry| Ok(entry?.path()));
    let mut entries: Vec<PathBuf> = entries.collect::<std::io::Result<_>>().map_err(unreadable)?;
    entries.sort();
    Ok(entries)
}

/// Names, of which a long list is cut.
pub(super) fn list(names: &[String]) -> String {
    let shown = names.iter().take(MAX_LISTED).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(MAX_LISTED) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

pub(super) fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
