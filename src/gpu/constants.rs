//! Constants that Rust and the kernels share, from `kernels/constants.cuh`.

include!(concat!(env!("OUT_DIR"), "/constants.rs"));
