//! Calls the command line, and shows its error as one line.

use std::process::ExitCode;

/// The server frees and takes many activation buffers a step: mimalloc keeps them without going back to the kernel.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match quiver::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
