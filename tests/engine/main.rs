//! The engine with a fake runner: scheduling, blocks, fairness, sampling, and the engine thread.

mod background;
mod constraint;
mod fake;
mod pooling;
mod properties;
mod sampler;
mod scheduler;
mod thread;
