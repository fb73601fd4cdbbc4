//! Sweeps: short runs of several settings on the same examples, which share passes over the frozen base.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::channel;

use super::data::Example;
use super::job::{Command, Job, JobReport, StepMetrics, Validation};
use super::spec::JobSpec;
use super::trainer::Trainer;
use crate::engine::BackgroundWork;
use crate::lora::weights::AdapterWeights;
use crate::model::decoder::Decoder;
use crate::{Error, Result};

/// Without a validation file, one of this many examples is held out.
const HELD_OUT: usize = 10;

/// The outcome of one run.
#[derive(Debug, Clone, Default)]
pub struct SweepOutcome {
    /// Number of trained values.
    pub parameters: usize,
    pub steps: Vec<StepMetrics>,
    pub validations: Vec<Validation>,
    /// Why the run failed, if it did.
    pub error: Option<Error>,
}

impl SweepOutcome {
    /// The last held-out loss; `None` for a run that failed or diverged.
    pub fn loss(&self) -> Option<f64> {
        let last = self.validations.last().filter(|_| self.error.is_none());
        last.map(|v| v.valid_loss).filter(|loss| loss.is_finite())
    }

    fn add(&mut self, report: JobReport) {
        match report {
            JobReport::Started { parameters, .. } => self.parameters = parameters,
            JobReport::Step(m) => self.steps.push(m),
            JobReport::Validation(v) => self.validations.push(v),
            JobReport::Failed(error) => self.error = Some(error),
            JobReport::Checkpoint(_)
            | JobReport::Resumed(_)
            | JobReport::Paused
            | JobReport::Cancelled
            | JobReport::Succeeded => {}
        }
    }
}

/// Splits examples into `(train, valid)`: every tenth example is held out, or the last one of fewer than ten.
pub fn hold_out(examples: Vec<Example>) -> (Vec<Example>, Vec<Example>) {
    let every = HELD_OUT.min(examples.len());
    let numbered = examples.into_iter().enumerate();
    let (valid, train): (Vec<_>, Vec<_>) = numbered.partition(|(i, _)| (i + 1).is_multiple_of(every));
    let plain = |numbered: Vec<(usize, Example)>| numbered.into_iter().map(|(_, example)| example).collect();
    (plain(train), plain(valid))
}

/// Runs jobs with these settings and the adapters they continue from, `together` at a time, and returns their outcomes in the
/// same order. Their checkpoints are in `dir` while they run. `observe` gets every report.
///
/// # Errors
/// `dir` cannot be written. The error of a run is in its outcome.
pub fn run(
    model: &Arc<Decoder>,
    runs: Vec<(JobSpec, Option<AdapterWeights>)>,
    (train, valid): (&[Example], &[Example]),
    together: usize,
    dir: &Path,
    mut observe: impl FnMut(&JobReport),
) -> Result<Vec<SweepOutcome>> {
    let (commands, inbox) = channel();
    let mut trainer = Trainer::new(model.clone(), inbox)?;
    let mut outcomes = vec![SweepOutcome::default(); runs.len()];
    let mut runs = runs.into_iter().enumerate().peekable();
    while runs.peek().is_some() {
        let (sender, reports) = channel();
        let checkpoints = tempfile::tempdir_in(dir)?;
        for (i, (spec, from)) in runs.by_ref().take(together.max(1)) {
            let (sender, dir) = (sender.clone(), checkpoints.path().join(i.to_string()));
            std::fs::create_dir(&dir)?;
            let job = Job {
                id: i.to_string(),
                spec,
                train: train.to_vec(),
                valid: valid.to_vec(),
                dir,
                provenance: Default::default(),
                from,
                resume: false,
                // The receiver outlives the trainer's work below.
                report: Box::new(move |report| drop(sender.send((i, report)))),
            };
            commands.send(Command::Start(Box::new(job))).map_err(|_| Error::internal("the trainer has ended"))?;
        }
        loop {
            let worked = trainer.run_slice() || trainer.settle();
            for (i, report) in reports.try_iter() {
                observe(&report);
                outcomes[i].add(report);
            }
            if !worked {
                break;
            }
        }
    }
    Ok(outcomes)
}

/// Indices of the outcomes by rising held-out loss. Those without a loss come last.
pub fn ranked(outcomes: &[SweepOutcome]) -> Vec<usize> {
    let loss = |i: &usize| outcomes[*i].loss().unwrap_or(f64::INFINITY);
    let mut order: Vec<usize> = (0..outcomes.len()).collect();
    order.sort_by(|a, b| loss(a).total_cmp(&loss(b)));
    order
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::hub::{ModelFiles, ModelFormat};
    use crate::model::weights::Weights;
    use crate::train::testing::spec;

    fn examples(n: u32) -> Vec<Example> {
        (0..n).map(|i| Example { tokens: (5..10 + i % 3).collect(), trained: vec![true; 5 + i as usize % 3] }).collect()
    }

    #[test]
    fn a_tenth_is_held_out() {
        for (n, held_out) in [(25, 2), (10, 1), (3, 1), (0, 0)] {
            let (train, valid) = hold_out(examples(n));
            assert_eq!((train.len(), valid.len()), (n as usize - held_out, held_out));
        }
    }

    #[test]
    fn outcomes_are_ranked_by_held_out_loss_with_diverged_runs_last() {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny/base");
        let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(base) };
        let model = Arc::new(Decoder::new(Weights::load(&files, None, &Device::Cpu, |_| {}).unwrap()).unwrap());
        let runs = [f32::INFINITY, 1e-6, 1e-2].map(|rate| {
            let mut spec = JobSpec { max_steps: Some(8), eval_every: Some(4), checkpoint_every: Some(100), ..spec() };
            spec.optimizer.learning_rate = rate;
            (spec, None)
        });
        let (train, valid) = hold_out(examples(12));
        let dir = tempfile::tempdir().unwrap();
        let mut steps = 0;
        let observe = |report: &JobReport| steps += usize::from(matches!(report, JobReport::Step(_)));
        let outcomes = run(&model, runs.into(), (&train, &valid), 2, dir.path(), observe).unwrap();
        assert_eq!(ranked(&outcomes), [2, 1, 0], "{outcomes:?}");
        assert!(outcomes[0].loss().is_none() && outcomes[2].loss() < outcomes[1].loss());
        assert_eq!(outcomes[2].validations.iter().map(|v| v.step).collect::<Vec<_>>(), [4, 8]);
        assert_eq!(steps, outcomes.iter().map(|o| o.steps.len()).sum::<usize>());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "checkpoints are gone");
    }
}
