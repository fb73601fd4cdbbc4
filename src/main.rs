//! Parses the command line and calls one subcommand.

/// The server frees and takes many activation buffers a step: mimalloc keeps them without going back to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> anyhow::Result<()> {
    Ok(quiver::cli::run()?)
}
