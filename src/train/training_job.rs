//! A job between its start and its end: what it puts into passes, and what it does with what comes out.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterExport, DoraNorms, RankAllocator, TrainableAdapter, TrainableParams, adalora};
use super::data::Example;
use super::data::order::{self, ExampleOrder};
use super::job::{Checkpoint, Job, JobReport, Probe, StepMetrics, Validation};
use super::optim::Optimizer;
use super::pass::{JobBatch, TargetScores, TrainBatch};
use super::state::{self, EvalPass, JobProgress};
use super::writer::JobReporter;
use crate::model::decoder::Decoder;
use crate::{Error, Result};

/// Tokens of the text that a checkpoint is probed with.
const PROBE_TOKENS: usize = 64;

/// A job that runs.
pub struct TrainingJob {
    job: Job,
    /// Takes what is written and told.
    line: JobReporter,
    model: Arc<Decoder>,
    order: ExampleOrder,
    valid: Vec<Example>,
    params: TrainableParams,
    optimizer: Optimizer,
    allocator: Option<RankAllocator>,
    norms: Option<DoraNorms>,
    /// The values as passes use them.
    adapter: Arc<TrainableAdapter>,
    progress: JobProgress,
    /// Optimiser steps in all.
    steps: usize,
    window: AccumulationWindow,
    /// LossSums over the validation under way.
    validation: LossSums,
    /// Examples of it that are measured.
    validated: usize,
}

/// The passes of one optimiser step.
#[derive(Default)]
struct AccumulationWindow {
    /// Examples of each pass, by index.
    passes: Vec<Vec<usize>>,
    /// Passes done.
    done: usize,
    /// One over the targets of all passes: what each one's gradient counts.
    scale: f32,
    tokens: usize,
    sums: LossSums,
    started: Option<Instant>,
}

#[derive(Debug, Clone, Copy, Default)]
struct LossSums {
    nll: f64,
    correct: usize,
    targets: usize,
}

impl LossSums {
    fn add(&mut self, scores: &TargetScores) {
        self.nll += scores.nll.iter().map(|&nll| f64::from(nll)).sum::<f64>();
        self.correct += scores.correct.iter().filter(|correct| **correct).count();
        self.targets += scores.nll.len();
    }

    fn mean_nll(&self) -> f64 {
        self.nll / self.targets.max(1) as f64
    }

    fn accuracy(&self) -> f64 {
        self.correct as f64 / self.targets.max(1) as f64
    }
}

impl TrainingJob {
    /// Makes a job ready to run, or to go on. It tells `line`, first that it runs. Errors: settings or examples that cannot be
    /// trained with, a state that cannot be read, no memory.
    pub fn new(mut job: Job, line: &JobReporter, model: Arc<Decoder>) -> Result<Self> {
        let (spec, config) = (&job.spec, model.config());
        check(&job, &model)?;
        let device = model.weights().norm.device();
        let order = ExampleOrder::new(spec, std::mem::take(&mut job.train))?;
        let given = !job.valid.is_empty();
        let valid = order::cut(std::mem::take(&mut job.valid), spec.max_length);
        if given && valid.is_empty() {
            return Err(Error::invalid("no example has a token to measure").param("validation_file"));
        }
        let params = TrainableParams::new(spec, config, job.from.take().as_ref(), device)?;
        let optimizer = Optimizer::new(&spec.optimizer, spec.lora.loraplus_lr_ratio, &params)?;
        let steps = spec.max_steps.unwrap_or(spec.epochs * order.steps_per_epoch());
        let allocator = spec.lora.adalora.as_ref().map(|ada| RankAllocator::new(ada, steps, &params)).transpose()?;
        let norms = spec.lora.use_dora.then(|| DoraNorms::new(&params, &model)).transpose()?;
        if let Some(norms) = &norms {
            norms.start(&params)?;
        }
        let mut running = Self {
            adapter: Arc::new(adapter(&params, norms.as_ref(), &model)?),
            job,
            line: line.clone(),
            model,
            order,
            valid,
            params,
            optimizer,
            allocator,
            norms,
            progress: JobProgress::default(),
            steps,
            window: AccumulationWindow::default(),
            validation: LossSums::default(),
            validated: 0,
        };
        if running.job.resume {
            running.restore()?;
        }
        running.restart()?;
        let (steps, done, parameters) = (running.steps, running.progress.step, running.params.count());
        running.line.tell(JobReport::Started { steps, done, parameters });
        if let Some((step, probe)) = running.progress.checkpoint.clone() {
            running.line.tell(JobReport::Resumed(Checkpoint { step, dir: running.checkpoint_dir(step), probe }));
        }
        Ok(running)
    }

    pub fn id(&self) -> &str {
        &self.job.id
    }

    /// Where it writes and reports.
    pub fn line(&self) -> &JobReporter {
        &self.line
    }

    /// Whether its next pass must wait until what is written is: one copy of the values beside them is enough.
    pub fn waits(&self) -> bool {
        self.progress.todo.front() == Some(&EvalPass::Checkpoint) && self.line.writes()
    }

    /// Whether its next pass is without gradients.
    pub fn measures(&self) -> bool {
        !self.progress.todo.is_empty()
    }

    /// Whether all is done.
    pub fn ended(&self) -> bool {
        self.learnt() && !self.measures()
    }

    /// Whether no optimiser step is to come: all are done, or validation has got no better for long enough.
    fn learnt(&self) -> bool {
        self.progress.step >= self.steps || self.job.spec.early_stopping.is_some_and(|n| self.progress.stale >= n)
    }

    /// What it puts into the next pass.
    pub fn job_batch(&self) -> JobBatch {
        let mut batch = TrainBatch::default();
        let mut dropout = None;
        match self.progress.todo.front() {
            Some(EvalPass::Validation) => {
                let end = self.valid.len().min(self.validated + self.job.spec.batch_size);
                for example in &self.valid[self.validated..end] {
                    batch.push(&example.tokens, 1.0, |i| example.trained[i]);
                }
            }
            Some(EvalPass::Checkpoint) => batch.push(self.probe(), 1.0, |_| true),
            None => {
                for &i in &self.window.passes[self.window.done] {
                    let example = &self.order.examples[i];
                    batch.push(&example.tokens, self.window.scale, |i| example.trained[i]);
                }
                let pass = (self.progress.step as u64) << 32 | (self.window.done as u64) << 16;
                let p = self.job.spec.lora.dropout;
                dropout = (p > 0.0).then(|| (p, self.job.spec.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ pass));
            }
        }
        JobBatch { batch, adapter: self.adapter.clone(), dropout }
    }

    /// Takes what a pass over [`TrainingJob::job_batch`] has found, and does what is due then: an optimiser step, or a checkpoint.
    /// Errors end the job.
    pub fn absorb(&mut self, scores: TargetScores) -> Result<()> {
        match self.progress.todo.front() {
            Some(EvalPass::Validation) => self.validate(&scores),
            Some(EvalPass::Checkpoint) => self.checkpoint(&scores),
            None => {
                self.window.sums.add(&scores);
                if !self.window.sums.nll.is_finite() {
                    return Err(Error::invalid(format!(
                        "the loss is {} in step {}: a lower learning rate may help",
                        self.window.sums.nll,
                        self.progress.step + 1
                    ))
                    .code("training_diverged"));
                }
                self.window.done += 1;
                if self.window.done == self.window.passes.len() { self.step() } else { Ok(()) }
            }
        }
    }

    /// Forgets the passes since the last optimiser step.
    pub fn restart(&mut self) -> Result<()> {
        (self.validation, self.validated) = Default::default();
        self.params.clear_grads()?;
        if self.learnt() {
            return Ok(());
        }
        let passes = self.order.window(self.progress.step);
        let examples = || passes.iter().flatten().map(|&i| &self.order.examples[i]);
        let targets: usize = examples().map(|e| e.trained.iter().skip(1).filter(|t| **t).count()).sum();
        let tokens = examples().map(|e| e.tokens.len()).sum();
        let (scale, started) = (1.0 / targets as f32, Some(Instant::now()));
        self.window = AccumulationWindow { passes, scale, tokens, started, ..AccumulationWindow::default() };
        Ok(())
    }

    /// Has what [`Job::resume`] goes on from written: the job as it was after its last optimiser step.
    pub fn save(&self) -> Result<()> {
        let save = self.snapshot()?;
        self.line.write(|_| save());
        Ok(())
    }

    /// Has the state removed from the job's directory.
    pub fn forget(&self) {
        let dir = self.job.dir.clone();
        self.line.write(move |_| state::remove(&dir));
    }

    /// Copies the state, for a later time at which it is written.
    fn snapshot(&self) -> Result<impl FnOnce() -> Result<()> + Send + use<>> {
        let (dir, progress) = (self.job.dir.clone(), self.progress.clone());
        let copy = |t: &Tensor| if t.device().is_cpu() { t.copy() } else { t.to_device(&Device::Cpu) };
        let tensors = self.tensors().into_iter().map(|(name, t)| Ok((name, copy(&t)?))).collect::<Result<_>>()?;
        Ok(move || state::write(&dir, &progress, &tensors))
    }

    fn step(&mut self) -> Result<()> {
        if let Some(allocator) = &self.allocator {
            allocator.finish_gradients(&self.params)?;
        }
        let moved = self.optimizer.step(&self.params, self.progress.step + 1, self.steps)?;
        if !moved.grad_norm.is_finite() {
            return Err(Error::invalid(format!(
                "the norm of the gradients is {} in step {}: a lower learning rate may help",
                moved.grad_norm,
                self.progress.step + 1
            ))
            .code("training_diverged"));
        }
        if let Some(allocator) = &mut self.allocator {
            allocator.allocate(&self.params, self.progress.step, moved.clip, &mut self.progress.kept)?;
        }
        self.adapter = Arc::new(adapter(&self.params, self.norms.as_ref(), &self.model)?);
        self.progress.step += 1;
        let (step, window, spec) = (self.progress.step, &self.window, &self.job.spec);
        let metrics = StepMetrics {
            step,
            train_loss: window.sums.mean_nll(),
            train_mean_token_accuracy: window.sums.accuracy(),
            learning_rate: moved.learning_rate,
            grad_norm: moved.grad_norm,
            tokens: window.tokens,
            trained_tokens: window.sums.targets,
            seconds: window.started.map_or(0.0, |started| started.elapsed().as_secs_f64()),
        };
        let every = |n: usize| step.is_multiple_of(n) || step == self.steps;
        let checkpoint = every(spec.checkpoint_every.unwrap_or(self.order.steps_per_epoch()));
        if !self.valid.is_empty() && spec.eval_every.map_or(checkpoint, every) {
            self.progress.todo.push_back(EvalPass::Validation);
        }
        if checkpoint {
            self.progress.todo.push_back(EvalPass::Checkpoint);
        }
        self.line.tell(JobReport::Step(metrics));
        self.restart()
    }

    fn validate(&mut self, scores: &TargetScores) -> Result<()> {
        self.validation.add(scores);
        self.validated = self.valid.len().min(self.validated + self.job.spec.batch_size);
        if self.validated < self.valid.len() {
            return Ok(());
        }
        let (step, sums) = (self.progress.step, std::mem::take(&mut self.validation));
        self.validated = 0;
        self.measured();
        let validation = Validation { step, valid_loss: sums.mean_nll(), valid_mean_token_accuracy: sums.accuracy() };
        if validation.valid_loss < self.progress.best_bits.map_or(f64::INFINITY, f64::from_bits) {
            (self.progress.best_bits, self.progress.stale) = (Some(validation.valid_loss.to_bits()), 0);
        } else {
            self.progress.stale += 1;
        }
        if self.learnt() && self.progress.todo.is_empty() {
            self.progress.todo.push_back(EvalPass::Checkpoint);
        }
        self.line.tell(JobReport::Validation(validation));
        // The run that goes on after a kill is not to decide again.
        if self.learnt() { self.save() } else { Ok(()) }
    }

    /// The first thing to be measured is. It took none of the next step's time.
    fn measured(&mut self) {
        self.progress.todo.pop_front();
        self.window.started = Some(Instant::now());
    }

    fn checkpoint(&mut self, scores: &TargetScores) -> Result<()> {
        let (step, tokens) = (self.progress.step, self.probe().to_vec());
        let probe = Probe { tokens, logprobs: scores.nll.iter().map(|nll| -nll).collect() };
        if probe.logprobs.iter().any(|logprob| !logprob.is_finite()) {
            let message = format!("the adapter of step {step} gives no finite log-probabilities");
            return Err(Error::invalid(message + ": a lower learning rate may help").code("training_diverged"));
        }
        let dir = self.checkpoint_dir(step);
        let export =
            AdapterExport::new(&self.job.spec, &self.params, self.progress.kept.as_deref(), &self.job.provenance)?;
        self.measured();
        self.progress.checkpoint = Some((step, probe.clone()));
        let save = self.snapshot()?;
        self.line.write(move |tell| {
            export.write(&dir)?;
            // Remembered before it is told: where the process ends in between, the run that goes on tells it.
            save()?;
            tell(JobReport::Checkpoint(Checkpoint { step, dir, probe }));
            Ok(())
        });
        Ok(())
    }

    fn checkpoint_dir(&self, step: usize) -> PathBuf {
        self.job.dir.join(format!("step-{step}"))
    }

    /// The text that checkpoints are probed with.
    fn probe(&self) -> &[u32] {
        let tokens = &self.order.examples[0].tokens;
        &tokens[..tokens.len().min(PROBE_TOKENS)]
    }

    /// All that changes from step to step, by name.
    fn tensors(&self) -> HashMap<String, Tensor> {
        let groups = self.params.groups.iter().zip(&self.optimizer.moments).enumerate();
        let mut tensors: HashMap<_, _> = groups
            .flat_map(|(i, (group, [m, v]))| {
                [("values", &group.values), ("m", m), ("v", v)].map(|(name, t)| (format!("{name}.{i}"), t.clone()))
            })
            .collect();
        tensors.extend(self.allocator.iter().flat_map(RankAllocator::tensors));
        tensors
    }

    /// Goes on from the state on disk.
    fn restore(&mut self) -> Result<()> {
        let (progress, stored) = state::read(&self.job.dir, self.model.weights().norm.device())?;
        let own = self.tensors();
        for (name, tensor) in &own {
            let stored = stored.get(name).filter(|t| t.shape() == tensor.shape() && t.dtype() == tensor.dtype());
            let stored = stored
                .ok_or_else(|| Error::invalid(format!("the job's state has no {name} that fits its settings")))?;
            tensor.slice_set(&stored.to_device(tensor.device())?, 0, 0)?;
        }
        if stored.len() != own.len() {
            return Err(Error::invalid("the job's state is of other settings"));
        }
        self.progress = progress;
        self.adapter = Arc::new(adapter(&self.params, self.norms.as_ref(), &self.model)?);
        Ok(())
    }
}

/// The values as passes use them.
fn adapter(params: &TrainableParams, norms: Option<&DoraNorms>, model: &Decoder) -> Result<TrainableAdapter> {
    let norm = model.weights().norm.clone();
    let dtype = if norm.device().is_cuda() { DType::BF16 } else { DType::F32 };
    TrainableAdapter::new(params, norms, model.config(), dtype)
}

/// What can be said before anything is made.
fn check(job: &Job, model: &Decoder) -> Result<()> {
    let (lora, optimizer) = (&job.spec.lora, &job.spec.optimizer);
    let positive = |name: &str, value: f32| match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(Error::invalid(format!("{name} is {value}; it must be a positive number")).param(name)),
    };
    positive("alpha", lora.alpha)?;
    positive("learning_rate", optimizer.learning_rate)?;
    if !(0.0..1.0).contains(&lora.dropout) {
        return Err(Error::invalid(format!("dropout is {}; at least 0 and below 1", lora.dropout)).param("dropout"));
    }
    for (name, value) in [
        ("n_epochs", Some(job.spec.epochs)),
        ("max_steps", job.spec.max_steps),
        ("checkpoint_every", job.spec.checkpoint_every),
        ("eval_every", job.spec.eval_every),
        ("early_stopping", job.spec.early_stopping),
        ("r", Some(lora.r)),
    ] {
        if value == Some(0) {
            return Err(Error::invalid(format!("{name} is 0; it must be at least 1")).param(name));
        }
    }
    if let Some(ada) = &lora.adalora {
        adalora::check(ada, lora)?;
    }
    let (vocab, positions) = (model.config().vocab_size, model.rope().positions());
    for example in job.train.iter().chain(&job.valid) {
        if example.trained.len() != example.tokens.len() {
            return Err(Error::internal("an example whose mask has another length than its tokens"));
        }
        if example.tokens.len().min(job.spec.max_length) > positions {
            return Err(
                Error::invalid(format!("an example has more tokens than the model's {positions}")).param("max_length")
            );
        }
        if let Some(token) = example.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::invalid(format!("token id {token}: the model has {vocab}")));
        }
    }
    Ok(())
}
