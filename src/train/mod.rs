//! Training: new adapters over the same quantised weights that serve (QLoRA, Dettmers et al., 2023). This is the computation; the
//! life of a job on a server is in `finetune`.
//!
//! In the order in which a job uses them:
//!
//! | file | what it is |
//! |---|---|
//! | [`spec`] | the settings of a job, with defaults |
//! | [`data`] | files and records, their tokens, and the order of examples |
//! | [`job`] | input and output of the trainer: job, commands, reports, checkpoint |
//! | [`trainer`] | the background work of the engine's thread: passes with rows of several jobs |
//! | `training_job` | a running job: its next rows, and its steps, validations and checkpoints |
//! | [`adapter`] | the parameters of a job, their methods (LoRA, DoRA, AdaLoRA), and their export to PEFT |
//! | [`pass`] | forward and backward of all jobs' rows, in bounded pieces |
//! | `block` | a decoder block with what its backward needs, and its backward |
//! | [`optim`] | learning-rate schedule, gradient clipping, AdamW |
//! | `writer` | the thread that writes files and delivers reports |
//! | `state` | the state of a job on disk, from which it resumes |
//! | `sweep` | short runs of several settings, compared |

pub mod adapter;
mod block;
pub mod data;
pub mod job;
pub mod optim;
pub mod pass;
pub mod spec;
pub(crate) mod state;
pub(crate) mod sweep;
#[cfg(test)]
mod testing;
pub mod trainer;
mod training_job;
mod writer;
