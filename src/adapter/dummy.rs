//! Random adapters in PEFT's format, for benchmarks with any number of adapters.

use std::borrow::Cow;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use safetensors::{Dtype, View, serialize_to_file};
use serde_json::json;

use crate::arch::{ModelConfig, Module};
use crate::model::weights::dummy::uniform;
use crate::{Error, Result};

/// `lora_alpha` over the rank.
const SCALE: usize = 2;

/// Writes an adapter of each of the ranks to `dir/dummy-0000`, `dir/dummy-0001`, ..., on all cores. Errors: `dir` cannot be written.
pub(crate) fn write_all(dir: &Path, model: &ModelConfig, modules: &[Module], ranks: &[usize]) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        loop {
            let i = next.fetch_add(1, Relaxed);
            let Some(&rank) = ranks.get(i) else { return Ok(()) };
            write(&dir.join(format!("dummy-{i:04}")), model, modules, rank)?;
        }
    };
    let failed = |_| Error::internal("a writing thread panicked");
    thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(ranks.len());
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(failed)?)
    })
}

/// Writes a bf16 adapter of one rank that targets these modules. Both matrices are random, seeded by the directory's name. A
/// preserves the magnitude of its input and B is small, so that outputs change but stay close to the base's. Errors: `dir`
/// cannot be written.
pub fn write(dir: &Path, model: &ModelConfig, modules: &[Module], rank: usize) -> Result<()> {
    let failed = |e: &dyn std::fmt::Display| Error::invalid(format!("{}: {e}", dir.display()));
    std::fs::create_dir_all(dir).map_err(|e| failed(&e))?;
    let mut names: Vec<String> = Vec::new();
    let mut tensors = Vec::new();
    let seed = dir.file_name().unwrap_or_default().to_string_lossy();
    for module in modules {
        let layers = if *module == Module::LmHead { 1 } else { model.num_layers };
        names.push(module.path(0).rsplit('.').next().unwrap_or_default().to_string());
        for layer in 0..layers {
            let (n, k) = module.shape(model);
            for (part, shape, deviation) in [("A", [rank, k], 1.0 / (k as f32).sqrt()), ("B", [n, rank], 0.01)] {
                let name = format!("base_model.model.{}.lora_{part}.weight", module.path(layer));
                tensors.push((name.clone(), RandomTensor { seed: format!("{seed} {name}"), shape, deviation }));
            }
        }
    }
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": SCALE * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": names, "inference_mode": true,
    });
    std::fs::write(dir.join("adapter_config.json"), format!("{config:#}\n")).map_err(|e| failed(&e))?;
    serialize_to_file(tensors, None, &dir.join("adapter_model.safetensors")).map_err(|e| failed(&e))
}

/// A random tensor, generated when it is written.
struct RandomTensor {
    seed: String,
    shape: [usize; 2],
    /// Standard deviation.
    deviation: f32,
}

impl View for RandomTensor {
    fn dtype(&self) -> Dtype {
        Dtype::BF16
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(uniform(&self.seed, self.shape[0] * self.shape[1], self.deviation))
    }

    fn data_len(&self) -> usize {
        2 * self.shape[0] * self.shape[1]
    }
}
