//! Gradients of whole models, compared tensor by tensor with differences of the loss.

use candle_core::{Device, Tensor};
use quiver::arch::Module;
use quiver::train::adapter::DoraNorms;
use quiver::train::adapter::RankAllocator;
use quiver::train::adapter::{ParamLocation, TrainableParams};
use quiver::train::pass::{JobBatch, Pass, TrainBatch};
use quiver::train::spec::{AdaLoraConfig, JobSpec, LoraConfig};

use crate::{adapter, mean, model, run, spec};

/// Three sequences of different lengths, in which some tokens are not targets.
fn batch(vocab: usize) -> TrainBatch {
    let mut batch = TrainBatch::default();
    let lengths = [21, 1, 13];
    let targets: usize = lengths.iter().map(|&n| (1..n).filter(|i| i % 4 != 1).count()).sum();
    for (s, n) in lengths.into_iter().enumerate() {
        let tokens: Vec<u32> = (0..n).map(|i| ((i * i * 7 + i * 13 + s * 31 + 5) % vocab) as u32).collect();
        batch.push(&tokens, 1.0 / targets as f32, |i| i % 4 != 1);
    }
    batch
}

/// All trained tensors by name.
fn places(params: &TrainableParams) -> Vec<(String, ParamLocation)> {
    let mut places = Vec::new();
    for site in &params.sites {
        places.push((format!("{} {:?} A", site.layer, site.site), site.a));
        places.extend(site.e.map(|e| (format!("{} {:?} E", site.layer, site.site), e)));
        for part in &site.modules {
            places.push((format!("{} {:?} B", site.layer, part.module), part.b));
            places.extend(part.magnitude.map(|m| (format!("{} {:?} m", site.layer, part.module), m)));
        }
    }
    places
}

/// Sets values that are nowhere zero, so that no gradient vanishes.
fn randomise(params: &TrainableParams) {
    for (i, (name, place)) in places(params).into_iter().enumerate() {
        let (rows, columns) = place.shape;
        let wave = |j: usize| ((i * 131 + j * j * 17 + j * 29) % 199) as f32 / 99.5 - 1.0;
        let values: Vec<f32> =
            (0..rows * columns).map(|j| wave(j) * if name.ends_with('B') { 0.15 } else { 0.3 }).collect();
        let values = Tensor::from_vec(values, place.shape, &Device::Cpu).unwrap();
        let start = if name.ends_with('m') { params.value(&place).unwrap() } else { values.zeros_like().unwrap() };
        params.set_value(&place, &(start + values).unwrap()).unwrap();
    }
}

/// Checks for each tensor that the derivative of the loss along its gradient is the length of the gradient. Under DoRA this holds
/// only for magnitudes, because the other gradients treat norms as constants; those are compared with PEFT's numbers elsewhere.
fn check(name: &str, spec: JobSpec, dropout: Option<(f32, u64)>) {
    let model = model(name);
    let vocab = model.config().vocab_size;
    let params = TrainableParams::new(&spec, model.config(), None, &Device::Cpu).unwrap();
    let norms = spec.lora.use_dora.then(|| DoraNorms::new(&params, &model).unwrap());
    if let Some(norms) = &norms {
        norms.start(&params).unwrap();
    }
    randomise(&params);
    let loss = |gradient| {
        let adapter = adapter(&params, norms.as_ref(), &model);
        mean(&run(&model, batch(vocab), adapter, dropout, gradient))
    };
    loss(true);
    let mut checked = 0;
    if let Some(ada) = &spec.lora.adalora {
        // Without the orthogonality penalty, the gradient is that of the loss.
        let ada = AdaLoraConfig { orth_reg_weight: 0.0, ..ada.clone() };
        RankAllocator::new(&ada, 10, &params).unwrap().finish_gradients(&params).unwrap();
    }
    for (tensor, place) in places(&params).into_iter().filter(|(tensor, _)| norms.is_none() || tensor.ends_with('m')) {
        let (values, gradient) = (params.value(&place).unwrap().copy().unwrap(), params.grad(&place).unwrap());
        let gradient = gradient.copy().unwrap();
        let length = f64::from(gradient.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
        assert!(length > 1e-5, "{name} {tensor}: no gradient");
        // The step is long enough for the rounding of the loss and short enough for its curvature.
        let step = (0.004 / length).min(0.05);
        let at = |sign: f64| {
            let moved = (&values + (&gradient * (sign * step / length)).unwrap()).unwrap();
            params.set_value(&place, &moved).unwrap();
            loss(false)
        };
        let slope = (8.0 * (at(0.5) - at(-0.5)) - (at(1.0) - at(-1.0))) / (6.0 * step);
        params.set_value(&place, &values).unwrap();
        assert!((slope / length - 1.0).abs() < 4e-3, "{name} {tensor}: {slope} along a gradient of {length}");
        checked += 1;
    }
    assert!(checked >= model.config().num_layers * spec.lora.target_modules.len());
}

#[test]
fn of_lora_on_every_architecture() {
    for name in ["peft-tiny/base", "architectures/mistral", "architectures/qwen2", "architectures/qwen3"] {
        check(name, spec(), None);
    }
}

#[test]
fn through_dropout() {
    check("peft-tiny/base", spec(), Some((0.3, 5)));
}

/// Gradients are equal bit for bit, whether activations are saved or computed again.
#[test]
fn with_room_for_no_some_and_all_activations() {
    for (name, use_dora) in [("peft-tiny/base", true), ("architectures/qwen3", false)] {
        let spec = JobSpec { lora: LoraConfig { use_dora, ..spec().lora }, ..spec() };
        let model = model(name);
        let params = TrainableParams::new(&spec, model.config(), None, &Device::Cpu).unwrap();
        let norms = use_dora.then(|| DoraNorms::new(&params, &model).unwrap());
        randomise(&params);
        let gradients = |room| {
            params.clear_grads().unwrap();
            let adapter = adapter(&params, norms.as_ref(), &model);
            let part = JobBatch { batch: batch(model.config().vocab_size), adapter, dropout: Some((0.3, 5)) };
            let mut pass = Pass::new(model.clone(), vec![part], true, room);
            while !pass.advance().unwrap() {}
            params.groups.iter().map(|g| g.grads.to_vec1::<f32>().unwrap()).collect::<Vec<_>>()
        };
        let (none, all) = (gradients(0), gradients(usize::MAX));
        assert_eq!(none, all, "{name}");
        // Room for one block of two.
        assert_eq!(none, gradients(150_000), "{name}");
        assert!(none.iter().flatten().any(|g| *g != 0.0));
    }
}

#[test]
fn of_some_modules() {
    let lora = LoraConfig { target_modules: vec![Module::V, Module::Up], ..spec().lora };
    check("peft-tiny/base", JobSpec { lora, ..spec() }, None);
}

#[test]
fn of_dora() {
    let lora = LoraConfig { use_dora: true, ..spec().lora };
    check("architectures/qwen2", JobSpec { lora, ..spec() }, None);
    let lora = LoraConfig { use_dora: true, target_modules: vec![Module::K, Module::Down], ..spec().lora };
    check("peft-tiny/base", JobSpec { lora, ..spec() }, Some((0.3, 5)));
}

#[test]
fn of_adalora() {
    let adalora = AdaLoraConfig {
        init_r: 3,
        target_r: 2,
        tinit: 0,
        tfinal: 0,
        delta_t: 1,
        beta1: 0.85,
        beta2: 0.85,
        orth_reg_weight: 0.5,
    };
    let lora = LoraConfig { adalora: Some(adalora), ..spec().lora };
    check("peft-tiny/base", JobSpec { lora, ..spec() }, None);
}
