//! Name -> generation: load, replace, unload, pin, list.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;

use super::Lease;
use crate::{Error, Result};

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

/// What an unload did.
#[derive(Debug, Clone, Serialize)]
pub struct Unloaded {
    /// The generation that went.
    pub generation: String,
    /// Bytes freed at once.
    pub freed_bytes: usize,
    /// Bytes that the last running request will free.
    pub pending_bytes: usize,
}

/// All adapters of the server; clones share it.
#[derive(Clone)]
pub struct Registry {}

impl Registry {
    /// Reads and checks an adapter directory off the caller's thread and publishes it under `name`, all or nothing.
    /// One load a name at a time; a second waits for the first. With `replace` false an existing name is a conflict.
    pub async fn load(&self, _name: &str, _source: &str, _pinned: bool, _replace: bool) -> Result<AdapterInfo> {
        Err(Error::internal("not written yet"))
    }

    /// Takes the current generation of `name`, or 404.
    pub fn lease(&self, _name: &str) -> Result<Lease> {
        Err(Error::internal("not written yet"))
    }

    /// Takes the name away; running requests keep their lease. 404 for an unknown name.
    pub fn unload(&self, _name: &str) -> Result<Unloaded> {
        Err(Error::internal("not written yet"))
    }

    /// Pins or unpins. 404 for an unknown name.
    pub fn pin(&self, _name: &str, _pinned: bool) -> Result<AdapterInfo> {
        Err(Error::internal("not written yet"))
    }

    /// One adapter, or 404.
    pub fn get(&self, _name: &str) -> Result<AdapterInfo> {
        Err(Error::internal("not written yet"))
    }

    /// All adapters, by name.
    pub fn list(&self) -> Vec<AdapterInfo> {
        Vec::new()
    }
}
