//! The trainer: jobs that share forward and backward passes over one frozen base, a piece at a time.

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

/// Rows of a pass beyond which no further job joins it: more make nothing faster, cost memory, and make pieces longer.
const MAX_ROWS: usize = 8 << 10;

/// Bytes of activations that a backward on the CPU does not have to make again. A GPU's memory is for keys and values.
const KEPT_BYTES: usize = 1 << 30;

/// Trains jobs over a model's weights. Every job that was started runs; a pass takes some rows of each.
pub struct Trainer {
    model: Arc<Decoder>,
    commands: Receiver<Command>,
    outbox: JobWriter,
    /// In the order in which they are asked for rows.
    jobs: Vec<TrainingJob>,
    /// Jobs to stop once no pass has their rows, and how.
    leaving: Vec<(String, StopKind)>,
    under_way: Option<ActivePass>,
    /// Jobs' results of the last pass that they have not taken yet.
    results: Vec<(String, TargetScores)>,
    /// Passes to come with one job each, to find out whose fault an error was.
    alone: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StopKind {
    Pause,
    Cancel,
}

/// A pass and whose rows are in it.
struct ActivePass {
    pass: Pass,
    jobs: Vec<String>,
}

impl BackgroundWork for Trainer {
    fn run_slice(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start(job) => self.start(*job),
                Command::Pause(id) => self.leaving.push((id, StopKind::Pause)),
                Command::Cancel(id) => self.leaving.push((id, StopKind::Cancel)),
            }
        }
        self.turn()
    }
}

impl Trainer {
    /// A trainer without jobs, which takes commands whenever it gets a slice. Errors: there can be no thread for files.
    pub fn new(model: Arc<Decoder>, commands: Receiver<Command>) -> Result<Self> {
        let (jobs, leaving, results) = Default::default();
        let outbox = JobWriter::start()?;
        Ok(Self { model, commands, outbox, jobs, leaving, under_way: None, results, alone: 0 })
    }

    /// Waits until files are written and reports are told. True where jobs are left, which go on now. For those who have
    /// nothing else to do when a slice had none.
    pub fn settle(&self) -> bool {
        self.outbox.flush();
        !self.jobs.is_empty()
    }

    fn start(&mut self, mut job: Job) {
        let line = self.outbox.line(std::mem::replace(&mut job.report, Box::new(|_| ())));
        let taken = self.jobs.iter().any(|running| running.id() == job.id);
        let model = self.model.clone();
        let started = guarded(|| match taken {
            true => Err(Error::invalid(format!("a job {} runs already", job.id))),
            false => TrainingJob::new(job, &line, model),
        });
        match started {
            Ok(running) => {
                self.jobs.push(running);
                // One that goes on may have had no more to do than to say so.
                self.end(self.jobs.len() - 1);
            }
            Err(error) => line.tell(JobReport::Failed(error)),
        }
    }

    /// Does one piece of work, if there is any.
    fn turn(&mut self) -> bool {
        self.jobs.retain(|job| !job.line().failed());
        if let Some((id, scores)) = self.results.pop() {
            if let Some(i) = self.jobs.iter().position(|job| job.id() == id) {
                self.take_result(i, scores);
            }
            return true;
        }
        let left = |id: &String| self.leaving.iter().any(|(leaving, _)| leaving == id);
        match self.under_way.take() {
            // Nobody waits for it.
            Some(ActivePass { jobs, .. }) if jobs.iter().all(left) => self.restart(&jobs),
            Some(ActivePass { mut pass, jobs }) => match guarded(|| pass.advance()) {
                Ok(false) => self.under_way = Some(ActivePass { pass, jobs }),
                Ok(true) => self.results = jobs.into_iter().zip(pass.scores()).rev().collect(),
                Err(error) => self.pass_failed(error, &jobs),
            },
            None => {
                self.let_go();
                return self.begin();
            }
        }
        true
    }

    fn take_result(&mut self, i: usize, scores: TargetScores) {
        let running = &mut self.jobs[i];
        match guarded(|| running.absorb(scores)) {
            Ok(()) => self.end(i),
            Err(error) => self.fail(i, error),
        }
    }

    /// Lets a job go that has done all.
    fn end(&mut self, i: usize) {
        if !self.jobs[i].ended() {
            return;
        }
        self.jobs.remove(i).line().tell(JobReport::Succeeded);
    }

    fn fail(&mut self, i: usize, error: Error) {
        let running = self.jobs.remove(i);
        tracing::warn!(error = %format_args!("{error:#}"), job = running.id(), "failed");
        running.line().tell(JobReport::Failed(error));
    }

    /// A pass of one job fails the job. One of several is no job's fault yet: each does its passes since the last optimiser
    /// step again, the first one alone.
    fn pass_failed(&mut self, error: Error, jobs: &[String]) {
        if let [id] = jobs {
            if let Some(i) = self.jobs.iter().position(|job| job.id() == id) {
                self.fail(i, error);
            }
            return;
        }
        tracing::warn!(error = %format_args!("{error:#}"), jobs = jobs.len(), "a pass of several jobs failed");
        self.alone = jobs.len();
        self.restart(jobs);
    }

    fn restart(&mut self, jobs: &[String]) {
        for id in jobs {
            let Some(i) = self.jobs.iter().position(|job| job.id() == id) else { continue };
            if let Err(error) = self.jobs[i].restart() {
                self.fail(i, error);
            }
        }
    }

    /// Lets jobs go that are to stop.
    fn let_go(&mut self) {
        for (id, leave) in std::mem::take(&mut self.leaving) {
            let Some(i) = self.jobs.iter().position(|job| job.id() == id) else { continue };
            let (done, report) = match leave {
                StopKind::Pause => (self.jobs[i].save(), JobReport::Paused),
                StopKind::Cancel => {
                    self.jobs[i].forget();
                    (Ok(()), JobReport::Cancelled)
                }
            };
            match done {
                Ok(()) => self.jobs.remove(i).line().tell(report),
                Err(error) => self.fail(i, error),
            }
        }
    }

    /// Begins a pass; false without jobs that can go on. Measuring goes before learning.
    fn begin(&mut self) -> bool {
        let ready: Vec<&TrainingJob> = self.jobs.iter().filter(|job| !job.waits()).collect();
        let measuring = ready.iter().any(|job| job.measures());
        let (mut parts, mut ids, mut rows) = (Vec::new(), Vec::new(), 0);
        for running in ready.into_iter().filter(|job| job.measures() == measuring) {
            let part = running.job_batch();
            let more = part.batch.tokens.len();
            if !parts.is_empty() && (rows + more > MAX_ROWS || self.alone > 0) {
                break;
            }
            rows += more;
            parts.push(part);
            ids.push(running.id().to_owned());
        }
        if parts.is_empty() {
            return false;
        }
        self.alone = self.alone.saturating_sub(1);
        // Whoever had no room is first next time.
        self.jobs.sort_by_key(|job| ids.iter().any(|id| id == job.id()));
        let room = if self.model.weights().norm.device().is_cpu() { KEPT_BYTES } else { 0 };
        self.under_way = Some(ActivePass { pass: Pass::new(self.model.clone(), parts, !measuring, room), jobs: ids });
        true
    }
}

/// What `f` gives, a panic being an error.
fn guarded<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
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
    use crate::train::testing::spec;

    /// Losses of two jobs; `fail` is called after every piece.
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
                spec: crate::train::spec::JobSpec { gradient_accumulation: 2, ..spec() },
                train: train.collect(),
                valid: Vec::new(),
                dir: own,
                provenance: Default::default(),
                from: None,
                resume: false,
                report: Box::new(report),
            });
        }
        while trainer.turn() || trainer.settle() {
            fail(&mut trainer);
        }
        let mut losses = std::mem::take(&mut *losses.lock().unwrap());
        losses.sort_by(|a, b| a.0.cmp(&b.0));
        losses
    }

    #[test]
    fn a_pass_of_several_jobs_that_fails_is_done_again_by_each() {
        let plain = losses(|_| ());
        assert_eq!(plain.len(), 6);
        let mut pieces = 0;
        let again = losses(|trainer| {
            pieces += 1;
            // In the backward of the second of two passes that make a step.
            let doomed = trainer.under_way.take_if(|_| pieces == 12);
            if let Some(ActivePass { jobs, .. }) = doomed {
                assert_eq!(jobs.len(), 2);
                trainer.pass_failed(Error::internal("out of memory"), &jobs);
            }
        });
        assert!(pieces > 40, "{pieces}");
        assert_eq!(plain, again);
    }

    #[test]
    fn a_pass_of_one_job_that_fails_is_the_end_of_the_job() {
        let mut alone = false;
        let losses = losses(|trainer| {
            if !alone && let Some(ActivePass { jobs, .. }) = trainer.under_way.take() {
                alone = true;
                trainer.pass_failed(Error::internal("out of memory"), &jobs[..1]);
                trainer.restart(&jobs[1..]);
            }
        });
        let names: Vec<&str> = losses.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["b", "b", "b", "out of memory"]);
    }
}
