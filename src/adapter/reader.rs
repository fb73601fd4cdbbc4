//! Reads an adapter in any layout into checked weights at their exact ranks.
//!
//! The reader of a layout translates its config and the names of its tensors into PEFT's ([`AdapterFiles`]). What follows is the
//! same for all: every tensor must be used and every targeted module must be present; otherwise the load fails and lists the
//! problems. An adapter that loads therefore has its full effect.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::base_check::BaseClaim;
use super::layout::Layout;
use super::peft::{ModulePlan, Planner, fail_on, wrong_dtype};
use super::peft_config::{PeftConfig, PeftType, invalid};
use super::tensor_file::{StoredTensor, TensorFile};
use super::{gguf, mlx, peft};
use crate::Result;
use crate::arch::ModelConfig;
use crate::hub;
use crate::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};

/// An adapter as it was read.
pub struct ReadAdapter {
    /// Its weights.
    pub weights: AdapterWeights,
    /// Its generation id: a hash of what it computes (modules, ranks, scales, tensors), so that options without effect do not
    /// change it.
    pub id: String,
    /// The base that it says it was trained on.
    pub base: BaseClaim,
}

/// The config and the tensors of an adapter, in PEFT's terms.
pub(super) struct AdapterFiles {
    /// What it computes.
    pub(super) config: PeftConfig,
    /// The base that it says it was trained on.
    pub(super) base: BaseClaim,
    /// Its tensors by PEFT's names.
    pub(super) tensors: TensorFile,
}

/// Reads and checks the adapter in `source`, a folder or a GGUF file, for a model.
///
/// Error codes: `adapter_source_not_found` for missing files, `adapter_unsupported` for options and kinds of files that are not
/// supported, `adapter_invalid` for files that contradict each other or the model. Each message names the option or the tensor.
pub fn read(source: &Path, model: &ModelConfig) -> Result<ReadAdapter> {
    let AdapterFiles { config, base, tensors } = match Layout::of(source)? {
        Layout::Peft(config) => peft::open(source, config)?,
        Layout::Mlx(config) => mlx::open(source, &config, model)?,
        Layout::Gguf(file) => gguf::open(&file, model)?,
    };
    let plans = Planner::new(&config, model).plan(&tensors.tensors)?;
    let mut reader = ModuleReader::new(tensors);
    let modules = plans.into_iter().map(|plan| reader.read(plan)).collect::<Result<_>>()?;
    Ok(ReadAdapter { weights: AdapterWeights { modules }, id: reader.finish(config.peft_type)?, base })
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

    fn tensor(&mut self, stored: &StoredTensor) -> Result<FloatVec> {
        let bytes = self.file.bytes(stored)?;
        hash_text(&mut self.hash, &stored.dtype.to_string());
        for dim in &stored.shape {
            self.hash.update((*dim as u64).to_le_bytes());
        }
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(&bytes);
        // The planner has rejected other dtypes.
        let values = FloatVec::read(stored.dtype, &bytes).ok_or_else(|| invalid(wrong_dtype(stored)))?;
        if let Some(at) = values.first_not_finite() {
            self.problems.push(format!("{} has a NaN or infinity at position {at}", stored.label));
        }
        Ok(values)
    }

    /// The generation id of the modules that were read. Errors: a value is not finite.
    fn finish(mut self, peft_type: PeftType) -> Result<String> {
        fail_on(self.problems)?;
        hash_text(&mut self.hash, if peft_type == PeftType::Lora { "lora" } else { "adalora" });
        Ok(hub::hex(&self.hash.finalize()[..8]))
    }
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
