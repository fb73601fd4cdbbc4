//! Training steps of each method, compared with losses, gradient norms and values of PEFT (`fixtures/training/make.py`).

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use quiver::arch::Module;
use quiver::train::adapter::DoraNorms;
use quiver::train::adapter::RankAllocator;
use quiver::train::adapter::{ParamLocation, TrainableParams};
use quiver::train::optim::Optimizer;
use quiver::train::pass::TrainBatch;
use quiver::train::spec::{self, AdaLoraConfig, JobSpec, LoraConfig};

use crate::{adapter, fixture, mean, model, run, spec};

/// Lengths of the sequences of `make.py`, and how many first tokens of each are not trained on.
const SEQUENCES: [(usize, usize); 4] = [(19, 7), (12, 3), (24, 10), (9, 1)];

fn batch(step: usize) -> TrainBatch {
    let rows = [2 * step % 4, (2 * step + 1) % 4];
    let targets: usize = rows.iter().map(|&s| SEQUENCES[s].0 - SEQUENCES[s].1).sum();
    let mut batch = TrainBatch::default();
    for s in rows {
        let (n, prompt) = SEQUENCES[s];
        let tokens: Vec<u32> = (0..n).map(|i| ((i * i * 7 + i * 13 + s * 31 + 5) % 97) as u32).collect();
        batch.push(&tokens, 1.0 / targets as f32, |i| i >= prompt);
    }
    batch
}

/// Name in PEFT, location and rows of each tensor. A and E of a site are stacked, so that a module has some of their rows.
fn named(params: &TrainableParams) -> Vec<(String, ParamLocation, std::ops::Range<usize>)> {
    let mut named = Vec::new();
    for site in &params.sites {
        for (i, module) in site.modules.iter().enumerate() {
            let path = module.module.path(site.layer);
            let rows = i * params.rank..(i + 1) * params.rank;
            named.push((format!("{path}.lora_A"), site.a, rows.clone()));
            named.extend(site.e.map(|e| (format!("{path}.lora_E"), e, rows)));
            named.push((format!("{path}.lora_B"), module.b, 0..module.n));
            named.extend(module.magnitude.map(|m| (format!("{path}.lora_magnitude_vector"), m, 0..module.n)));
        }
    }
    named
}

fn golden(name: &str, lora: LoraConfig, weight_decay: f32, steps: usize) {
    let model = model("peft-tiny/base");
    let spec = JobSpec { lora, optimizer: spec::OptimizerConfig { weight_decay, ..spec().optimizer }, ..spec() };
    let file = fixture(&format!("training/{name}.safetensors"));
    let golden: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let params = TrainableParams::new(&spec, model.config(), None, &Device::Cpu).unwrap();
    let named = named(&params);
    assert_eq!(golden.len(), 2 * named.len() + 2, "every tensor is compared");
    for (tensor, location, rows) in &named {
        let whole = params.value(location).unwrap().copy().unwrap();
        let initial = golden[&format!("initial.{tensor}")].reshape((rows.len(), location.shape.1)).unwrap();
        whole.slice_set(&initial, 0, rows.start).unwrap();
        params.set_value(location, &whole).unwrap();
    }
    let norms = spec.lora.use_dora.then(|| DoraNorms::new(&params, &model).unwrap());
    let mut allocator = spec.lora.adalora.as_ref().map(|ada| RankAllocator::new(ada, steps, &params).unwrap());
    let mut optimizer = Optimizer::new(&spec.optimizer, spec.lora.loraplus_lr_ratio, &params).unwrap();
    let (mut losses, mut norms_of_gradients, mut kept) = (Vec::new(), Vec::new(), None);
    for step in 0..steps {
        params.clear_grads().unwrap();
        let scores = run(&model, batch(step), adapter(&params, norms.as_ref(), &model), None, true);
        losses.push(mean(&scores) as f32);
        if let Some(allocator) = &allocator {
            allocator.finish_gradients(&params).unwrap();
        }
        let taken = optimizer.step(&params, step + 1, steps).unwrap();
        norms_of_gradients.push(taken.grad_norm);
        if let Some(allocator) = &mut allocator {
            allocator.allocate(&params, step, taken.clip, &mut kept).unwrap();
        }
    }
    let close = |what: &str, have: &[f32], want: &Tensor, tolerance: f32| {
        let want = want.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(have.len(), want.len());
        for (i, (have, want)) in have.iter().zip(want).enumerate() {
            assert!((have - want).abs() < tolerance, "{name}: {what} {i} is {have}, PEFT has {want}");
        }
    };
    close("loss", &losses, &golden["loss"], 2e-5);
    close("norm", &norms_of_gradients, &golden["grad_norm"], 2e-4);
    for (tensor, location, rows) in &named {
        let have = params.value(location).unwrap().narrow(0, rows.start, rows.len()).unwrap();
        let have = have.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        // A step changes values by 0.02; the tolerance is a hundredth of that.
        close(tensor, &have, &golden[&format!("final.{tensor}")], 2e-4);
    }
}

#[test]
fn lora() {
    golden("lora", spec().lora, 0.0, 6);
}

#[test]
fn rslora() {
    let target_modules = vec![Module::Q, Module::Down];
    golden("rslora", LoraConfig { target_modules, use_rslora: true, ..spec().lora }, 0.1, 6);
}

#[test]
fn loraplus() {
    let target_modules = vec![Module::V, Module::O, Module::Up];
    golden("loraplus", LoraConfig { target_modules, loraplus_lr_ratio: Some(8.0), ..spec().lora }, 0.1, 6);
}

#[test]
fn dora() {
    golden("dora", LoraConfig { use_dora: true, ..spec().lora }, 0.0, 6);
}

#[test]
fn adalora() {
    let adalora = AdaLoraConfig {
        init_r: 3,
        target_r: 2,
        tinit: 2,
        tfinal: 4,
        delta_t: 2,
        beta1: 0.8,
        beta2: 0.9,
        orth_reg_weight: 0.3,
    };
    let target_modules = vec![Module::Q, Module::Gate, Module::Down];
    golden("adalora", LoraConfig { target_modules, alpha: 6.0, adalora: Some(adalora), ..spec().lora }, 0.0, 12);
}
