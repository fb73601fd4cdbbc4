//! From an adapter on disk to a model that answers, once trainer and server agree on what it says.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::mpsc::unbounded_channel;

use crate::adapter::Lease;
use crate::engine::request::{Event, Request, SamplingParams};
use crate::error::ErrorKind;
use crate::runtime::Runtime;
use crate::train::job::{Checkpoint, Probe};
use crate::{Error, Result};

/// Nats a token by which the server's log-probabilities of the probe may be off the trainer's, on average. Other order of sums
/// and bf16 make less; a wrong scale, a wrong row or a wrong base make more.
const MAX_DIFFERENCE: f64 = 0.05;

/// How long a probe goes on asking an engine whose queue is full.
const PATIENCE: Duration = Duration::from_secs(60);

/// Brings adapters of jobs into service. Its calls block.
pub struct Publisher {
    pub runtime: Arc<Runtime>,
    /// Runs the registry's async calls.
    pub tokio: Handle,
}

impl Publisher {
    /// Compares the server's log-probabilities under the checkpoint with the trainer's, and gives it the name. The mean
    /// difference, nats a token. Errors: it cannot be loaded, or they differ.
    pub fn checkpoint(&self, name: &str, checkpoint: &Checkpoint) -> Result<f64> {
        let staged = self.tokio.block_on(self.runtime.registry.load_unpublished(name, path(&checkpoint.dir)?))?;
        let served = self.score(staged.lease(), &checkpoint.probe)?;
        let trained = &checkpoint.probe.logprobs;
        let off = trained.iter().zip(&served).map(|(a, b)| f64::from((a - b).abs()));
        let (sum, most) = off.fold((0.0_f64, 0.0_f64), |(sum, most), off| (sum + off, most.max(off)));
        let mean = sum / served.len().max(1) as f64;
        // Not `>`: NaN is no agreement.
        if served.len() == trained.len() && mean <= MAX_DIFFERENCE {
            self.runtime.registry.publish(staged);
            return Ok(mean);
        }
        let message = format!(
            "the server does not say what the trainer says: after step {} their log-probabilities of the same {} tokens differ by \
             {mean:.4} nats on average ({most:.4} at most), and {MAX_DIFFERENCE} are allowed",
            checkpoint.step,
            checkpoint.probe.tokens.len()
        );
        Err(Error::new(ErrorKind::Conflict, message).code("train_serve_mismatch"))
    }

    /// Gives what has been compared before a name, or another name.
    pub fn again(&self, name: &str, dir: &Path) -> Result<()> {
        let staged = self.tokio.block_on(self.runtime.registry.load_unpublished(name, path(dir)?))?;
        self.runtime.registry.publish(staged);
        Ok(())
    }

    /// The server's log-probabilities of the probe's tokens after the first.
    fn score(&self, lease: Lease, probe: &Probe) -> Result<Vec<f32>> {
        let began = Instant::now();
        loop {
            let (events, mut replies) = unbounded_channel();
            let params = SamplingParams { max_tokens: 0, prompt_logprobs: Some(0), ..SamplingParams::default() };
            let submitted = self.runtime.engine.submit(Request {
                id: "probe".into(),
                prompt: probe.tokens.clone(),
                params,
                adapters: vec![(lease.clone(), 1.0)],
                arrived: Instant::now(),
                events,
            });
            match submitted {
                Err(e) if e.kind == ErrorKind::Overloaded && began.elapsed() < PATIENCE => {
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
            return Err(Error::internal("the engine ended without an answer to a probe"));
        }
    }
}

fn path(dir: &Path) -> Result<&str> {
    dir.to_str().ok_or_else(|| Error::invalid(format!("{} is not UTF-8", dir.display())))
}
