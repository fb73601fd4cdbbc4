//! PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`. [`Planner`] matches the tensors with the
//! config and the model. Unsloth, Axolotl, TRL, LLaMA-Factory, torchtune and Tinker write this layout too.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::base_check::BaseClaim;
use super::peft_config::{PeftConfig, PeftType, invalid, unsupported};
use super::reader::AdapterFiles;
use super::tensor_file::{StoredTensor, TensorFile, ValueOrder};
use crate::Result;
use crate::arch::{ModelConfig, Module};

/// Most problems that one message lists. The others are counted.
const MAX_LISTED: usize = 8;

/// Most causes that a message gives before the problems.
const MAX_CAUSES: usize = 3;

/// What PEFT puts before a module's path.
const PREFIX: &str = "base_model.model.";

/// Tinker's name of the head.
const TINKER_HEAD: &str = "base_model.model.model.unembed_tokens.";

/// Opens the adapter in `dir`, whose config has been read.
pub(super) fn open(dir: &Path, mut config: Map<String, Value>) -> Result<AdapterFiles> {
    let base = BaseClaim::of(&config);
    let mut parsed = PeftConfig::parse(config.clone())?;
    let mut tensors = TensorFile::safetensors(dir, "adapter_model.safetensors")?;
    // Some trainers save the state of the model itself, whose keys lack PEFT's prefix.
    if !tensors.tensors.keys().any(|name| name.starts_with("base_model.")) {
        let bare = |name: &str| name.starts_with("model.layers.") || name.starts_with("lm_head.");
        tensors.rename(|name| bare(name).then(|| format!("{PREFIX}{name}")))?;
    }
    if tensors.tensors.keys().any(|name| name.starts_with(TINKER_HEAD)) {
        config.insert("target_modules".into(), tinker_targets(&config, &tensors));
        parsed = PeftConfig::parse(config)?;
        tensors.rename(|name| Some(format!("{PREFIX}lm_head.{}", name.strip_prefix(TINKER_HEAD)?)))?;
    }
    Ok(AdapterFiles { config: parsed, base, tensors })
}

/// The targets of an adapter that Tinker exported with the head. Its config says `all-linear`, to which the head does not belong,
/// even if the attention or the MLP was left out.
fn tinker_targets(config: &Map<String, Value>, tensors: &TensorFile) -> Value {
    let has = |part: &str| tensors.tensors.keys().any(|name| name.contains(part));
    let mut targets = match config.get("target_modules") {
        Some(Value::Array(names)) => names.clone(),
        _ => Vec::new(),
    };
    if targets.is_empty() {
        let groups: [(&str, &[&str]); 2] = [
            (".self_attn.", &["q_proj", "k_proj", "v_proj", "o_proj"]),
            (".mlp.", &["gate_proj", "up_proj", "down_proj"]),
        ];
        targets
            .extend(groups.iter().filter(|(part, _)| has(part)).flat_map(|(_, names)| *names).map(|name| json!(name)));
    }
    targets.push("lm_head".into());
    targets.into()
}

/// The tensors of one module, by role.
#[derive(Default)]
struct ModuleTensors {
    a: Option<StoredTensor>,
    b: Option<StoredTensor>,
    e: Option<StoredTensor>,
    bias: Option<StoredTensor>,
    magnitude: Option<StoredTensor>,
}

impl ModuleTensors {
    fn get_mut(&mut self, role: TensorRole) -> &mut Option<StoredTensor> {
        match role {
            TensorRole::A => &mut self.a,
            TensorRole::B => &mut self.b,
            TensorRole::E => &mut self.e,
            TensorRole::Bias => &mut self.bias,
            TensorRole::Magnitude => &mut self.magnitude,
        }
    }
}

/// One module to read: its tensors, whose shapes have been checked.
pub(super) struct ModulePlan {
    pub(super) layer: usize,
    pub(super) module: Module,
    pub(super) path: String,
    pub(super) rank: usize,
    pub(super) scale: f32,
    pub(super) a: StoredTensor,
    pub(super) b: StoredTensor,
    pub(super) e: Option<StoredTensor>,
    pub(super) bias: Option<StoredTensor>,
    pub(super) magnitude: Option<StoredTensor>,
}

/// Plans the read of a file: matches its tensors with the config and the model, and collects what does not match.
pub(super) struct Planner<'a> {
    config: &'a PeftConfig,
    model: &'a ModelConfig,
    /// What explains the problems.
    causes: BTreeSet<String>,
    problems: Vec<String>,
}

impl<'a> Planner<'a> {
    pub(super) fn new(config: &'a PeftConfig, model: &'a ModelConfig) -> Self {
        Self { config, model, causes: BTreeSet::new(), problems: Vec::new() }
    }

    /// The modules to read, in the order of layers and modules. Errors: the file, the config and the model do not match.
    pub(super) fn plan(mut self, tensors: &BTreeMap<String, StoredTensor>) -> Result<Vec<ModulePlan>> {
        let model = self.model;
        let places: HashMap<String, (usize, Module)> = (0..model.num_layers)
            .flat_map(|layer| Module::BLOCK.map(|module| (layer, module)))
            .chain([(model.num_layers, Module::LmHead)])
            .map(|(layer, module)| (module.path(layer), (layer, module)))
            .collect();
        if self.config.targets("model.embed_tokens")? {
            return Err(unsupported(
                "target_modules includes embed_tokens, and the embedding is shared by all adapters",
            ));
        }

        let mut found = self.assign(tensors, &places)?;
        let mut order: Vec<_> = places.iter().map(|(path, place)| (*place, path)).collect();
        order.sort();
        let mut plans = Vec::new();
        let mut targeted = 0;
        for (place, path) in order {
            if self.config.targets(path)? {
                targeted += 1;
                plans.extend(self.plan_module(place, path, found.remove(&place).unwrap_or_default())?);
            }
        }
        if targeted == 0 {
            self.problems.insert(0, "target_modules matches no linear layer of this model".into());
        } else if plans.is_empty() && self.problems.is_empty() {
            self.problems.push("every module was pruned to rank 0, so the adapter has no effect".into());
        }
        if !self.causes.is_empty() && !self.problems.is_empty() {
            self.problems.splice(..0, std::mem::take(&mut self.causes).into_iter().take(MAX_CAUSES));
        }
        fail_on(self.problems)?;
        Ok(plans)
    }

    /// Assigns each tensor to its module. Errors: the file holds several adapters.
    fn assign(
        &mut self,
        tensors: &BTreeMap<String, StoredTensor>,
        places: &HashMap<String, (usize, Module)>,
    ) -> Result<BTreeMap<(usize, Module), ModuleTensors>> {
        let mut found: BTreeMap<(usize, Module), ModuleTensors> = BTreeMap::new();
        let mut adapters = BTreeSet::new();
        for (name, tensor) in tensors {
            // PEFT saves a copy of a targeted head's frozen weight. If its shape is right, it is taken to be the base's.
            if name == "base_model.model.lm_head.base_layer.weight" && self.config.targets("lm_head")? {
                let (n, k) = Module::LmHead.shape(self.model);
                if tensor.shape != [n, k] {
                    self.wrong_shape(tensor, &[n, k]);
                    self.causes.extend(cause(name, tensor, self.model));
                }
                continue;
            }
            let place = split(name, self.config.peft_type).and_then(|(path, role, adapter)| {
                let place = places.get(path).filter(|_| self.config.targets(path).unwrap_or(false))?;
                Some((*place, role, adapter))
            });
            let Some((place, role, adapter)) = place else {
                self.problems.push(match layer(name).filter(|layer| *layer >= self.model.num_layers) {
                    Some(layer) => format!(
                        "{}: layer {layer} is beyond the model's {} layers",
                        tensor.label, self.model.num_layers
                    ),
                    None => format!("{}: not used", tensor.label),
                });
                self.causes.extend(cause(name, tensor, self.model));
                continue;
            };
            adapters.insert(adapter);
            *found.entry(place).or_default().get_mut(role) = Some(tensor.clone());
        }
        if adapters.len() > 1 {
            return Err(invalid(format!("the file holds the tensors of several adapters, {adapters:?}: keep one")));
        }
        Ok(found)
    }

    fn wrong_shape(&mut self, tensor: &StoredTensor, want: &[usize]) {
        let (mut have, mut want) = (tensor.shape.clone(), want.to_vec());
        if tensor.order == ValueOrder::Transposed {
            have.reverse();
            want.reverse();
        }
        let label = &tensor.label;
        self.problems.push(format!("{label} has the shape {have:?}; the config and the model require {want:?}"));
    }

    /// Checks the tensors of one targeted module. `None` if there is nothing to read, because the module was pruned away or a
    /// problem was found.
    fn plan_module(
        &mut self,
        (layer, module): (usize, Module),
        path: &str,
        tensors: ModuleTensors,
    ) -> Result<Option<ModulePlan>> {
        let config = self.config;
        let before = self.problems.len();
        let (n, k) = module.shape(self.model);
        let (rank, scale) = config.rank_and_scale(path)?;
        if !scale.is_finite() {
            self.problems.push(format!("{path}: its scale, alpha over rank, is not a finite number"));
        }
        let ModuleTensors { a, b, e, bias, magnitude } = tensors;
        let ada = config.peft_type == PeftType::AdaLora;
        let expected = [
            ("lora_A", &a, vec![rank, k], true, ""),
            ("lora_B", &b, vec![n, rank], true, ""),
            ("lora_E", &e, vec![rank, 1], ada, ""),
            ("lora_B.bias", &bias, vec![n], config.lora_bias, "lora_bias"),
            ("lora_magnitude_vector", &magnitude, vec![n], config.dora, "use_dora"),
        ];
        for (what, tensor, shape, required, option) in expected {
            match tensor {
                None if required => self.problems.push(format!("{path}: targeted, but {what} is missing")),
                None => {}
                Some(tensor) if !required => {
                    self.problems.push(format!("{}: not used, since {option} is false", tensor.label));
                }
                Some(tensor) => {
                    if tensor.shape != shape {
                        self.wrong_shape(tensor, &shape);
                        self.causes.extend(other_base(module, what, tensor, &shape));
                    }
                    if !matches!(tensor.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                        self.problems.push(wrong_dtype(tensor));
                    }
                }
            }
        }
        Ok(match (a, b) {
            (Some(a), Some(b)) if self.problems.len() == before && rank > 0 => {
                Some(ModulePlan { layer, module, path: path.to_owned(), rank, scale, a, b, e, bias, magnitude })
            }
            _ => None,
        })
    }
}

/// The role of a tensor in its module.
enum TensorRole {
    A,
    B,
    E,
    Bias,
    Magnitude,
}

/// Splits `base_model.model.<path>.lora_A[.<adapter>].weight` into path, role and adapter. PEFT strips the adapter's name when
/// it saves; some trainers do not. AdaLoRA's tensors are parameters, whose names do not end in `.weight`.
fn split(name: &str, peft_type: PeftType) -> Option<(&str, TensorRole, &str)> {
    let (path, rest) = name.strip_prefix(PREFIX)?.split_once(".lora_")?;
    if let Some(adapter) = rest.strip_prefix("magnitude_vector") {
        let adapter = adapter.strip_suffix(".weight").unwrap_or(adapter);
        return Some((path, TensorRole::Magnitude, if adapter.is_empty() { "" } else { adapter.strip_prefix('.')? }));
    }
    let (matrix, rest) = rest.split_at_checked(1)?;
    let (adapter, bias) = match peft_type {
        PeftType::AdaLora => (rest, false),
        PeftType::Lora => match rest.strip_suffix(".weight") {
            Some(adapter) => (adapter, false),
            None => (rest.strip_suffix(".bias")?, true),
        },
    };
    let role = match (matrix, bias, peft_type) {
        ("A", false, _) => TensorRole::A,
        ("B", false, _) => TensorRole::B,
        ("B", true, PeftType::Lora) => TensorRole::Bias,
        ("E", false, PeftType::AdaLora) => TensorRole::E,
        _ => return None,
    };
    let adapter = if adapter.is_empty() { "" } else { adapter.strip_prefix('.')? };
    Some((path, role, adapter))
}

pub(super) fn wrong_dtype(tensor: &StoredTensor) -> String {
    format!("{} has the dtype {}; F32, F16 and BF16 can be read", tensor.label, tensor.dtype)
}

/// The index of the decoder block in a tensor's name.
fn layer(name: &str) -> Option<usize> {
    name.split_once(".layers.")?.1.split('.').next()?.parse().ok()
}

/// Why a file has a tensor that is not used, where the name tells.
fn cause(name: &str, tensor: &StoredTensor, model: &ModelConfig) -> Option<String> {
    let part = |part: &str| name.split('.').any(|p| p == part);
    if (part("embed_tokens") || part("lm_head")) && !name.contains(".lora_") {
        let rows = tensor.shape.first().copied().unwrap_or(0);
        return Some(if rows == model.vocab_size {
            "the embedding or the head was saved whole, which adapters cannot share: if it was not trained, save the adapter \
             again with save_pretrained(..., save_embedding_layers=False), and otherwise train it with LoRA on lm_head"
                .into()
        } else {
            format!(
                "the embedding was resized: the adapter's vocabulary has {rows} tokens and the base's {}; train without added \
                 tokens, or serve a base with this vocabulary",
                model.vocab_size
            )
        });
    }
    match layer(name) {
        _ if part("modules_to_save") => Some(
            "a module was saved whole (modules_to_save), which adapters cannot share: use LoRA on it instead".into(),
        ),
        Some(layer) if layer >= model.num_layers && name.starts_with(PREFIX) => {
            Some(format!("the adapter belongs to a larger base: the served one has {} layers", model.num_layers))
        }
        _ if name.starts_with("base_model.model.model.layers.") => None,
        _ if name.contains(".attn.") || name.starts_with("layers.") => Some(
            "the keys are torchtune's own: save the adapter with its Hugging Face checkpointer \
             (save_adapter_weights_only), which writes PEFT's keys"
                .into(),
        ),
        _ => {
            let prefix = name.split_once("layers.").map_or(name, |(prefix, _)| prefix);
            Some(format!(
                "the keys begin with {prefix:?}, and PEFT's for this base with \"base_model.model.model.layers.\": the adapter \
                 was made for another architecture or by an unknown trainer"
            ))
        }
    }
}

/// What a wrong size of a matrix says about the base that the adapter was trained on.
fn other_base(module: Module, what: &str, tensor: &StoredTensor, want: &[usize]) -> Option<String> {
    let reads_hidden = !matches!(module, Module::O | Module::Down);
    match (what, &tensor.shape[..], want) {
        ("lora_A", [_, have], [_, want]) if have != want && reads_hidden => {
            Some(format!("the adapter belongs to another base: its hidden size is {have} and the served base's {want}"))
        }
        ("lora_B", [have, _], [want, _]) if have != want && module == Module::LmHead => {
            Some(format!("the vocabulary was resized: the adapter's has {have} tokens and the served base's {want}"))
        }
        _ => None,
    }
}

pub(super) fn fail_on(mut problems: Vec<String>) -> Result<()> {
    if problems.is_empty() {
        return Ok(());
    }
    let more = problems.len().saturating_sub(MAX_LISTED);
    problems.truncate(MAX_LISTED);
    let mut list = problems.join("; ");
    if more > 0 {
        list += &format!("; and {more} more");
    }
    Err(invalid(format!("the adapter does not match its config or the model: {list}")))
}
