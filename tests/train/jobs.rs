//! Training jobs: alone, several at once, paused and resumed, and the files they write.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::{Device, Tensor};
use quiver::Error;
use quiver::adapter::reader;
use quiver::arch::Module;
use quiver::engine::BackgroundWork;
use quiver::lora::slots::{SlotPool, SlotWeights};
use quiver::lora::weights::AdapterWeights;
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::ops::batch::Batch;
use quiver::train::data::Example;
use quiver::train::job::{Checkpoint, Command, Job, JobReport, StepMetrics, Validation};
use quiver::train::spec::{AdaLoraConfig, JobSpec, LoraConfig, OptimizerConfig, OptimizerKind};
use quiver::train::trainer::Trainer;
use tempfile::TempDir;

use crate::{model, spec};

/// A trainer on the tiny model, and the reports of its jobs.
struct Harness {
    model: Arc<Decoder>,
    trainer: Trainer,
    commands: Sender<Command>,
    dir: TempDir,
    reports: Arc<Mutex<Vec<(String, JobReport)>>>,
}

impl Harness {
    fn new() -> Self {
        let (commands, receiver) = channel();
        let model = model("peft-tiny/base");
        let trainer = Trainer::new(model.clone(), receiver).unwrap();
        Self { model, trainer, commands, dir: TempDir::new().unwrap(), reports: Arc::default() }
    }

    /// A job on `examples(12)` with its own directory.
    fn job(&self, id: &str, spec: JobSpec) -> Job {
        let (reports, name) = (self.reports.clone(), id.to_owned());
        let dir = self.dir.path().join(id);
        std::fs::create_dir_all(&dir).unwrap();
        Job {
            id: id.into(),
            spec,
            train: examples(12),
            valid: Vec::new(),
            dir,
            provenance: Default::default(),
            from: None,
            resume: false,
            report: Box::new(move |report| reports.lock().unwrap().push((name.clone(), report))),
        }
    }

    fn start(&self, job: Job) {
        self.commands.send(Command::Start(Box::new(job))).unwrap();
    }

    /// Runs slices until nothing is left to do or `until` is true. Before each call of `until`, the reports and files of the slice
    /// are complete.
    fn run(&mut self, mut until: impl FnMut(&Self) -> bool) {
        while self.trainer.run_slice() | self.trainer.settle() && !until(self) {}
    }

    /// Replaces the trainer, as after a kill.
    fn restart(&mut self) {
        let (commands, receiver) = channel();
        (self.commands, self.trainer) = (commands, Trainer::new(self.model.clone(), receiver).unwrap());
    }

    fn finish(&mut self) {
        self.run(|_| false);
    }

    fn reports(&self, id: &str) -> Vec<JobReport> {
        self.reports.lock().unwrap().iter().filter(|(name, _)| name == id).map(|(_, report)| report.clone()).collect()
    }

    fn last(&self, id: &str) -> JobReport {
        self.reports(id).pop().expect("a report")
    }

    fn error(&self, id: &str) -> Error {
        match self.last(id) {
            JobReport::Failed(error) => error,
            other => panic!("{id} is {other:?}"),
        }
    }

    fn steps(&self, id: &str) -> Vec<StepMetrics> {
        let step =
            |report| if let JobReport::Step(step) = report { Some(StepMetrics { seconds: 0.0, ..step }) } else { None };
        self.reports(id).into_iter().filter_map(step).collect()
    }

    fn validations(&self, id: &str) -> Vec<Validation> {
        let valid = |report| if let JobReport::Validation(v) = report { Some(v) } else { None };
        self.reports(id).into_iter().filter_map(valid).collect()
    }

    fn checkpoints(&self, id: &str) -> Vec<Checkpoint> {
        let checkpoint = |report| if let JobReport::Checkpoint(c) = report { Some(c) } else { None };
        self.reports(id).into_iter().filter_map(checkpoint).collect()
    }

    /// The weights of the job's last checkpoint. The job must have succeeded.
    fn result(&self, id: &str) -> AdapterWeights {
        assert!(matches!(self.last(id), JobReport::Succeeded), "{id}: {:?}", self.last(id));
        let checkpoint = self.checkpoints(id).pop().expect("a checkpoint");
        reader::read(&checkpoint.dir, self.model.config()).unwrap().weights
    }
}

/// Sequences in which each token follows from the one before. The first three tokens are not trained on.
fn examples(count: usize) -> Vec<Example> {
    let example = |s: usize| {
        let n = 8 + s * 5 % 13;
        let tokens = (0..n).map(|i| ((s * 31 + i * (3 + s % 2)) % 97) as u32).collect();
        Example { tokens, trained: (0..n).map(|i| i >= 3).collect() }
    };
    (0..count).map(example).collect()
}

fn dropout() -> JobSpec {
    JobSpec { epochs: 2, lora: LoraConfig { dropout: 0.2, ..spec().lora }, ..spec() }
}

#[test]
fn a_job_learns_reports_and_writes_checkpoints() {
    let mut harness = Harness::new();
    let optimizer = OptimizerConfig { max_grad_norm: 10.0, ..spec().optimizer };
    let mut job = harness.job("a", JobSpec { epochs: 8, batch_size: 3, gradient_accumulation: 2, optimizer, ..spec() });
    job.provenance.insert("base_model_name_or_path".into(), "tiny".into());
    harness.start(job);
    harness.finish();
    assert!(matches!(harness.reports("a")[0], JobReport::Started { steps: 16, done: 0, parameters: 4480 }));
    let steps = harness.steps("a");
    assert_eq!(steps.iter().map(|s| s.step).collect::<Vec<_>>(), (1..=16).collect::<Vec<_>>());
    let all: usize = examples(12).iter().map(|e| e.tokens.len()).sum();
    assert_eq!((steps[0].tokens + steps[1].tokens, steps[0].trained_tokens + steps[1].trained_tokens), (all, all - 36));
    assert!(steps[15].train_loss < steps[0].train_loss - 0.3, "{steps:?}");
    assert!(steps[15].train_mean_token_accuracy > 0.2, "{steps:?}");
    // One checkpoint an epoch, each in its own directory. The state stays until the receiver of the reports removes it.
    let checkpoints = harness.checkpoints("a");
    assert_eq!(checkpoints.iter().map(|c| c.step).collect::<Vec<_>>(), (1..=8).map(|i| 2 * i).collect::<Vec<_>>());
    let mut names: Vec<_> =
        std::fs::read_dir(harness.dir.path().join("a")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert!(names.len() == 9 && names[0] == "state.safetensors", "{names:?}");
    assert_eq!(checkpoints[7].dir.file_name().unwrap(), "step-16");
    let config = std::fs::read_to_string(checkpoints[7].dir.join("adapter_config.json")).unwrap();
    assert!(config.contains(r#""base_model_name_or_path": "tiny""#), "{config}");
    assert_eq!(harness.result("a").modules.len(), 14);
}

/// The server's log-probabilities of a text under an adapter.
fn served(model: &Decoder, weights: &AdapterWeights, tokens: &[u32]) -> Vec<f32> {
    let mut kv = KvCache::new(model.config(), 8, &Device::Cpu).unwrap();
    let mut slots = SlotPool::default();
    let slot = slots.insert(SlotWeights::from_adapter(weights, model.config()));
    let mut batch = Batch::default();
    batch.push(tokens, 0, &(0..8).collect::<Vec<_>>(), KvCache::BLOCK_SIZE, &[(slot, 1.0)]);
    batch.logit_rows = (0..tokens.len() as u32 - 1).collect();
    let logits = model.forward(&batch, &mut kv, &slots).unwrap().logits.to_vec2::<f32>().unwrap();
    let logprob = |(row, &next): (&Vec<f32>, &u32)| {
        let sum: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        (f64::from(row[next as usize]) - sum.ln()) as f32
    };
    logits.iter().zip(&tokens[1..]).map(logprob).collect()
}

#[test]
fn served_checkpoints_have_the_trainers_log_probabilities() {
    let adalora = AdaLoraConfig { init_r: 4, target_r: 2, tinit: 1, tfinal: 2, ..AdaLoraConfig::default() };
    let kinds = [
        ("lora", spec().lora),
        ("rslora", LoraConfig { use_rslora: true, target_modules: vec![Module::Q, Module::Up], ..spec().lora }),
        ("adalora", LoraConfig { adalora: Some(adalora), ..spec().lora }),
        ("dora", LoraConfig { use_dora: true, ..spec().lora }),
    ];
    let mut harness = Harness::new();
    for (id, lora) in &kinds {
        harness.start(harness.job(id, JobSpec { epochs: 2, lora: lora.clone(), ..spec() }));
    }
    harness.finish();
    for (id, _) in &kinds {
        let (weights, checkpoint) = (harness.result(id), harness.checkpoints(id).pop().unwrap());
        let served = served(&harness.model, &weights, &checkpoint.probe.tokens);
        let trained = &checkpoint.probe.logprobs;
        assert_eq!(served.len(), trained.len());
        for (a, b) in served.iter().zip(trained) {
            assert!((a - b).abs() < 1e-4, "{id}: served {a}, trained {b}");
        }
        let base = self::served(&harness.model, &AdapterWeights::default(), &checkpoint.probe.tokens);
        assert!(base.iter().zip(trained).any(|(a, b)| (a - b).abs() > 0.01), "{id} has an effect");
    }
    let ranks: Vec<usize> = harness.result("adalora").modules.iter().map(|m| m.rank).collect();
    assert!(ranks.iter().sum::<usize>() <= 14 * 2 + 14 && ranks.iter().min() < ranks.iter().max(), "{ranks:?}");
}

#[test]
fn jobs_that_run_together_do_the_same_as_alone() {
    let specs = [
        ("a", dropout()),
        (
            "b",
            JobSpec {
                epochs: 1,
                lora: LoraConfig { r: 3, target_modules: vec![Module::V, Module::Down], ..spec().lora },
                ..spec()
            },
        ),
        (
            "c",
            JobSpec {
                epochs: 2,
                batch_size: 1,
                gradient_accumulation: 3,
                lora: LoraConfig { use_dora: true, ..spec().lora },
                ..spec()
            },
        ),
    ];
    let mut together = Harness::new();
    let prepare = |harness: &Harness, (id, spec): &(&str, JobSpec)| {
        let mut job = harness.job(id, spec.clone());
        job.valid = examples(5);
        harness.start(job);
    };
    specs.iter().for_each(|job| prepare(&together, job));
    together.finish();
    for job in &specs {
        let mut alone = Harness::new();
        prepare(&alone, job);
        alone.finish();
        let id = job.0;
        assert_eq!(alone.steps(id), together.steps(id), "{id}");
        assert_eq!(alone.validations(id), together.validations(id), "{id}");
        let probes = |h: &Harness| h.checkpoints(id).into_iter().map(|c| c.probe).collect::<Vec<_>>();
        assert_eq!(probes(&alone), probes(&together), "{id}");
        assert!(files_equal(&alone.checkpoints(id)[0].dir, &together.checkpoints(id)[0].dir), "{id}");
    }
}

fn files_equal(a: &Path, b: &Path) -> bool {
    let read = |dir: &Path, name| std::fs::read(dir.join(name)).unwrap();
    ["adapter_config.json", "adapter_model.safetensors"].iter().all(|name| read(a, name) == read(b, name))
}

#[test]
fn a_paused_job_resumes_bit_for_bit() {
    let adalora = AdaLoraConfig { init_r: 3, target_r: 1, tfinal: 1, ..AdaLoraConfig::default() };
    let eight_bits = OptimizerConfig { kind: OptimizerKind::Adamw8bit, ..spec().optimizer };
    let every = JobSpec { checkpoint_every: Some(2), eval_every: Some(1), ..dropout() };
    let specs = [
        ("f32", every.clone()),
        ("8bit", JobSpec { optimizer: eight_bits, lora: LoraConfig { r: 32, ..dropout().lora }, ..every.clone() }),
        ("adalora", JobSpec { lora: LoraConfig { adalora: Some(adalora), ..spec().lora }, ..every.clone() }),
        ("dora", JobSpec { lora: LoraConfig { use_dora: true, ..spec().lora }, ..every }),
    ];
    for (id, spec) in specs {
        let run = |pauses: &[usize]| {
            let mut harness = Harness::new();
            let prepare = |harness: &Harness| {
                let mut job = harness.job(id, spec.clone());
                job.valid = examples(4);
                job
            };
            harness.start(prepare(&harness));
            for &step in pauses {
                harness.run(|h| h.steps(id).len() == step);
                // Pause in the middle of a pass.
                (0..3).for_each(|_| assert!(harness.trainer.run_slice()));
                harness.commands.send(Command::Pause(id.into())).unwrap();
                harness.finish();
                assert!(matches!(harness.last(id), JobReport::Paused), "{:?}", harness.last(id));
                harness.start(Job { resume: true, ..prepare(&harness) });
            }
            harness.finish();
            harness
        };
        let (whole, parts) = (run(&[]), run(&[1, 4, 5]));
        assert_eq!(whole.steps(id).len(), 12);
        assert_eq!(whole.steps(id), parts.steps(id), "{id}");
        assert_eq!(whole.validations(id), parts.validations(id), "{id}");
        assert_eq!(whole.checkpoints(id).len(), parts.checkpoints(id).len());
        for (a, b) in whole.checkpoints(id).iter().zip(parts.checkpoints(id)) {
            assert!(a.probe == b.probe && files_equal(&a.dir, &b.dir), "{id} at step {}", a.step);
        }
    }
}

#[test]
fn a_resumed_job_with_nothing_left_to_do_ends() {
    let mut harness = Harness::new();
    let spec = JobSpec { checkpoint_every: Some(2), ..dropout() };
    harness.start(harness.job("a", spec.clone()));
    harness.run(|h| h.checkpoints("a").len() == 1);
    harness.commands.send(Command::Pause("a".into())).unwrap();
    harness.finish();
    harness.start(Job { resume: true, ..harness.job("a", JobSpec { max_steps: Some(2), ..spec }) });
    harness.finish();
    harness.result("a");
    assert_eq!((harness.steps("a").len(), harness.checkpoints("a").len()), (2, 1));
    // The checkpoint is reported again, as the first report may have been lost.
    let (made, reports) = (&harness.checkpoints("a")[0], harness.reports("a"));
    let JobReport::Resumed(again) = &reports[reports.len() - 2] else { panic!("{reports:?}") };
    assert_eq!((again.step, &again.dir, &again.probe), (2, &made.dir, &made.probe));
}

#[test]
fn accumulating_is_the_same_as_a_larger_batch() {
    let mut harness = Harness::new();
    harness.start(harness.job("large", JobSpec { batch_size: 4, ..spec() }));
    harness.start(harness.job("small", JobSpec { batch_size: 2, gradient_accumulation: 2, ..spec() }));
    harness.start(
        harness.job(
            "packed",
            JobSpec { batch_size: 1, gradient_accumulation: 9, packing: true, max_length: 64, ..spec() },
        ),
    );
    harness.start(harness.job("whole", JobSpec { batch_size: 12, ..spec() }));
    harness.finish();
    for (a, b) in [("large", "small"), ("whole", "packed")] {
        let (a, b) = (harness.steps(a), harness.steps(b));
        assert!(!a.is_empty() && a.len() == b.len());
        for (a, b) in a.iter().zip(&b) {
            assert_eq!((a.tokens, a.trained_tokens), (b.tokens, b.trained_tokens));
            assert!(
                (a.train_loss - b.train_loss).abs() < 1e-4 && (a.grad_norm - b.grad_norm).abs() < 1e-4,
                "{a:?} {b:?}"
            );
        }
    }
}

#[test]
fn a_failing_job_reports_why_and_does_not_disturb_the_others() {
    let mut harness = Harness::new();
    let optimizer = OptimizerConfig { learning_rate: 1e30, max_grad_norm: 1e30, warmup_steps: 0, ..spec().optimizer };
    harness.start(harness.job("diverges", JobSpec { epochs: 4, optimizer, ..spec() }));
    let mut nothing = harness.job("nothing", spec());
    nothing.train.iter_mut().for_each(|e| e.trained.fill(false));
    harness.start(nothing);
    let mut stranger = harness.job("stranger", spec());
    stranger.train[3].tokens[2] = 97;
    harness.start(stranger);
    let mut nowhere = harness.job("nowhere", spec());
    nowhere.dir = harness.dir.path().join("nothing/there/at/all");
    std::fs::write(harness.dir.path().join("nothing/there"), "a file").unwrap();
    harness.start(nowhere);
    let stateless = harness.job("stateless", spec());
    std::fs::create_dir(stateless.dir.join("state.safetensors")).unwrap();
    harness.start(stateless);
    harness.start(harness.job("good", spec()));
    harness.start(harness.job("good", spec()));
    harness.finish();
    let error = harness.error("diverges");
    assert!(error.code == Some("training_diverged") && error.message.contains("a lower learning rate"), "{error}");
    assert!(harness.error("nothing").message.contains("no example has a token to train on"));
    assert!(harness.error("stranger").message.contains("token id 97"));
    assert!(harness.error("nowhere").message.contains("adapter cannot be written"));
    assert!(harness.error("stateless").message.contains("state cannot be written"));
    let reports = harness.reports("good");
    let ends = reports.iter().filter(|r| matches!(r, JobReport::Succeeded)).count();
    assert!(ends == 1 && reports.iter().any(|r| matches!(r, JobReport::Failed(e) if e.message.contains("already"))));
    assert!(!harness.trainer.run_slice());
}

#[test]
fn a_hanging_disk_delays_no_slice_and_changes_no_result() {
    let spec = JobSpec { checkpoint_every: Some(2), ..dropout() };
    let mut plain = Harness::new();
    plain.start(plain.job("a", spec.clone()));
    plain.finish();

    let mut harness = Harness::new();
    let (release, released) = channel::<()>();
    let Job { mut report, .. } = harness.job("a", spec.clone());
    let hangs = move |told: JobReport| {
        if matches!(told, JobReport::Checkpoint(_)) {
            // Blocks until the test drops `release`, or fails after 20 s if a slice waits for it.
            assert_eq!(released.recv_timeout(Duration::from_secs(20)), Err(RecvTimeoutError::Disconnected));
        }
        report(told);
    };
    harness.start(Job { report: Box::new(hangs), ..harness.job("a", spec) });
    while harness.trainer.run_slice() {}
    assert!(harness.steps("a").len() <= 2, "later reports wait");
    drop(release);
    assert!(harness.trainer.settle(), "the job has not ended");
    assert_eq!(harness.steps("a").len(), 4, "it continues up to the next checkpoint");
    harness.finish();

    let order = |harness: &Harness| {
        let word = |report: JobReport| match report {
            JobReport::Step(m) => format!("step {}", m.step),
            JobReport::Checkpoint(checkpoint) => format!("checkpoint {}", checkpoint.step),
            other => format!("{other:?}"),
        };
        harness.reports("a").into_iter().map(word).collect::<Vec<_>>()
    };
    assert_eq!(order(&harness), order(&plain));
    assert_eq!(harness.checkpoints("a").len(), 6);
    for (a, b) in harness.checkpoints("a").iter().zip(plain.checkpoints("a")) {
        assert!(a.probe == b.probe && files_equal(&a.dir, &b.dir), "step {}", a.step);
    }
}

#[test]
fn a_cancelled_job_stops_and_its_state_is_removed() {
    let mut harness = Harness::new();
    harness.start(harness.job("a", JobSpec { checkpoint_every: Some(1), ..dropout() }));
    harness.start(harness.job("b", spec()));
    harness.run(|h| h.checkpoints("a").len() == 2);
    let state = harness.dir.path().join("a/state.safetensors");
    assert!(state.exists());
    harness.commands.send(Command::Cancel("a".into())).unwrap();
    harness.commands.send(Command::Cancel("no such job".into())).unwrap();
    harness.finish();
    assert!(matches!(harness.last("a"), JobReport::Cancelled) && !state.exists());
    assert!(matches!(harness.last("b"), JobReport::Succeeded));
    assert_eq!(harness.checkpoints("a").len(), 2);
}

/// A job that early stopping ends.
fn overfits(harness: &Harness, checkpoint_every: Option<usize>) -> Job {
    let optimizer = OptimizerConfig { learning_rate: 0.3, max_grad_norm: 100.0, warmup_steps: 0, ..spec().optimizer };
    let spec =
        JobSpec { epochs: 30, eval_every: Some(2), early_stopping: Some(2), optimizer, checkpoint_every, ..spec() };
    let mut job = harness.job("a", spec);
    // Reversed sequences, for which the training examples do not help.
    job.valid = examples(3);
    job.valid.iter_mut().for_each(|e| e.tokens.reverse());
    job
}

#[test]
fn early_stopping_survives_a_kill() {
    let mut whole = Harness::new();
    whole.start(overfits(&whole, Some(1000)));
    whole.finish();
    let (validations, made) = (whole.validations("a"), whole.checkpoints("a"));
    assert!(validations.len() >= 3 && made.len() == 1, "{validations:?}");

    let mut harness = Harness::new();
    harness.start(overfits(&harness, Some(1000)));
    harness.run(|h| h.validations("a").len() == validations.len());
    // A kill after the validation, then one after the checkpoint.
    for checkpoints in [1, 0] {
        let told = harness.reports("a").len();
        harness.restart();
        harness.start(Job { resume: true, ..overfits(&harness, Some(1000)) });
        harness.finish();
        let after = &harness.reports("a")[told..];
        assert!(matches!(after[0], JobReport::Started { done, .. } if done == made[0].step), "{after:?}");
        let again = |r: &&JobReport| matches!(r, JobReport::Step(_) | JobReport::Validation(_));
        assert_eq!(after.iter().filter(again).count(), 0, "{after:?}");
        let new = after.iter().filter(|r| matches!(r, JobReport::Checkpoint(_))).count();
        assert_eq!(new, checkpoints, "{after:?}");
        assert!(files_equal(&harness.checkpoints("a")[0].dir, &made[0].dir));
        harness.result("a");
    }
}

#[test]
fn a_job_stops_early_when_validation_does_not_improve() {
    let mut harness = Harness::new();
    harness.start(overfits(&harness, Some(6)));
    harness.finish();
    let validations = harness.validations("a");
    assert!(validations.len() >= 3 && validations.len() < 30, "{validations:?}");
    let best = validations.iter().map(|v| v.valid_loss).fold(f64::MAX, f64::min);
    assert_eq!(validations[validations.len() - 3].valid_loss, best);
    assert_eq!(harness.checkpoints("a").pop().unwrap().step, validations.last().unwrap().step);
    harness.result("a");
}

#[test]
fn a_job_continues_from_an_adapter() {
    let mut harness = Harness::new();
    harness.start(harness.job("a", spec()));
    harness.finish();
    let weights = harness.result("a");
    let mut next = harness.job("b", JobSpec { lora: LoraConfig { alpha: 1.0, ..spec().lora }, ..spec() });
    next.valid = examples(12);
    next.spec.optimizer.learning_rate = 1e-9;
    next.from = Some(weights.clone());
    harness.start(next);
    let mut other = harness.job("c", JobSpec { lora: LoraConfig { r: 8, ..spec().lora }, ..spec() });
    other.from = Some(weights);
    harness.start(other);
    harness.finish();
    // With another alpha and steps of almost no length, the adapter is the same.
    let probe = |id| harness.checkpoints(id).pop().unwrap().probe.logprobs;
    for (a, b) in probe("a").iter().zip(probe("b")) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    let error = harness.error("c");
    assert!(error.param.as_deref() == Some("from_checkpoint") && error.message.contains("rank 2"), "{error}");
}

#[test]
fn a_job_continues_from_a_dora() {
    let mut harness = Harness::new();
    let dora = JobSpec { lora: LoraConfig { use_dora: true, ..spec().lora }, ..spec() };
    harness.start(harness.job("a", dora.clone()));
    harness.finish();
    for (id, spec) in [("b", dora), ("c", spec())] {
        let mut next = harness.job(id, spec);
        next.spec.optimizer.learning_rate = 1e-9;
        next.from = Some(harness.result("a"));
        harness.start(next);
    }
    harness.finish();
    let probe = |id| harness.checkpoints(id).pop().unwrap().probe.logprobs;
    for (a, b) in probe("a").iter().zip(probe("b")) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
    assert!(harness.error("c").message.contains("it is a DoRA"));
}

#[test]
fn initial_values_follow_the_seed() {
    let first = |seed| {
        let mut harness = Harness::new();
        let optimizer = OptimizerConfig { learning_rate: 1e-12, ..spec().optimizer };
        harness.start(harness.job("a", JobSpec { seed, max_steps: Some(1), optimizer, ..spec() }));
        harness.finish();
        let weights = harness.result("a");
        Tensor::new(weights.modules[0].a.to_f32(), &Device::Cpu).unwrap().to_vec1::<f32>().unwrap()
    };
    assert_eq!(first(1), first(1));
    assert_ne!(first(1), first(2));
}
