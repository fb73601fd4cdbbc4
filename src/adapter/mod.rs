//! Adapters: reading them, naming them, and keeping them in memory.
//!
//! The life of an adapter:
//!
//! 1. **Read.** `source.rs` checks that the source may be read, and `layout.rs` tells how it is stored; `foreign.rs` names what is
//!    no adapter. `peft.rs`, `mlx.rs` and `gguf.rs` open a layout and translate it into PEFT's terms (`peft_config.rs`,
//!    `tensor_file.rs`). `reader.rs` reads the result. `base_check.rs` compares the base that it names with the served one.
//! 2. **Registered.** `registry.rs` publishes the weights under a name as a [`Generation`] (`generation.rs`), stores them in
//!    host memory, and lists the name in the manifest (`manifest.rs`), from which a restart restores it. The weights of a
//!    training checkpoint are loaded without a name first, and published by `finetune/publish.rs`.
//!    An adapter that was put into the adapters directory later is loaded when a request names it (`on_demand.rs`).
//! 3. **Leased.** `server/select_adapter.rs` chooses the adapters of a request and takes a [`Lease`] (`lease.rs`) on each.
//! 4. **Staged.** When the request is queued or scheduled, the engine asks `tiers.rs` for the generation. Loader threads
//!    (`loader.rs`) take the weights from host memory (`host_tier.rs`), or read them from disk again, and stage them for a slot.
//! 5. **In a slot.** The staged weights move into a slot of the pool (`lora/slots.rs`), whose index the batch carries.
//!    `lora/delta.rs` applies them to the rows of the request.
//! 6. **Evicted.** When an adapter needs a slot and there is no room, `tiers.rs` evicts the least recently used ones;
//!    `host_tier.rs` does the same in host memory. An evicted generation stays registered and is loaded again on demand.
//! 7. **Retired.** Replacing or unloading the name retires the generation: no new leases, and its slot and host memory are
//!    freed when the last lease ends.
//!
//! `dummy.rs` writes random adapters for benchmarks.

mod base_check;
pub mod dummy;
mod foreign;
mod generation;
mod gguf;
mod host_tier;
mod layout;
mod lease;
mod loader;
mod manifest;
mod mlx;
mod names;
mod on_demand;
mod peft;
mod peft_config;
pub mod reader;
pub mod registry;
mod source;
mod tensor_file;
pub mod tiers;

pub use base_check::{BaseClaim, ServedBase};
pub use generation::Generation;
pub use host_tier::HostTier;
pub use lease::Lease;
