//! The handle to all fine-tuning jobs. HTTP handlers send requests through it to the `JobManager`'s thread, which carries them out.

use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::context::JobContext;
pub use super::gauges::JobGauge;
use super::gauges::JobGauges;
use super::manager::{JobManager, ManagerMessage};
use super::record::JobRecord;
use super::store::Store;
use crate::{Error, Result};

/// A change of a job's status that a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobAction {
    Cancel,
    Pause,
    Resume,
}

/// A handle to all jobs; clones share it.
#[derive(Clone)]
pub struct Jobs {
    context: Arc<JobContext>,
    manager: Sender<ManagerMessage>,
    gauges: JobGauges,
}

impl Jobs {
    /// Starts the manager's thread, which continues the jobs of the last process. Errors: the thread cannot be started.
    pub fn start(context: JobContext, tokio: Handle) -> Result<Self> {
        let (sender, inbox) = channel();
        let (context, gauges) = (Arc::new(context), JobGauges::default());
        let manager = JobManager::new(context.clone(), tokio, sender.clone(), gauges.clone());
        thread::Builder::new().name("jobs".into()).spawn(move || manager.run(inbox))?;
        Ok(Self { context, manager: sender, gauges })
    }

    /// The server's handles that jobs use.
    pub(crate) fn context(&self) -> &Arc<JobContext> {
        &self.context
    }

    /// Files and jobs on disk.
    pub(crate) fn store(&self) -> &Arc<Store> {
        &self.context.store
    }

    /// Creates a job.
    pub(crate) async fn create(&self, record: JobRecord) -> Result<JobRecord> {
        self.ask(|reply| ManagerMessage::Create(Box::new(record), reply)).await?
    }

    /// Cancels, pauses or resumes a job. Errors: there is no such job, or its status does not allow the action.
    pub(crate) async fn change(&self, id: &str, action: JobAction) -> Result<JobRecord> {
        self.ask(|reply| ManagerMessage::Change(id.to_owned(), action, reply)).await?
    }

    /// Stops all jobs once their states are written. They continue at the next start.
    pub(crate) async fn stop(&self) {
        // Without an answer the manager has ended already.
        let _ = self.ask(ManagerMessage::Stop).await;
    }

    /// The jobs' gauges for the metrics page.
    pub(crate) fn gauges(&self) -> Vec<JobGauge> {
        self.gauges.all()
    }

    async fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> ManagerMessage) -> Result<T> {
        let gone = || Error::internal("the job manager's thread has ended; see the server's log");
        let (reply, answer) = oneshot::channel();
        self.manager.send(message(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}
