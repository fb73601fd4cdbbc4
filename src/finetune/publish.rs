//! Publishing: a checkpoint on disk becomes a model that requests can name, once trainer and server agree on its probe.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;

use crate::adapter::Lease;
use crate::adapter::registry::UnpublishedAdapter;
use crate::engine::request::{Event, Request, SamplingParams};
use crate::error::ErrorKind;
use crate::runtime::Runtime;
use crate::train::job::{Checkpoint, Probe};
use crate::{Error, Result};

/// Largest mean difference, in nats a token, between the log-probabilities of trainer and server. Another order of sums and
/// bf16 cause smaller differences; a wrong scale, row or base causes larger ones.
const MAX_DIFFERENCE: f64 = 0.05;

/// How long a probe is submitted again while the engine's queue is full.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(60);

/// Publishes adapters of jobs. Its calls block.
pub(super) struct Publisher {
    pub(super) runtime: Arc<Runtime>,
    /// Runs the registry's async calls.
    pub(super) tokio: Handle,
}

impl Publisher {
    /// Compares the server's log-probabilities under a checkpoint with the trainer's, and publishes it as `name`. Returns the
    /// mean difference in nats a token. Errors: the checkpoint cannot be loaded, or the log-probabilities differ.
    pub(super) fn publish_checkpoint(&self, name: &str, checkpoint: &Checkpoint) -> Result<f64> {
        let staged = self.load(name, &checkpoint.dir)?;
        let served = self.score(staged.lease(), &checkpoint.probe)?;
        let trained = &checkpoint.probe.logprobs;
        let differences = trained.iter().zip(&served).map(|(a, b)| f64::from((a - b).abs()));
        let (sum, most) = differences.fold((0.0_f64, 0.0_f64), |(sum, most), d| (sum + d, most.max(d)));
        let mean = sum / served.len().max(1) as f64;
        // Written such that NaN is an error.
        if served.len() == trained.len() && mean <= MAX_DIFFERENCE {
            self.tokio.block_on(self.runtime.registry.publish(staged));
            return Ok(mean);
        }
        let message = format!(
            "trainer and server log-probabilities differ: by {mean:.4} nats a token on average and {most:.4} at most, over {} \
             tokens after step {}; the limit is {MAX_DIFFERENCE} on average",
            checkpoint.probe.tokens.len(),
            checkpoint.step
        );
        Err(Error::new(ErrorKind::Conflict, message).code("train_serve_mismatch"))
    }

    /// Publishes a checkpoint that has been compared before as `name`. Errors: it cannot be loaded.
    pub(super) fn publish(&self, name: &str, dir: &Path) -> Result<()> {
        let staged = self.load(name, dir)?;
        self.tokio.block_on(self.runtime.registry.publish(staged));
        Ok(())
    }

    fn load(&self, name: &str, dir: &Path) -> Result<UnpublishedAdapter> {
        let source = dir.to_str().ok_or_else(|| Error::internal("the path of the jobs is not UTF-8").path(dir))?;
        let loaded = self.tokio.block_on(self.runtime.registry.load_unpublished(name, source));
        // The client of the job gets the error.
        loaded.map_err(|e| e.hide_path(dir, "the checkpoint"))
    }

    /// The server's log-probabilities of the probe's tokens after the first.
    fn score(&self, lease: Lease, probe: &Probe) -> Result<Vec<f32>> {
        let began = Instant::now();
        loop {
            let (events, mut replies) = unbounded_channel();
            let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..SamplingParams::default() };
            let submitted = self.runtime.engine.submit(Request {
                adapters: vec![(lease.clone(), 1.0)],
                ..Request::new("probe", probe.tokens.clone(), params, events)
            });
            match submitted {
                Err(e) if e.kind == ErrorKind::Overloaded && began.elapsed() < QUEUE_TIMEOUT => {
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
                submitted => submitted?,
            }
            while let Some(event) = replies.blocking_recv() {
                match event {
                    Event::Prompt(scores) => return Ok(scores.into_iter().flatten().map(|s| s.logprob).collect()),
                    Event::Failed(error) => return Err(error),
                    _ => {}
                }
            }
            return Err(Error::internal("the engine has ended without an answer to a probe"));
        }
    }
}
