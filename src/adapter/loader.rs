//! Loader threads: they take weights from host memory, or read them from disk, and stage them for a slot.
//!
//! Weights in host memory go through a loader thread too, so that there is one path whatever an adapter's size. Staging for
//! the CPU takes 2.4 ms for a rank-8 adapter of a 135M model (8 ms with reading), and seventy times that for a rank-64
//! adapter of an 8B model.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::host_tier::HostTier;
use super::reader::ReadAdapter;
use super::{Generation, reader};
use crate::arch::ModelConfig;
use crate::error::ErrorKind;
use crate::lora::slots::{SlotStager, StagedWeights};
use crate::lora::weights::AdapterWeights;
use crate::{Error, Result};

/// Number of loader threads. Two, so that a slow disk does not delay adapters that are in host memory, and no more, because
/// the threads share the cores with the engine.
const THREADS: usize = 2;

/// Handle to the loader threads, which end when it is dropped.
pub(super) struct Loaders {
    jobs: Sender<Arc<Generation>>,
    done: Receiver<(u64, Result<StagedWeights>)>,
}

/// The work of a loader thread.
#[derive(Clone)]
struct Loader {
    model: Arc<ModelConfig>,
    host: Arc<HostTier>,
    stager: SlotStager,
}

impl Loaders {
    /// Starts the threads. Errors: a thread cannot be started.
    pub(super) fn start(model: Arc<ModelConfig>, host: Arc<HostTier>, stager: SlotStager) -> Result<Self> {
        let (jobs, queue) = channel::<Arc<Generation>>();
        let (results, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let loader = Loader { model, host, stager };
        for i in 0..THREADS {
            let (loader, queue, results) = (loader.clone(), queue.clone(), results.clone());
            let run = move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(generation) = next else { return };
                    let loaded = catch_unwind(AssertUnwindSafe(|| loader.load(&generation)))
                        .unwrap_or_else(|_| Err(Error::internal("the adapter loader panicked")));
                    if results.send((generation.key(), loaded)).is_err() {
                        return;
                    }
                }
            };
            thread::Builder::new().name(format!("adapter-loader-{i}")).spawn(run)?;
        }
        Ok(Self { jobs, done })
    }

    /// Queues a load. Errors: the threads have ended.
    pub(super) fn enqueue(&self, generation: Arc<Generation>) -> Result<()> {
        self.jobs.send(generation).map_err(|_| Error::internal("the adapter loaders have stopped"))
    }

    /// The key and the result of a finished load, if there is one.
    pub(super) fn finished(&self) -> Option<(u64, Result<StagedWeights>)> {
        self.done.try_recv().ok()
    }
}

impl Loader {
    /// Loads the weights of a generation and stages them for a slot.
    fn load(&self, generation: &Generation) -> Result<StagedWeights> {
        let weights = match self.host.get(generation.key()) {
            Some(weights) => weights,
            None => {
                let weights = Arc::new(self.read_again(generation)?);
                self.host.put(generation, weights.clone());
                weights
            }
        };
        self.stager.stage(&weights, &self.model)
    }

    /// Reads a generation from disk. Errors: its directory is gone or has changed.
    fn read_again(&self, generation: &Generation) -> Result<AdapterWeights> {
        let changed = |what: String| {
            let message = format!("adapter {:?} generation {}: {what}", generation.name, generation.id);
            let error = Error::new(ErrorKind::Unavailable, message).code("adapter_source_changed");
            // Clients get the error, and they must not learn the path.
            tracing::warn!(error = %error, path = %generation.source.display(), "an adapter cannot be loaded");
            error
        };
        let ReadAdapter { weights, id, .. } = reader::read(&generation.source, &self.model)
            .map_err(|e| e.hide_path(&generation.source, "its directory"))
            .map_err(|e| changed(format!("it cannot be read again: {e}")))?;
        if id != generation.id {
            return Err(changed(format!(
                "its directory now holds generation {id}; load the adapter again to serve it"
            )));
        }
        self.host.stats.disk_reads.fetch_add(1, Relaxed);
        Ok(weights)
    }
}
