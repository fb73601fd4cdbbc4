//! A fake trainer without a model. Its jobs do a step a tick and write adapters that answer in capitals. Some seeds make jobs
//! fail.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use quiver::Error;
use quiver::train::job::{Checkpoint, Command, Job, JobReport, Probe, StepMetrics, Validation};

use crate::harness::{BROKEN, write_adapter};

/// Seed of a job that fails in its second step.
pub const DIVERGES: u64 = 13;
/// Seed of a job whose probes differ from the server's log-probabilities.
pub const LIES: u64 = 14;
/// Seed of a job that the trainer drops without a report in its second step.
pub const VANISHES: u64 = 15;
/// Seed of a job that fails in its second step with an internal error.
pub const BREAKS: u64 = 16;

const TICK: Duration = Duration::from_millis(3);

/// Steps of a job without `max_steps`.
pub const STEPS: usize = 3;

struct FakeJob {
    job: Job,
    step: usize,
    steps: usize,
}

/// Starts the trainer on its own thread.
pub fn start() -> Sender<Command> {
    let (commands, inbox) = channel();
    std::thread::spawn(move || run(&inbox));
    commands
}

fn state(dir: &Path) -> std::path::PathBuf {
    dir.join("state.safetensors")
}

fn run(inbox: &Receiver<Command>) {
    let mut jobs: Vec<FakeJob> = Vec::new();
    loop {
        // Without jobs, waits for a command.
        let command = if jobs.is_empty() {
            match inbox.recv() {
                Ok(command) => Some(command),
                Err(_) => return,
            }
        } else {
            inbox.try_recv().ok()
        };
        let at = |jobs: &[FakeJob], id: &str| jobs.iter().position(|running| running.job.id == id);
        match command {
            Some(Command::Start(mut job)) => {
                assert!(!job.train.is_empty(), "a job without examples");
                let resumed = job.resume.then(|| std::fs::read_to_string(state(&job.dir)).expect("a state"));
                let step = resumed.map_or(0, |text| text.parse().expect("a number"));
                let steps = job.spec.max_steps.unwrap_or(STEPS);
                (job.report)(JobReport::Started { steps, done: step, parameters: 64 });
                let last = checkpoint(&job, step);
                if last.dir.is_dir() {
                    (job.report)(JobReport::Resumed(last));
                }
                jobs.push(FakeJob { job: *job, step, steps });
            }
            Some(Command::Pause(id)) => {
                if let Some(i) = at(&jobs, &id) {
                    let mut running = jobs.remove(i);
                    std::fs::write(state(&running.job.dir), running.step.to_string()).expect("a state is written");
                    (running.job.report)(JobReport::Paused);
                }
            }
            Some(Command::Cancel(id)) => {
                if let Some(i) = at(&jobs, &id) {
                    let mut running = jobs.remove(i);
                    let _ = std::fs::remove_file(state(&running.job.dir));
                    (running.job.report)(JobReport::Cancelled);
                }
            }
            None => {}
        }
        jobs.retain_mut(step);
        std::thread::sleep(TICK);
    }
}

fn checkpoint(job: &Job, step: usize) -> Checkpoint {
    let logprob = if job.spec.seed == LIES { -1.0 } else { 0.0 };
    let probe = Probe { tokens: b"ABC".map(u32::from).into(), logprobs: vec![logprob; 2] };
    Checkpoint { step, dir: job.dir.join(format!("step-{step}")), probe }
}

/// Does one step of a job. False once the job has ended.
fn step(running: &mut FakeJob) -> bool {
    let FakeJob { job, step, steps } = running;
    *step += 1;
    let step = *step;
    match (step, job.spec.seed) {
        (2, DIVERGES) => {
            (job.report)(JobReport::Failed(Error::invalid("the loss is NaN in step 2").code("training_diverged")));
            return false;
        }
        (2, BREAKS) => {
            (job.report)(JobReport::Failed(Error::internal(BROKEN)));
            return false;
        }
        (2, VANISHES) => return false,
        _ => {}
    }
    (job.report)(JobReport::Step(StepMetrics {
        step,
        train_loss: 1.0 / step as f64,
        train_mean_token_accuracy: 0.5,
        learning_rate: 1e-4,
        grad_norm: 1.0,
        tokens: 10,
        trained_tokens: 4,
        seconds: 0.01,
    }));
    let last = step >= *steps;
    if !job.valid.is_empty() && last {
        (job.report)(JobReport::Validation(Validation { step, valid_loss: 0.25, valid_mean_token_accuracy: 0.75 }));
    }
    if last || job.spec.checkpoint_every.is_some_and(|every| step.is_multiple_of(every)) {
        let checkpoint = checkpoint(job, step);
        write_adapter(&checkpoint.dir, step as f32 / 10.0);
        std::fs::write(state(&job.dir), step.to_string()).expect("a state is written");
        (job.report)(JobReport::Checkpoint(checkpoint));
    }
    if last {
        (job.report)(JobReport::Succeeded);
    }
    !last
}
