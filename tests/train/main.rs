//! Training: gradients, PEFT's numbers, and the life of jobs.

mod goldens;
mod gradients;
mod jobs;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};
use quiver::arch::Module;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::model::decoder::Decoder;
use quiver::model::weights::Weights;
use quiver::train::adapter::DoraNorms;
use quiver::train::adapter::TrainableAdapter;
use quiver::train::adapter::TrainableParams;
use quiver::train::pass::{JobBatch, Pass, TargetScores, TrainBatch};
use quiver::train::spec::{JobSpec, LoraConfig, LoraInit, LrSchedule, OptimizerConfig, OptimizerKind};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A fixture's model, in f32.
fn model(name: &str) -> Arc<Decoder> {
    let files = ModelFiles { name: name.into(), format: ModelFormat::HuggingFace(fixture(name)) };
    Arc::new(Decoder::new(Weights::load(&files, None, &Device::Cpu, |_| {}).unwrap()).unwrap())
}

/// LoRA on all linears.
fn spec() -> JobSpec {
    JobSpec {
        epochs: 1,
        max_steps: None,
        batch_size: 2,
        gradient_accumulation: 1,
        max_length: 64,
        packing: false,
        train_on_inputs: false,
        seed: 7,
        lora: LoraConfig {
            r: 2,
            alpha: 4.0,
            dropout: 0.0,
            target_modules: Module::BLOCK.to_vec(),
            use_rslora: false,
            loraplus_lr_ratio: None,
            use_dora: false,
            init: LoraInit::Default,
            adalora: None,
        },
        optimizer: OptimizerConfig {
            learning_rate: 0.02,
            schedule: LrSchedule::Cosine,
            warmup_steps: 2,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.99,
            eps: 1e-8,
            max_grad_norm: 0.5,
            kind: OptimizerKind::Adamw,
        },
        checkpoint_every: None,
        eval_every: None,
        early_stopping: None,
        from_checkpoint: None,
    }
}

/// What the values of `params` are now.
fn adapter(params: &TrainableParams, norms: Option<&DoraNorms>, model: &Decoder) -> Arc<TrainableAdapter> {
    Arc::new(TrainableAdapter::new(params, norms, model.config(), DType::F32).unwrap())
}

/// Runs a whole pass of one job; gradients go to where the adapter has them.
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
