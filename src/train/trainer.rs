//! The trainer: jobs that share forward and backward passes over one frozen base, in slices of bounded time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use super::job::{Command, Job, JobReport};
use super::pass::{Pass, TargetScores};
use super::training_job::TrainingJob;
use super::writer::JobWriter;
use crate::engine::BackgroundWork;
use crate::model::decoder::Decoder;
use crate::{Error, Result};

/// Most rows of a pass, unless one job alone has more. Further rows make no row faster, but slices longer, and cost memory.
const MAX_ROWS: usize = 8 << 10;

/// Bytes of activations that are saved for the backward on a CPU. The memory of a GPU is for the KV cache.
const SAVED_ACTIVATIONS: usize = 1 << 30;

/// Trains jobs on a model's weights. All started jobs run at the same time: a pass has rows of each.
pub struct Trainer {
    model: Arc<Decoder>,
    commands: Receiver<Command>,
    writer: JobWriter,
    /// In the order in which the next pass takes their rows.
    jobs: Vec<TrainingJob>,
    /// Jobs to stop once no pass contains their rows.
    stopping: Vec<(String, StopKind)>,
    active_pass: Option<ActivePass>,
    /// Results of the last pass, by job, that are not processed yet.
    results: Vec<(String, TargetScores)>,
    /// Number of next passes that take rows of one job only, to find the job that made a pass fail.
    single_job_passes: usize,
}

/// How a job stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopKind {
    Pause,
    Cancel,
}

/// A pass that has begun, and the jobs with rows in it.
struct ActivePass {
    pass: Pass,
    jobs: Vec<String>,
}

impl BackgroundWork for Trainer {
    fn run_slice(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start(job) => self.start(*job),
                Command::Pause(id) => self.stopping.push((id, StopKind::Pause)),
                Command::Cancel(id) => self.stopping.push((id, StopKind::Cancel)),
            }
        }
        self.work()
    }
}

impl Trainer {
    /// A trainer without jobs. It reads `commands` at each slice. Errors: the writer's thread cannot be started.
    pub fn new(model: Arc<Decoder>, commands: Receiver<Command>) -> Result<Self> {
        let (jobs, stopping, results) = Default::default();
        let writer = JobWriter::start()?;
        Ok(Self { model, commands, writer, jobs, stopping, active_pass: None, results, single_job_passes: 0 })
    }

    /// Waits until all files are written and all reports are delivered. Returns whether jobs are left. For callers that have
    /// nothing else to do: jobs that wait for their files can continue afterwards.
    pub fn settle(&self) -> bool {
        self.writer.flush();
        !self.jobs.is_empty()
    }

    fn position(&self, id: &str) -> Option<usize> {
        self.jobs.iter().position(|job| job.id() == id)
    }

    fn start(&mut self, mut job: Job) {
        let reporter = self.writer.reporter(std::mem::replace(&mut job.report, Box::new(|_| ())));
        let running = self.position(&job.id).is_some();
        let model = self.model.clone();
        let started = catch_panics(|| match running {
            true => Err(Error::invalid(format!("job {} is already running", job.id))),
            false => TrainingJob::new(job, &reporter, model),
        });
        match started {
            Ok(job) => {
                self.jobs.push(job);
                // A resumed job may have nothing left to do.
                self.remove_if_done(self.jobs.len() - 1);
            }
            Err(error) => reporter.report(JobReport::Failed(error)),
        }
    }

    /// Does one bounded piece of work. False if there is none.
    fn work(&mut self) -> bool {
        self.jobs.retain(|job| !job.reporter().has_failed());
        if let Some((id, scores)) = self.results.pop() {
            if let Some(i) = self.position(&id) {
                self.process(i, scores);
            }
            return true;
        }
        let stops = |id: &String| self.stopping.iter().any(|(stopping, _)| stopping == id);
        match self.active_pass.take() {
            // No job needs the results.
            Some(ActivePass { jobs, .. }) if jobs.iter().all(stops) => self.restart(&jobs),
            Some(ActivePass { mut pass, jobs }) => match catch_panics(|| pass.advance()) {
                Ok(false) => self.active_pass = Some(ActivePass { pass, jobs }),
                Ok(true) => self.results = jobs.into_iter().zip(pass.scores()).rev().collect(),
                Err(error) => self.pass_failed(error, &jobs),
            },
            None => {
                self.stop_jobs();
                return self.begin_pass();
            }
        }
        true
    }

    /// Gives a job the results of its rows.
    fn process(&mut self, i: usize, scores: TargetScores) {
        let job = &mut self.jobs[i];
        match catch_panics(|| job.process(scores)) {
            Ok(()) => self.remove_if_done(i),
            Err(error) => self.fail(i, error),
        }
    }

    fn remove_if_done(&mut self, i: usize) {
        if self.jobs[i].is_done() {
            self.jobs.remove(i).reporter().report(JobReport::Succeeded);
        }
    }

    fn fail(&mut self, i: usize, error: Error) {
        let job = self.jobs.remove(i);
        tracing::warn!(error = %format_args!("{error:#}"), job = job.id(), "training job failed");
        job.reporter().report(JobReport::Failed(error));
    }

    /// Handles a failed pass. If it had rows of one job only, the job fails. Otherwise any of them may be the cause: each repeats
    /// its passes since the last optimiser step, and the next passes take rows of one job only.
    fn pass_failed(&mut self, error: Error, jobs: &[String]) {
        if let [id] = jobs {
            if let Some(i) = self.position(id) {
                self.fail(i, error);
            }
            return;
        }
        tracing::warn!(error = %format_args!("{error:#}"), jobs = jobs.len(), "a pass of several jobs failed");
        self.single_job_passes = jobs.len();
        self.restart(jobs);
    }

    /// Lets jobs repeat their passes since the last optimiser step.
    fn restart(&mut self, jobs: &[String]) {
        for id in jobs {
            let Some(i) = self.position(id) else { continue };
            if let Err(error) = self.jobs[i].restart_step() {
                self.fail(i, error);
            }
        }
    }

    /// Pauses and cancels the jobs that are to stop.
    fn stop_jobs(&mut self) {
        for (id, kind) in std::mem::take(&mut self.stopping) {
            let Some(i) = self.position(&id) else { continue };
            let (done, report) = match kind {
                StopKind::Pause => (self.jobs[i].save_state(), JobReport::Paused),
                StopKind::Cancel => {
                    self.jobs[i].remove_state();
                    (Ok(()), JobReport::Cancelled)
                }
            };
            match done {
                Ok(()) => self.jobs.remove(i).reporter().report(report),
                Err(error) => self.fail(i, error),
            }
        }
    }

    /// Begins a pass: one without gradients if a job needs it, otherwise one with gradients. False if no job has rows.
    fn begin_pass(&mut self) -> bool {
        let ready: Vec<&TrainingJob> = self.jobs.iter().filter(|job| !job.waits_for_files()).collect();
        let evaluates = ready.iter().any(|job| job.evaluates());
        let (mut batches, mut ids, mut rows) = (Vec::new(), Vec::new(), 0);
        for job in ready.into_iter().filter(|job| job.evaluates() == evaluates) {
            let batch = job.next_batch();
            let more = batch.batch.tokens.len();
            if !batches.is_empty() && (rows + more > MAX_ROWS || self.single_job_passes > 0) {
                break;
            }
            rows += more;
            batches.push(batch);
            ids.push(job.id().to_owned());
        }
        if batches.is_empty() {
            return false;
        }
        self.single_job_passes = self.single_job_passes.saturating_sub(1);
        // Jobs that had no room come first in the next pass.
        self.jobs.sort_by_key(|job| ids.iter().any(|id| id == job.id()));
        let saved_bytes = if self.model.weights().norm.device().is_cpu() { SAVED_ACTIVATIONS } else { 0 };
        let pass = Pass::new(self.model.clone(), batches, !evaluates, saved_bytes);
        self.active_pass = Some(ActivePass { pass, jobs: ids });
        true
    }
}

/// Runs `f`, and returns a panic as an error.
fn catch_panics<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| Err(Error::internal("training failed; see the server's log")))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use candle_core::Device;

    use super::*;
    use crate::hub::{ModelFiles, ModelFormat};
    use crate::model::weights::Weights;
    use crate::train::data::Example;
    use crate::train::spec::JobSpec;
    use crate::train::testing::spec;

    /// Losses of two jobs. `fail` is called after every slice.
    fn losses(mut fail: impl FnMut(&mut Trainer)) -> Vec<(String, f64)> {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny/base");
        let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(base) };
        let weights = Weights::load(&files, None, &Device::Cpu, |_| {}).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (losses, (_commands, receiver)) = (Arc::new(Mutex::new(Vec::new())), channel());
        let mut trainer = Trainer::new(Arc::new(Decoder::new(weights).unwrap()), receiver).unwrap();
        for id in ["a", "b"] {
            let (own, losses) = (dir.path().join(id), losses.clone());
            std::fs::create_dir(&own).unwrap();
            let report = move |report| match report {
                JobReport::Step(step) => losses.lock().unwrap().push((id.to_owned(), step.train_loss)),
                JobReport::Failed(error) => losses.lock().unwrap().push((error.message, 0.0)),
                _ => {}
            };
            let train = (3..9).map(|n| Example { tokens: (5..5 + n).collect(), trained: vec![true; n as usize] });
            trainer.start(Job {
                id: id.into(),
                spec: JobSpec { gradient_accumulation: 2, ..spec() },
                train: train.collect(),
                valid: Vec::new(),
                dir: own,
                provenance: Default::default(),
                from: None,
                resume: false,
                report: Box::new(report),
            });
        }
        while trainer.work() || trainer.settle() {
            fail(&mut trainer);
        }
        let mut losses = std::mem::take(&mut *losses.lock().unwrap());
        losses.sort_by(|a, b| a.0.cmp(&b.0));
        losses
    }

    #[test]
    fn after_a_failed_pass_of_several_jobs_each_job_repeats_it() {
        let plain = losses(|_| ());
        assert_eq!(plain.len(), 6);
        let mut slices = 0;
        let again = losses(|trainer| {
            slices += 1;
            // In the backward of the second of the two passes of a step.
            let doomed = trainer.active_pass.take_if(|_| slices == 12);
            if let Some(ActivePass { jobs, .. }) = doomed {
                assert_eq!(jobs.len(), 2);
                trainer.pass_failed(Error::internal("out of memory"), &jobs);
            }
        });
        assert!(slices > 40, "{slices}");
        assert_eq!(plain, again);
    }

    #[test]
    fn a_failed_pass_of_one_job_ends_the_job() {
        let mut alone = false;
        let losses = losses(|trainer| {
            if !alone && let Some(ActivePass { jobs, .. }) = trainer.active_pass.take() {
                alone = true;
                trainer.pass_failed(Error::internal("out of memory"), &jobs[..1]);
                trainer.restart(&jobs[1..]);
            }
        });
        let names: Vec<&str> = losses.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "b", "b", "out of memory"]);
    }
}
