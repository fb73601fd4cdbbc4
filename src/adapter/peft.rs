//! A PEFT directory (`adapter_config.json` + `adapter_model.safetensors`) -> checked, exact-rank weights.
//!
//! Every tensor must be used and every targeted module must be there, or the load fails and lists what was not: an
//! adapter that loads has its full effect.

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

/// Problems that one message lists; more are counted.
const MAX_LISTED: usize = 8;

/// Bytes of a safetensors header, the limit of the format's own library.
const MAX_HEADER: u64 = 100_000_000;

/// Reads and checks the adapter in `dir` for a model, and returns it with its generation id. The id covers what
/// the adapter computes (module, rank, scale, tensors), so that options that change nothing do not change it.
///
/// Errors: `adapter_source_not_found` for missing files, `adapter_unsupported` for options that are not served,
/// `adapter_invalid` for anything that does not fit together; each names the option or tensor.
pub fn read(dir: &Path, model: &ModelConfig) -> Result<(AdapterWeights, String)> {
    let config = std::fs::read_to_string(dir.join("adapter_config.json"))
        .map_err(|e| missing(dir, &format!("adapter_config.json cannot be read: {e}")))?;
    let config = PeftConfig::parse(&config)?;
    let file = TensorFile::open(dir)?;
    let plan = ReadPlan::new(&config, &file.tensors, model)?;
    plan.read(&config, file)
}

/// An open safetensors file with a checked header.
struct TensorFile {
    file: File,
    /// Where tensor data starts.
    data: u64,
    tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads the header only: nothing is allocated for a file that does not fit the model.
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
            return Err(broken(format!("it has {have} bytes of tensor data, its header says {want}: cut off?")));
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

/// The tensors of one module, by role.
#[derive(Default)]
struct ModuleTensors<'a> {
    a: Option<(&'a str, &'a TensorInfo)>,
    b: Option<(&'a str, &'a TensorInfo)>,
    e: Option<(&'a str, &'a TensorInfo)>,
    bias: Option<(&'a str, &'a TensorInfo)>,
    magnitude: Option<(&'a str, &'a TensorInfo)>,
}

/// One module to read: where its tensors are, with shapes already checked.
struct ModulePlan {
    layer: usize,
    module: Module,
    path: String,
    rank: usize,
    scale: f32,
    a: (String, TensorInfo),
    b: (String, TensorInfo),
    e: Option<(String, TensorInfo)>,
    bias: Option<(String, TensorInfo)>,
    magnitude: Option<(String, TensorInfo)>,
}

/// What to read, after config, header and model have been found to agree.
struct ReadPlan {
    steps: Vec<ModulePlan>,
}

impl ReadPlan {
    fn new(config: &PeftConfig, tensors: &BTreeMap<String, TensorInfo>, model: &ModelConfig) -> Result<Self> {
        let places: HashMap<String, (usize, Module)> = (0..model.num_layers)
            .flat_map(|layer| Module::BLOCK.map(|module| (layer, module)))
            .chain([(model.num_layers, Module::LmHead)])
            .map(|(layer, module)| (module.path(layer), (layer, module)))
            .collect();
        if config.targets("model.embed_tokens")? {
            return Err(Error::invalid(
                "this adapter cannot be served: target_modules includes embed_tokens, and the embedding is shared by all \
                 adapters",
            )
            .code("adapter_unsupported"));
        }

        let mut problems = Vec::new();
        let mut found: BTreeMap<(usize, Module), ModuleTensors> = BTreeMap::new();
        let mut adapters = BTreeSet::new();
        for (name, info) in tensors {
            // PEFT saves a copy of a targeted head's frozen weight, which is the base's own if the shape is.
            if name == "base_model.model.lm_head.base_layer.weight" && config.targets("lm_head")? {
                let (n, k) = Module::LmHead.shape(model);
                if info.shape != [n, k] {
                    problems.push(wrong_shape(name, &info.shape, &[n, k]));
                }
                continue;
            }
            let Some((path, role, adapter)) = split(name, config.peft_type) else {
                problems.push(unused(name, model));
                continue;
            };
            let Some(place) = places.get(path).filter(|_| config.targets(path).unwrap_or(false)) else {
                problems.push(unused(name, model));
                continue;
            };
            adapters.insert(adapter);
            let parts = found.entry(*place).or_default();
            let part = match role {
                TensorRole::A => &mut parts.a,
                TensorRole::B => &mut parts.b,
                TensorRole::E => &mut parts.e,
                TensorRole::Bias => &mut parts.bias,
                TensorRole::Magnitude => &mut parts.magnitude,
            };
            *part = Some((name, info));
        }
        if adapters.len() > 1 {
            return Err(invalid(format!("the file holds the tensors of several adapters, {adapters:?}: keep one")));
        }

        let mut steps = Vec::new();
        let mut order: Vec<_> = places.iter().map(|(path, place)| (*place, path)).collect();
        order.sort();
        let mut targeted = 0;
        for ((layer, module), path) in order {
            if !config.targets(path)? {
                continue;
            }
            targeted += 1;
            let parts = found.remove(&(layer, module)).unwrap_or_default();
            if let Some(step) = step(config, model, (layer, module), path, &parts, &mut problems)? {
                steps.push(step);
            }
        }
        if targeted == 0 {
            problems.insert(0, "target_modules names no linear layer of this model".into());
        } else if steps.is_empty() && problems.is_empty() {
            problems.push("every module was pruned to rank 0: it changes nothing".into());
        }
        fail_on(problems)?;
        Ok(Self { steps })
    }

    fn read(self, config: &PeftConfig, mut file: TensorFile) -> Result<(AdapterWeights, String)> {
        let mut hash = Sha256::new();
        hash.update(b"quiver adapter generation 1");
        let mut problems = Vec::new();
        let mut load = |(name, info): &(String, TensorInfo), hash: &mut Sha256| -> Result<FloatVec> {
            let bytes = file.bytes(info)?;
            hash_text(hash, &info.dtype.to_string());
            for dim in &info.shape {
                hash.update((*dim as u64).to_le_bytes());
            }
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(&bytes);
            // `step` has refused other dtypes.
            let values = FloatVec::read(info.dtype, &bytes).ok_or_else(|| invalid(wrong_dtype(name, info)))?;
            if let Some(at) = values.first_not_finite() {
                problems.push(format!("{name} has a NaN or infinity at position {at}"));
            }
            Ok(values)
        };
        let mut modules = Vec::with_capacity(self.steps.len());
        for step in &self.steps {
            hash_text(&mut hash, &step.path);
            hash.update((step.rank as u64).to_le_bytes());
            hash.update(step.scale.to_le_bytes());
            let mut a = load(&step.a, &mut hash)?;
            let b = load(&step.b, &mut hash)?;
            if let Some(e) = &step.e {
                a = times_rows(&a, &load(e, &mut hash)?);
            }
            let bias = step.bias.as_ref().map(|bias| load(bias, &mut hash)).transpose()?;
            let magnitude = step.magnitude.as_ref().map(|magnitude| load(magnitude, &mut hash)).transpose()?;
            let (layer, module, rank, scale) = (step.layer, step.module, step.rank, step.scale);
            modules.push(ModuleWeights { layer, module, rank, scale, a, b, bias, magnitude });
        }
        fail_on(problems)?;
        hash_text(&mut hash, if config.peft_type == PeftType::Lora { "lora" } else { "adalora" });
        let id = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        Ok((AdapterWeights { modules }, id))
    }
}

/// What a tensor is within its module.
enum TensorRole {
    A,
    B,
    E,
    Bias,
    Magnitude,
}

/// `base_model.model.<path>.lora_A[.<adapter>].weight` -> path, role and adapter. PEFT strips the adapter's name when it
/// saves; some trainers do not. AdaLoRA's tensors are parameters, without `.weight`.
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

/// Checks the tensors of one targeted module. `None` when there is nothing to read: pruned away, or a problem noted.
fn step(
    config: &PeftConfig,
    model: &ModelConfig,
    (layer, module): (usize, Module),
    path: &str,
    parts: &ModuleTensors,
    problems: &mut Vec<String>,
) -> Result<Option<ModulePlan>> {
    let before = problems.len();
    let (n, k) = module.shape(model);
    let (rank, scale) = config.rank_and_scale(path)?;
    if !scale.is_finite() {
        problems.push(format!("{path}: its scale, alpha over rank, is not a finite number"));
    }
    let ada = config.peft_type == PeftType::AdaLora;
    let wanted = [
        ("lora_A", parts.a, vec![rank, k], true, ""),
        ("lora_B", parts.b, vec![n, rank], true, ""),
        ("lora_E", parts.e, vec![rank, 1], ada, ""),
        ("lora_B.bias", parts.bias, vec![n], config.lora_bias, "lora_bias"),
        ("lora_magnitude_vector", parts.magnitude, vec![n], config.dora, "use_dora"),
    ];
    for (what, part, shape, needed, option) in wanted {
        match part {
            None if needed => problems.push(format!("{path}: targeted, but {what} is missing")),
            None => {}
            Some((name, _)) if !needed => problems.push(format!("{name}: not used, since {option} is false")),
            Some((name, info)) => {
                if info.shape != shape {
                    problems.push(wrong_shape(name, &info.shape, &shape));
                }
                if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                    problems.push(wrong_dtype(name, info));
                }
            }
        }
    }
    let own = |part: Option<(&str, &TensorInfo)>| part.map(|(name, info)| (name.to_owned(), info.clone()));
    match (own(parts.a), own(parts.b)) {
        (Some(a), Some(b)) if problems.len() == before && rank > 0 => {
            let (e, bias, magnitude) = (own(parts.e), own(parts.bias), own(parts.magnitude));
            Ok(Some(ModulePlan { layer, module, path: path.to_owned(), rank, scale, a, b, e, bias, magnitude }))
        }
        _ => Ok(None),
    }
}

/// `A * E` row by row, in f32 as PEFT computes it.
fn times_rows(a: &FloatVec, e: &FloatVec) -> FloatVec {
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
    format!("{name} has the shape {have:?}, and by the config and the model it must be {want:?}")
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
    Err(invalid(format!("the adapter does not fit: {list}")))
}

fn missing(dir: &Path, what: &str) -> Error {
    Error::not_found(format!("no adapter in {}: {what}", dir.display())).code("adapter_source_not_found")
}
