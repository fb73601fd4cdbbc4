//! Training: gradients, comparison with PEFT, and whole jobs.

mod goldens;
mod gradients;
mod jobs;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::model::decoder::Decoder;
use quiver::model::weights::Weights;
use quiver::train::adapter::{DoraNorms, TrainableAdapter, TrainableParams};
use quiver::train::pass::{JobBatch, Pass, TargetScores, TrainBatch};
use quiver::train::spec::{JobSpec, LoraConfig, LrSchedule, OptimizerConfig};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A fixture's model, in f32.
fn model(name: &str) -> Arc<Decoder> {
    let files = ModelFiles { name: name.into(), format: ModelFormat::HuggingFace(fixture(name)) };
    Arc::new(Decoder::new(Weights::load(&files, None, &Device::Cpu, |_| {}).unwrap()).unwrap())
}

/// One epoch of plain LoRA on all modules.
fn spec() -> JobSpec {
    JobSpec {
        epochs: 1,
        batch_size: 2,
        max_length: 64,
        seed: 7,
        lora: LoraConfig { r: 2, alpha: 4.0, ..LoraConfig::default() },
        optimizer: OptimizerConfig {
            learning_rate: 0.02,
            schedule: LrSchedule::Cosine,
            warmup_steps: 2,
            beta2: 0.99,
            max_grad_norm: 0.5,
            ..OptimizerConfig::default()
        },
        ..JobSpec::default()
    }
}

/// The adapter with the current values of `params`.
fn adapter(params: &TrainableParams, norms: Option<&DoraNorms>, model: &Decoder) -> Arc<TrainableAdapter> {
    Arc::new(TrainableAdapter::new(params, norms, model.config(), DType::F32).unwrap())
}

/// Runs a whole pass of one job. Gradients are added to those of the adapter.
fn run(
    model: &Arc<Decoder>,
    batch: TrainBatch,
    adapter: Arc<TrainableAdapter>,
    dropout: Option<(f32, u64)>,
    gradient: bool,
) -> TargetScores {
    let mut pass = Pass::new(model.clone(), vec![JobBatch { batch, adapter, dropout }], gradient, 0);
    while !pass.advance().unwrap() {}
    pass.scores().pop().unwrap()
}

/// Mean of the targets' negative log-likelihoods.
fn mean(scores: &TargetScores) -> f64 {
    scores.nll.iter().map(|&nll| f64::from(nll)).sum::<f64>() / scores.nll.len() as f64
}
