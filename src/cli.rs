//! The command line: one subcommand a function.

/// Runs the subcommand that the process arguments name.
pub fn run() -> anyhow::Result<()> {
    anyhow::bail!("no subcommand yet")
}
