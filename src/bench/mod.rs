//! The benchmarks: `quiver bench engine` measures steps of the engine, `quiver bench serve` loads any OpenAI-compatible server.
//!
//! The modules of the load generator, in the order of a run: [`traffic`] determines all requests before the first is sent;
//! [`client`] sends them and reads streams; [`target`] knows the server (its process, its models, its request format);
//! [`load`] keeps to the schedule and times the replies; [`stats`] summarises them; [`report`] writes JSON, tables and charts.
//! [`series`] runs several loads in a row, [`grid`] holds those that papers use; [`verdict`] judges an overload, [`soak`] checks
//! every reply for a long time. [`secrets`] keeps keys out of all of it. [`engine`] measures steps against the memory [`bandwidth`].
//!
//! Latencies count from the time a request was due, not from the time it was sent: a server that stalls is charged for the
//! requests that waited meanwhile (coordinated omission; Tene, 2013).

mod bandwidth;
pub mod client;
pub(crate) mod engine;
pub(crate) mod grid;
pub mod load;
pub mod report;
pub mod secrets;
pub(crate) mod series;
pub(crate) mod soak;
pub mod stats;
pub mod target;
pub mod traffic;
pub mod verdict;
