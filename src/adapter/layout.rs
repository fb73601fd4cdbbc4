//! The layouts of adapters on disk: which one a folder or a file has.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::foreign;
use super::peft_config::invalid;
use crate::Result;

/// The config of an adapter's folder, in PEFT's layout and in MLX's.
pub(super) const CONFIG: &str = "adapter_config.json";

/// Files of an adapter's folder that are read, or whose presence decides what is read.
pub(super) const FILES: [&str; 4] = [CONFIG, "adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors"];

/// Most bytes of an `adapter_config.json`. AdaLoRA's ranks of a large model take about one megabyte.
const MAX_CONFIG: u64 = 16 << 20;

/// How an adapter is stored.
#[derive(Debug)]
pub(super) enum Layout {
    /// A folder with `adapter_config.json` in PEFT's form.
    Peft(Map<String, Value>),
    /// A folder with `adapter_config.json` in MLX-LM's form.
    Mlx(Map<String, Value>),
    /// A GGUF file, as llama.cpp's `convert_lora_to_gguf.py` writes it.
    Gguf(PathBuf),
}

impl Layout {
    /// The layout of a source. Errors: it holds something else, which the message names.
    pub(super) fn of(source: &Path) -> Result<Self> {
        if source.is_file() {
            return Self::of_file(source.to_owned());
        }
        match Self::of_folder(source) {
            Some(FolderLayout::Config) => {
                let config = read_config(source)?;
                Ok(if is_mlx(&config) { Self::Mlx(config) } else { Self::Peft(config) })
            }
            Some(FolderLayout::Gguf(file)) => Self::of_file(file),
            Some(FolderLayout::Ggufs(files)) => {
                let names: Vec<String> = files.iter().map(|file| foreign::file_name(file)).collect();
                Err(invalid(format!(
                    "{} holds several GGUF files, {}: give the path of one",
                    source.display(),
                    foreign::list(&names)
                )))
            }
            None => Err(foreign::folder_error(source)),
        }
    }

    fn of_file(file: PathBuf) -> Result<Self> {
        match is_gguf(&file) {
            true => Ok(Self::Gguf(file)),
            false => Err(foreign::file_error(&file)),
        }
    }

    /// What makes a folder that of an adapter. `None` if nothing does.
    pub(super) fn of_folder(dir: &Path) -> Option<FolderLayout> {
        if !dir.is_dir() {
            return None;
        }
        if dir.join(CONFIG).exists() {
            return Some(FolderLayout::Config);
        }
        let gguf = |path: &PathBuf| path.extension().is_some_and(|end| end == "gguf") && path.is_file();
        let mut files: Vec<PathBuf> = foreign::entries(dir).ok()?.into_iter().filter(gguf).collect();
        match files.len() {
            0 => None,
            1 => files.pop().map(FolderLayout::Gguf),
            _ => Some(FolderLayout::Ggufs(files)),
        }
    }
}

/// What makes a folder that of an adapter.
pub(super) enum FolderLayout {
    /// It has a config.
    Config,
    /// It has one GGUF file.
    Gguf(PathBuf),
    /// It has several GGUF files.
    Ggufs(Vec<PathBuf>),
}

/// Whether a file begins as GGUF files do.
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"GGUF"
}

/// The object in `adapter_config.json`.
fn read_config(dir: &Path) -> Result<Map<String, Value>> {
    let path = dir.join(CONFIG);
    let mut text = String::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_CONFIG + 1).read_to_string(&mut text))
        .map_err(|e| foreign::missing(dir, &format!("{CONFIG} cannot be read: {e}")))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(invalid(format!("{CONFIG} has more than {MAX_CONFIG} bytes")));
    }
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(invalid(format!("{CONFIG} must hold one JSON object"))),
        Err(e) => Err(match foreign::name_content(&path) {
            Some(what) => foreign::unsupported(what),
            None => invalid(format!("{CONFIG} is not valid JSON: {e}")),
        }),
    }
}

/// Whether a config is MLX-LM's, which saves all arguments of its trainer.
fn is_mlx(config: &Map<String, Value>) -> bool {
    !config.contains_key("peft_type")
        && ["lora_parameters", "fine_tune_type", "lora_layers"].iter().any(|key| config.contains_key(*key))
}
