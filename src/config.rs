//! Settings of `quiver serve`: each is a flag, an environment variable (`QUIVER_PORT`) and a key of the config file
//! (`port = 8000`), in this order of precedence, and then its default.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Arg, Args, Command, ValueEnum};

use crate::gpu::DeviceChoice;
use crate::model::weights::Quantize;
use crate::{Error, Result};

/// Form of the log lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files.
    Auto,
    /// Made up for the shape in a config.json, to measure speed and memory.
    Dummy,
}

/// An adapter to load at the start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPath {
    /// The name requests use.
    pub name: String,
    /// Its directory.
    pub path: String,
}

/// The base model: settings that training alone has too.
#[derive(Debug, Clone, Args)]
pub struct BaseConfig {
    /// Where the base model is.
    #[arg(
        long,
        env = "QUIVER_MODEL",
        default_value = "smollm2-135m-instruct",
        help = "Base model: the alias smollm2-135m-instruct, a .gguf file, a Hugging Face directory, or \
                hf:org/name[@revision][/file]",
        help_heading = "Model"
    )]
    pub model: String,

    /// Quantise a model in f32, f16 or bf16 while loading; the form of dummy weights [default: nf4 for dummy weights]
    #[arg(long, env = "QUIVER_QUANTIZE", value_name = "FORMAT", help_heading = "Model")]
    pub quantize: Option<Quantize>,

    /// Where weights come from; dummy makes them up, in 4 bits, for --model DIR or config.json
    #[arg(long, env = "QUIVER_LOAD_FORMAT", value_name = "FORMAT", default_value = "auto", help_heading = "Model")]
    pub load_format: LoadFormat,

    /// Where the model runs: auto (a GPU where there is one), cpu, cuda or cuda:N
    #[arg(long, env = "QUIVER_DEVICE", value_name = "DEVICE", default_value = "auto", help_heading = "Model")]
    pub device: DeviceChoice,

    /// On a GPU, make a request's tokens the same bit for bit whatever else runs and however its prompt was cut, at the price of
    /// speed (on the CPU they always are)
    #[arg(long, env = "QUIVER_DETERMINISTIC", help_heading = "Model")]
    pub deterministic: bool,

    /// Where downloaded models are kept [default: ~/.cache/quiver]
    #[arg(long, env = "QUIVER_CACHE_DIR", value_name = "DIR", help_heading = "Model")]
    pub cache_dir: Option<PathBuf>,

    /// Threads of the forward pass [default: all cores]
    #[arg(long, env = "QUIVER_THREADS", value_name = "N", value_parser = positive, help_heading = "Engine")]
    pub threads: Option<usize>,
}

/// All settings. Sizes take a suffix: 512MiB, 2GiB, 1.5GB.
#[derive(Debug, Clone, Args)]
pub struct ServeConfig {
    #[command(flatten)]
    pub base: BaseConfig,

    /// Name of the base in requests and responses, instead of the model's own; give it again for more names
    #[arg(long, env = "QUIVER_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',', help_heading = "Model")]
    pub served_model_name: Vec<String>,

    /// Longest prompt plus output, tokens [default: what the model was made for]
    #[arg(long, env = "QUIVER_MAX_MODEL_LEN", value_name = "TOKENS", value_parser = positive, help_heading = "Model")]
    pub max_model_len: Option<usize>,

    /// Load every adapter directory in this folder under its own name [default: adapters, if it exists]
    #[arg(long, env = "QUIVER_ADAPTERS", value_name = "DIR", help_heading = "Adapters")]
    pub adapters: Option<PathBuf>,

    /// Load one adapter; may be given again
    #[arg(
        long,
        env = "QUIVER_ADAPTER",
        value_name = "NAME=PATH",
        value_parser = named_path,
        value_delimiter = ',',
        help_heading = "Adapters"
    )]
    pub adapter: Vec<NamedPath>,

    /// Adapters may only be loaded from inside this directory
    #[arg(long, env = "QUIVER_ADAPTER_ROOT", value_name = "DIR", help_heading = "Adapters")]
    pub adapter_root: Option<PathBuf>,

    /// Memory for adapters in slots, ready for the next step
    #[arg(
        long,
        env = "QUIVER_ADAPTER_MEMORY",
        value_name = "SIZE",
        default_value = "1GiB",
        value_parser = bytes,
        help_heading = "Adapters"
    )]
    pub adapter_memory: usize,

    /// Memory for adapters that were put out of their slots; beyond it they are read from disk again
    #[arg(
        long,
        env = "QUIVER_HOST_ADAPTER_MEMORY",
        value_name = "SIZE",
        default_value = "2GiB",
        value_parser = bytes,
        help_heading = "Adapters"
    )]
    pub host_adapter_memory: usize,

    /// Remember loaded adapters, files and fine-tuning jobs here, for the next start [default: nothing is remembered]
    #[arg(long, env = "QUIVER_STATE_DIR", value_name = "DIR", help_heading = "Adapters")]
    pub state_dir: Option<PathBuf>,

    /// Fine-tuning jobs that run at once; others wait
    #[arg(
        long,
        env = "QUIVER_MAX_TRAINING_JOBS",
        value_name = "N",
        default_value = "2",
        value_parser = positive,
        help_heading = "Training"
    )]
    pub max_training_jobs: usize,

    /// Largest part of the time that training gets while requests run, 0 to 1; idle time is all its own
    #[arg(
        long,
        env = "QUIVER_TRAIN_SHARE",
        value_name = "SHARE",
        default_value = "0.3",
        value_parser = share,
        help_heading = "Training"
    )]
    pub train_share: f64,

    /// Longest pause that training may put between two tokens of an answer, seconds; work that is likely to take longer waits
    /// until nobody waits for a token [default: 0.25, on a GPU 0.05]
    #[arg(long, env = "QUIVER_TRAIN_MAX_DELAY", value_name = "SECONDS", value_parser = seconds, help_heading = "Training")]
    pub train_max_delay: Option<Duration>,

    /// Memory of a GPU left for fine-tuning jobs [default: a quarter of what the model leaves, at most 16GiB]
    #[arg(long, env = "QUIVER_TRAIN_MEMORY", value_name = "SIZE", value_parser = bytes, help_heading = "Training")]
    pub train_memory: Option<usize>,

    /// Longest file to train on
    #[arg(
        long,
        env = "QUIVER_MAX_FILE",
        value_name = "SIZE",
        default_value = "512MiB",
        value_parser = bytes,
        help_heading = "Training"
    )]
    pub max_file: usize,

    /// Address to listen on
    #[arg(long, env = "QUIVER_HOST", default_value = "127.0.0.1", help_heading = "HTTP")]
    pub host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, env = "QUIVER_PORT", default_value_t = 8000, help_heading = "HTTP")]
    pub port: u16,

    /// Key that inference needs; may be given again. Without one, it is open
    #[arg(
        long,
        env = "QUIVER_API_KEY",
        value_name = "KEY",
        hide_env_values = true,
        value_parser = key,
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    pub api_key: Vec<String>,

    /// Key that the admin routes need. Without one, they answer only to clients on this machine
    #[arg(
        long,
        env = "QUIVER_ADMIN_KEY",
        value_name = "KEY",
        hide_env_values = true,
        value_parser = key,
        help_heading = "HTTP"
    )]
    pub admin_key: Option<String>,

    /// Longest request body
    #[arg(
        long,
        env = "QUIVER_MAX_BODY",
        value_name = "SIZE",
        default_value = "8MiB",
        value_parser = bytes,
        help_heading = "HTTP"
    )]
    pub max_body: usize,

    /// How long running requests may go on after SIGTERM or ctrl-C, seconds
    #[arg(
        long,
        env = "QUIVER_DRAIN_TIMEOUT",
        value_name = "SECONDS",
        default_value = "30",
        value_parser = seconds,
        help_heading = "HTTP"
    )]
    pub drain_timeout: Duration,

    /// Memory for keys and values of running and cached sequences [default: enough for 8 of full length, at most 1/4 of RAM;
    /// on a GPU, what is left of its memory]
    #[arg(long, env = "QUIVER_KV_MEMORY", value_name = "SIZE", value_parser = bytes, help_heading = "Engine")]
    pub kv_memory: Option<usize>,

    /// Rows of one forward pass: running sequences first, the rest is prompt [default: 512, on a GPU 4096]
    #[arg(long, env = "QUIVER_MAX_BATCH_TOKENS", value_name = "TOKENS", value_parser = positive, help_heading = "Engine")]
    pub max_batch_tokens: Option<usize>,

    /// Sequences that run at once
    #[arg(
        long,
        env = "QUIVER_MAX_RUNNING",
        value_name = "N",
        default_value = "64",
        value_parser = positive,
        help_heading = "Engine"
    )]
    pub max_running: usize,

    /// Sequences that wait; more are refused with 429
    #[arg(
        long,
        env = "QUIVER_MAX_WAITING",
        value_name = "N",
        default_value = "1024",
        value_parser = positive,
        help_heading = "Engine"
    )]
    pub max_waiting: usize,

    /// Do not keep keys and values of finished prompts for the next request that begins alike
    #[arg(
        long,
        env = "QUIVER_NO_PREFIX_CACHE",
        value_parser = clap::builder::FalseyValueParser::new(),
        action = clap::ArgAction::SetTrue,
        help_heading = "Engine"
    )]
    pub no_prefix_cache: bool,

    /// What to log: error, warn, info, debug, trace, or a filter such as info,quiver::engine=debug
    #[arg(long, env = "QUIVER_LOG_LEVEL", value_name = "FILTER", default_value = "info", help_heading = "Logs")]
    pub log_level: String,

    /// How to log
    #[arg(long, env = "QUIVER_LOG_FORMAT", value_name = "FORMAT", default_value = "text", help_heading = "Logs")]
    pub log_format: LogFormat,

    /// TOML file with any of these settings under the same names, such as port = 8000
    #[arg(long, env = "QUIVER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// Makes the values of a config file the defaults of a command's arguments, so that flags and environment go before
/// them and clap checks them as it checks flags. Errors: unreadable file, malformed TOML, a key that is no setting.
pub fn with_file(command: Command, file: &Path) -> Result<Command> {
    let fail = |what: String| Error::invalid(format!("config file {}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|e| fail(e.to_string()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| fail(e.to_string()))?;
    table.into_iter().try_fold(command, |command, (key, value)| {
        let is_setting = |arg: &&Arg| arg.get_long() == Some(key.as_str()) && key != "config" && key != "help";
        let Some(id) = command.get_arguments().find(is_setting).map(|arg| arg.get_id().clone()) else {
            return Err(fail(format!("`{key}` is no setting; `quiver serve --help` lists them (without the dashes)")));
        };
        let values = match value {
            toml::Value::Array(list) => list.into_iter().map(plain).collect::<Option<Vec<_>>>(),
            one => plain(one).map(|one| vec![one]),
        };
        let values = values
            .ok_or_else(|| fail(format!("`{key}` must be a string, a number, true or false, or an array of these")))?;
        Ok(command.mut_arg(id, |arg| arg.default_values(values)))
    })
}

fn plain(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(s) => Some(s),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => Some(value.to_string()),
        _ => None,
    }
}

/// A size such as `512MiB`.
fn bytes(text: &str) -> Result<usize, String> {
    let size: ByteSize =
        text.parse().map_err(|_| format!("{text:?} is no size: write 512MiB, 2GiB or a number of bytes"))?;
    usize::try_from(size.as_u64()).map_err(|e| e.to_string())
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be an integer of at least 1".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|n| (0.0..=1.0).contains(n)).ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// A number of seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

fn key(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err("a key has visible ASCII characters only, and at least one".to_owned()) }
}

fn named_path(text: &str) -> Result<NamedPath, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok(NamedPath { name: name.to_owned(), path: path.to_owned() })
        }
        _ => Err("must be NAME=PATH".to_owned()),
    }
}
