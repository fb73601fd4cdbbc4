//! `quiver bench serve`: load on any OpenAI-compatible server, and what became of it.
//!
//! In the order of a run: [`traffic`] decides what is sent when, before any of it is sent; [`client`] sends and reads streams;
//! [`target`] knows the server (its process, its models, its form of a request); [`load`] keeps to the schedule and
//! times; [`stats`] sums up; [`report`] and [`plot`] write it down. [`grid`] holds the series of runs that papers
//! use, [`trial`] those that end with a verdict. [`bandwidth`] is what `quiver bench engine` measures steps against.
//!
//! Latency counts from the time at which a request was due, not from when it was sent: a server that stalls is charged for the
//! requests that waited meanwhile (coordinated omission; Tene, 2013).

pub mod bandwidth;
pub mod client;
pub mod grid;
pub mod load;
pub mod report;
pub mod stats;
pub mod target;
pub mod traffic;
pub mod trial;
