//! HTTP: router, limits, shutdown.

pub mod prompt;
