//! The registry: loads, publishes, replaces, unloads, pins and lists adapters by name.
//!
//! Reading and checking run on blocking threads, one load per name at a time. Only a complete and correct adapter is
//! published. The manifest is rewritten after every change.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use candle_core::Device;
use futures::{StreamExt, stream};
use serde::Serialize;

use super::base_check::{self, BaseClaim, ServedBase};
use super::generation::Tier;
use super::host_tier::HostTier;
use super::manifest::{Manifest, ManifestEntry};
use super::names::{NameLocks, NameTable, not_found};
use super::on_demand::{OnDemand, adapters_in};
use super::reader::{self, ReadAdapter};
use super::source::{SourceRoots, SourceScope};
use super::tiers::{TierStats, Tiers};
use super::{Generation, Lease};
use crate::arch::{ModelConfig, Module};
use crate::error::ErrorKind;
use crate::lora::slots;
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Adapters that are read at once when many are loaded at start-up, or by requests.
pub(super) const PARALLEL_LOADS: usize = 4;

/// Length of the longest adapter name, in bytes.
const MAX_NAME: usize = 256;

/// Rank of the adapter by which [`Registry::nominal_slots`] counts.
const NOMINAL_RANK: usize = 16;

/// Directories and memory budgets of the adapters.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Device of the slots.
    pub device: Device,
    /// Sources of [`Registry::load`] must lie below this directory. Relative sources are resolved against it.
    pub adapter_root: Option<PathBuf>,
    /// Sources may also lie below this directory, to which the trainer writes checkpoints.
    pub checkpoint_root: Option<PathBuf>,
    /// The adapters directory: [`Registry::load_directory`] loads it, and [`Registry::lease_or_load`] looks there.
    pub directory: Option<PathBuf>,
    /// Directory of the manifest. Without it, a restart restores no adapters.
    pub state_dir: Option<PathBuf>,
    /// Bytes that adapters may take in host memory.
    pub host_budget: usize,
    /// Bytes that adapters may take in slots.
    pub slot_budget: usize,
    /// Names of the base model, which no adapter may have.
    pub reserved_names: Vec<String>,
    /// The served base, with which the base that an adapter names is compared.
    pub base: ServedBase,
    /// Refuse adapters of another base. Without it, they are loaded with a warning.
    pub strict_base: bool,
}

impl Default for RegistryConfig {
    /// Slots on the CPU and budgets of 0 bytes.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            adapter_root: None,
            checkpoint_root: None,
            directory: None,
            state_dir: None,
            host_budget: 0,
            slot_budget: 0,
            reserved_names: Vec::new(),
            base: ServedBase::default(),
            strict_base: false,
        }
    }
}

/// How [`Registry::load`] publishes an adapter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// Whether to pin it: it keeps its slot and its host memory when other adapters need room.
    pub pinned: bool,
    /// Whether to replace the adapter that has the name. If not, a name in use is a conflict.
    pub replace: bool,
}

impl LoadOptions {
    /// Replaces the adapter that has the name, without pinning the new one.
    pub const REPLACE: Self = Self { pinned: false, replace: true };
}

/// An adapter as the admin API shows it.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterInfo {
    /// The name that requests use.
    pub name: String,
    /// Content hash of the current generation.
    pub generation: String,
    /// The directory from which it was read.
    pub source: PathBuf,
    /// Largest rank of any module.
    pub rank: usize,
    /// Number of modules that it targets.
    pub modules: usize,
    /// Bytes of its weights.
    pub bytes: usize,
    /// Whether it is never evicted for another adapter.
    pub pinned: bool,
    /// The fastest tier that holds it: `slot`, `host` or `disk`.
    pub level: &'static str,
    /// Number of leases.
    pub leases: usize,
    /// When this generation was loaded.
    pub loaded_at: SystemTime,
    /// What may make it useless although it can be served: it names another base, or all its deltas are zero.
    pub warnings: Vec<String>,
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
            level: g.tier().name(),
            leases: g.leases(),
            loaded_at: g.loaded_at,
            warnings: g.warnings.clone(),
        }
    }
}

/// The effect of an unload.
#[derive(Debug, Clone, Serialize)]
pub struct UnloadOutcome {
    /// The retired generation.
    pub generation: String,
    /// Bytes that were freed at once.
    pub freed_bytes: usize,
    /// Bytes that will be freed when the last lease ends, or, if there is none, by the engine's next step.
    pub pending_bytes: usize,
}

/// A loaded adapter that has no name yet: only holders of a lease can use it.
pub struct UnpublishedAdapter(Arc<Generation>);

impl UnpublishedAdapter {
    /// Takes a lease on it.
    pub fn lease(&self) -> Lease {
        Lease::new(self.0.clone())
    }
}

/// All adapters of the server. Clones share one registry.
#[derive(Clone)]
pub struct Registry(pub(super) Arc<RegistryInner>);

pub(super) struct RegistryInner {
    model: Arc<ModelConfig>,
    config: RegistryConfig,
    roots: SourceRoots,
    host: Arc<HostTier>,
    names: Mutex<NameTable>,
    loading: NameLocks,
    pub(super) on_demand: OnDemand,
    /// `None` without a state directory. Locked during a write, so that the last write has the last state.
    manifest: Option<Mutex<Manifest>>,
}

impl Registry {
    /// A registry for one model, with nothing loaded: [`Registry::restore`] loads the adapters of the manifest. Errors: the
    /// adapter root or the state directory cannot be used.
    pub fn new(model: Arc<ModelConfig>, config: RegistryConfig) -> Result<Self> {
        let roots = SourceRoots::new(config.adapter_root.as_deref(), config.checkpoint_root.as_deref())?;
        let manifest = config.state_dir.as_deref().map(Manifest::open).transpose()?;
        let (entries, damaged) = manifest.as_ref().map(Manifest::read).unwrap_or_default();
        let absent = entries.into_iter().map(|e| (e.name.clone(), e)).collect();
        Ok(Self(Arc::new(RegistryInner {
            model,
            roots,
            host: Arc::new(HostTier::new(config.host_budget, Arc::default())),
            on_demand: OnDemand::new(config.directory.clone()),
            config,
            names: Mutex::new(NameTable { absent, damaged, ..NameTable::default() }),
            loading: NameLocks::default(),
            manifest: manifest.map(Mutex::new),
        })))
    }

    /// The tiers of these adapters, for the engine thread to own. Errors: the GPU has no room for the slots, or a loader
    /// thread cannot be started.
    pub fn tiers(&self) -> Result<Tiers> {
        Tiers::new(self.0.model.clone(), self.0.host.clone(), &self.0.config.device, self.0.config.slot_budget)
    }

    /// How many adapters of rank 16 on all modules of the decoder blocks fit into the slots, at least 1. Slots have a budget of
    /// bytes and no number; this one does not change while the server runs.
    pub fn nominal_slots(&self) -> usize {
        let model = &self.0.model;
        let values: usize = Module::BLOCK.iter().map(|m| m.shape(model)).map(|(n, k)| NOMINAL_RANK * (n + k)).sum();
        let bytes = if self.0.config.device.is_cuda() { 2 } else { 4 };
        (self.0.config.slot_budget / (values * model.num_layers * bytes).max(1)).max(1)
    }

    /// Counters for the metrics page.
    pub fn stats(&self) -> &TierStats {
        &self.0.host.stats
    }

    /// Reads and checks an adapter directory on a blocking thread and publishes it under `name`, all or nothing. A second
    /// load of the same name waits for the first. Replacing an adapter by the same content from the same source keeps its
    /// generation.
    ///
    /// Error codes: `adapter_name_invalid`, `adapter_exists`, `adapter_path_forbidden`, `adapter_source_not_found`,
    /// `adapter_invalid`, `adapter_unsupported`, `adapter_too_large`, `adapter_pin_budget`.
    pub async fn load(&self, name: &str, source: &str, options: LoadOptions) -> Result<AdapterInfo> {
        let info = self.load_unsaved(name, Path::new(source), SourceScope::Roots, options).await?;
        self.save();
        Ok(info)
    }

    /// Reads and checks an adapter as [`Registry::load`] does, but does not publish it: only holders of a lease can use it.
    /// Dropping it unloads it.
    pub async fn load_unpublished(&self, name: &str, source: &str) -> Result<UnpublishedAdapter> {
        self.counted(async {
            self.check_name(name)?;
            let (generation, weights) = self.read(name, Path::new(source), SourceScope::Roots).await?;
            let generation = Arc::new(generation);
            self.0.host.put(&generation, Arc::new(weights));
            Ok(UnpublishedAdapter(generation))
        })
        .await
    }

    /// Publishes an adapter under its name, and retires the generation that had the name. A pinned name stays pinned if the new
    /// generation fits; otherwise a warning is logged.
    pub async fn publish(&self, UnpublishedAdapter(generation): UnpublishedAdapter) -> AdapterInfo {
        let name = generation.name.clone();
        let name_lock = self.0.loading.of(&name);
        let _guard = name_lock.lock.lock().await;
        let info = {
            let mut names = self.lock();
            let absent = names.absent.remove(&name).is_some_and(|entry| entry.pinned);
            if absent || names.loaded.get(&name).is_some_and(|old| old.pinned()) {
                match self.check_pin_budget(&names, &name, generation.slot_bytes) {
                    Ok(()) => generation.state.set_pinned(true),
                    Err(e) => tracing::warn!("adapter {name:?} is no longer pinned: {e}"),
                }
            }
            let info = AdapterInfo::from(&*generation);
            names.insert(generation);
            info
        };
        self.save();
        info
    }

    /// Loads every adapter in `dir`, a subdirectory or a GGUF file, under its name, unless the name is taken. The adapter root
    /// does not apply, because the operator chose `dir`.
    pub async fn load_directory(&self, dir: &Path) -> Result<Vec<(String, Result<AdapterInfo>)>> {
        let mut found = adapters_in(dir)?;
        found.retain(|(name, _)| !self.lock().loaded.contains_key(name));
        let loads = found.into_iter().map(|(name, path)| async move {
            let loaded = self.load_unsaved(&name, &path, SourceScope::Anywhere, LoadOptions::default()).await;
            if let Err(e) = &loaded {
                tracing::warn!("adapter {name:?} in {} was not loaded: {e}", path.display());
            }
            (name, loaded)
        });
        let loaded = stream::iter(loads).buffered(PARALLEL_LOADS).collect().await;
        self.save();
        Ok(loaded)
    }

    /// Loads the adapters of the manifest. Returns and logs a message for each that could not be restored as it was: one
    /// whose content has changed is loaded as a new generation, and one that fails to load stays in the manifest. Call it
    /// after [`Registry::load_directory`]: for an adapter that is loaded already, it only restores the pin.
    pub async fn restore(&self) -> Vec<String> {
        let (entries, mut problems): (Vec<ManifestEntry>, _) = {
            let mut names = self.lock();
            (names.absent.values().cloned().collect(), std::mem::take(&mut names.damaged))
        };
        let restores = entries.into_iter().map(|entry| self.restore_one(entry));
        let failed: Vec<_> = stream::iter(restores).buffered(PARALLEL_LOADS).collect().await;
        problems.extend(failed.into_iter().flatten());
        problems.iter().for_each(|problem| tracing::warn!("{problem}"));
        self.save();
        problems
    }

    /// Loads one entry of the manifest. Returns a message if it could not be restored as it was.
    async fn restore_one(&self, entry: ManifestEntry) -> Option<String> {
        let ManifestEntry { name, source, pinned, generation } = entry;
        let current = self.get(&name).ok().filter(|info| info.generation == generation && info.source == source);
        let restored = match current {
            Some(_) => self.pin_unsaved(&name, pinned),
            None => {
                let options = LoadOptions { pinned, replace: true };
                self.load_unsaved(&name, &source, SourceScope::Roots, options).await
            }
        };
        match restored {
            Ok(info) if info.generation == generation => None,
            Ok(info) => Some(format!(
                "adapter {name:?}: {} has changed since generation {generation} and was loaded as generation {}",
                source.display(),
                info.generation
            )),
            Err(e) => Some(format!("adapter {name:?} was not restored: {e}")),
        }
    }

    /// Takes a lease on the current generation of `name`. Errors: `NotFound` if no adapter has the name.
    pub fn lease(&self, name: &str) -> Result<Lease> {
        // Under the lock: either an unload sees the lease, or the lease fails because of the unload.
        self.lock().find(name).map(|generation| Lease::new(generation.clone()))
    }

    /// Removes the name and retires its generation; requests keep their leases. Errors: `NotFound` if no adapter has the name.
    pub fn unload(&self, name: &str) -> Result<UnloadOutcome> {
        let in_directory = self.0.on_demand.source(name).is_some();
        let mut names = self.lock();
        let unloaded = match (names.loaded.remove(name), names.absent.remove(name)) {
            (Some(generation), _) => {
                generation.retire();
                let host = if self.0.host.contains(generation.key()) { generation.bytes } else { 0 };
                let slot = if generation.tier() == Tier::Slot { generation.slot_bytes } else { 0 };
                let (freed_bytes, pending_bytes) =
                    if generation.leases() > 0 { (0, host + slot) } else { (host, slot) };
                UnloadOutcome { generation: generation.id.clone(), freed_bytes, pending_bytes }
            }
            (None, Some(entry)) => UnloadOutcome { generation: entry.generation, freed_bytes: 0, pending_bytes: 0 },
            (None, None) => return Err(not_found(name)),
        };
        if in_directory {
            names.withdrawn.insert(name.to_owned());
        }
        drop(names);
        self.save();
        Ok(unloaded)
    }

    /// Pins or unpins an adapter. Errors: `NotFound` if no adapter has the name, `Conflict` if the pinned adapters would
    /// not fit into the slots together.
    pub fn set_pinned(&self, name: &str, pinned: bool) -> Result<AdapterInfo> {
        let info = self.pin_unsaved(name, pinned)?;
        self.save();
        Ok(info)
    }

    /// One adapter. Errors: `NotFound` if no adapter has the name.
    pub fn get(&self, name: &str) -> Result<AdapterInfo> {
        self.lock().find(name).map(|generation| AdapterInfo::from(&**generation))
    }

    /// All adapters, sorted by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        self.lock().loaded.values().map(|generation| AdapterInfo::from(&**generation)).collect()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, NameTable> {
        // The maps are consistent after each statement, so a poisoned lock can be used.
        self.0.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin_unsaved(&self, name: &str, pinned: bool) -> Result<AdapterInfo> {
        let mut names = self.lock();
        let generation = names.find(name)?.clone();
        if pinned {
            self.check_pin_budget(&names, name, generation.slot_bytes)?;
        }
        generation.state.set_pinned(pinned);
        names.absent.remove(name);
        Ok(AdapterInfo::from(&*generation))
    }

    /// Loads an adapter without writing the manifest, and counts the load.
    pub(super) async fn load_unsaved(
        &self,
        name: &str,
        source: &Path,
        scope: SourceScope,
        options: LoadOptions,
    ) -> Result<AdapterInfo> {
        self.counted(async {
            let name_lock = self.0.loading.of(name);
            let _guard = name_lock.lock.lock().await;
            self.load_locked(name, source, scope, options).await
        })
        .await
    }

    /// Counts a load, and its time if it succeeds.
    async fn counted<T>(&self, load: impl Future<Output = Result<T>>) -> Result<T> {
        let started = Instant::now();
        let loaded = load.await;
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

    /// Loads an adapter; the caller holds the name's lock. An adapter of [`SourceScope::Anywhere`], which start-up offers
    /// without being asked for it, does not displace a manifest entry of that name.
    async fn load_locked(
        &self,
        name: &str,
        source: &Path,
        scope: SourceScope,
        options: LoadOptions,
    ) -> Result<AdapterInfo> {
        let LoadOptions { pinned, replace } = options;
        self.check_name(name)?;
        if !replace && self.lock().loaded.contains_key(name) {
            let message = format!("adapter {name:?} is already loaded: replace it or unload it first");
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
        let same = |old: &&Arc<Generation>| {
            old.id == generation.id && old.source == generation.source && old.warnings == generation.warnings
        };
        if let Some(old) = names.loaded.get(name).filter(same) {
            old.state.set_pinned(pinned);
            return Ok(AdapterInfo::from(&**old));
        }
        generation.state.set_pinned(pinned);
        let generation = Arc::new(generation);
        self.0.host.put(&generation, Arc::new(weights));
        let info = AdapterInfo::from(&*generation);
        names.insert(generation);
        Ok(info)
    }

    /// Reads and checks an adapter that will be published as `name`.
    async fn read(&self, name: &str, source: &Path, scope: SourceScope) -> Result<(Generation, AdapterWeights)> {
        let (inner, source) = (self.0.clone(), source.to_owned());
        let read = move || {
            let source = inner.roots.resolve(&source, scope)?;
            reader::read(&source, &inner.model).map(|adapter| (base_check::own_template(&source), source, adapter))
        };
        let (template, source, ReadAdapter { weights, id, base }) = tokio::task::spawn_blocking(read)
            .await
            .map_err(|e| Error::internal(format!("reading the adapter failed: {e}")).caused_by(e))?
            .map_err(|e| e.param("source"))?;

        let mut warnings = self.check_use(&weights, &base)?;
        warnings.extend(self.0.config.base.template_warning(template.as_deref()));
        let slot_bytes = slots::slot_bytes(&weights, &self.0.model, &self.0.config.device)?;
        let mut generation = Generation::new(name, id, source, &weights, slot_bytes, self.0.host.clone());
        if generation.slot_bytes > self.0.config.slot_budget {
            return Err(Error::invalid(format!(
                "adapter {name:?} needs {} bytes in a slot, more than the whole slot budget of {} bytes",
                generation.slot_bytes, self.0.config.slot_budget
            ))
            .code("adapter_too_large"));
        }
        warnings.iter().for_each(|warning| tracing::warn!("adapter {name:?}: {warning}"));
        generation.warnings = warnings;
        Ok((generation, weights))
    }

    /// What may make an adapter useless although it can be served. Errors: it surely belongs to another base, and the settings
    /// refuse such adapters.
    fn check_use(&self, weights: &AdapterWeights, base: &BaseClaim) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        if let Some(mismatch) = self.0.config.base.mismatch(base) {
            if self.0.config.strict_base && mismatch.certain {
                let message = format!("{}; --strict-base refuses it", mismatch.message);
                return Err(Error::invalid(message).param("source").code("adapter_of_another_base"));
            }
            warnings.push(mismatch.message);
        }
        if weights.is_zero() {
            warnings.push(
                "all deltas of the adapter are zero (every A or every B): it changes nothing, and probably learnt nothing".into(),
            );
        }
        Ok(warnings)
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._:/@- ".contains(c);
        let message = if name.trim().is_empty()
            || name.trim() != name
            || name.len() > MAX_NAME
            || !name.chars().all(allowed)
            // Clients take these out of a URL.
            || name.split('/').any(|part| part == "." || part == "..")
        {
            format!(
                "invalid adapter name {name:?}: it must have 1 to {MAX_NAME} characters of A-Z a-z 0-9 . _ : / @ -, spaces only \
                 between them, and no part `.` or `..`"
            )
        } else if self.0.config.reserved_names.iter().any(|reserved| reserved == name) {
            format!("{name:?} is the name of the base model")
        } else {
            return Ok(());
        };
        Err(Error::invalid(message).param("name").code("adapter_name_invalid"))
    }

    /// Pinned adapters must fit into the slots together, or they would wait for each other forever.
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

    /// Writes the manifest. A failure is logged and does not affect the adapters being served.
    pub(super) fn save(&self) {
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
