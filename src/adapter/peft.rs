//! Reads a PEFT directory (`adapter_config.json` and `adapter_model.safetensors`) into checked weights at their exact ranks.
//!
//! Every tensor must be used and every targeted module must be present; otherwise the load fails and lists the problems. An
//! adapter that loads therefore has its full effect.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use sha2::{Digest, Sha256};

use super::peft_config::{PeftConfig, PeftType, invalid};
use crate::arch::{ModelConfig, Module};
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use crate::{Error, Result};

/// Most problems that one message lists. The others are counted.
const MAX_LISTED: usize = 8;

/// Most bytes of a safetensors header: the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// Reads and checks the adapter in `dir` for a model, and returns its weights and its generation id. The id is a hash of what the
/// adapter computes (modules, ranks, scales, tensors), so that options without effect do not change it.
///
/// Error codes: `adapter_source_not_found` for missing files, `adapter_unsupported` for options that are not supported,
/// `adapter_invalid` for files that contradict each other or the model. Each message names the option or the tensor.
pub fn read(dir: &Path, model: &ModelConfig) -> Result<(AdapterWeights, String)> {
    let config = std::fs::read_to_string(dir.join("adapter_config.json"))
        .map_err(|e| missing(dir, &format!("adapter_config.json cannot be read: {e}")))?;
    let config = PeftConfig::parse(&config)?;
    let file = TensorFile::open(dir)?;
    let plans = Planner { config: &config, model, problems: Vec::new() }.plan(&file.tensors)?;
    let mut reader = ModuleReader::new(file);
    let modules = plans.into_iter().map(|plan| reader.read(plan)).collect::<Result<_>>()?;
    Ok((AdapterWeights { modules }, reader.finish(config.peft_type)?))
}

/// An open safetensors file whose header has been checked.
struct TensorFile {
    file: File,
    /// Offset of the tensor data, in bytes.
    data: u64,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads only the header, so that nothing is allocated for a file that does not match the model.
    fn open(dir: &Path) -> Result<Self> {
        let name = "adapter_model.safetensors";
        let mut file = File::open(dir.join(name)).map_err(|e| {
            if dir.join("adapter_model.bin").exists() {
                return invalid(format!(
                    "{} has only adapter_model.bin, a pickle that can run code when read: load it with PEFT and save it \
                     again with save_pretrained (safetensors)",
                    dir.display()
                ));
            }
            missing(dir, &format!("{name} cannot be read: {e}"))
        })?;
        let broken = |what: String| invalid(format!("{name}: {what}"));
        let io = |e: std::io::Error| broken(e.to_string());
        let length = file.metadata().map_err(io)?.len();
        let mut size = [0; 8];
        file.read_exact(&mut size).map_err(|_| broken("shorter than a safetensors header".into()))?;
        let size = u64::from_le_bytes(size);
        if size > length.saturating_sub(8).min(MAX_HEADER) {
            return Err(broken(format!(
                "its header claims {size} bytes, of a file of {length} and {MAX_HEADER} allowed"
            )));
        }
        let mut header = vec![0; size as usize];
        file.read_exact(&mut header).map_err(io)?;
        let header: Metadata = serde_json::from_slice(&header).map_err(|e| broken(format!("bad header: {e}")))?;
        let (have, want) = (length - 8 - size, header.data_len() as u64);
        if have != want {
            return Err(broken(format!(
                "it has {have} bytes of tensor data and its header says {want}: is it truncated?"
            )));
        }
        let tensors = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { file, data: 8 + size, tensors })
    }

    fn bytes(&mut self, tensor: &TensorInfo) -> Result<Vec<u8>> {
        let mut bytes = vec![0; tensor.data_offsets.1 - tensor.data_offsets.0];
        self.file
            .seek(SeekFrom::Start(self.data + tensor.data_offsets.0 as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|e| invalid(format!("adapter_model.safetensors: {e}")))?;
        Ok(bytes)
    }
}

/// A tensor of the file, with its name.
type NamedTensor = (String, TensorInfo);

/// The tensors of one module, by role.
#[derive(Default)]
struct ModuleTensors {
    a: Option<NamedTensor>,
    b: Option<NamedTensor>,
    e: Option<NamedTensor>,
    bias: Option<NamedTensor>,
    magnitude: Option<NamedTensor>,
}

impl ModuleTensors {
    fn get_mut(&mut self, role: TensorRole) -> &mut Option<NamedTensor> {
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
struct ModulePlan {
    layer: usize,
    module: Module,
    path: String,
    rank: usize,
    scale: f32,
    a: NamedTensor,
    b: NamedTensor,
    e: Option<NamedTensor>,
    bias: Option<NamedTensor>,
    magnitude: Option<NamedTensor>,
}

/// Plans the read of a file: matches its tensors with the config and the model, and collects what does not match.
struct Planner<'a> {
    config: &'a PeftConfig,
    model: &'a ModelConfig,
    problems: Vec<String>,
}

impl Planner<'_> {
    /// The modules to read, in the order of layers and modules. Errors: the file, the config and the model do not match.
    fn plan(mut self, tensors: &BTreeMap<String, TensorInfo>) -> Result<Vec<ModulePlan>> {
        let model = self.model;
        let places: HashMap<String, (usize, Module)> = (0..model.num_layers)
            .flat_map(|layer| Module::BLOCK.map(|module| (layer, module)))
            .chain([(model.num_layers, Module::LmHead)])
            .map(|(layer, module)| (module.path(layer), (layer, module)))
            .collect();
        if self.config.targets("model.embed_tokens")? {
            return Err(Error::invalid(
                "this adapter cannot be served: target_modules includes embed_tokens, and the embedding is shared by all \
                 adapters",
            )
            .code("adapter_unsupported"));
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
        fail_on(self.problems)?;
        Ok(plans)
    }

    /// Assigns each tensor to its module. Errors: the file holds several adapters.
    fn assign(
        &mut self,
        tensors: &BTreeMap<String, TensorInfo>,
        places: &HashMap<String, (usize, Module)>,
    ) -> Result<BTreeMap<(usize, Module), ModuleTensors>> {
        let mut found: BTreeMap<(usize, Module), ModuleTensors> = BTreeMap::new();
        let mut adapters = BTreeSet::new();
        for (name, info) in tensors {
            // PEFT saves a copy of a targeted head's frozen weight. If its shape is right, it is taken to be the base's.
            if name == "base_model.model.lm_head.base_layer.weight" && self.config.targets("lm_head")? {
                let (n, k) = Module::LmHead.shape(self.model);
                if info.shape != [n, k] {
                    self.problems.push(wrong_shape(name, &info.shape, &[n, k]));
                }
                continue;
            }
            let Some((path, role, adapter)) = split(name, self.config.peft_type) else {
                self.problems.push(unused(name, self.model));
                continue;
            };
            let Some(place) = places.get(path).filter(|_| self.config.targets(path).unwrap_or(false)) else {
                self.problems.push(unused(name, self.model));
                continue;
            };
            adapters.insert(adapter);
            *found.entry(*place).or_default().get_mut(role) = Some((name.clone(), info.clone()));
        }
        if adapters.len() > 1 {
            return Err(invalid(format!("the file holds the tensors of several adapters, {adapters:?}: keep one")));
        }
        Ok(found)
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
                Some((name, _)) if !required => {
                    self.problems.push(format!("{name}: not used, since {option} is false"));
                }
                Some((name, info)) => {
                    if info.shape != shape {
                        self.problems.push(wrong_shape(name, &info.shape, &shape));
                    }
                    if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                        self.problems.push(wrong_dtype(name, info));
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

/// Reads planned modules, and hashes their contents.
struct ModuleReader {
    file: TensorFile,
    hash: Sha256,
    problems: Vec<String>,
}

impl ModuleReader {
    fn new(file: TensorFile) -> Self {
        let hash = Sha256::new_with_prefix(b"quiver adapter generation 1");
        Self { file, hash, problems: Vec::new() }
    }

    fn read(&mut self, plan: ModulePlan) -> Result<ModuleWeights> {
        hash_text(&mut self.hash, &plan.path);
        self.hash.update((plan.rank as u64).to_le_bytes());
        self.hash.update(plan.scale.to_le_bytes());
        let mut a = self.tensor(&plan.a)?;
        let b = self.tensor(&plan.b)?;
        if let Some(e) = &plan.e {
            a = scale_rows(&a, &self.tensor(e)?);
        }
        let bias = plan.bias.map(|bias| self.tensor(&bias)).transpose()?;
        let magnitude = plan.magnitude.map(|magnitude| self.tensor(&magnitude)).transpose()?;
        let ModulePlan { layer, module, rank, scale, .. } = plan;
        Ok(ModuleWeights { layer, module, rank, scale, a, b, bias, magnitude })
    }

    fn tensor(&mut self, (name, info): &NamedTensor) -> Result<FloatVec> {
        let bytes = self.file.bytes(info)?;
        hash_text(&mut self.hash, &info.dtype.to_string());
        for dim in &info.shape {
            self.hash.update((*dim as u64).to_le_bytes());
        }
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(&bytes);
        // The planner has rejected other dtypes.
        let values = FloatVec::read(info.dtype, &bytes).ok_or_else(|| invalid(wrong_dtype(name, info)))?;
        if let Some(at) = values.first_not_finite() {
            self.problems.push(format!("{name} has a NaN or infinity at position {at}"));
        }
        Ok(values)
    }

    /// The generation id of the modules that were read. Errors: a value is not finite.
    fn finish(mut self, peft_type: PeftType) -> Result<String> {
        fail_on(self.problems)?;
        hash_text(&mut self.hash, if peft_type == PeftType::Lora { "lora" } else { "adalora" });
        Ok(self.hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect())
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
    let (path, rest) = name.strip_prefix("base_model.model.")?.split_once(".lora_")?;
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

/// Scales each row of A by its entry of E, in f32 as PEFT does.
fn scale_rows(a: &FloatVec, e: &FloatVec) -> FloatVec {
    let (mut a, e) = (a.to_f32(), e.to_f32());
    let k = a.len() / e.len().max(1);
    for (row, factor) in a.chunks_mut(k.max(1)).zip(&e) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
    FloatVec::F32(a.into())
}

fn hash_text(hash: &mut Sha256, text: &str) {
    hash.update((text.len() as u64).to_le_bytes());
    hash.update(text);
}

fn wrong_shape(name: &str, have: &[usize], want: &[usize]) -> String {
    format!("{name} has the shape {have:?}; the config and the model require {want:?}")
}

fn wrong_dtype(name: &str, info: &TensorInfo) -> String {
    format!("{name} has the dtype {}; F32, F16 and BF16 can be read", info.dtype)
}

fn unused(name: &str, model: &ModelConfig) -> String {
    let layer = name.split_once(".layers.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
    match layer {
        Some(layer) if layer >= model.num_layers => {
            format!("{name}: layer {layer} is beyond the model's {} layers", model.num_layers)
        }
        _ => format!("{name}: not used"),
    }
}

fn fail_on(mut problems: Vec<String>) -> Result<()> {
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

fn missing(dir: &Path, what: &str) -> Error {
    Error::not_found(format!("no adapter in {}: {what}", dir.display())).code("adapter_source_not_found")
}
