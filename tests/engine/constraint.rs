//! Constraints in the engine: alone and in a batch, through preemption, when they are slow and when they fail.

use std::time::Duration;

use quiver::engine::EngineConfig;
use quiver::engine::constraint::{TokenConstraint, TokenMask};
use quiver::engine::request::{Event, FinishReason, SamplingParams};
use quiver::{Error, Result};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::fake::{Answer, Bench, EOS, config, greedy, reference, request};

/// Allows ids that follow the last one by 1 to 3, modulo 40. After `limit` tokens the output is complete.
#[derive(Clone)]
struct Steps {
    last: u32,
    taken: usize,
    limit: usize,
    pause: Duration,
}

const STEPS: Steps = Steps { last: 0, taken: 0, limit: usize::MAX, pause: Duration::ZERO };

impl TokenConstraint for Steps {
    fn compute_mask(&mut self) -> Result<TokenMask> {
        std::thread::sleep(self.pause);
        Ok((1..4).map(|step| (self.last + step) % 40).collect())
    }

    fn accept(&mut self, token: u32) -> Result<bool> {
        assert!((1..4).any(|step| (self.last + step) % 40 == token), "{token} after {}", self.last);
        (self.last, self.taken) = (token, self.taken + 1);
        Ok(self.taken == self.limit)
    }
}

/// Fails after `after` tokens.
struct Failing {
    after: usize,
}

impl TokenConstraint for Failing {
    fn compute_mask(&mut self) -> Result<TokenMask> {
        if self.after == 0 { Err(Error::invalid("as the test wants")) } else { Ok((0..40).collect()) }
    }

    fn accept(&mut self, _: u32) -> Result<bool> {
        self.after -= 1;
        Ok(false)
    }
}

fn submit(
    bench: &Bench,
    prompt: &[u32],
    params: SamplingParams,
    constraint: impl TokenConstraint + 'static,
) -> UnboundedReceiver<Event> {
    let (mut request, events) = request(prompt, &[], params);
    request.constraint = Some(Box::new(constraint));
    bench.engine.submit(request).expect("accepted");
    events
}

fn answer(events: &mut UnboundedReceiver<Event>) -> Answer {
    let mut answer = Answer::default();
    answer.take(events);
    answer
}

fn alone(prompt: &[u32], params: &SamplingParams, constraint: impl TokenConstraint + 'static) -> Answer {
    let mut bench = Bench::new(&config());
    let mut events = submit(&bench, prompt, params.clone(), constraint);
    bench.finish();
    answer(&mut events)
}

#[test]
fn preempted_and_mixed_sequences_keep_their_constraint() {
    let mut bench = Bench::new(&EngineConfig { num_blocks: 16, ..config() });
    let jobs: Vec<(Vec<u32>, SamplingParams)> = (0..8)
        .map(|i| {
            let params = SamplingParams { temperature: 0.9, seed: Some(i), logprobs: Some(1), ..greedy(40) };
            ((0..6).map(|t| (t * 3 + i as u32) % 40).collect(), params)
        })
        .collect();
    let mut events: Vec<_> = jobs
        .iter()
        .enumerate()
        .map(|(i, (prompt, params))| match i % 2 {
            0 => submit(&bench, prompt, params.clone(), STEPS),
            _ => bench.submit(prompt, &[], params.clone()).unwrap(),
        })
        .collect();
    bench.finish();
    assert!(bench.engine.stats().preemptions.load(std::sync::atomic::Ordering::Relaxed) > 3);
    for (i, ((prompt, params), events)) in jobs.iter().zip(&mut events).enumerate() {
        let mut got = answer(events);
        got.cached_tokens = 0;
        let want = if i % 2 == 0 { alone(prompt, params, STEPS) } else { reference(prompt, &[], params, 200) };
        assert_eq!(got, want);
        assert_eq!(got.ids().len(), 40);
    }
}

#[test]
fn a_complete_output_ends() {
    for (limit, max_tokens, reason) in
        [(3, 9, FinishReason::Stop), (3, 3, FinishReason::Stop), (4, 3, FinishReason::Length)]
    {
        let got = alone(&[1, 2], &greedy(max_tokens), Steps { limit, ..STEPS });
        assert_eq!(got.finished, Some((reason, None)));
        assert_eq!(got.ids().len(), limit.min(max_tokens));
    }
}

/// Allows only the end.
struct Finished;

impl TokenConstraint for Finished {
    fn compute_mask(&mut self) -> Result<TokenMask> {
        Ok([EOS].into_iter().collect())
    }

    fn accept(&mut self, _: u32) -> Result<bool> {
        unreachable!("the end is not accepted")
    }
}

#[test]
fn min_tokens_yields_to_an_output_that_can_only_end() {
    let params = SamplingParams { min_tokens: 5, ignore_eos: false, ..greedy(9) };
    assert_eq!(alone(&[1, 2], &params, Finished).finished, Some((FinishReason::Stop, None)));
}

#[test]
fn a_slow_constraint_holds_up_nobody() {
    let mut bench = Bench::new(&config());
    let slow = Steps { pause: Duration::from_millis(70), ..STEPS };
    let mut slow = submit(&bench, &[1, 2, 3], greedy(2), slow);
    let mut quick = bench.submit(&[1, 2, 3], &[], greedy(3)).unwrap();
    for _ in 0..3 {
        bench.worker.tick();
    }
    assert_eq!(answer(&mut quick).ids(), reference(&[1, 2, 3], &[], &greedy(3), 200).ids());
    bench.finish();
    assert_eq!(answer(&mut slow).ids(), alone(&[1, 2, 3], &greedy(2), STEPS).ids());
}

#[test]
fn a_constraint_that_fails_ends_its_sequence_alone() {
    let mut bench = Bench::new(&config());
    let mut failing = submit(&bench, &[1, 2, 3], greedy(9), Failing { after: 2 });
    let mut panicking = submit(&bench, &[1, 2, 3], greedy(9), Steps { last: 39, limit: 1, ..STEPS });
    let mut other = bench.submit(&[1, 2, 3], &[], greedy(9)).unwrap();
    bench.finish();
    let failing = answer(&mut failing);
    assert_eq!((failing.tokens.len(), failing.failed.as_deref()), (2, Some("as the test wants")));
    assert!(answer(&mut panicking).ended());
    assert_eq!(answer(&mut other).ids(), reference(&[1, 2, 3], &[], &greedy(9), 200).ids());
}

#[test]
fn allowed_ids_and_bad_words() {
    let params = SamplingParams { allowed_token_ids: vec![3, 7, 11], ..greedy(12) };
    let mut bench = Bench::new(&config());
    let got = bench.answer(&[1, 2], &[], params).ids();
    assert!(got.len() == 12 && got.iter().all(|id| [3, 7, 11].contains(id)), "{got:?}");

    let free = bench.answer(&[1, 2], &[], greedy(12)).ids();
    let params = SamplingParams { bad_words: vec![free[..3].to_vec()], ..greedy(12) };
    let got = bench.answer(&[1, 2], &[], params).ids();
    assert_eq!(got[..2], free[..2]);
    assert!(!got.windows(3).any(|three| three == &free[..3]), "{got:?}");

    let params = SamplingParams { bad_words: vec![vec![free[0]]], ..greedy(12) };
    assert!(!bench.answer(&[1, 2], &[], params).ids().contains(&free[0]));
}
