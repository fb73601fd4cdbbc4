//! `adapter_config.json` as PEFT 0.21 writes it: the modules that an adapter targets, and the rank and scale of each.
//!
//! PEFT ignores unknown keys, and servers often ignore options that they do not support. Either way an adapter loads and gives
//! wrong answers. Here each option is applied, known to have no effect after training, or rejected by name.

use std::collections::HashMap;

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// Options that only affected training, or that record where the adapter came from.
const IGNORED_OPTIONS: [&str; 20] = [
    // Our trainer's notes on the base and the data.
    "quiver",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    // Llama's projections are `nn.Linear`; PEFT itself resets this to false for them.
    "fan_in_fan_out",
    // These three have an effect only together with an option that is rejected.
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    // These initialisations leave the base unchanged (see `check_init`).
    "eva_config",
    "target_r",
    "tinit",
    "tfinal",
    "deltaT",
    "beta1",
    "beta2",
    "orth_reg_weight",
    "total_step",
];

/// Options that `PeftConfig::parse` reads.
const READ_OPTIONS: [&str; 17] = [
    "peft_type",
    "task_type",
    "r",
    "init_r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_bias",
    "bias",
    "init_lora_weights",
    "alora_invocation_tokens",
];

/// Options that change what the adapter computes and are not supported, each with the reason.
const REJECTED_OPTIONS: [(&str, &str); 15] = [
    ("modules_to_save", "whole layers of the base were trained, which adapters cannot share: use LoRA on them instead"),
    ("layer_replication", "the adapter belongs to a base with repeated layers"),
    ("trainable_token_indices", "rows of the embedding were trained, which all adapters share"),
    ("target_parameters", "only linear layers can be targeted"),
    ("use_qalora", "QA-LoRA pools the input of A"),
    ("use_bdlora", "block-diagonal LoRA is not served"),
    ("megatron_config", "Megatron parallel layers are not served"),
    ("loftq_config", "LoftQ changes the base"),
    ("corda_config", "CorDA changes the base: convert it to plain LoRA when saving"),
    ("lora_ga_config", "LoRA-GA changes the base: convert it to plain LoRA when saving"),
    ("kasa_config", "KaSA changes the base"),
    ("velora_config", "VeLoRA is not served"),
    ("monteclora_config", "MonteCLoRA is not served"),
    ("arrow_config", "Arrow routing between adapters is not served"),
    ("ensure_weight_tying", "adapters on tied embeddings are not served"),
];

/// PEFT's `peft_type`: the formula of a delta.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PeftType {
    /// `scale * B A`.
    Lora,
    /// `scale * B (A * E)` with `E [r, 1]` (PEFT's `SVDLinear`).
    AdaLora,
}

impl PeftType {
    /// The option that holds the rank, and its default in PEFT.
    fn rank_option(self) -> (&'static str, usize) {
        match self {
            Self::Lora => ("r", 8),
            Self::AdaLora => ("init_r", 12),
        }
    }
}

/// A checked adapter configuration.
#[derive(Debug)]
pub(super) struct PeftConfig {
    /// LoRA or AdaLoRA.
    pub(super) peft_type: PeftType,
    /// Whether `lora_B` has a bias.
    pub(super) lora_bias: bool,
    /// Whether the adapter is a DoRA: each module has a magnitude vector.
    pub(super) dora: bool,
    /// Rank of modules that match no pattern; `init_r` for AdaLoRA.
    rank: usize,
    /// `lora_alpha` of modules that match no pattern.
    alpha: f64,
    /// Whether the scale is alpha over the square root of the rank.
    rslora: bool,
    /// Ranks of modules by pattern of their path; the first match wins.
    rank_pattern: Vec<(Regex, usize)>,
    /// Alphas of modules by pattern of their path; the first match wins.
    alpha_pattern: Vec<(Regex, f64)>,
    /// AdaLoRA: ranks after pruning, by module path.
    pruned: HashMap<String, usize>,
    /// Modules that it targets.
    targets: ModuleMatcher,
    /// Modules that it does not target although `targets` matches them.
    exclude: Option<ModuleMatcher>,
    /// Layers to which a list of `targets` is limited.
    layers: Option<Vec<usize>>,
    /// Patterns that find the layer index in a path.
    layer_index: Vec<Regex>,
}

/// One of PEFT's ways to select modules.
#[derive(Debug)]
enum ModuleMatcher {
    /// Every linear layer except the output head.
    AllLinear,
    /// A regular expression that matches the whole path.
    Path(Regex),
    /// Paths, or their trailing components.
    Names(Vec<String>),
}

impl ModuleMatcher {
    fn matches(&self, path: &str) -> Result<bool> {
        match self {
            Self::AllLinear => Ok(path.ends_with("_proj")),
            Self::Path(regex) => is_match(regex, path),
            Self::Names(names) => Ok(names
                .iter()
                .any(|n| path.strip_suffix(n.as_str()).is_some_and(|p| p.is_empty() || p.ends_with('.')))),
        }
    }
}

impl PeftConfig {
    /// Reads the object in `adapter_config.json`. Errors name every option that is not supported.
    pub(super) fn parse(map: Map<String, Value>) -> Result<Self> {
        let options = PeftOptions(map);
        let peft_type = options.peft_type()?;
        options.check_served()?;

        let (rank, default_rank) = peft_type.rank_option();
        let mut config = Self {
            peft_type,
            lora_bias: options.bool("lora_bias")?,
            dora: options.bool("use_dora")?,
            rank: options.positive(rank)?.unwrap_or(default_rank),
            alpha: options.number("lora_alpha")?.unwrap_or(8.0),
            rslora: options.bool("use_rslora")?,
            rank_pattern: Vec::new(),
            alpha_pattern: options.patterns("alpha_pattern", |key, v| {
                v.as_f64().filter(|a| a.is_finite()).ok_or_else(|| must(key, "be a number", v))
            })?,
            pruned: HashMap::new(),
            targets: options.targets()?,
            exclude: options.matcher("exclude_modules")?,
            layers: options.layers()?,
            layer_index: options.layer_index()?,
        };
        config.check_combination()?;
        match peft_type {
            PeftType::Lora => config.rank_pattern = options.patterns("rank_pattern", positive)?,
            PeftType::AdaLora => config.pruned = options.pruned_ranks()?,
        }
        Ok(config)
    }

    /// The config that another layout's options amount to. Errors: as those of [`PeftConfig::parse`].
    pub(super) fn of(options: Value) -> Result<Self> {
        match options {
            Value::Object(map) => Self::parse(map),
            _ => Err(invalid("the options must be one JSON object")),
        }
    }

    /// Rejects options that exclude each other.
    fn check_combination(&self) -> Result<()> {
        if self.layers.is_some() && !matches!(self.targets, ModuleMatcher::Names(_)) {
            return Err(invalid("layers_to_transform needs target_modules to be a list of names"));
        }
        if self.dora && self.lora_bias {
            return Err(unsupported("use_dora with lora_bias: PEFT does not support both together"));
        }
        let not_in_adalora = [
            ("use_rslora", self.rslora),
            ("lora_bias", self.lora_bias),
            ("use_dora", self.dora),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
        ];
        match not_in_adalora.iter().find(|(_, used)| *used) {
            Some((name, _)) if self.peft_type == PeftType::AdaLora => {
                Err(unsupported(format!("{name}: AdaLoRA does not have it")))
            }
            _ => Ok(()),
        }
    }

    /// Whether PEFT would put an adapter on the module at `path` (`check_target_module_exists`).
    pub(super) fn targets(&self, path: &str) -> Result<bool> {
        if let Some(exclude) = &self.exclude
            && exclude.matches(path)?
        {
            return Ok(false);
        }
        if !self.targets.matches(path)? {
            return Ok(false);
        }
        let Some(layers) = &self.layers else { return Ok(true) };
        if matches!(&self.targets, ModuleMatcher::Names(names) if names.iter().any(|n| n == path)) {
            return Ok(true);
        }
        for regex in &self.layer_index {
            let found = regex.captures(path).map_err(|e| invalid(format!("layers_pattern on {path}: {e}")))?;
            if let Some(index) = found.as_ref().and_then(|c| c.name("idx")) {
                return Ok(index.as_str().parse().is_ok_and(|i: usize| layers.contains(&i)));
            }
        }
        Ok(false)
    }

    /// Rank and scale of the module at `path` (`get_pattern_key`). The scale is alpha/r, or alpha/sqrt(r) with rsLoRA. The rank
    /// is 0 only for a module that AdaLoRA has pruned away.
    pub(super) fn rank_and_scale(&self, path: &str) -> Result<(usize, f32)> {
        let rank = match self.pruned.get(path) {
            Some(rank) => *rank,
            None => first_match(&self.rank_pattern, path)?.unwrap_or(self.rank),
        };
        let alpha = first_match(&self.alpha_pattern, path)?.unwrap_or(self.alpha);
        let scale = match self.peft_type {
            PeftType::Lora if self.rslora => alpha / (rank as f64).sqrt(),
            PeftType::Lora => alpha / rank as f64,
            // `ranknum` stays `init_r` after pruning, and PEFT adds 1e-5 to it.
            PeftType::AdaLora => (if alpha > 0.0 { alpha } else { self.rank as f64 }) / (self.rank as f64 + 1e-5),
        };
        Ok((rank, scale as f32))
    }
}

/// The JSON object, with typed access.
struct PeftOptions(Map<String, Value>);

impl PeftOptions {
    /// Rejects all options that are not supported, in one message.
    fn check_served(&self) -> Result<()> {
        let mut problems = Vec::new();
        for (key, value) in &self.0 {
            if IGNORED_OPTIONS.contains(&key.as_str()) || READ_OPTIONS.contains(&key.as_str()) || is_empty(value) {
                continue;
            }
            match REJECTED_OPTIONS.iter().find(|(name, _)| name == key) {
                Some((_, why)) => problems.push(format!("{key}: {why}")),
                None => problems.push(format!("{key}: unknown option with the value {}", short(value))),
            }
        }
        // To PEFT, an empty list still means activated LoRA.
        if self.0.get("alora_invocation_tokens").is_some_and(|v| !v.is_null()) {
            problems.push("alora_invocation_tokens: activated LoRA is not served".into());
        }
        match self.0.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(s)) if s == "none" => {}
            Some(v) => {
                problems.push(format!("bias {}: the base's biases were trained; only \"none\" is served", short(v)))
            }
        }
        match self.0.get("task_type") {
            None | Some(Value::Null) => {}
            Some(Value::String(s)) if s == "CAUSAL_LM" => {}
            Some(v) => problems.push(format!("task_type {}: only CAUSAL_LM adapters can be served", short(v))),
        }
        problems.extend(self.check_init());
        if problems.is_empty() { Ok(()) } else { Err(unsupported(problems.join("; "))) }
    }

    /// Rejects initialisations that change the base weights: such an adapter does not fit the shared base.
    fn check_init(&self) -> Option<String> {
        let value = self.0.get("init_lora_weights")?;
        let Value::String(init) = value else {
            return (!value.is_boolean() && !value.is_null())
                .then(|| format!("init_lora_weights must be a boolean or a name, not {}", short(value)));
        };
        match init.to_lowercase().as_str() {
            "gaussian" | "eva" | "orthogonal" | "mica" => None,
            name if ["pissa", "olora", "corda", "loftq", "lora_ga"].iter().any(|p| name.starts_with(p)) => {
                Some(format!(
                    "init_lora_weights {init:?}: it changed the base weights, so the adapter does not fit the shared base; \
                     save it with path_initial_model_for_weight_conversion to get a plain LoRA adapter"
                ))
            }
            _ => Some(format!("init_lora_weights {init:?}: unknown")),
        }
    }

    /// The value of an option, unless it is absent or null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn string(&self, key: &str) -> Result<Option<String>> {
        self.get(key).map(|v| v.as_str().map(str::to_owned).ok_or_else(|| must(key, "be a string", v))).transpose()
    }

    fn bool(&self, key: &str) -> Result<bool> {
        self.get(key).map_or(Ok(false), |v| v.as_bool().ok_or_else(|| must(key, "be true or false", v)))
    }

    fn positive(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|v| positive(key, v)).transpose()
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key).map(|v| v.as_f64().ok_or_else(|| must(key, "be a number", v))).transpose()
    }

    fn strings(&self, key: &str) -> Result<Option<Vec<String>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        if let Value::String(one) = value {
            return Ok(Some(vec![one.clone()]));
        }
        let list = value.as_array().and_then(|l| l.iter().map(|v| v.as_str().map(str::to_owned)).collect());
        list.map(Some).ok_or_else(|| must(key, "be a string or a list of strings", value))
    }

    fn peft_type(&self) -> Result<PeftType> {
        match self.string("peft_type")?.as_deref() {
            Some("LORA") => Ok(PeftType::Lora),
            Some("ADALORA") => Ok(PeftType::AdaLora),
            Some(other) => Err(unsupported(format!("peft_type {other:?}: only LORA and ADALORA are served"))),
            None => Err(invalid(
                "adapter_config.json has neither PEFT's peft_type nor MLX-LM's lora_parameters: it belongs to another program",
            )),
        }
    }

    fn matcher(&self, key: &str) -> Result<Option<ModuleMatcher>> {
        match self.get(key) {
            Some(Value::String(s)) if s.is_empty() => Ok(None),
            Some(Value::String(s)) => Ok(Some(ModuleMatcher::Path(regex(key, &format!("^(?:{s})$"))?))),
            _ => Ok(self.strings(key)?.filter(|names| !names.is_empty()).map(ModuleMatcher::Names)),
        }
    }

    fn targets(&self) -> Result<ModuleMatcher> {
        let key = "target_modules";
        if self.get(key).and_then(Value::as_str).is_some_and(|s| s.eq_ignore_ascii_case("all-linear")) {
            return Ok(ModuleMatcher::AllLinear);
        }
        // PEFT's default for Llama.
        let default = || ModuleMatcher::Names(vec!["q_proj".into(), "v_proj".into()]);
        Ok(self.matcher(key)?.unwrap_or_else(default))
    }

    /// One pattern per key, in the file's order. PEFT matches it by `re.match(rf"(.*\.)?({key})$", path)`.
    fn patterns<T>(&self, key: &str, read: impl Fn(&str, &Value) -> Result<T>) -> Result<Vec<(Regex, T)>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let map = value.as_object().ok_or_else(|| must(key, "be an object", value))?;
        map.iter()
            .map(|(pattern, v)| {
                let name = format!("{key}[{pattern:?}]");
                Ok((regex(&name, &format!(r"^(?:.*\.)?(?:{pattern})$"))?, read(&name, v)?))
            })
            .collect()
    }

    fn layers(&self) -> Result<Option<Vec<usize>>> {
        let key = "layers_to_transform";
        let Some(value) = self.get(key) else { return Ok(None) };
        let list = match value {
            Value::Array(list) => list.iter().map(|v| v.as_u64().map(|i| i as usize)).collect(),
            one => one.as_u64().map(|i| vec![i as usize]),
        };
        let list: Vec<usize> = list.ok_or_else(|| must(key, "be a layer index or a list of them", value))?;
        // In PEFT, an empty list means no limit.
        Ok((!list.is_empty()).then_some(list))
    }

    /// Without `layers_pattern`, the first numeric component of a path is its layer.
    fn layer_index(&self) -> Result<Vec<Regex>> {
        let key = "layers_pattern";
        match self.strings(key)?.filter(|patterns| patterns.iter().any(|p| !p.is_empty())) {
            None => Ok(vec![regex(key, r"^.*?\.[^.]*\.(?P<idx>\d+)\.")?]),
            Some(patterns) => {
                patterns.iter().map(|p| regex(key, &format!(r"^(?:.*?\.)?{p}\.(?P<idx>\d+)\."))).collect()
            }
        }
    }

    /// Ranks after pruning. AdaLoRA's `rank_pattern` is `{"<path>.lora_E": [kept, ...]}`.
    fn pruned_ranks(&self) -> Result<HashMap<String, usize>> {
        let key = "rank_pattern";
        let Some(value) = self.get(key) else { return Ok(HashMap::new()) };
        let map = value.as_object().ok_or_else(|| must(key, "be an object", value))?;
        map.iter()
            .map(|(name, v)| {
                let kept = v.as_array().and_then(|l| l.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
                let kept = kept.ok_or_else(|| must(&format!("{key}[{name:?}]"), "be a list of booleans", v))?;
                let path = name.find(".lora_E").map_or(name.as_str(), |end| &name[..end]);
                let path = path.strip_prefix("base_model.model.").unwrap_or(path);
                Ok((path.to_owned(), kept.iter().filter(|k| **k).count()))
            })
            .collect()
    }
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], path: &str) -> Result<Option<T>> {
    for (regex, value) in patterns {
        if is_match(regex, path)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn regex(option: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| invalid(format!("{option} is not a valid regular expression: {e}")))
}

fn is_match(regex: &Regex, path: &str) -> Result<bool> {
    regex.is_match(path).map_err(|e| invalid(format!("matching {:?} against {path}: {e}", regex.as_str())))
}

/// Whether the value turns its option off: null, false, `""`, `[]` or `{}`.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(s) => s.is_empty(),
        Value::Array(a) => a.is_empty(),
        Value::Object(o) => o.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

/// A value as a message shows it, cut after 60 characters.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn positive(key: &str, value: &Value) -> Result<usize> {
    match value.as_u64() {
        Some(n) if n > 0 => Ok(n as usize),
        _ => Err(must(key, "be a positive integer", value)),
    }
}

fn must(key: &str, what: &str, value: &Value) -> Error {
    invalid(format!("adapter_config.json: {key} must {what}, not {}", short(value)))
}

/// The error of a file that contradicts itself, the format or the model.
pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::invalid(message).code("adapter_invalid")
}

/// The error of a valid file with options that are not supported.
pub(super) fn unsupported(message: impl Into<String>) -> Error {
    Error::invalid(format!("this adapter cannot be served: {}", message.into())).code("adapter_unsupported")
}
