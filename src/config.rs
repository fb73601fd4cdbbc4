//! Settings of `quiver serve`. Each is a flag, an environment variable (`QUIVER_PORT`) and a key of the config file
//! (`port = 8000`), in this order of precedence.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Arg, Args, Command, ValueEnum};

use crate::gpu::DeviceChoice;
use crate::model::weights::Quantize;
use crate::{Error, Result};

/// Format of the log lines on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Readable text.
    Text,
    /// One JSON object per line.
    Json,
}

/// Source of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files.
    Auto,
    /// Random weights for the shape in a config.json, to measure speed and memory.
    Dummy,
}

/// Source of the sampling parameters that a request does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GenerationConfig {
    /// The model's generation_config.json.
    Auto,
    /// OpenAI's defaults.
    None,
}

/// An adapter to load at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPath {
    /// Name in requests.
    pub name: String,
    /// Adapter directory.
    pub path: String,
}

/// Settings of the base model, which `train` and `sweep` have too.
#[derive(Debug, Clone, Args)]
pub struct BaseConfig {
    /// The base model.
    #[arg(
        long,
        env = "QUIVER_MODEL",
        default_value = "smollm2-135m-instruct",
        help = "Base model: the alias smollm2-135m-instruct, a .gguf file, a Hugging Face directory, or \
                hf:org/name[@revision][/file]",
        help_heading = "Model"
    )]
    pub model: String,

    /// Quantise a model in f32, f16 or bf16 while loading; also the format of dummy weights [default: nf4 for dummy weights]
    #[arg(long, env = "QUIVER_QUANTIZE", value_name = "FORMAT", help_heading = "Model")]
    pub quantize: Option<Quantize>,

    /// Source of the weights; dummy generates random 4-bit weights for the shape of --model, a directory or config.json
    #[arg(long, env = "QUIVER_LOAD_FORMAT", value_name = "FORMAT", default_value = "auto", help_heading = "Model")]
    pub load_format: LoadFormat,

    /// Device: auto (a GPU if there is one), cpu, cuda or cuda:N
    #[arg(long, env = "QUIVER_DEVICE", value_name = "DEVICE", default_value = "auto", help_heading = "Model")]
    pub device: DeviceChoice,

    /// On a GPU, compute the same bits for a request independent of other requests and of how its prompt is split into chunks;
    /// slower (the CPU always does)
    #[arg(long, env = "QUIVER_DETERMINISTIC", help_heading = "Model")]
    pub deterministic: bool,

    /// Directory of downloaded models [default: ~/.cache/quiver]
    #[arg(long, env = "QUIVER_CACHE_DIR", value_name = "DIR", help_heading = "Model")]
    pub cache_dir: Option<PathBuf>,

    /// Number of threads of the forward pass [default: all cores]
    #[arg(long, env = "QUIVER_THREADS", value_name = "N", value_parser = positive, help_heading = "Engine")]
    pub threads: Option<usize>,
}

/// Settings of `quiver serve`. Sizes take a suffix: 512MiB, 2GiB, 1.5GB.
#[derive(Debug, Clone, Args)]
pub struct ServeConfig {
    #[command(flatten)]
    pub base: BaseConfig,

    /// Name of the base in requests and responses, in place of the model's own; repeat it for more names
    #[arg(long, env = "QUIVER_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',', help_heading = "Model")]
    pub served_model_name: Vec<String>,

    /// Longest sequence, prompt and output, in tokens [default: the model's limit]
    #[arg(long, env = "QUIVER_MAX_MODEL_LEN", value_name = "TOKENS", value_parser = positive, help_heading = "Model")]
    pub max_model_len: Option<usize>,

    /// Load every adapter in this directory under the name of its subdirectory, and those put there later when a request names
    /// them [default: adapters, if it exists]
    #[arg(long, env = "QUIVER_ADAPTERS", value_name = "DIR", help_heading = "Adapters")]
    pub adapters: Option<PathBuf>,

    /// Load an adapter; may be repeated
    #[arg(
        long,
        env = "QUIVER_ADAPTER",
        value_name = "NAME=PATH",
        value_parser = named_path,
        value_delimiter = ',',
        help_heading = "Adapters"
    )]
    pub adapter: Vec<NamedPath>,

    /// Allow adapters to be loaded only from below this directory
    #[arg(long, env = "QUIVER_ADAPTER_ROOT", value_name = "DIR", help_heading = "Adapters")]
    pub adapter_root: Option<PathBuf>,

    /// Where the temperature, top_p, top_k, min_p and repetition_penalty of requests that give none come from: the model's
    /// generation_config.json (auto), or OpenAI's defaults (none)
    #[arg(long, env = "QUIVER_GENERATION_CONFIG", value_enum, default_value = "auto", help_heading = "Server")]
    pub generation_config: GenerationConfig,

    /// Refuse an adapter that was trained on another base; without this, it is loaded with a warning
    #[arg(
        long,
        env = "QUIVER_STRICT_BASE",
        value_parser = clap::builder::FalseyValueParser::new(),
        action = clap::ArgAction::SetTrue,
        help_heading = "Adapters"
    )]
    pub strict_base: bool,

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

    /// Host memory for adapters that were evicted from their slots; those evicted from it too are read from disk again
    #[arg(
        long,
        env = "QUIVER_HOST_ADAPTER_MEMORY",
        value_name = "SIZE",
        default_value = "2GiB",
        value_parser = bytes,
        help_heading = "Adapters"
    )]
    pub host_adapter_memory: usize,

    /// Keep loaded adapters, files and fine-tuning jobs in this directory for the next start [default: nothing is kept]
    #[arg(long, env = "QUIVER_STATE_DIR", value_name = "DIR", help_heading = "Adapters")]
    pub state_dir: Option<PathBuf>,

    /// Fine-tuning jobs that run at once; further jobs wait
    #[arg(
        long,
        env = "QUIVER_MAX_TRAINING_JOBS",
        value_name = "N",
        default_value = "2",
        value_parser = positive,
        help_heading = "Training"
    )]
    pub max_training_jobs: usize,

    /// Largest share of the time for training while requests run, 0 to 1; training also gets all idle time
    #[arg(
        long,
        env = "QUIVER_TRAIN_SHARE",
        value_name = "SHARE",
        default_value = "0.3",
        value_parser = share,
        help_heading = "Training"
    )]
    pub train_share: f64,

    /// Target for the longest training-induced gap between two tokens, seconds (predicted, not guaranteed) [default: 0.25; 0.05
    /// on a GPU]
    #[arg(long, env = "QUIVER_TRAIN_MAX_DELAY", value_name = "SECONDS", value_parser = seconds, help_heading = "Training")]
    pub train_max_delay: Option<Duration>,

    /// GPU memory reserved for fine-tuning jobs [default: a quarter of what the model leaves free, at most 16GiB]
    #[arg(long, env = "QUIVER_TRAIN_MEMORY", value_name = "SIZE", value_parser = bytes, help_heading = "Training")]
    pub train_memory: Option<usize>,

    /// Largest file that a client may upload
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

    /// Port to listen on; 0 chooses a free port
    #[arg(long, env = "QUIVER_PORT", default_value_t = 8000, help_heading = "HTTP")]
    pub port: u16,

    /// API key for inference, models, files, fine-tuning, tokenization and /lora-adapters; may be repeated. Without one, these
    /// routes are open to all
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

    /// Key for the admin routes: /admin/adapters, /v1/load_lora_adapter and /v1/unload_lora_adapter. Without one, they accept only
    /// clients on this machine
    #[arg(
        long,
        env = "QUIVER_ADMIN_KEY",
        value_name = "KEY",
        hide_env_values = true,
        value_parser = key,
        help_heading = "HTTP"
    )]
    pub admin_key: Option<String>,

    /// Let web pages of this origin (https://app.example, or * for all) use the server from a browser; may be repeated. The admin
    /// routes stay closed to them [default: none]
    #[arg(
        long,
        env = "QUIVER_CORS_ORIGIN",
        value_name = "ORIGIN",
        value_parser = cors_origin,
        value_delimiter = ',',
        help_heading = "HTTP"
    )]
    pub cors_origin: Vec<String>,

    /// Largest request body
    #[arg(
        long,
        env = "QUIVER_MAX_BODY",
        value_name = "SIZE",
        default_value = "8MiB",
        value_parser = bytes,
        help_heading = "HTTP"
    )]
    pub max_body: usize,

    /// Time for running requests to finish after SIGTERM or ctrl-C, seconds
    #[arg(
        long,
        env = "QUIVER_DRAIN_TIMEOUT",
        value_name = "SECONDS",
        default_value = "30",
        value_parser = seconds,
        help_heading = "HTTP"
    )]
    pub drain_timeout: Duration,

    /// Memory for the KV cache [default: enough for 8 sequences of full length, at most 1/4 of RAM; on a GPU, the memory that
    /// is left]
    #[arg(long, env = "QUIVER_KV_MEMORY", value_name = "SIZE", value_parser = bytes, help_heading = "Engine")]
    pub kv_memory: Option<usize>,

    /// Rows of one forward pass: decode rows first, then prompt chunks [default: 512; 4096 on a GPU]
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

    /// Sequences that wait; further ones are refused with 429
    #[arg(
        long,
        env = "QUIVER_MAX_WAITING",
        value_name = "N",
        default_value = "1024",
        value_parser = positive,
        help_heading = "Engine"
    )]
    pub max_waiting: usize,

    /// Do not reuse the KV cache of earlier requests with the same prefix
    #[arg(
        long,
        env = "QUIVER_NO_PREFIX_CACHE",
        value_parser = clap::builder::FalseyValueParser::new(),
        action = clap::ArgAction::SetTrue,
        help_heading = "Engine"
    )]
    pub no_prefix_cache: bool,

    /// Log level: error, warn, info, debug, trace, or a filter such as info,quiver::engine=debug
    #[arg(long, env = "QUIVER_LOG_LEVEL", value_name = "FILTER", default_value = "info", help_heading = "Logs")]
    pub log_level: String,

    /// Log format
    #[arg(long, env = "QUIVER_LOG_FORMAT", value_name = "FORMAT", default_value = "text", help_heading = "Logs")]
    pub log_format: LogFormat,

    /// TOML file with any of these settings under the same names, such as port = 8000
    #[arg(long, env = "QUIVER_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

impl ServeConfig {
    /// The adapters directory, if there is one.
    pub fn adapters_dir(&self) -> Option<&Path> {
        let default = Path::new("adapters");
        self.adapters.as_deref().or(default.is_dir().then_some(default))
    }
}

/// Makes the values of a config file the defaults of a command's arguments, so that flags and environment variables override
/// them and clap checks them like flags. Errors: unreadable file, malformed TOML, unknown setting.
pub fn with_file(command: Command, file: &Path) -> Result<Command> {
    let fail = |what: String| Error::invalid(format!("config file {}: {what}", file.display()));
    let text = std::fs::read_to_string(file).map_err(|e| fail(e.to_string()))?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| fail(e.to_string()))?;
    table.into_iter().try_fold(command, |command, (key, value)| {
        let is_setting = |arg: &&Arg| arg.get_long() == Some(key.as_str()) && key != "config" && key != "help";
        let Some(id) = command.get_arguments().find(is_setting).map(|arg| arg.get_id().clone()) else {
            return Err(fail(format!(
                "unknown setting `{key}`: `quiver serve --help` lists the settings (omit the dashes)"
            )));
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

/// A scalar as an argument of the command line.
fn plain(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(s) => Some(s),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => Some(value.to_string()),
        _ => None,
    }
}

/// Parses a size such as `512MiB`.
fn bytes(text: &str) -> Result<usize, String> {
    let size: ByteSize =
        text.parse().map_err(|_| format!("invalid size {text:?}: write 512MiB, 2GiB or a number of bytes"))?;
    usize::try_from(size.as_u64()).map_err(|e| e.to_string())
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| "must be an integer of at least 1".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|n| (0.0..=1.0).contains(n)).ok_or_else(|| "must be a number from 0 to 1".to_owned())
}

/// Parses a number of seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "must be a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

fn key(text: &str) -> Result<String, String> {
    let fits = !text.is_empty() && text.chars().all(|c| c.is_ascii_graphic());
    if fits { Ok(text.to_owned()) } else { Err("must be one or more visible ASCII characters".to_owned()) }
}

/// Parses `*`, or an origin as browsers send it: `https://app.example:3000`.
fn cors_origin(text: &str) -> Result<String, String> {
    let is_origin = |(scheme, host): (&str, &str)| {
        let host_chars = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
        !host.is_empty()
            && host.chars().all(host_chars)
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    if text == "*" || text.split_once("://").is_some_and(is_origin) {
        return Ok(text.to_ascii_lowercase());
    }
    Err("must be * or an origin such as https://app.example or http://localhost:3000, without a path".to_owned())
}

fn named_path(text: &str) -> Result<NamedPath, String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => {
            Ok(NamedPath { name: name.to_owned(), path: path.to_owned() })
        }
        _ => Err("must be NAME=PATH".to_owned()),
    }
}
