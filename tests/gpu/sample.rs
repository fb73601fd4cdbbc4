//! Sampling on a GPU against the engine's sampler, row by row on the same logits.

use candle_core::Tensor;
use quiver::Result;
use quiver::engine::constraint::TokenMask;
use quiver::engine::request::{Logprobs, SamplingParams};
use quiver::engine::sampler::{LogitsTask, SampledToken, SamplingMetadata, TokenCounts, run_tasks, sample, score};
use quiver::ops::sample::{RowSampling, SMALL, launch};
use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::common::device;

const VOCABS: [usize; 8] = [1, 7, 64, 1000, 1023, 49_152, 50_257, 128_256];

/// One row's logits and its sampling parameters.
#[derive(Debug, Clone)]
struct Case {
    logits: Vec<f32>,
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    masked: Vec<u32>,
    allowed: Option<TokenMask>,
    seed: u64,
    index: usize,
    /// Scored instead of sampled.
    target: Option<(u32, usize)>,
}

impl Case {
    fn new(logits: Vec<f32>, params: SamplingParams) -> Self {
        let (prompt, output, masked) = (vec![], vec![], vec![]);
        Self { logits, params, prompt, output, masked, allowed: None, seed: 1, index: 0, target: None }
    }

    fn counts(&self) -> TokenCounts {
        let mut counts = TokenCounts::new(&self.params, &self.prompt);
        self.output.iter().for_each(|id| counts.push(*id));
        counts
    }

    fn choice<'a>(&'a self, counts: &'a TokenCounts) -> SamplingMetadata<'a> {
        SamplingMetadata {
            params: &self.params,
            counts,
            masked: &self.masked,
            allowed: self.allowed.as_ref(),
            seed: self.seed,
            index: self.index,
        }
    }

    fn on_cpu(&self) -> Result<SampledToken> {
        match self.target {
            Some((id, top)) => score(&self.logits, id, top).map(|l| SampledToken { id, logprobs: Some(l) }),
            None => sample(&self.logits, &self.choice(&self.counts())),
        }
    }

    /// The logits after bias, penalties and masks, computed in the plainest way.
    fn edited(&self) -> Vec<f32> {
        let params = &self.params;
        let mut logits = self.logits.clone();
        params.logit_bias.iter().for_each(|(id, bias)| logits[*id as usize] += bias);
        for id in 0..logits.len() as u32 {
            let logit = &mut logits[id as usize];
            let count = self.output.iter().filter(|other| **other == id).count();
            if count > 0 || self.prompt.contains(&id) {
                let factor = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
            }
            if count > 0 {
                *logit -= params.frequency_penalty * count as f32 + params.presence_penalty;
            }
        }
        self.masked.iter().for_each(|id| logits[*id as usize] = f32::NEG_INFINITY);
        if let Some(allowed) = &self.allowed {
            let forbidden = |id: &u32| !allowed.allows(*id);
            (0..logits.len() as u32).filter(forbidden).for_each(|id| logits[id as usize] = f32::NEG_INFINITY);
        }
        logits
    }

    fn uniform(&self) -> f64 {
        let mut rng = Pcg64::seed_from_u64(self.seed);
        rng.advance(self.index as u128);
        (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Whether the draw by id of what truncation keeps, give or take a token, gives `id` but for 1e-5 of all weight; and
    /// how many tokens it keeps.
    fn could_be(&self, id: u32) -> (bool, usize) {
        let logits = self.edited();
        let SamplingParams { temperature, top_p, top_k, min_p, .. } = self.params;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| {
            let weight = f64::from((logit - max) / temperature).exp();
            if (weight as f32) < min_p { 0.0 } else { weight }
        };
        let mut best: Vec<u32> = (0..logits.len() as u32).collect();
        let order = |a: &u32, b: &u32| logits[*b as usize].partial_cmp(&logits[*a as usize]).unwrap().then(a.cmp(b));
        best.sort_by(order);
        best.truncate(if top_k == 0 { best.len() } else { top_k });
        let weights: Vec<f64> = logits.iter().map(|logit| weight(*logit)).collect();
        let goal = f64::from(top_p) * best.iter().map(|id| weights[*id as usize]).sum::<f64>();
        let mut reached = 0.0;
        let cut = best.iter().position(|id| {
            reached += weights[*id as usize];
            top_p < 1.0 && reached >= goal
        });
        let kept = cut.map_or(best.len(), |last| last + 1);
        let possible = [kept - 1, kept, kept + 1].into_iter().any(|kept| {
            let mut ids = best[..kept.clamp(1, best.len())].to_vec();
            ids.sort_unstable();
            let total: f64 = ids.iter().map(|id| weights[*id as usize]).sum();
            let before: f64 = ids.iter().filter(|other| **other < id).map(|id| weights[*id as usize]).sum();
            let (from, to) = (before / total - 1e-5, (before + weights[id as usize]) / total + 1e-5);
            ids.contains(&id) && (from..to).contains(&self.uniform())
        });
        (possible, kept)
    }

    /// Compares the device's answer.
    fn check(&self, got: &Result<SampledToken>) {
        let want = self.on_cpu();
        let (got, want) = match (got, &want) {
            (Ok(got), Ok(want)) => (got, want),
            (Err(got), Err(want)) => return assert_eq!(got.message, want.message),
            _ => panic!("{got:?}, not {want:?}"),
        };
        let about = || format!("{:?} {:?} of {} logits", self.params, self.target, self.logits.len());
        if got.id != want.id {
            assert!(
                self.target.is_none() && self.params.temperature > 0.0,
                "{} is not {}: {}",
                got.id,
                want.id,
                about()
            );
            let (possible, kept) = self.could_be(got.id);
            // Best first, as on the CPU, or by id without truncation and beyond the small sets.
            let truncated = self.params.top_k > 0 || self.params.top_p < 1.0;
            let exact = truncated && (kept <= SMALL || (1..=SMALL).contains(&self.params.top_k));
            assert!(possible && !exact, "{} is not {} of {kept}: {}", got.id, want.id, about());
        }
        let same = got.id == want.id;
        let (Some(got), Some(want)) = (&got.logprobs, &want.logprobs) else {
            return assert_eq!(got.logprobs.is_some(), want.logprobs.is_some());
        };
        let near = |a: f32, b: f32| a == b || (a - b).abs() <= 1e-4 * b.abs().max(1.0);
        if same {
            assert!(near(got.logprob, want.logprob) && got.rank == want.rank, "{got:?}, not {want:?}: {}", about());
        }
        let ids = |logprobs: &Logprobs| logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(got), ids(want), "{}", about());
        assert!(got.top.iter().zip(&want.top).all(|(a, b)| near(a.1, b.1)), "{got:?}, not {want:?}: {}", about());
    }
}

/// The device's answers for rows of one vocabulary.
fn on_device(cases: &[Case]) -> Vec<Result<SampledToken>> {
    let vocab = cases[0].logits.len();
    // One more row in front, so that the rows do not start at the start of the memory.
    let logits = std::iter::once(vec![f32::NAN; vocab]).chain(cases.iter().map(|case| case.logits.clone()));
    let logits: Vec<f32> = logits.flatten().collect();
    let logits = Tensor::from_vec(logits, (cases.len() + 1, vocab), &device()).unwrap();
    let logits = logits.narrow(0, 1, cases.len()).unwrap();
    let counts: Vec<_> = cases.iter().map(Case::counts).collect();
    let tasks = cases.iter().zip(&counts).map(|(case, counts)| match case.target {
        Some((id, top)) => LogitsTask::Score { id, top },
        None => LogitsTask::Sample(case.choice(counts)),
    });
    run_tasks(&logits, &tasks.collect::<Vec<_>>()).unwrap()
}

fn check(cases: &[Case]) {
    on_device(cases).iter().zip(cases).for_each(|(got, case)| case.check(got));
}

/// Logits of many kinds: smooth, peaked, full of ties, all equal, wide, partly impossible.
fn logits(rng: &mut Pcg64, vocab: usize) -> Vec<f32> {
    let kind = rng.random_range(0..7);
    let mut noise = || (0..4).map(|_| rng.random::<f32>()).sum::<f32>() * 6.0 - 12.0;
    let mut logits: Vec<f32> = (0..vocab).map(|_| noise()).collect();
    match kind {
        0 => {}
        1 => logits.iter_mut().for_each(|l| *l *= 0.01),
        2 => logits.iter_mut().for_each(|l| *l = (*l / 4.0).round() * 0.5),
        3 => logits.fill(0.25),
        4 => logits.iter_mut().for_each(|l| *l *= 20.0),
        5 => logits.iter_mut().step_by(3).for_each(|l| *l = f32::NEG_INFINITY),
        _ => logits.iter_mut().step_by(17).for_each(|l| *l = l.abs() * 1.5 - 3.0),
    }
    if kind == 5 && vocab == 1 {
        logits[0] = -0.0;
    }
    logits
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

/// A few ids, a run of ids or most ids; the words may end before the vocabulary or after it.
fn random_mask(rng: &mut Pcg64, vocab: usize) -> TokenMask {
    let vocab = vocab as u32;
    let first = rng.random_range(0..vocab);
    match rng.random_range(0..4) {
        0 => [first].into_iter().collect(),
        1 => (0..rng.random_range(1..40)).map(|_| rng.random_range(0..vocab + 40)).chain([first]).collect(),
        2 => (first..(first + 1000).min(vocab)).collect(),
        _ => (0..vocab + 100).filter(|id| id % 7 != 3 || *id == first).collect(),
    }
}

/// Any mix of parameters.
fn random_case(rng: &mut Pcg64, vocab: usize) -> Case {
    let mut case = Case::new(logits(rng, vocab), greedy());
    (case.seed, case.index) = (rng.random(), rng.random_range(0..100));
    let id = |rng: &mut Pcg64| rng.random_range(0..vocab as u32);
    if rng.random_ratio(1, 8) {
        case.target = Some((id(rng), rng.random_range(0..=20)));
        return case;
    }
    let params = &mut case.params;
    if rng.random_ratio(3, 4) {
        params.temperature = [0.01, 0.7, 1.0, 1.0, 2.0][rng.random_range(0..5)];
        params.min_p = [0.0, 0.0, 0.05, 0.3, 1.0][rng.random_range(0..5)];
        params.top_k = [0, 0, 1, 5, 50, 1024, 1025, 5000, usize::MAX][rng.random_range(0..9)];
        params.top_p = [1.0, 1.0, 0.95, 0.9, 0.5, 0.999_999_9, 1e-6, 0.0][rng.random_range(0..8)];
    }
    params.logprobs = [None, None, Some(0), Some(1), Some(5), Some(20)][rng.random_range(0..6)];
    if rng.random_ratio(1, 4) {
        // Some ids more than once.
        params.logit_bias = (0..rng.random_range(1..40)).map(|_| (id(rng), rng.random_range(-9.0..9.0_f32))).collect();
        params.logit_bias.extend(params.logit_bias.clone().iter().step_by(4).map(|(id, b)| (*id, b / 3.0)));
    }
    if rng.random_ratio(1, 4) {
        params.repetition_penalty = [1.0, 1.3][rng.random_range(0..2)];
        params.presence_penalty = [0.0, 1.5, -0.7][rng.random_range(0..3)];
        params.frequency_penalty = [0.0, 0.3, -0.1][rng.random_range(0..3)];
        case.prompt = (0..rng.random_range(0..300)).map(|_| id(rng)).collect();
        case.output = (0..rng.random_range(0..100)).map(|_| id(rng)).collect();
        case.output.extend(case.output.clone().iter().step_by(3));
    }
    if rng.random_ratio(1, 4) {
        case.masked = (0..rng.random_range(1..4)).map(|_| id(rng)).collect();
    }
    if rng.random_ratio(1, 3) {
        case.allowed = Some(random_mask(rng, vocab));
    }
    case
}

#[test]
fn mixed_rows_equal_the_cpu() {
    let mut rng = Pcg64::seed_from_u64(1);
    for vocab in VOCABS {
        let batches: &[usize] = if vocab < 2000 { &[1, 2, 7, 33, 64, 70, 70] } else { &[1, 3, 70] };
        for rows in batches {
            check(&(0..*rows).map(|_| random_case(&mut rng, vocab)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn every_parameter_alone_equals_the_cpu() {
    let none = SamplingParams::default();
    let mut all = vec![greedy(), none.clone()];
    all.extend([0.1, 2.0, 1e-30].map(|temperature| SamplingParams { temperature, ..none.clone() }));
    all.extend([0.01, 0.5, 1.0].map(|min_p| SamplingParams { min_p, ..none.clone() }));
    all.extend([1, 2, 40, 1000, 1024, 1025, 4096, 40_000].map(|top_k| SamplingParams { top_k, ..none.clone() }));
    all.extend([0.0, 0.3, 0.8, 0.95, 0.9999].map(|top_p| SamplingParams { top_p, ..none.clone() }));
    all.extend([0, 1, 20].map(|top| SamplingParams { logprobs: Some(top), ..greedy() }));
    let mut rng = Pcg64::seed_from_u64(2);
    for vocab in VOCABS {
        for _ in 0..4 {
            let logits = logits(&mut rng, vocab);
            check(&all.iter().map(|params| Case::new(logits.clone(), params.clone())).collect::<Vec<_>>());
        }
    }
}

#[test]
fn draws_go_through_the_whole_distribution() {
    let mut rng = Pcg64::seed_from_u64(3);
    let logits = logits(&mut rng, 1000);
    let kinds = [
        SamplingParams::default(),
        SamplingParams { top_p: 0.9, ..SamplingParams::default() },
        SamplingParams { top_k: 300, min_p: 1e-4, temperature: 1.7, ..SamplingParams::default() },
    ];
    let cases = kinds.iter().flat_map(|params| {
        let case = Case::new(logits.clone(), params.clone());
        (0..200).map(move |index| Case { index, ..case.clone() })
    });
    check(&cases.collect::<Vec<_>>());
}

#[test]
fn ties_beyond_all_that_is_sorted() {
    // A nucleus or a top_k of tens of thousands of equal tokens: the lowest ids are kept.
    let flat = |params: SamplingParams| {
        (0..6).map(move |index| Case { index, ..Case::new(vec![0.5; 49_152], params.clone()) })
    };
    let none = SamplingParams::default();
    let kinds = [
        SamplingParams { top_p: 0.9, ..none.clone() },
        SamplingParams { top_k: 50, logprobs: Some(20), ..none.clone() },
        SamplingParams { top_k: 20_000, ..none.clone() },
        SamplingParams { top_k: 20_000, top_p: 0.7, logprobs: Some(3), ..none.clone() },
        SamplingParams { top_p: 1e-6, logprobs: Some(0), ..none },
    ];
    let cases: Vec<_> = kinds.into_iter().flat_map(flat).collect();
    check(&cases);
    let limits = [44_237, 50, 20_000, 14_000, 1].iter().flat_map(|limit| [*limit; 6]);
    for (got, limit) in on_device(&cases).into_iter().zip(limits) {
        assert!(got.unwrap().id <= limit);
    }
}

#[test]
fn ties_go_to_the_lowest_id() {
    for vocab in [1, 15, 33, 1025, 9000] {
        let case = |first: usize| {
            let mut logits = vec![-1.0; vocab];
            logits[first..].iter_mut().step_by(3).for_each(|l| *l = 2.0);
            Case::new(logits, greedy())
        };
        let firsts = (0..vocab).step_by(vocab.div_ceil(50)).collect::<Vec<_>>();
        let cases: Vec<_> = firsts.iter().map(|first| case(*first)).collect();
        for (got, first) in on_device(&cases).into_iter().zip(firsts) {
            assert_eq!(got.unwrap().id as usize, first);
        }
    }
    check(&[Case::new(vec![-0.0, 0.0], greedy()), Case::new(vec![f32::MIN, f32::NEG_INFINITY], greedy())]);
}

#[test]
fn bad_rows_fail_alone() {
    let mut rng = Pcg64::seed_from_u64(4);
    for vocab in VOCABS {
        let mut cases: Vec<_> = (0..12).map(|_| random_case(&mut rng, vocab)).collect();
        for (i, bad) in [f32::NAN, -f32::NAN, f32::INFINITY].into_iter().enumerate() {
            let at = rng.random_range(0..vocab);
            cases[3 * i].logits[at] = bad;
        }
        // A masked NaN does no harm, unless nothing else is left.
        cases[1] = Case { masked: vec![vocab as u32 - 1], ..cases[1].clone() };
        cases[1].logits[vocab - 1] = f32::NAN;
        cases[2].logits.fill(f32::NEG_INFINITY);
        cases[4] = Case { masked: (0..vocab as u32).collect(), target: None, ..cases[4].clone() };
        cases[5].target = Some((vocab as u32, 3));
        check(&cases);
    }
}

#[test]
fn masks_that_allow_one_token_force_it() {
    let mut rng = Pcg64::seed_from_u64(8);
    for vocab in VOCABS {
        let cases: Vec<_> = (0..20)
            .map(|i| {
                let id = if i == 0 { vocab as u32 - 1 } else { rng.random_range(0..vocab as u32) };
                let params =
                    if i % 2 == 0 { greedy() } else { SamplingParams { logprobs: Some(1), ..Default::default() } };
                Case { allowed: Some([id].into_iter().collect()), ..Case::new(logits(&mut rng, vocab), params) }
            })
            .filter(|case| case.edited().iter().any(|logit| logit.is_finite()))
            .collect();
        for (got, case) in on_device(&cases).iter().zip(&cases) {
            case.check(got);
            assert!(case.allowed.as_ref().unwrap().allows(got.as_ref().unwrap().id));
        }
    }
}

#[test]
fn penalties_of_a_whole_prompt() {
    let mut rng = Pcg64::seed_from_u64(5);
    let vocab = 50_257;
    let params = SamplingParams { repetition_penalty: 1.2, logprobs: Some(20), frequency_penalty: 0.2, ..greedy() };
    let prompt: Vec<u32> = (0..100_000).map(|_| rng.random_range(0..vocab as u32)).collect();
    let case = |rng: &mut Pcg64| Case { prompt: prompt.clone(), ..Case::new(logits(rng, vocab), params.clone()) };
    check(&(0..3).map(|_| case(&mut rng)).collect::<Vec<_>>());
}

/// All values of a sample, as bits.
fn bits(sample: &Result<SampledToken>) -> Result<(u32, Vec<(u32, u32)>), String> {
    let SampledToken { id, logprobs } = sample.as_ref().map_err(|e| e.message.clone())?;
    let own = logprobs.iter().map(|l| (l.rank, l.logprob.to_bits()));
    let top = logprobs.iter().flat_map(|l| &l.top).map(|(id, logprob)| (*id, logprob.to_bits()));
    Ok((*id, own.chain(top).collect()))
}

#[test]
fn rows_stand_alone_bit_by_bit() {
    let mut rng = Pcg64::seed_from_u64(6);
    for vocab in [64, 1000, 50_257, 128_256] {
        let cases: Vec<_> = (0..40).map(|_| random_case(&mut rng, vocab)).collect();
        let together: Vec<_> = on_device(&cases).iter().map(bits).collect();
        for (case, together) in cases.iter().zip(&together).step_by(if vocab < 2000 { 1 } else { 5 }) {
            assert_eq!(bits(&on_device(std::slice::from_ref(case))[0]), *together);
        }
        let reversed: Vec<_> = cases.iter().rev().cloned().collect();
        assert_eq!(on_device(&reversed).iter().rev().map(bits).collect::<Vec<_>>(), together);
    }
}

#[test]
fn the_best_alone_needs_no_parameters() {
    let mut rng = Pcg64::seed_from_u64(7);
    let (rows, vocab) = (64, 128_256);
    let cases: Vec<_> = (0..rows).map(|_| Case::new(logits(&mut rng, vocab), greedy())).collect();
    let values: Vec<f32> = cases.iter().flat_map(|case| case.logits.clone()).collect();
    let tensor = Tensor::from_vec(values, (rows, vocab), &device()).unwrap();
    let asked: Vec<_> = (0..rows).map(|_| RowSampling::default()).collect();
    let launched = launch(&tensor, &asked).unwrap();
    let picked = launched.read().unwrap();
    assert_eq!(launched.read().unwrap(), picked);
    for (case, picked) in cases.iter().zip(picked) {
        assert_eq!(picked.id, case.on_cpu().unwrap().id);
        assert_eq!(picked.max, case.logits[picked.id as usize]);
    }
    assert!(launch(&tensor, &asked[1..]).is_err());
}
