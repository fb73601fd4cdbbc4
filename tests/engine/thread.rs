//! The engine thread: events over channels, faults, draining, idling.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use quiver::engine::{Engine, EngineConfig};
use quiver::error::ErrorKind;

use crate::fake::{Answer, Fake, config, greedy, lease, reference, request};

fn start(change: impl FnOnce(&mut Fake)) -> Engine {
    let mut fake = Fake::new(&config());
    change(&mut fake);
    Engine::start(fake, config(), None).unwrap()
}

async fn answer(engine: &Engine, prompt: &[u32], name: Option<&str>, max_tokens: usize) -> Answer {
    let adapters = name.map(|name| (lease(name, name), 1.0)).into_iter().collect::<Vec<_>>();
    let (request, mut events) = request(prompt, &adapters, greedy(max_tokens));
    engine.submit(request).unwrap();
    let mut answer = Answer::default();
    while let Some(event) = events.recv().await {
        answer.push(event);
    }
    assert!(answer.ended(), "the channel closes after the end only");
    answer
}

#[tokio::test]
async fn many_clients_at_once() {
    let engine = start(|fake| fake.load_ticks = 3);
    let names = [None, Some("a"), Some("b")];
    let clients = (0..60_u32).map(|i| {
        let (engine, name) = (engine.clone(), names[i as usize % 3]);
        tokio::spawn(async move {
            let prompt = [i % 7, 2, 3, 4, 5, i % 5];
            let got = answer(&engine, &prompt, name, 20).await.ids();
            let adapters: Vec<_> = name.map(|name| (lease(name, name), 1.0)).into_iter().collect();
            assert_eq!(got, reference(&prompt, &adapters, &greedy(20), 200).ids());
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    // The counters are updated at the end of the step.
    while engine.stats().running.load(Relaxed) + engine.stats().used_blocks.load(Relaxed) > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(engine.stats().total_blocks.load(Relaxed), 64);
}

#[tokio::test]
async fn a_panic_fails_what_runs_and_nothing_else() {
    let engine = start(|fake| fake.panic_at = Some(3));
    let failed = answer(&engine, &[1, 2], Some("a"), 10).await;
    assert_eq!(failed.tokens.len(), 2);
    assert!(failed.failed.unwrap().contains("forward pass"));
    let served = answer(&engine, &[1, 2], Some("a"), 10).await;
    assert_eq!(served.ids(), reference(&[1, 2], &[(lease("a", "a"), 1.0)], &greedy(10), 200).ids());
}

#[tokio::test]
async fn a_broken_adapter_is_the_clients_error() {
    let engine = start(|fake| fake.broken = vec!["a".into()]);
    assert!(answer(&engine, &[1], Some("a"), 3).await.failed.unwrap().contains("gone"));
    assert_eq!(answer(&engine, &[1], Some("b"), 3).await.tokens.len(), 3);
}

#[tokio::test]
async fn draining_finishes_accepted_requests() {
    let engine = start(|fake| fake.load_ticks = 20);
    let clients: Vec<_> = (0..20)
        .map(|i| {
            let (request, events) = request(&[i, 1], &[(lease("a", "a"), 1.0)], greedy(30));
            engine.submit(request).unwrap();
            events
        })
        .collect();
    tokio::time::timeout(Duration::from_secs(60), engine.drain()).await.expect("drains");
    let (late, _events) = request(&[1], &[], greedy(1));
    assert_eq!(engine.submit(late).unwrap_err().kind, ErrorKind::Unavailable);
    for mut events in clients {
        let mut answer = Answer::default();
        answer.take(&mut events);
        assert_eq!(answer.tokens.len(), 30);
        assert!(answer.finished.is_some());
    }
    // Draining again, with no requests, returns at once.
    tokio::time::timeout(Duration::from_secs(60), engine.drain()).await.expect("drains");
}

#[tokio::test]
async fn requests_outlive_the_handle() {
    let engine = start(|_| ());
    let (request, mut events) = request(&[5, 6], &[], greedy(40));
    engine.submit(request).unwrap();
    drop(engine);
    let mut answer = Answer::default();
    while let Some(event) = events.recv().await {
        answer.push(event);
    }
    assert_eq!(answer.tokens.len(), 40);
}

#[tokio::test]
async fn no_steps_run_while_idle() {
    let engine = start(|_| ());
    answer(&engine, &[1], None, 4).await;
    let steps = engine.stats().steps.load(Relaxed);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(engine.stats().steps.load(Relaxed), steps);
}

#[test]
fn limits_are_checked_at_the_start() {
    let fake = || Fake::new(&config());
    let error = Engine::start(fake(), EngineConfig { num_blocks: 0, ..config() }, None).err().unwrap();
    assert!(error.message.contains("num_blocks"));
    let error = Engine::start(fake(), EngineConfig { max_batch_tokens: 4, ..config() }, None).err().unwrap();
    assert!(error.message.contains("max_running"));
}
