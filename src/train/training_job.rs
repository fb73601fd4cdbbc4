//! A running job: it puts rows into passes and uses the results for optimiser steps, validations,
//! checkpoints.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};

use super::adapter::{AdapterExport, DoraNorms, RankAllocator, TrainableAdapter, TrainableParams, adalora};
use super::data::Example;
use super::data::order::{self, ExampleOrder};
use super::job::{Checkpoint, Job, JobReport, Probe, StepMetrics, Validation};
use super::optim::{Optimizer, OptimizerStep};
use super::pass::{JobBatch, TargetScores, TrainBatch};
use super::spec::JobSpec;
use super::state::{self, EvalPass, JobProgress};
use super::writer::JobReporter;
use crate::model::decoder::Decoder;
use crate::{Error, Result};

/// Most tokens of a probe.
const PROBE_TOKENS: usize = 64;

/// A running job.
pub(super) struct TrainingJob {
    job: Job,
    reporter: JobReporter,
    model: Arc<Decoder>,
    /// The training examples and their order.
    order: ExampleOrder,
    /// The validation examples, cut to `max_length`.
    valid: Vec<Example>,
    params: TrainableParams,
    optimizer: Optimizer,
    allocator: Option<RankAllocator>,
    norms: Option<DoraNorms>,
    /// The current parameters as passes use them.
    adapter: Arc<TrainableAdapter>,
    progress: JobProgress,
    /// Optimiser steps in all.
    steps: usize,
    window: AccumulationWindow,
    /// Sums of the current validation.
    validation: LossSums,
    /// Number of examples that the current validation has measured.
    validated: usize,
}

/// The passes of one optimiser step (gradient accumulation).
#[derive(Default)]
struct AccumulationWindow {
    /// Indices of the examples of each pass.
    passes: Vec<Vec<usize>>,
    /// Number of passes done.
    done: usize,
    /// Factor of each target's gradient: one over the number of targets of all passes.
    scale: f32,
    /// Tokens of all passes.
    tokens: usize,
    sums: LossSums,
    started: Option<Instant>,
}

/// Sums over the targets of several passes.
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
    /// Starts or resumes a job, and reports that it runs. Errors: unusable settings or examples, an unreadable state, out of
    /// memory.
    pub(super) fn new(mut job: Job, reporter: &JobReporter, model: Arc<Decoder>) -> Result<Self> {
        let (spec, config) = (&job.spec, model.config());
        check(&job, &model)?;
        let device = model.weights().norm.device();
        let order = ExampleOrder::new(spec, std::mem::take(&mut job.train))?;
        let has_validation = !job.valid.is_empty();
        let valid = order::cut_examples(std::mem::take(&mut job.valid), spec.max_length);
        if has_validation && valid.is_empty() {
            return Err(
                Error::invalid("no example of the validation file has a token to measure").param("validation_file")
            );
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
            reporter: reporter.clone(),
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
            running.restore_state()?;
        }
        running.restart_step()?;
        let (steps, done, parameters) = (running.steps, running.progress.step, running.params.count());
        running.reporter.report(JobReport::Started { steps, done, parameters });
        if let Some((step, probe)) = running.progress.checkpoint.clone() {
            running.reporter.report(JobReport::Resumed(Checkpoint { step, dir: running.checkpoint_dir(step), probe }));
        }
        Ok(running)
    }

    pub(super) fn id(&self) -> &str {
        &self.job.id
    }

    pub(super) fn reporter(&self) -> &JobReporter {
        &self.reporter
    }

    /// Whether it must wait: its next pass is for a checkpoint, and its last files are still being written. Waiting bounds the
    /// copies of the parameters in host memory.
    pub(super) fn waits_for_files(&self) -> bool {
        self.progress.todo.front() == Some(&EvalPass::Checkpoint) && self.reporter.is_writing()
    }

    /// Whether its next pass has no gradients.
    pub(super) fn evaluates(&self) -> bool {
        !self.progress.todo.is_empty()
    }

    /// Whether nothing is left to do.
    pub(super) fn is_done(&self) -> bool {
        self.steps_done() && !self.evaluates()
    }

    /// Whether there are no more optimiser steps: all are done, or early stopping ends the job.
    fn steps_done(&self) -> bool {
        self.progress.step >= self.steps || self.job.spec.early_stopping.is_some_and(|n| self.progress.stale >= n)
    }

    /// The job's rows in its next pass.
    pub(super) fn next_batch(&self) -> JobBatch {
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

    /// Processes the results of a pass over [`Self::next_batch`]: takes an optimiser step, ends a validation or writes a
    /// checkpoint when it is due. Errors end the job.
    pub(super) fn process(&mut self, scores: TargetScores) -> Result<()> {
        match self.progress.todo.front() {
            Some(EvalPass::Validation) => self.add_validation(&scores),
            Some(EvalPass::Checkpoint) => self.write_checkpoint(&scores),
            None => {
                self.window.sums.add(&scores);
                if !self.window.sums.nll.is_finite() {
                    let (loss, step) = (self.window.sums.nll, self.progress.step + 1);
                    return Err(diverged(format!("the loss is {loss} in step {step}")));
                }
                self.window.done += 1;
                if self.window.done == self.window.passes.len() { self.optimizer_step() } else { Ok(()) }
            }
        }
    }

    /// Begins the next optimiser step, or a validation, from its first pass, without the results of earlier passes.
    pub(super) fn restart_step(&mut self) -> Result<()> {
        (self.validation, self.validated) = Default::default();
        self.params.clear_grads()?;
        if self.steps_done() {
            return Ok(());
        }
        let passes = self.order.step_passes(self.progress.step);
        let examples = || passes.iter().flatten().map(|&i| &self.order.examples[i]);
        let targets: usize = examples().map(|e| e.trained.iter().skip(1).filter(|t| **t).count()).sum();
        let tokens = examples().map(|e| e.tokens.len()).sum();
        let (scale, started) = (1.0 / targets as f32, Some(Instant::now()));
        self.window = AccumulationWindow { passes, scale, tokens, started, ..AccumulationWindow::default() };
        Ok(())
    }

    /// Queues a write of the state after the last optimiser step, from which [`Job::resume`] continues.
    pub(super) fn save_state(&self) -> Result<()> {
        let write = self.snapshot()?;
        self.reporter.write(|_| write());
        Ok(())
    }

    /// Queues the removal of the state.
    pub(super) fn remove_state(&self) {
        let dir = self.job.dir.clone();
        self.reporter.write(move |_| state::remove(&dir));
    }

    /// Copies the state, and returns a function that writes the copy.
    fn snapshot(&self) -> Result<impl FnOnce() -> Result<()> + Send + use<>> {
        let (dir, progress) = (self.job.dir.clone(), self.progress.clone());
        let copy = |t: &Tensor| if t.device().is_cpu() { t.copy() } else { t.to_device(&Device::Cpu) };
        let tensors = self.state_tensors().into_iter().map(|(name, t)| Ok((name, copy(&t)?))).collect::<Result<_>>()?;
        Ok(move || state::write(&dir, &progress, &tensors))
    }

    /// Takes an optimiser step, reports it, and schedules the validation and the checkpoint that are due after it.
    fn optimizer_step(&mut self) -> Result<()> {
        let taken = self.update_params()?;
        self.progress.step += 1;
        let window = &self.window;
        let metrics = StepMetrics {
            step: self.progress.step,
            train_loss: window.sums.mean_nll(),
            train_mean_token_accuracy: window.sums.accuracy(),
            learning_rate: taken.learning_rate,
            grad_norm: taken.grad_norm,
            tokens: window.tokens,
            trained_tokens: window.sums.targets,
            seconds: window.started.map_or(0.0, |started| started.elapsed().as_secs_f64()),
        };
        self.schedule_evaluations();
        self.reporter.report(JobReport::Step(metrics));
        self.restart_step()
    }

    /// Moves the parameters along the accumulated gradients.
    fn update_params(&mut self) -> Result<OptimizerStep> {
        if let Some(allocator) = &self.allocator {
            allocator.finish_gradients(&self.params)?;
        }
        let taken = self.optimizer.step(&self.params, self.progress.step + 1, self.steps)?;
        if !taken.grad_norm.is_finite() {
            let (norm, step) = (taken.grad_norm, self.progress.step + 1);
            return Err(diverged(format!("the norm of the gradients is {norm} in step {step}")));
        }
        if let Some(allocator) = &mut self.allocator {
            allocator.allocate(&self.params, self.progress.step, taken.clip, &mut self.progress.kept)?;
        }
        self.adapter = Arc::new(adapter(&self.params, self.norms.as_ref(), &self.model)?);
        Ok(taken)
    }

    fn schedule_evaluations(&mut self) {
        let (step, spec) = (self.progress.step, &self.job.spec);
        let every = |n: usize| step.is_multiple_of(n) || step == self.steps;
        let checkpoint = every(spec.checkpoint_every.unwrap_or(self.order.steps_per_epoch()));
        if !self.valid.is_empty() && spec.eval_every.map_or(checkpoint, every) {
            self.progress.todo.push_back(EvalPass::Validation);
        }
        if checkpoint {
            self.progress.todo.push_back(EvalPass::Checkpoint);
        }
    }

    /// Adds the results of a pass to the current validation, and ends it after its last pass.
    fn add_validation(&mut self, scores: &TargetScores) -> Result<()> {
        self.validation.add(scores);
        self.validated = self.valid.len().min(self.validated + self.job.spec.batch_size);
        if self.validated < self.valid.len() {
            return Ok(());
        }
        let (step, sums) = (self.progress.step, std::mem::take(&mut self.validation));
        self.validated = 0;
        self.evaluation_done();
        let validation = Validation { step, valid_loss: sums.mean_nll(), valid_mean_token_accuracy: sums.accuracy() };
        if validation.valid_loss < self.progress.best_bits.map_or(f64::INFINITY, f64::from_bits) {
            (self.progress.best_bits, self.progress.stale) = (Some(validation.valid_loss.to_bits()), 0);
        } else {
            self.progress.stale += 1;
        }
        if self.steps_done() && self.progress.todo.is_empty() {
            self.progress.todo.push_back(EvalPass::Checkpoint);
        }
        self.reporter.report(JobReport::Validation(validation));
        // A run that resumes after a kill must not decide on early stopping again.
        if self.steps_done() { self.save_state() } else { Ok(()) }
    }

    /// Ends the current evaluation. Its time does not count for the next step.
    fn evaluation_done(&mut self) {
        self.progress.todo.pop_front();
        self.window.started = Some(Instant::now());
    }

    /// Queues a write of the adapter, with the probe that has just been measured.
    fn write_checkpoint(&mut self, scores: &TargetScores) -> Result<()> {
        let (step, tokens) = (self.progress.step, self.probe().to_vec());
        let probe = Probe { tokens, logprobs: scores.nll.iter().map(|nll| -nll).collect() };
        if probe.logprobs.iter().any(|logprob| !logprob.is_finite()) {
            return Err(diverged(format!("the log-probabilities after step {step} are not finite")));
        }
        let dir = self.checkpoint_dir(step);
        let export =
            AdapterExport::new(&self.job.spec, &self.params, self.progress.kept.as_deref(), &self.job.provenance)?;
        self.evaluation_done();
        self.progress.checkpoint = Some((step, probe.clone()));
        let write_state = self.snapshot()?;
        self.reporter.write(move |report| {
            export.write(&dir)?;
            // Before the report: if the process ends in between, the resumed run reports the checkpoint.
            write_state()?;
            report(JobReport::Checkpoint(Checkpoint { step, dir, probe }));
            Ok(())
        });
        Ok(())
    }

    fn checkpoint_dir(&self, step: usize) -> PathBuf {
        self.job.dir.join(format!("step-{step}"))
    }

    /// The text that checkpoints are probed with: the start of the first training example.
    fn probe(&self) -> &[u32] {
        let tokens = &self.order.examples[0].tokens;
        &tokens[..tokens.len().min(PROBE_TOKENS)]
    }

    /// All tensors of the state, by name.
    fn state_tensors(&self) -> HashMap<String, Tensor> {
        let groups = self.params.groups.iter().zip(&self.optimizer.moments).enumerate();
        let mut tensors: HashMap<_, _> = groups
            .flat_map(|(i, (group, [m, v]))| {
                [("values", &group.values), ("m", m), ("v", v)].map(|(name, t)| (format!("{name}.{i}"), t.clone()))
            })
            .collect();
        tensors.extend(self.allocator.iter().flat_map(RankAllocator::tensors));
        tensors
    }

    /// Continues from the state on disk. Errors: it cannot be read, or is of other settings.
    fn restore_state(&mut self) -> Result<()> {
        let (progress, stored) = state::read(&self.job.dir, self.model.weights().norm.device())?;
        let own = self.state_tensors();
        for (name, tensor) in &own {
            let stored = stored.get(name).filter(|t| t.shape() == tensor.shape() && t.dtype() == tensor.dtype());
            let stored = stored
                .ok_or_else(|| Error::invalid(format!("the job's state has no tensor {name} for these settings")))?;
            tensor.slice_set(&stored.to_device(tensor.device())?, 0, 0)?;
        }
        if stored.len() != own.len() {
            return Err(Error::invalid("the job's state has tensors that these settings do not need"));
        }
        self.progress = progress;
        self.adapter = Arc::new(adapter(&self.params, self.norms.as_ref(), &self.model)?);
        Ok(())
    }
}

/// The current parameters as passes use them.
fn adapter(params: &TrainableParams, norms: Option<&DoraNorms>, model: &Decoder) -> Result<TrainableAdapter> {
    let norm = model.weights().norm.clone();
    let dtype = if norm.device().is_cuda() { DType::BF16 } else { DType::F32 };
    TrainableAdapter::new(params, norms, model.config(), dtype)
}

fn diverged(what: String) -> Error {
    Error::invalid(what + ": a lower learning rate may help").code("training_diverged")
}

/// Checks settings and examples before anything is allocated. Errors: `Invalid`, with the setting.
fn check(job: &Job, model: &Decoder) -> Result<()> {
    check_settings(&job.spec)?;
    let (vocab, positions) = (model.config().vocab_size, model.rope().positions());
    for example in job.train.iter().chain(&job.valid) {
        if example.trained.len() != example.tokens.len() {
            return Err(Error::internal("an example has a mask of another length than its tokens"));
        }
        if example.tokens.len().min(job.spec.max_length) > positions {
            let message = format!("an example has more tokens than the {positions} positions of the model");
            return Err(Error::invalid(message).param("max_length"));
        }
        if let Some(token) = example.tokens.iter().find(|&&t| t as usize >= vocab) {
            return Err(Error::invalid(format!("token id {token} is not below the model's vocabulary size, {vocab}")));
        }
    }
    Ok(())
}

fn check_settings(spec: &JobSpec) -> Result<()> {
    let (lora, optimizer) = (&spec.lora, &spec.optimizer);
    let positive = |name: &str, value: f32| match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(Error::invalid(format!("{name} is {value}; it must be a positive number")).param(name)),
    };
    positive("alpha", lora.alpha)?;
    positive("learning_rate", optimizer.learning_rate)?;
    if !(0.0..1.0).contains(&lora.dropout) {
        let message = format!("dropout is {}; it must be at least 0 and below 1", lora.dropout);
        return Err(Error::invalid(message).param("dropout"));
    }
    for (name, value) in [
        ("n_epochs", Some(spec.epochs)),
        ("max_steps", spec.max_steps),
        ("checkpoint_every", spec.checkpoint_every),
        ("eval_every", spec.eval_every),
        ("early_stopping", spec.early_stopping),
        ("r", Some(lora.r)),
    ] {
        if value == Some(0) {
            return Err(Error::invalid(format!("{name} is 0; it must be at least 1")).param(name));
        }
    }
    lora.adalora.as_ref().map_or(Ok(()), |ada| adalora::check(ada, lora))
}
