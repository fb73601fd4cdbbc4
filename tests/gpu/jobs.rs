//! Whole training jobs of each kind of adapter, on a GPU against the CPU.

use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use candle_core::Device;
use quiver::adapter::reader;
use quiver::engine::BackgroundWork;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use quiver::model::decoder::Decoder;
use quiver::model::weights::{Quantize, Weights};
use quiver::train::data::Example;
use quiver::train::job::{Command, Job, JobReport};
use quiver::train::spec::{AdaLoraConfig, JobSpec, LoraConfig, LrSchedule, OptimizerConfig};
use quiver::train::trainer::Trainer;

use crate::common::{device, relative_error};

/// Largest difference of a step's loss, in nats: activations and their gradients are bf16.
const LOSS: f64 = 0.003;
/// Relative error of the trained deltas. AdamW turns small gradients, rounding errors included, into steps as large as those of
/// large gradients.
const LEARNT: f64 = 0.06;

fn spec(lora: LoraConfig) -> JobSpec {
    JobSpec {
        epochs: 2,
        batch_size: 2,
        max_length: 64,
        seed: 7,
        lora,
        optimizer: OptimizerConfig {
            learning_rate: 0.01,
            schedule: LrSchedule::Constant,
            warmup_steps: 1,
            beta2: 0.99,
            ..OptimizerConfig::default()
        },
        checkpoint_every: Some(1),
        ..JobSpec::default()
    }
}

fn lora() -> LoraConfig {
    LoraConfig { r: 4, alpha: 8.0, ..LoraConfig::default() }
}

/// The result of a job.
struct Outcome {
    /// Of each step.
    losses: Vec<f64>,
    /// Before anything was learnt: the first step of a warm-up has rate 0.
    first: AdapterWeights,
    last: AdapterWeights,
}

/// Runs a job on sequences in which every token is determined by the previous one.
fn run(spec: &JobSpec, device: &Device) -> Outcome {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny/base");
    let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(fixtures) };
    let weights = Weights::load(&files, Some(Quantize::Nf4), device, |_| {}).unwrap();
    let model = Arc::new(Decoder::new(weights).unwrap());
    let (dir, reports, (commands, receiver)) =
        (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(Vec::new())), channel());
    let mut trainer = Trainer::new(model.clone(), receiver).unwrap();
    let example = |s: usize| {
        let n = 8 + s * 5 % 13;
        let tokens = (0..n).map(|i| ((s * 31 + i * (3 + s % 2)) % 97) as u32).collect();
        Example { tokens, trained: (0..n).map(|i| i >= 3).collect() }
    };
    let told = reports.clone();
    let job = Job {
        id: "job".into(),
        spec: spec.clone(),
        train: (0..12).map(example).collect(),
        valid: Vec::new(),
        dir: dir.path().to_owned(),
        provenance: Default::default(),
        from: None,
        resume: false,
        report: Box::new(move |report| told.lock().unwrap().push(report)),
    };
    commands.send(Command::Start(Box::new(job))).unwrap();
    while trainer.run_slice() | trainer.settle() {}
    let (mut losses, mut adapters) = (Vec::new(), Vec::new());
    for report in reports.lock().unwrap().iter() {
        match report {
            JobReport::Step(step) => losses.push(step.train_loss),
            JobReport::Checkpoint(checkpoint) => {
                adapters.push(reader::read(&checkpoint.dir, model.config()).unwrap().weights);
            }
            JobReport::Failed(error) => panic!("the job failed: {error}"),
            _ => {}
        }
    }
    assert_eq!(adapters.len(), losses.len(), "one a step");
    let (first, last) = (adapters.remove(0), adapters.pop().expect("more than one step"));
    Outcome { losses, first, last }
}

/// `s·B·A`, `[n, k]`.
fn delta(m: &ModuleWeights) -> Vec<f32> {
    let (a, b) = (m.a.to_f32(), m.b.to_f32());
    let k = a.len() / m.rank;
    let value = |i: usize| (0..m.rank).map(|r| b[i / k * m.rank + r] * a[r * k + i % k]).sum::<f32>() * m.scale;
    (0..b.len() / m.rank * k).map(value).collect()
}

/// Deltas of all modules of `like`, zeros where AdaLoRA's budget has left none.
fn deltas(of: &AdapterWeights, like: &AdapterWeights) -> Vec<f32> {
    let own = |m: &ModuleWeights| of.modules.iter().find(|o| (o.layer, o.module) == (m.layer, m.module)).map(delta);
    like.modules.iter().flat_map(|m| own(m).unwrap_or_else(|| vec![0.0; delta(m).len()])).collect()
}

fn magnitudes(of: &AdapterWeights) -> Vec<f32> {
    of.modules.iter().filter_map(|m| m.magnitude.as_ref()).flat_map(FloatVec::to_f32).collect()
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Trains on both, and compares losses and deltas, which are zero at the start.
fn compare(name: &str, lora: LoraConfig, steps: usize) -> (Outcome, Outcome) {
    let spec = spec(lora);
    let (cpu, gpu) = (run(&spec, &Device::Cpu), run(&spec, &device()));
    assert_eq!((cpu.losses.len(), gpu.losses.len()), (steps, steps));
    let farthest = cpu.losses.iter().zip(&gpu.losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let learnt = relative_error(&deltas(&gpu.last, &cpu.last), &wide(&deltas(&cpu.last, &cpu.last)));
    println!("{name}: losses {:?}, off by up to {farthest:.5}; deltas off by {learnt:.4}", cpu.losses);
    assert!(farthest < LOSS, "{name}: {:?}, on the CPU {:?}", gpu.losses, cpu.losses);
    assert!(learnt < LEARNT, "{name}: deltas off by {learnt}");
    (cpu, gpu)
}

#[test]
fn a_lora_is_that_of_the_cpu() {
    compare("lora", LoraConfig { dropout: 0.1, ..lora() }, 12);
}

#[test]
fn a_dora_is_that_of_the_cpu() {
    let (cpu, gpu) = compare("dora", LoraConfig { use_dora: true, ..lora() }, 12);
    let (start, own_start) = (magnitudes(&cpu.first), magnitudes(&gpu.first));
    // Rows of `down` do not end at a block of NF4, so that a GPU stores them in bf16.
    let norms = relative_error(&own_start, &wide(&start));
    assert!(!start.is_empty() && norms < 1e-3, "norms of the base: {norms}");
    let moved = |last: &AdapterWeights| magnitudes(last).iter().zip(&start).map(|(m, s)| m - s).collect::<Vec<_>>();
    let error = relative_error(&moved(&gpu.last), &wide(&moved(&cpu.last)));
    println!("magnitudes off by {error:.4} of how far they have moved");
    assert!(error < LEARNT, "magnitudes: {error}");
}

#[test]
fn an_adalora_is_that_of_the_cpu() {
    let adalora = AdaLoraConfig { init_r: 4, target_r: 2, tinit: 2, tfinal: 4, delta_t: 2, ..AdaLoraConfig::default() };
    let (cpu, gpu) = compare("adalora", LoraConfig { adalora: Some(adalora), ..lora() }, 12);
    let ranks = |of: &AdapterWeights| of.modules.iter().map(|m| m.rank).sum::<usize>();
    for Outcome { first, last, .. } in [&cpu, &gpu] {
        assert!(ranks(last) < ranks(first), "no rank was taken away");
    }
}
