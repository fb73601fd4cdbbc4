//! The sampler, compared with a plain one that sorts everything in f64.

use proptest::prelude::*;
use quiver::engine::constraint::TokenMask;
use quiver::engine::request::SamplingParams;
use quiver::engine::sampler::{SampledToken, SamplingMetadata, TokenCounts, sample, score};

fn choose(
    logits: &[f32],
    params: &SamplingParams,
    counts: &TokenCounts,
    masked: &[u32],
    seed: u64,
    index: usize,
) -> u32 {
    sample(logits, &SamplingMetadata { params, counts, masked, allowed: None, seed, index }).unwrap().id
}

fn plain(logits: &[f32], params: &SamplingParams) -> SampledToken {
    sample(
        logits,
        &SamplingMetadata {
            params,
            counts: &TokenCounts::new(params, &[]),
            masked: &[],
            allowed: None,
            seed: 1,
            index: 0,
        },
    )
    .unwrap()
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// Probabilities after temperature, `min_p`, `top_k` and `top_p`, by sorting a full softmax.
fn distribution(logits: &[f32], params: &SamplingParams) -> Vec<f64> {
    let mut sorted: Vec<(f64, usize)> =
        logits.iter().map(|l| f64::from(*l) / f64::from(params.temperature)).zip(0..).collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let max = sorted[0].0;
    sorted.iter_mut().for_each(|(logit, _)| *logit = (*logit - max).exp());
    sorted.retain(|(weight, _)| *weight >= f64::from(params.min_p));
    if params.top_k > 0 {
        sorted.truncate(params.top_k);
    }
    let total: f64 = sorted.iter().map(|(weight, _)| weight).sum();
    let mut reached = 0.0;
    let keep = sorted.iter().position(|(weight, _)| {
        reached += weight / total;
        reached >= f64::from(params.top_p)
    });
    sorted.truncate(keep.map_or(sorted.len(), |last| last + 1));
    let total: f64 = sorted.iter().map(|(weight, _)| weight).sum();
    let mut probabilities = vec![0.0; logits.len()];
    sorted.iter().for_each(|(weight, id)| probabilities[*id] = weight / total);
    probabilities
}

/// Noise between -3 and 3, different for each `(seed, i)`.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 * 6.0 - 3.0
    };
    (0..len).map(|_| next()).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let cases = [
        SamplingParams::default(),
        SamplingParams { temperature: 0.5, ..SamplingParams::default() },
        SamplingParams { temperature: 2.0, top_k: 7, ..SamplingParams::default() },
        SamplingParams { top_p: 0.6, ..SamplingParams::default() },
        SamplingParams { min_p: 0.2, ..SamplingParams::default() },
        SamplingParams { top_k: 20, top_p: 0.7, min_p: 0.05, temperature: 1.3, ..SamplingParams::default() },
        SamplingParams { top_k: 1, ..SamplingParams::default() },
    ];
    for (case, params) in cases.iter().enumerate() {
        for len in [5, 64, 100] {
            let logits = noise(len as u64, len);
            let want = distribution(&logits, params);
            let counts = TokenCounts::new(params, &[]);
            let draws = 20_000;
            let mut got = vec![0_usize; len];
            // Half the draws vary the index and half the seed: both must be independent.
            (0..draws / 2).for_each(|i| got[choose(&logits, params, &counts, &[], 42, i) as usize] += 1);
            (0..draws / 2).for_each(|i| got[choose(&logits, params, &counts, &[], i as u64, 3) as usize] += 1);
            let mut chi_square = 0.0;
            let mut freedom = 0.0;
            for (got, want) in got.iter().zip(&want) {
                let expected = want * draws as f64;
                if *want == 0.0 {
                    assert_eq!(*got, 0, "case {case}: a token outside the distribution was drawn");
                } else {
                    chi_square += (*got as f64 - expected).powi(2) / expected;
                    freedom += 1.0;
                }
            }
            // Mean `freedom - 1`, variance twice that: five standard deviations.
            let limit = freedom + 5.0 * (2.0_f64 * freedom).sqrt();
            assert!(chi_square < limit, "case {case}, {len} tokens: {chi_square} over {limit}");
        }
    }
}

#[test]
fn a_flat_nucleus_reaches_beyond_the_first_candidates() {
    // 90% of 5,000 equal tokens are many more than the first candidates. Ties go to the lowest ids.
    let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
    let logits = vec![0.5; 5_000];
    let counts = TokenCounts::new(&params, &[]);
    let ids: Vec<_> = (0..4_000).map(|i| choose(&logits, &params, &counts, &[], 7, i)).collect();
    let last = *ids.iter().max().unwrap();
    assert!((4_450..=4_500).contains(&last), "{last}");
    // A top_p close to 1 keeps all tokens.
    let params = SamplingParams { top_p: 0.999_999_9, ..SamplingParams::default() };
    assert!((0..4_000).any(|i| choose(&logits, &params, &counts, &[], 7, i) > 4_900));
}

#[test]
fn draws_depend_on_seed_and_index_alone() {
    let logits = noise(3, 1000);
    let params = SamplingParams::default();
    let counts = TokenCounts::new(&params, &[]);
    let stream = |seed| (0..50).map(|i| choose(&logits, &params, &counts, &[], seed, i)).collect::<Vec<_>>();
    assert_eq!(stream(1), stream(1));
    assert_ne!(stream(1), stream(2));
    assert_eq!(stream(9)[30], choose(&logits, &params, &counts, &[], 9, 30));
}

#[test]
fn ties_go_to_the_lowest_id() {
    for len in [1, 15, 16, 17, 33, 200] {
        for first in 0..len {
            let mut logits = vec![-1.0; len];
            logits[first..].iter_mut().step_by(3).for_each(|l| *l = 2.0);
            assert_eq!(plain(&logits, &greedy()).id, first as u32);
        }
    }
    assert_eq!(plain(&[-0.0, 0.0], &greedy()).id, 0);
    assert_eq!(plain(&[f32::MIN, f32::NEG_INFINITY], &greedy()).id, 0);
}

#[test]
fn bad_logits_are_errors() {
    for len in [1, 16, 40] {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for at in 0..len {
                let mut logits = vec![0.0; len];
                logits[at] = bad;
                for params in [greedy(), SamplingParams::default()] {
                    let counts = TokenCounts::new(&params, &[]);
                    let metadata = SamplingMetadata {
                        params: &params,
                        counts: &counts,
                        masked: &[],
                        allowed: None,
                        seed: 0,
                        index: 0,
                    };
                    assert!(sample(&logits, &metadata).unwrap_err().message.contains("NaN"));
                }
                assert!(score(&logits, 0, 1).is_err());
            }
        }
    }
    let params = greedy();
    let counts = TokenCounts::new(&params, &[]);
    let all_masked =
        SamplingMetadata { params: &params, counts: &counts, masked: &[0, 1], allowed: None, seed: 0, index: 0 };
    assert!(sample(&[1.0, 2.0], &all_masked).unwrap_err().message.contains("masked"));
    assert!(score(&[1.0, 2.0], 2, 0).is_err());
}

#[test]
fn only_allowed_tokens_come() {
    let params = [
        greedy(),
        SamplingParams::default(),
        SamplingParams { top_k: 3, ..SamplingParams::default() },
        SamplingParams { top_p: 0.5, min_p: 0.1, ..SamplingParams::default() },
    ];
    for len in [1, 31, 32, 33, 100, 1000] {
        let logits = noise(len as u64, len);
        let masks: [TokenMask; 4] = [
            [0].into_iter().collect(),
            (0..len as u32).collect(),
            (0..len as u32).filter(|id| id % 3 == 0).collect(),
            [len as u32 - 1, len as u32 + 70].into_iter().collect(),
        ];
        for (params, mask) in params.iter().flat_map(|params| masks.iter().map(move |mask| (params, mask))) {
            let params = SamplingParams { logprobs: Some(2), ..params.clone() };
            let by_hand: Vec<f32> =
                (0..).zip(&logits).map(|(id, l)| if mask.allows(id) { *l } else { f32::NEG_INFINITY }).collect();
            let counts = TokenCounts::new(&params, &[]);
            let choice = SamplingMetadata {
                params: &params,
                counts: &counts,
                masked: &[],
                allowed: Some(mask),
                seed: 1,
                index: 0,
            };
            let got = sample(&logits, &choice).unwrap();
            assert_eq!(got, plain(&by_hand, &params));
            assert!(mask.allows(got.id));
        }
    }
}

#[test]
fn penalties_by_hand() {
    // The prompt is 0 and 1; 1 was generated twice and 2 once.
    let logits = [2.0, 2.0, -2.0, 0.25];
    let after = |params: &SamplingParams| {
        let mut counts = TokenCounts::new(params, &[0, 1]);
        [1, 1, 2].into_iter().for_each(|id| counts.push(id));
        let params = SamplingParams { logprobs: Some(4), temperature: 0.0, ..params.clone() };
        let metadata =
            SamplingMetadata { params: &params, counts: &counts, masked: &[], allowed: None, seed: 0, index: 0 };
        let mut top = sample(&logits, &metadata).unwrap().logprobs.unwrap().top;
        top.sort_by_key(|(id, _)| *id);
        // Logits up to a constant, which token 3 gives because no penalty applies to it.
        top.iter().map(|(_, logprob)| logprob - top[3].1 + 0.25).collect::<Vec<_>>()
    };
    let near = |got: Vec<f32>, want: [f32; 4]| {
        assert!(got.iter().zip(want).all(|(got, want)| (got - want).abs() < 1e-5), "{got:?}, not {want:?}");
    };
    let none = SamplingParams::default();
    near(after(&none), [2.0, 2.0, -2.0, 0.25]);
    near(after(&SamplingParams { repetition_penalty: 2.0, ..none.clone() }), [1.0, 1.0, -4.0, 0.25]);
    near(after(&SamplingParams { presence_penalty: 0.5, ..none.clone() }), [2.0, 1.5, -2.5, 0.25]);
    near(after(&SamplingParams { frequency_penalty: 0.5, ..none.clone() }), [2.0, 1.0, -2.5, 0.25]);
    let all = SamplingParams { repetition_penalty: 2.0, presence_penalty: 0.5, frequency_penalty: 0.5, ..none.clone() };
    near(after(&all), [1.0, -0.5, -5.0, 0.25]);
    // Bias comes before the penalties; ids outside the vocabulary do nothing.
    let biased = SamplingParams { logit_bias: vec![(0, 2.0), (2, 3.0), (99, 1.0)], repetition_penalty: 2.0, ..none };
    near(after(&biased), [2.0, 1.0, 0.5, 0.25]);
}

#[test]
fn masks_hold_against_everything() {
    let params = SamplingParams { logit_bias: vec![(1, 100.0)], ..greedy() };
    let counts = TokenCounts::new(&params, &[]);
    assert_eq!(choose(&[0.0, 1.0, 0.5], &params, &counts, &[1], 0, 0), 2);
    assert_eq!(choose(&[0.0, 1.0, 0.5], &params, &counts, &[], 0, 0), 1);
}

#[test]
fn the_log_probabilities_of_chosen_ids_are_reported() {
    let logits = [0.5, -1.0, 3.0, 2.0];
    let params = SamplingParams { logprobs: Some(4), logprob_token_ids: vec![3, 0, 99], ..greedy() };
    let found = plain(&logits, &params).logprobs.expect("requested");
    let of = |id: u32| found.top.iter().find(|(other, _)| *other == id).copied().expect("all are in the top");
    // An id outside the vocabulary has no log-probability.
    assert_eq!(found.chosen, [of(3), of(0)]);
}

#[test]
fn temperature_is_not_in_the_logprobs() {
    let logits = noise(8, 300);
    let cold = plain(&logits, &SamplingParams { temperature: 0.01, logprobs: Some(2), ..SamplingParams::default() });
    let zero = plain(&logits, &SamplingParams { logprobs: Some(2), ..greedy() });
    assert_eq!(cold, zero);
    // At this temperature all other weights underflow to 0.
    assert_eq!(plain(&logits, &SamplingParams { temperature: 1e-30, ..SamplingParams::default() }).id, zero.id);
}

proptest! {
    #[test]
    fn logprobs_equal_a_plain_softmax(seed: u64, len in 1_usize..700, top in 0_usize..8, scale in 0.1_f32..20.0) {
        let logits: Vec<f32> = noise(seed, len).iter().map(|l| (l * scale * 4.0).round() / 4.0).collect();
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let id = (seed % len as u64) as u32;
        let got = score(&logits, id, top).unwrap();
        let logprob = |id: u32| f64::from(logits[id as usize]) - total.ln();
        let close = |got: f32, want: f64| (f64::from(got) - want).abs() < 1e-5 * want.abs().max(1.0);
        prop_assert!(close(got.logprob, logprob(id)));
        prop_assert_eq!(got.rank as usize, 1 + logits.iter().filter(|l| **l > logits[id as usize]).count());
        let mut sorted: Vec<u32> = (0..len as u32).collect();
        sorted.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        prop_assert_eq!(got.top.len(), top.min(len));
        for ((id, got), want) in got.top.iter().zip(&sorted) {
            prop_assert_eq!(id, want);
            prop_assert!(close(*got, logprob(*want)));
        }
    }

    #[test]
    fn what_is_drawn_could_be_drawn(
        seed: u64, len in 1_usize..700, temperature in 0.1_f32..3.0, top_p in 0.05_f32..=1.0, top_k in 0_usize..40,
        min_p in 0.0_f32..0.5,
    ) {
        // Rounded, so that there are ties.
        let logits: Vec<f32> = noise(seed, len).iter().map(|l| (l * 8.0).round() / 8.0).collect();
        let params = SamplingParams { temperature, top_p, top_k, min_p, ..SamplingParams::default() };
        // Slightly wider limits, because of rounding at the edges.
        let wider = SamplingParams { top_p: top_p + 1e-4, min_p: min_p * 0.999, ..params.clone() };
        let possible = distribution(&logits, &wider);
        let counts = TokenCounts::new(&params, &[]);
        for index in 0..20 {
            let id = choose(&logits, &params, &counts, &[], seed, index);
            prop_assert!(possible[id as usize] > 0.0);
        }
    }
}
