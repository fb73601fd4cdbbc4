//! The life of a fine-tuning job. Its computation is in [`train`](crate::train).
//!
//! In the order in which a job uses them:
//!
//! | file | what it is |
//! |---|---|
//! | `settings` | the settings of a request, as a [`JobSpec`](crate::train::spec::JobSpec) |
//! | [`jobs`] | the handle to all jobs: create, pause, resume, cancel |
//! | `record` | the record of a job, and the objects of OpenAI's API |
//! | [`store`] | files, uploads, batches, jobs and their events on disk |
//! | `stored_files` | files in the store: their contents and their end |
//! | `manager` | the thread that changes the states of jobs, and their queue |
//! | `prepare` | a job's files, parsed, with its final settings |
//! | [`context`] | what jobs need of the server, and the `Job` for the trainer |
//! | `reports` | how the manager handles the trainer's reports |
//! | `gauges` | metrics of jobs for the metrics page |
//! | `publish` | publishing a checkpoint once trainer and server agree on its probe |
//! | `tensorboard`, `history`, `results` | the metrics files of a job |
//! | `local` | a job without a server, for `quiver train` |
//! | `sweep` | the files of a sweep, for `quiver sweep` |
//!
//! `quiver train` and `quiver sweep` use the settings, the preparation and the metrics files, without a server or store.

pub mod context;
mod gauges;
pub(crate) mod history;
pub mod jobs;
pub(crate) mod local;
mod manager;
pub(crate) mod prepare;
mod publish;
pub(crate) mod record;
mod reports;
pub(crate) mod results;
pub(crate) mod settings;
pub mod store;
mod stored_files;
pub(crate) mod sweep;
pub(crate) mod tensorboard;
