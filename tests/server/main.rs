//! The HTTP server on real sockets, with the real engine on a fake model.

mod admin;
mod answers;
mod batches;
mod drain;
mod embeddings;
mod errors;
mod extras;
mod fields;
mod files;
mod finetune;
mod harness;
mod http;
mod messages;
mod metrics;
mod responses;
mod streaming;
mod structured;
mod tgi;
mod tokenize;
mod tools;
mod trainer;
mod uploads;
