//! Runs the command line and prints its error on one line.

use std::process::ExitCode;

fn main() -> ExitCode {
    match quiver::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
