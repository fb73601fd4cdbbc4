//! Name -> generation: load, replace, unload, pin, list.
//!
//! Loading reads and checks off the async threads, one load a name at a time, and publishes only a whole, correct
//! adapter. What the manifest says follows what is published.

use std::collections::{BTreeMap, HashMap};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use candle_core::Device;
use futures::{StreamExt, stream};
use serde::Serialize;

use super::manifest::{Manifest, ManifestEntry};
use super::tiers::{HostTier, TierStats, Tiers};
use super::{Generation, Lease, peft};
use crate::arch::ModelConfig;
use crate::error::ErrorKind;
use crate::lora::slots;
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Adapters read at once when many are loaded at start.
const PARALLEL_LOADS: usize = 4;

/// Longest adapter name in bytes.
const MAX_NAME: usize = 256;

/// Limits and places of the adapters.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Where the slots are.
    pub device: Device,
    /// Sources of [`Registry::load`] must lie below this directory, and relative ones start here.
    pub adapter_root: Option<PathBuf>,
    /// Sources may lie below this one too: where the trainer writes adapters.
    pub checkpoint_root: Option<PathBuf>,
    /// Where the manifest is kept; without one, nothing is remembered.
    pub state_dir: Option<PathBuf>,
    /// Bytes of adapters in host memory.
    pub host_budget: usize,
    /// Bytes of adapters in slots.
    pub slot_budget: usize,
    /// Names that no adapter may have: the base model's.
    pub reserved_names: Vec<String>,
}

impl Default for RegistryConfig {
    /// Slots on the CPU, and no memory for any adapter.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            adapter_root: None,
            checkpoint_root: None,
            state_dir: None,
            host_budget: 0,
            slot_budget: 0,
            reserved_names: Vec::new(),
        }
    }
}

/// How [`Registry::load`] publishes an adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Keep it in its slot and in host memory against other adapters.
    pub pinned: bool,
    /// Replace the adapter that has the name; without it, a name in use is a conflict.
    pub replace: bool,
}

impl LoadOptions {
    /// Replace the adapter that has the name, and do not pin the new one.
    pub const REPLACE: Self = Self { pinned: false, replace: true };
}

/// Where the source of an adapter may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SourceScope {
    /// Below the adapter root or the checkpoint root.
    Roots,
    /// Anywhere: the operator chose the directory.
    Anywhere,
}

/// What an operator may know of an adapter.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterInfo {
    /// The name requests use.
    pub name: String,
    /// Content hash of the current version.
    pub generation: String,
    /// Directory it was read from.
    pub source: PathBuf,
    /// Largest rank of any module.
    pub rank: usize,
    /// Number of modules it changes.
    pub modules: usize,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Never evicted from its slot for another adapter.
    pub pinned: bool,
    /// `slot`, `host` or `disk`.
    pub level: &'static str,
    /// Requests that hold it now.
    pub leases: usize,
    /// When this generation was loaded.
    pub loaded_at: SystemTime,
}

impl From<&Generation> for AdapterInfo {
    fn from(g: &Generation) -> Self {
        Self {
            name: g.name.clone(),
            generation: g.id.clone(),
            source: g.source.clone(),
            rank: g.rank,
            modules: g.modules,
            bytes: g.bytes,
            pinned: g.pinned(),
            level: g.level(),
            leases: g.leases(),
            loaded_at: g.loaded_at,
        }
    }
}

/// What an unload did.
#[derive(Debug, Clone, Serialize)]
pub struct UnloadOutcome {
    /// The generation that went.
    pub generation: String,
    /// Bytes freed at once.
    pub freed_bytes: usize,
    /// Bytes that the last running request, or for an idle slot the engine's next step, will free.
    pub pending_bytes: usize,
}

/// An adapter that is ready and has no name yet.
pub struct UnpublishedAdapter(Arc<Generation>);

impl UnpublishedAdapter {
    /// Takes it.
    pub fn lease(&self) -> Lease {
        Lease::new(self.0.clone())
    }
}

/// All adapters of the server; clones share it.
#[derive(Clone)]
pub struct Registry(Arc<RegistryInner>);

struct RegistryInner {
    model: Arc<ModelConfig>,
    config: RegistryConfig,
    /// `adapter_root` without symlinks.
    root: Option<PathBuf>,
    host: Arc<HostTier>,
    names: Mutex<NameTable>,
    /// One lock a name that is being loaded.
    loading: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// `None` without a state directory. Held while it is written, so that the last writer writes the last state.
    manifest: Option<Mutex<Manifest>>,
}

/// What names stand for now.
#[derive(Default)]
struct NameTable {
    loaded: BTreeMap<String, Arc<Generation>>,
    /// Manifest entries that are not loaded (yet): kept in the manifest until the name is loaded or unloaded, so that
    /// a source that is away for one start is not forgotten.
    absent: BTreeMap<String, ManifestEntry>,
    /// What was wrong with the manifest, until [`Registry::restore`] reports it.
    damaged: Vec<String>,
}

impl Registry {
    /// A registry for one model, with nothing loaded: [`Registry::restore`] loads what the manifest lists. Errors: a
    /// root or state directory that cannot be used.
    pub fn new(model: Arc<ModelConfig>, config: RegistryConfig) -> Result<Self> {
        let real = |root: &PathBuf| {
            root.canonicalize().map_err(|e| {
                Error::invalid(format!("the adapter root {} cannot be used: {e}", root.display())).param("adapter_root")
            })
        };
        let root = config.adapter_root.as_ref().map(real).transpose()?;
        let manifest = config.state_dir.as_deref().map(Manifest::open).transpose()?;
        let (entries, damaged) = manifest.as_ref().map(Manifest::read).unwrap_or_default();
        let absent = entries.into_iter().map(|e| (e.name.clone(), e)).collect();
        Ok(Self(Arc::new(RegistryInner {
            model,
            root,
            host: Arc::new(HostTier::new(config.host_budget, Arc::default())),
            config,
            names: Mutex::new(NameTable { loaded: BTreeMap::new(), absent, damaged }),
            loading: Mutex::default(),
            manifest: manifest.map(Mutex::new),
        })))
    }

    /// The slots of these adapters, for the engine thread to own. Errors: a GPU has no room for them, or the loader
    /// threads cannot be started.
    pub fn tiers(&self) -> Result<Tiers> {
        Tiers::new(self.0.model.clone(), self.0.host.clone(), &self.0.config.device, self.0.config.slot_budget)
    }

    /// Bytes that adapters in slots may take.
    pub fn slot_budget(&self) -> usize {
        self.0.config.slot_budget
    }

    /// Counters that the metrics page reads.
    pub fn stats(&self) -> &TierStats {
        &self.0.host.stats
    }

    /// Reads and checks an adapter directory off the caller's thread and publishes it under `name`, all or nothing.
    /// One load a name at a time; a second waits for the first. With `replace` false an existing name is a conflict;
    /// with it, the same content from the same place stays the generation it is.
    ///
    /// Codes: `adapter_name_invalid`, `adapter_exists`, `adapter_path_forbidden`, `adapter_source_not_found`,
    /// `adapter_invalid`, `adapter_unsupported`, `adapter_too_large`, `adapter_pin_budget`.
    pub async fn load(&self, name: &str, source: &str, options: LoadOptions) -> Result<AdapterInfo> {
        let info = self.load_counted(name, Path::new(source), SourceScope::Roots, options).await?;
        self.save();
        Ok(info)
    }

    /// Reads an adapter as [`Registry::load`] does, without giving it the name yet: requests that hold its lease can use it,
    /// nobody else finds it. Dropped, it is gone.
    pub async fn load_unpublished(&self, name: &str, source: &str) -> Result<UnpublishedAdapter> {
        self.check_name(name)?;
        let (generation, weights) = self.read(name, Path::new(source), SourceScope::Roots).await?;
        let generation = Arc::new(generation);
        self.0.host.put(&generation, Arc::new(weights));
        Ok(UnpublishedAdapter(generation))
    }

    /// Gives a staged adapter its name, whatever had it before.
    pub fn publish(&self, UnpublishedAdapter(generation): UnpublishedAdapter) -> AdapterInfo {
        let info = AdapterInfo::from(&*generation);
        let mut names = self.lock();
        names.absent.remove(&info.name);
        if let Some(old) = names.loaded.insert(info.name.clone(), generation) {
            old.retire();
        }
        drop(names);
        self.save();
        info
    }

    /// Loads every sub-directory of `dir` that holds an adapter, under its own name, unless the name is taken. The
    /// operator chose `dir`, so the adapter root does not apply.
    pub async fn load_directory(&self, dir: &Path) -> Result<Vec<(String, Result<AdapterInfo>)>> {
        let unreadable = |e: std::io::Error| Error::invalid(format!("{} cannot be read: {e}", dir.display()));
        let mut found = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().join("adapter_config.json").exists() && !self.lock().loaded.contains_key(&name) {
                found.push((name, entry.path()));
            }
        }
        found.sort();
        let loads = found.into_iter().map(|(name, path)| async move {
            let loaded = self.load_counted(&name, &path, SourceScope::Anywhere, LoadOptions::default()).await;
            if let Err(e) = &loaded {
                tracing::warn!("adapter {name:?} in {} was not loaded: {e}", path.display());
            }
            (name, loaded)
        });
        let loaded = stream::iter(loads).buffered(PARALLEL_LOADS).collect().await;
        self.save();
        Ok(loaded)
    }

    /// Loads what the manifest lists and returns what could not be brought back as it was, which is also logged. An
    /// entry whose content has changed is loaded as the new generation it now is; one that fails stays in the
    /// manifest. Call it after [`Registry::load_directory`]: what is loaded already only gets its pin back.
    pub async fn restore(&self) -> Vec<String> {
        let (entries, mut problems): (Vec<ManifestEntry>, _) = {
            let mut names = self.lock();
            (names.absent.values().cloned().collect(), std::mem::take(&mut names.damaged))
        };
        let restores = entries.into_iter().map(|entry| async move {
            let ManifestEntry { name, source, pinned, generation } = entry;
            let current = self.get(&name).ok().filter(|info| info.generation == generation && info.source == source);
            let restored = match current {
                Some(_) => self.pin_now(&name, pinned),
                None => {
                    let options = LoadOptions { pinned, replace: true };
                    self.load_counted(&name, &source, SourceScope::Roots, options).await
                }
            };
            let problem = match restored {
                Ok(info) if info.generation == generation => return None,
                Ok(info) => format!(
                    "adapter {name:?}: {} has changed since generation {generation} and was loaded as generation {}",
                    source.display(),
                    info.generation
                ),
                Err(e) => format!("adapter {name:?} was not restored: {e}"),
            };
            Some(problem)
        });
        let failed: Vec<_> = stream::iter(restores).buffered(PARALLEL_LOADS).collect().await;
        problems.extend(failed.into_iter().flatten());
        problems.iter().for_each(|problem| tracing::warn!("{problem}"));
        self.save();
        problems
    }

    /// Takes the current generation of `name`, or 404.
    pub fn lease(&self, name: &str) -> Result<Lease> {
        // Under the lock, so that an unload sees the lease or the lease sees the unload.
        self.lock().find(name).map(|generation| Lease::new(generation.clone()))
    }

    /// Takes the name away; running requests keep their lease. 404 for an unknown name.
    pub fn unload(&self, name: &str) -> Result<UnloadOutcome> {
        let mut names = self.lock();
        let unloaded = match (names.loaded.remove(name), names.absent.remove(name)) {
            (Some(generation), _) => {
                generation.retire();
                let host = if self.0.host.contains(generation.key) { generation.bytes } else { 0 };
                let slot = if generation.level() == "slot" { generation.slot_bytes } else { 0 };
                let (freed_bytes, pending_bytes) =
                    if generation.leases() > 0 { (0, host + slot) } else { (host, slot) };
                UnloadOutcome { generation: generation.id.clone(), freed_bytes, pending_bytes }
            }
            (None, Some(entry)) => UnloadOutcome { generation: entry.generation, freed_bytes: 0, pending_bytes: 0 },
            (None, None) => return Err(not_found(name)),
        };
        drop(names);
        self.save();
        Ok(unloaded)
    }

    /// Pins or unpins. 404 for an unknown name, 409 when the pinned ones would not fit into slots together.
    pub fn set_pinned(&self, name: &str, pinned: bool) -> Result<AdapterInfo> {
        let info = self.pin_now(name, pinned)?;
        self.save();
        Ok(info)
    }

    /// One adapter, or 404.
    pub fn get(&self, name: &str) -> Result<AdapterInfo> {
        self.lock().find(name).map(|generation| AdapterInfo::from(&**generation))
    }

    /// All adapters, by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        self.lock().loaded.values().map(|generation| AdapterInfo::from(&**generation)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, NameTable> {
        // The maps are consistent between statements, so a panic elsewhere does not spoil them.
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin_now(&self, name: &str, pinned: bool) -> Result<AdapterInfo> {
        let mut names = self.lock();
        let generation = names.find(name)?.clone();
        if pinned {
            self.check_pin_budget(&names, name, generation.slot_bytes)?;
        }
        generation.state.pinned.store(pinned, SeqCst);
        names.absent.remove(name);
        Ok(AdapterInfo::from(&*generation))
    }

    /// [`Registry::load_alone`] with one load a name at a time, counted. What an operator's directory offers
    /// ([`SourceScope::Anywhere`]) does not count as a decision on what the manifest says.
    async fn load_counted(
        &self,
        name: &str,
        source: &Path,
        scope: SourceScope,
        options: LoadOptions,
    ) -> Result<AdapterInfo> {
        let started = Instant::now();
        let name_lock = NameLock::new(&self.0, name);
        let loaded = {
            let _guard = name_lock.lock.lock().await;
            self.load_alone(name, source, scope, options).await
        };
        let stats = self.stats();
        match &loaded {
            Ok(_) => {
                stats.loads.fetch_add(1, Relaxed);
                stats.load_micros.fetch_add(started.elapsed().as_micros() as u64, Relaxed);
            }
            Err(_) => {
                stats.load_failures.fetch_add(1, Relaxed);
            }
        }
        loaded
    }

    async fn load_alone(
        &self,
        name: &str,
        source: &Path,
        scope: SourceScope,
        options: LoadOptions,
    ) -> Result<AdapterInfo> {
        let LoadOptions { pinned, replace } = options;
        self.check_name(name)?;
        if !replace && self.lock().loaded.contains_key(name) {
            let message = format!("adapter {name:?} is loaded already: ask for it to be replaced, or unload it first");
            return Err(Error::new(ErrorKind::Conflict, message).param("name").code("adapter_exists"));
        }
        let (generation, weights) = self.read(name, source, scope).await?;
        let mut names = self.lock();
        if pinned {
            self.check_pin_budget(&names, name, generation.slot_bytes)?;
        }
        if scope == SourceScope::Roots {
            names.absent.remove(name);
        }
        let same = |old: &&Arc<Generation>| old.id == generation.id && old.source == generation.source;
        if let Some(old) = names.loaded.get(name).filter(same) {
            old.state.pinned.store(pinned, SeqCst);
            return Ok(AdapterInfo::from(&**old));
        }
        generation.state.pinned.store(pinned, SeqCst);
        let generation = Arc::new(generation);
        self.0.host.put(&generation, Arc::new(weights));
        let info = AdapterInfo::from(&*generation);
        if let Some(old) = names.loaded.insert(name.to_owned(), generation) {
            old.retire();
        }
        Ok(info)
    }

    /// Reads and checks an adapter that is to be called `name`.
    async fn read(&self, name: &str, source: &Path, scope: SourceScope) -> Result<(Generation, AdapterWeights)> {
        let (inner, source) = (self.0.clone(), source.to_owned());
        let read = move || {
            let source = inner.resolve(&source, scope)?;
            peft::read(&source, &inner.model).map(|(weights, id)| (source, weights, id))
        };
        let (source, weights, id) = tokio::task::spawn_blocking(read)
            .await
            .map_err(|e| Error::internal(format!("reading the adapter failed: {e}")))?
            .map_err(|e| e.param("source"))?;

        let slot_bytes = slots::slot_bytes(&weights, &self.0.model, &self.0.config.device)?;
        let generation = Generation::new(name, id, source, &weights, slot_bytes, self.0.host.clone());
        if generation.slot_bytes > self.0.config.slot_budget {
            return Err(Error::invalid(format!(
                "adapter {name:?} needs {} bytes in a slot, more than the whole slot budget of {} bytes",
                generation.slot_bytes, self.0.config.slot_budget
            ))
            .code("adapter_too_large"));
        }
        Ok((generation, weights))
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._:/@-".contains(c);
        let message = if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(allowed) {
            format!("an adapter name has 1 to {MAX_NAME} characters of A-Z a-z 0-9 . _ : / @ -; {name:?} does not fit")
        } else if self.0.config.reserved_names.iter().any(|reserved| reserved == name) {
            format!("{name:?} is the name of the base model")
        } else {
            return Ok(());
        };
        Err(Error::invalid(message).param("name").code("adapter_name_invalid"))
    }

    /// Pinned adapters must fit into the slots together, or they would wait for each other for ever.
    fn check_pin_budget(&self, names: &NameTable, name: &str, bytes: usize) -> Result<()> {
        let others = names.loaded.values().filter(|g| g.name != name && g.pinned());
        let total = bytes + others.map(|g| g.slot_bytes).sum::<usize>();
        let budget = self.0.config.slot_budget;
        if total <= budget {
            return Ok(());
        }
        let message = format!(
            "pinning {name:?} would pin {total} bytes, more than the slot budget of {budget} bytes: unpin another first"
        );
        Err(Error::new(ErrorKind::Conflict, message).param("pinned").code("adapter_pin_budget"))
    }

    /// Writes the manifest. What serves already goes on serving when that fails; the log has the reason.
    fn save(&self) {
        let Some(manifest) = &self.0.manifest else { return };
        let manifest = manifest.lock().unwrap_or_else(PoisonError::into_inner);
        let entries: Vec<ManifestEntry> = {
            let names = self.lock();
            let loaded = names.loaded.values().map(|g| ManifestEntry {
                name: g.name.clone(),
                source: g.source.clone(),
                pinned: g.pinned(),
                generation: g.id.clone(),
            });
            let loaded = loaded.filter(|e| !names.absent.contains_key(&e.name));
            loaded.chain(names.absent.values().cloned()).collect()
        };
        if let Err(e) = manifest.write(&entries) {
            tracing::error!("the adapter manifest is out of date: {e}");
        }
    }
}

impl NameTable {
    fn find(&self, name: &str) -> Result<&Arc<Generation>> {
        self.loaded.get(name).ok_or_else(|| not_found(name))
    }
}

/// A place in the line of loads of one name; the line goes when nobody is in it.
struct NameLock<'a> {
    inner: &'a RegistryInner,
    name: &'a str,
    lock: Arc<tokio::sync::Mutex<()>>,
}

impl<'a> NameLock<'a> {
    fn new(inner: &'a RegistryInner, name: &'a str) -> Self {
        let mut loading = inner.loading.lock().unwrap_or_else(PoisonError::into_inner);
        Self { inner, name, lock: loading.entry(name.to_owned()).or_default().clone() }
    }
}

impl Drop for NameLock<'_> {
    fn drop(&mut self) {
        let mut loading = self.inner.loading.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's and ours.
        if Arc::strong_count(&self.lock) == 2 {
            loading.remove(self.name);
        }
    }
}

impl RegistryInner {
    /// The real path of a source. Under [`SourceScope::Roots`] it lies below the adapter root, if there is one: neither `..` nor a
    /// symlink leads out, and what lies outside is not even looked at.
    fn resolve(&self, source: &Path, scope: SourceScope) -> Result<PathBuf> {
        if source.as_os_str().is_empty() {
            return Err(Error::invalid("the source must be the path of an adapter directory, not empty"));
        }
        let forbidden = || {
            let message = format!("{} is outside the adapter root", source.display());
            Error::new(ErrorKind::Forbidden, message).code("adapter_path_forbidden")
        };
        let root = self.root.as_deref().filter(|_| scope == SourceScope::Roots);
        let made = self.config.checkpoint_root.as_deref();
        let inside = |path: &Path| {
            root.is_none_or(|root| path.starts_with(root) || made.is_some_and(|made| path.starts_with(made)))
        };
        let path = match (root, &self.config.adapter_root) {
            (Some(root), Some(given)) => {
                // Paths may name the root as it was given, through a symlink.
                let below = source.strip_prefix(given).unwrap_or(source);
                root.join(below)
            }
            _ => source.to_owned(),
        };
        if !inside(&path) || (root.is_some() && path.components().any(|c| c == Component::ParentDir)) {
            return Err(forbidden());
        }
        let real = path.canonicalize().map_err(|e| {
            Error::not_found(format!("no adapter in {}: {e}", source.display())).code("adapter_source_not_found")
        })?;
        for file in ["", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"] {
            if real.join(file).canonicalize().is_ok_and(|file| !inside(&file)) {
                return Err(forbidden());
            }
        }
        Ok(real)
    }
}

fn not_found(name: &str) -> Error {
    Error::not_found(format!("no adapter named {name:?} is loaded")).code("adapter_not_found")
}
