//! Background work between the steps of requests and in idle time.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::time::{Duration, Instant};

use quiver::engine::worker::Tick;
use quiver::engine::{BackgroundTask, BackgroundWork, Engine};

use crate::fake::{Answer, Bench, Fake, config, greedy, reference, request};

/// Background work that sleeps.
#[derive(Clone, Default)]
struct Work {
    time: Duration,
    /// Number of slices that ran.
    done: Arc<AtomicUsize>,
    /// Number of slices that there are.
    limit: Option<usize>,
    panics: bool,
}

impl BackgroundWork for Work {
    fn run_slice(&mut self) -> bool {
        if self.limit.is_some_and(|limit| self.done.load(Relaxed) >= limit) {
            return false;
        }
        std::thread::sleep(self.time);
        assert!(!self.panics, "requested by the test");
        self.done.fetch_add(1, Relaxed);
        true
    }
}

impl Work {
    /// Whether the engine has dropped its copy.
    fn gone(&self) -> bool {
        Arc::strong_count(&self.done) == 1
    }
}

fn task(work: &Work, share: f64, max_delay: Duration) -> Option<BackgroundTask> {
    Some(BackgroundTask { work: Box::new(work.clone()), share, max_delay })
}

fn bench(step: Duration, task: Option<BackgroundTask>) -> Bench {
    let mut fake = Fake::new(&config());
    fake.step = step;
    Bench::with_background(fake, &config(), task)
}

fn read(counter: &AtomicU64) -> f64 {
    counter.load(Relaxed) as f64
}

const MS: Duration = Duration::from_millis(1);

#[test]
fn idle_time_is_used_back_to_back_and_ends_with_the_work() {
    let work = Work { limit: Some(100), ..Work::default() };
    let mut bench = bench(Duration::ZERO, task(&work, 0.0, Duration::ZERO));
    for _ in 0..100 {
        assert_eq!(bench.worker.tick(), Tick::Sliced);
    }
    assert_eq!(bench.worker.tick(), Tick::Idle);
    assert_eq!(bench.engine.stats().background_slices.load(Relaxed), 100);
}

#[test]
fn a_request_goes_before_idle_work_and_its_answer_stays_the_same() {
    let work = Work::default();
    let mut bench = bench(Duration::ZERO, task(&work, 0.0, MS));
    assert_eq!(bench.worker.tick(), Tick::Sliced);
    let mut events = bench.submit(&[1, 2, 3], &[], greedy(20)).unwrap();
    for _ in 0..20 {
        assert_eq!(bench.worker.tick(), Tick::Stepped);
    }
    assert_eq!(work.done.load(Relaxed), 1, "with a share of 0, slices run in idle time only");
    assert_eq!(bench.worker.tick(), Tick::Sliced);
    let mut answer = Answer::default();
    answer.take(&mut events);
    assert_eq!(answer, reference(&[1, 2, 3], &[], &greedy(20), 200));
}

#[test]
fn the_share_is_kept_while_requests_run() {
    for share in [0.1, 0.5] {
        let work = Work { time: MS, ..Work::default() };
        let mut bench = bench(MS, task(&work, share, 1000 * MS));
        let mut longest = Duration::ZERO;
        let _events = bench.submit(&[1, 2, 3], &[], greedy(150)).unwrap();
        for _ in 0..150 {
            let began = Instant::now();
            assert_eq!(bench.worker.tick(), Tick::Stepped);
            longest = longest.max(began.elapsed());
        }
        let stats = bench.engine.stats();
        let (serving, background) = (read(&stats.serving_micros), read(&stats.background_micros));
        let (got, one_tick) = (background / (serving + background), longest.as_micros() as f64);
        // It may be ahead by the slice that reached the share, and is never behind by a whole tick.
        let off = one_tick / (serving + background);
        assert!((share - off..=share + off).contains(&got), "{got} of {share}, give or take {off}");
    }
}

#[test]
fn slices_longer_than_the_delay_wait_until_no_sequence_decodes() {
    let work = Work { time: 20 * MS, ..Work::default() };
    let mut bench = bench(MS, task(&work, 1.0, 10 * MS));
    assert_eq!(bench.worker.tick(), Tick::Sliced);
    let _events = bench.submit(&[1; 100], &[], greedy(30)).unwrap();
    // The prompt takes four steps, the last of which gives the first token.
    for after_step in [2, 3, 4] {
        assert_eq!(bench.worker.tick(), Tick::Stepped);
        assert_eq!(work.done.load(Relaxed), after_step, "a slice may delay a prompt");
    }
    for _ in 0..29 {
        assert_eq!(bench.worker.tick(), Tick::Stepped);
        assert_eq!(work.done.load(Relaxed), 4, "but not the next token");
    }
    assert_eq!(bench.worker.tick(), Tick::Stepped);
    assert_eq!(work.done.load(Relaxed), 5, "no sequence decodes any more");
    assert_eq!(bench.worker.tick(), Tick::Sliced);
}

#[test]
fn a_panic_ends_the_work_and_not_the_engine() {
    let work = Work { panics: true, ..Work::default() };
    let mut bench = bench(Duration::ZERO, task(&work, 0.5, MS));
    assert_eq!(bench.worker.tick(), Tick::Idle);
    assert!(work.gone(), "the task is dropped");
    assert_eq!(bench.answer(&[4, 5], &[], greedy(5)), reference(&[4, 5], &[], &greedy(5), 200));
}

#[test]
fn a_share_is_from_0_to_1() {
    let error = Engine::start(Fake::new(&config()), config(), task(&Work::default(), 1.5, MS)).err().unwrap();
    assert!(error.message.contains("share"), "{error}");
}

#[tokio::test]
async fn the_thread_slices_between_requests_and_ends_with_the_handle() {
    let work = Work { time: MS / 10, ..Work::default() };
    let engine = Engine::start(Fake::new(&config()), config(), task(&work, 0.3, MS)).unwrap();
    for i in 0..20 {
        let (request, mut events) = request(&[i, 7], &[], greedy(20));
        engine.submit(request).unwrap();
        let mut answer = Answer::default();
        while let Some(event) = events.recv().await {
            answer.push(event);
        }
        assert_eq!(answer.ids(), reference(&[i, 7], &[], &greedy(20), 200).ids());
    }
    let before = work.done.load(Relaxed);
    tokio::time::timeout(Duration::from_secs(20), async {
        while work.done.load(Relaxed) < before + 50 {
            tokio::time::sleep(MS).await;
        }
        drop(engine);
        while !work.gone() {
            tokio::time::sleep(MS).await;
        }
    })
    .await
    .expect("idle time is used, and the thread ends though there is work");
}
