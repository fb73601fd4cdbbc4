//! Slots in a GPU's memory.

mod gains;
mod memory;
pub mod slots;
mod staging;
