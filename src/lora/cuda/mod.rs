//! Slots in a GPU's memory.

mod gains;
pub mod slots;
