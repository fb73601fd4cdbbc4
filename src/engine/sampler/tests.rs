use super::*;

fn draw<'a>(params: &'a SamplingParams, index: usize, counts: &'a HashMap<u32, u32>) -> Draw<'a> {
    Draw { params, seed: 7, index, prompt: &[0], counts, stop_ids: &[3] }
}

/// Probabilities after all options, by a full sort.
fn reference(logits: &[f32], p: &SamplingParams) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|l| f64::from(*l) / f64::from(p.temperature)).collect();
    let max = scaled.iter().fold(f64::MIN, |a, b| a.max(*b));
    let mut weights: Vec<f64> = scaled.iter().map(|s| (s - max).exp()).collect();
    for w in &mut weights {
        if *w < f64::from(p.min_p) {
            *w = 0.0;
        }
    }
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    if p.top_k > 0 {
        ids[p.top_k.min(logits.len())..].iter().for_each(|&i| weights[i] = 0.0);
    }
    let total: f64 = weights.iter().sum();
    let mut sum = 0.0;
    for &i in &ids {
        if sum >= f64::from(p.top_p) * total && p.top_p < 1.0 {
            weights[i] = 0.0;
        }
        sum += weights[i];
    }
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

#[test]
fn draws_follow_the_truncated_distribution() {
    let logits: Vec<f32> = (0..300).map(|i| ((i * 37) % 101) as f32 / 17.0).collect();
    let base = SamplingParams::default();
    let cases = [
        SamplingParams { temperature: 0.7, ..base.clone() },
        SamplingParams { temperature: 0.5, top_k: 5, ..base.clone() },
        SamplingParams { top_p: 0.6, ..base.clone() },
        SamplingParams { temperature: 1.5, min_p: 0.3, ..base.clone() },
        SamplingParams { top_k: 40, top_p: 0.8, min_p: 0.05, ..base },
    ];
    let counts = HashMap::new();
    for params in cases {
        let want = reference(&logits, &params);
        let mut seen = vec![0u32; logits.len()];
        let draws = 20_000;
        for index in 0..draws {
            let (id, _) = sample(&logits, &draw(&params, index, &counts)).expect("finite logits");
            seen[id as usize] += 1;
        }
        let mut distance = 0.0;
        for (i, (&n, p)) in seen.iter().zip(&want).enumerate() {
            assert!(*p > 0.0 || n == 0, "id {i} is cut off by {params:?}");
            distance += (f64::from(n) / draws as f64 - p).abs();
        }
        // Half the L1 distance of 20,000 draws from at most 300 outcomes is about 0.04.
        assert!(distance / 2.0 < 0.06, "{distance} for {params:?}");
    }
}

#[test]
fn same_seed_and_index_draw_the_same() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 997) as f32 / 100.0).collect();
    let (params, counts) = (SamplingParams::default(), HashMap::new());
    let run = |seed| -> Vec<u32> {
        (0..50).map(|i| sample(&logits, &Draw { seed, ..draw(&params, i, &counts) }).expect("finite").0).collect()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn greedy_takes_the_lowest_id_on_ties() {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let counts = HashMap::new();
    let mut logits = vec![0.5f32; 40];
    (logits[21], logits[33]) = (2.0, 2.0);
    assert_eq!(sample(&logits, &draw(&params, 0, &counts)).expect("finite").0, 21);
}

#[test]
fn penalties_bias_and_minimum_length_by_hand() {
    let counts = HashMap::from([(1, 2)]);
    let greedy = SamplingParams { temperature: 0.0, logprobs: Some(4), ..Default::default() };
    let run = |params: &SamplingParams, index| {
        let (id, l) = sample(&[2.0, 1.9, -1.0, 1.5], &draw(params, index, &counts)).expect("finite");
        (id, l.expect("asked for"))
    };
    // Prompt id 0 and output id 1 are seen: 2.0/2, 1.9/2.
    assert_eq!(run(&SamplingParams { repetition_penalty: 2.0, ..greedy.clone() }, 0).0, 3);
    // 1.9 - 0.5 - 2·0.1 = 1.2.
    let (_, l) = run(&SamplingParams { presence_penalty: 0.5, frequency_penalty: 0.1, ..greedy.clone() }, 0);
    assert_eq!(l.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 3, 1, 2]);
    assert!((l.top[0].1 - l.top[2].1 - 0.8).abs() < 1e-6);
    let biased = SamplingParams { logit_bias: vec![(2, 50.0)], ..greedy.clone() };
    assert_eq!(run(&biased, 0).0, 2);
    let longer = SamplingParams { min_tokens: 2, logit_bias: vec![(3, 50.0)], ..greedy };
    assert_eq!((run(&longer, 1).0, run(&longer, 2).0), (0, 3));
}

#[test]
fn log_probabilities_ranks_and_alternatives() {
    let logits = [0.0f32, 3.0, 1.0, 3.0];
    let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
    let l = logprobs(&logits, 2, 2).expect("finite");
    assert!((f64::from(l.logprob) - (1.0 - total.ln())).abs() < 1e-6);
    assert_eq!((l.rank, l.top.iter().map(|t| t.0).collect::<Vec<_>>()), (3, vec![1, 3]));
}

#[test]
fn broken_logits_are_an_error() {
    let (params, counts) = (SamplingParams::default(), HashMap::new());
    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 17, 39] {
            let mut logits = vec![0.0; 40];
            logits[at] = bad;
            assert!(sample(&logits, &draw(&params, 0, &counts)).is_err(), "{bad} at {at}");
        }
    }
    assert!(sample(&[f32::NEG_INFINITY; 3], &draw(&params, 0, &counts)).is_err());
}
