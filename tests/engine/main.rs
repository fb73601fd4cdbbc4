//! The engine on a fake model: scheduling, blocks, fairness, sampling, and the thread around them.

mod background;
mod fake;
mod properties;
mod sampler;
mod scheduler;
mod thread;
