//! The command line, one file per subcommand. It parses arguments and prints; the other modules do the work.

mod adapter;
mod bench;
mod bench_serve;
mod doctor;
mod eval;
mod merge;
mod serve;
mod sweep;
mod train;
mod train_settings;

use std::ffi::OsString;
use std::future::Future;
use std::io::IsTerminal;
use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::config::{self, LogFormat, ServeConfig};
use crate::{Error, Result, hub};

/// One 4-bit base model, many LoRA adapters: an OpenAI-compatible server.
#[derive(Debug, Parser)]
#[command(
    version,
    arg_required_else_help = true,
    after_help = "`quiver serve` without arguments downloads a small default model and serves it on http://127.0.0.1:8000."
)]
struct Cli {
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Debug, Subcommand)]
enum Subcommands {
    /// Serve a model and its adapters over HTTP
    #[command(
        long_about = "Serve a model and its adapters over HTTP.\n\nEvery setting is a flag, an environment variable \
                      (shown in brackets) and a key of the TOML file given by --config, in this order of precedence."
    )]
    Serve(Box<ServeConfig>),
    /// Train an adapter on a file of examples
    #[command(
        long_about = "Train an adapter on a file of examples, without a server.\n\nThe settings and their defaults are those of \
                      the fine-tuning API."
    )]
    Train(Box<train::TrainArgs>),
    /// Find the best learning rate, rank and target modules in short runs that are trained together
    Sweep(Box<sweep::SweepArgs>),
    /// Download a model ahead of time
    Pull(PullArgs),
    /// Manage the adapters of a running server
    Adapter(adapter::AdapterArgs),
    /// Run benchmarks
    Bench(bench::BenchArgs),
    /// Measure the quality of the base and its adapters on a file
    Eval(Box<eval::EvalArgs>),
    /// Merge an adapter into the base, and measure the loss of quality
    #[command(
        long_about = "Merge an adapter into the base, and measure the loss of quality.\n\nFor programs that cannot serve an \
                      unmerged adapter. Merging into 16 bits loses almost nothing, merging into 4 bits most of what the \
                      adapter learned."
    )]
    Merge(Box<merge::MergeArgs>),
    /// Describe this machine and the models that fit
    Doctor,
}

/// Arguments of `quiver pull`.
#[derive(Debug, clap::Args)]
struct PullArgs {
    /// The alias smollm2-135m-instruct, or hf:org/name[@revision][/file]
    #[arg(default_value = "smollm2-135m-instruct")]
    model: String,
    /// Directory of downloaded models [default: ~/.cache/quiver]
    #[arg(long, env = "QUIVER_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

/// Runs the subcommand that the process arguments name.
pub fn run() -> Result<()> {
    match parse(std::env::args_os().collect())?.command {
        Subcommands::Serve(config) => serve::run(*config),
        Subcommands::Train(args) => args.run(),
        Subcommands::Sweep(args) => args.run(),
        Subcommands::Pull(pull) => pull.run(),
        Subcommands::Adapter(args) => args.run(),
        Subcommands::Bench(args) => args.run(),
        Subcommands::Eval(args) => args.run(),
        Subcommands::Merge(args) => args.run(),
        Subcommands::Doctor => doctor::run(),
    }
}

/// Parses the arguments. On invalid ones, `--help` and `--version`, clap ends the process. With `serve --config FILE`, the
/// arguments are parsed again with the file's values as defaults.
fn parse(args: Vec<OsString>) -> Result<Cli> {
    let mut command = Cli::command();
    let mut matches = command.clone().get_matches_from(&args);
    let file = matches.subcommand_matches("serve").and_then(|serve| serve.get_one::<PathBuf>("config").cloned());
    if let Some(file) = file {
        let mut wrong = None;
        command = command.mut_subcommand("serve", |serve| {
            config::with_file(serve.clone(), &file).unwrap_or_else(|e| {
                wrong = Some(e);
                serve
            })
        });
        if let Some(error) = wrong {
            return Err(error);
        }
        // The arguments were valid without the file, so the error is in the file.
        matches = command.try_get_matches_from(&args).map_err(|e| {
            Error::invalid(format!("config file {}: {}", file.display(), e.to_string().trim_start_matches("error: ")))
        })?;
    }
    Ok(Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit()))
}

impl PullArgs {
    fn run(self) -> Result<()> {
        let files = hub::resolve(&self.model, &self.cache_dir.unwrap_or_else(hub::default_cache), true)?;
        println!("{}", files.path().display());
        Ok(())
    }
}

/// Starts logging to stderr as the settings say. Errors: an invalid filter.
fn start_logs(config: &ServeConfig) -> Result<()> {
    let filter = EnvFilter::try_new(&config.log_level)
        .map_err(|e| Error::invalid(format!("--log-level {:?}: {e}", config.log_level)))?;
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

/// Runs a future on a multi-threaded runtime of its own.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;
    use crate::config::{LoadFormat, NamedPath};
    use crate::model::weights::Quantize;

    fn serve(args: &[&str], file: &str) -> Result<ServeConfig> {
        let mut toml = tempfile::NamedTempFile::new().expect("a temporary file");
        toml.write_all(file.as_bytes()).expect("it can be written");
        let path = toml.path().to_str().expect("an ASCII path");
        let args = ["quiver", "serve", "--config", path].iter().chain(args).map(OsString::from).collect();
        match parse(args)?.command {
            Subcommands::Serve(config) => Ok(*config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_go_before_the_file_and_the_file_before_defaults() {
        let file = "port = 9000\nmax-running = 7\nadapter = ['a=x', 'b=y']\nno-prefix-cache = true\nkv-memory = '1GiB'\n\
                    log-format = 'json'\ndrain-timeout = 1.5\nload-format = 'dummy'\nquantize = 'q4_0'";
        let config = serve(&["--port", "9001"], file).expect("all is right");
        assert_eq!(config.port, 9001);
        assert_eq!(config.max_running, 7);
        assert_eq!(config.max_batch_tokens, None);
        assert_eq!(config.kv_memory, Some(1 << 30));
        assert!(config.no_prefix_cache);
        assert_eq!(config.log_format, LogFormat::Json);
        assert_eq!((config.base.load_format, config.base.quantize), (LoadFormat::Dummy, Some(Quantize::Q4_0)));
        assert_eq!(config.drain_timeout, Duration::from_millis(1500));
        let named = |name: &str, path: &str| NamedPath { name: name.into(), path: path.into() };
        assert_eq!(config.adapter, [named("a", "x"), named("b", "y")]);
    }

    #[test]
    fn origins_of_web_pages() {
        let args = ["--cors-origin", "http://LocalHost:3000,http://[::1]:80", "--cors-origin", "https://app.example"];
        let config = serve(&args, "").expect("all is right");
        assert_eq!(config.cors_origin, ["http://localhost:3000", "http://[::1]:80", "https://app.example"]);
        assert_eq!(serve(&[], "cors-origin = '*'").expect("all is right").cors_origin, ["*"]);
        for wrong in
            ["app.example", "https://app.example/", "https://app.example/chat", "https://", "https://*.example"]
        {
            let error = serve(&[], &format!("cors-origin = '{wrong}'")).expect_err(wrong).to_string();
            assert!(error.contains("must be * or an origin"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_wrong_file_is_named_with_what_is_wrong() {
        for (file, what) in [
            ("prot = 1", "unknown setting `prot`"),
            ("config = 'x'", "unknown setting `config`"),
            ("port = [[1]]", "`port` must be"),
            ("port = 70000", "70000"),
            ("quantize = 'nf5'", "nf5"),
            ("port = ", "TOML parse error"),
            ("kv-memory = 'much'", "invalid size \"much\""),
        ] {
            let error = serve(&[], file).expect_err(file).to_string();
            assert!(error.starts_with("config file ") && error.contains(what), "{file}: {error}");
        }
    }
}
