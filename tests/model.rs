//! The decoder on flat batches, compared with the logits of transformers and PEFT, and with itself when batches are split
//! differently.

use std::ops::Range;
use std::path::PathBuf;

use candle_core::Device;
use quiver::adapter::reader;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::lora::slots::{SlotPool, SlotWeights};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::{Quantize, Weights};
use quiver::ops::batch::{Batch, Span};

/// KV blocks of the tests' caches.
const BLOCKS: usize = 64;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny").join(name)
}

fn weights(quantize: Option<Quantize>) -> Weights {
    let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(fixture("base")) };
    Weights::load(&files, quantize, &Device::Cpu, |_| {}).unwrap()
}

/// A model with its cache and adapters.
struct Runner {
    decoder: Decoder,
    kv: KvCache,
    slots: SlotPool,
}

impl Runner {
    fn new(quantize: Option<Quantize>) -> Self {
        let decoder = Decoder::new(weights(quantize)).unwrap();
        let kv = KvCache::new(decoder.config(), BLOCKS, &Device::Cpu).unwrap();
        Self { decoder, kv, slots: SlotPool::default() }
    }

    /// Loads a fixture's adapter into a slot.
    fn load(&mut self, name: &str) -> u32 {
        let adapter = reader::read(&fixture(name), self.decoder.config()).unwrap().weights;
        self.slots.insert(SlotWeights::from_adapter(&adapter, self.decoder.config()))
    }

    /// Runs parts of sequences as one batch. Returns the logits of the rows that `wanted` selects, part by part.
    fn step(&mut self, parts: &[(&Sequence, Range<usize>)], wanted: impl Fn(usize) -> bool) -> Vec<Vec<f32>> {
        let batch = batch(parts, &wanted);
        let logits = self.decoder.forward(&batch, &mut self.kv, &self.slots).unwrap().logits;
        assert_eq!(logits.dims(), [batch.logit_rows.len(), self.decoder.config().vocab_size]);
        let mut rows = logits.to_vec2::<f32>().unwrap().into_iter();
        let part =
            |span: &Span| rows.by_ref().take(span.rows.clone().filter(|&row| wanted(row)).count()).flatten().collect();
        batch.spans.iter().map(part).collect()
    }

    /// The logits of all rows of a sequence that runs in chunks of at most `chunk` rows.
    fn run(&mut self, sequence: &Sequence, chunk: usize) -> Vec<f32> {
        let len = sequence.tokens.len();
        let parts = (0..len).step_by(chunk).map(|start| start..(start + chunk).min(len));
        parts.flat_map(|part| self.step(&[(sequence, part)], |_| true).concat()).collect()
    }
}

/// Tokens under weighted adapters, and their KV blocks.
struct Sequence {
    tokens: Vec<u32>,
    terms: Vec<(u32, f32)>,
    table: Vec<u32>,
}

impl Sequence {
    /// A sequence of `len` tokens. The KV blocks of eight sequences are interleaved.
    fn new(id: u32, len: u32, terms: &[(u32, f32)]) -> Self {
        let tokens = (0..len).map(|i| (i * i * 7 + i * 13 + id * 31) % 97).collect();
        Self { tokens, terms: terms.to_vec(), table: (0..8).rev().map(|block| block * 8 + id).collect() }
    }
}

fn batch(parts: &[(&Sequence, Range<usize>)], wanted: &impl Fn(usize) -> bool) -> Batch {
    let mut batch = Batch::default();
    for (sequence, positions) in parts {
        let tokens = &sequence.tokens[positions.clone()];
        batch.push(tokens, positions.start, &sequence.table, KvCache::BLOCK_SIZE, &sequence.terms);
    }
    batch.logit_rows = (0..batch.tokens.len()).filter(|&row| wanted(row)).map(|row| row as u32).collect();
    batch
}

/// The `input_ids` of the fixtures, and the expected logits of `name`.
fn expected(name: &str) -> (Vec<u32>, Vec<f32>) {
    let read =
        |name: &str| candle_core::safetensors::load(fixture(name).join("expected.safetensors"), &Device::Cpu).unwrap();
    let ids = read("base")["input_ids"].flatten_all().unwrap().to_vec1::<i64>().unwrap();
    let logits = read(name)["logits"].flatten_all().unwrap().to_vec1().unwrap();
    (ids.into_iter().map(|id| id as u32).collect(), logits)
}

/// Relative L2 distance.
#[track_caller]
fn distance(have: &[f32], want: &[f32]) -> f64 {
    assert_eq!(have.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = have.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (difference / want.iter().map(|&x| square(x)).sum::<f64>()).sqrt()
}

#[test]
fn logits_equal_those_of_transformers_and_peft() {
    let mut runner = Runner::new(None);
    let (tokens, logits) = expected("base");
    let mut sequence = Sequence { tokens, ..Sequence::new(0, 0, &[]) };
    let base = runner.run(&sequence, 100);
    assert!(distance(&base, &logits) < 1e-5, "{}", distance(&base, &logits));
    for name in [
        "qv-r4",
        "all-linear-r8",
        "rslora-patterns",
        "one-layer-regex",
        "r33",
        "lora-bias",
        "lm-head",
        "adalora",
        "dora",
    ] {
        sequence.terms = vec![(runner.load(name), 1.0)];
        let (_, logits) = expected(name);
        let have = runner.run(&sequence, 100);
        assert!(distance(&have, &logits) < 1e-5, "{name}: {}", distance(&have, &logits));
        assert!(distance(&base, &logits) > 1e-3, "{name} must have an effect");
    }
}

#[test]
fn chunks_decode_steps_and_neighbours_change_no_bit() {
    for quantize in [None, Some(Quantize::Nf4)] {
        let mut runner = Runner::new(quantize);
        let (a, b) = (runner.load("all-linear-r8"), runner.load("r33"));
        let (head, dora) = (runner.load("lm-head"), runner.load("dora"));
        let sequences = [
            Sequence::new(0, 120, &[]),
            Sequence::new(1, 120, &[(a, 1.0)]),
            Sequence::new(2, 120, &[(b, 0.7), (a, -0.4)]),
            Sequence::new(3, 120, &[(head, 1.0)]),
            Sequence::new(4, 120, &[(a, 1.0)]),
            Sequence::new(5, 120, &[(dora, 1.0)]),
        ];
        let whole: Vec<Vec<f32>> = sequences.iter().map(|s| runner.run(s, 120)).collect();
        for (sequence, whole) in sequences.iter().zip(&whole) {
            for chunk in [1, 3, 7, 50] {
                assert_eq!(whole, &runner.run(sequence, chunk), "chunks of {chunk}");
            }
        }

        // All sequences in one batch: prompt chunks of different sizes together with decode rows, until all are done.
        let mut done = [0; 6];
        let mut mixed = vec![Vec::new(); 6];
        while done.iter().any(|&d| d < 120) {
            let parts: Vec<(usize, Range<usize>)> = (0..6)
                .filter(|&i| done[i] < 120)
                .map(|i| (i, done[i]..(done[i] + if done[i] < 100 { [17, 60, 1, 33, 8, 21][i] } else { 1 }).min(120)))
                .collect();
            let step: Vec<_> = parts.iter().map(|(i, part)| (&sequences[*i], part.clone())).collect();
            for ((i, part), logits) in parts.iter().zip(runner.step(&step, |_| true)) {
                mixed[*i].extend(logits);
                done[*i] = part.end;
            }
        }
        assert_eq!(whole, mixed);
    }
}

#[test]
fn rows_without_logits_only_write_their_keys() {
    let mut runner = Runner::new(None);
    let adapter = runner.load("all-linear-r8");
    let head = runner.load("lm-head");
    let sequences =
        [Sequence::new(0, 60, &[(adapter, 1.0)]), Sequence::new(1, 60, &[]), Sequence::new(2, 60, &[(head, 2.0)])];
    let parts = |positions: Range<usize>| sequences.each_ref().map(|s| (s, positions.clone()));
    let whole = runner.step(&parts(0..60), |_| true);

    let mut other = Runner { kv: KvCache::new(runner.decoder.config(), BLOCKS, &Device::Cpu).unwrap(), ..runner };
    assert!(other.step(&parts(0..40), |_| false).concat().is_empty());
    // The rows 3, 10, 17, ... of a batch with 20 rows of each sequence.
    let vocab = other.decoder.config().vocab_size;
    for (part, (some, whole)) in other.step(&parts(40..60), |row| row % 7 == 3).iter().zip(&whole).enumerate() {
        let rows = (0..20).filter(|row| (part * 20 + row) % 7 == 3);
        let wanted: Vec<f32> = rows.flat_map(|row| whole[(40 + row) * vocab..][..vocab].to_vec()).collect();
        assert_eq!(some, &wanted);
    }
}

/// Hidden states come from the same rows as the logits, without changing them, and whichever rows ask for logits.
#[test]
fn hidden_states_beside_logits_change_no_bit() {
    let mut runner = Runner::new(None);
    let (adapter, head) = (runner.load("all-linear-r8"), runner.load("lm-head"));
    let sequences =
        [Sequence::new(0, 30, &[(adapter, 1.0)]), Sequence::new(1, 30, &[]), Sequence::new(2, 30, &[(head, 2.0)])];
    let parts = sequences.each_ref().map(|s| (s, 0..30));
    let mut run = |logits: fn(usize) -> bool, hidden: fn(usize) -> bool| {
        let mut batch = batch(&parts, &logits);
        batch.hidden_rows = (0..90).filter(|row| hidden(*row as usize)).collect();
        let output = runner.decoder.forward(&batch, &mut runner.kv, &runner.slots).unwrap();
        let hidden = output.hidden.map(|hidden| hidden.to_vec2::<f32>().unwrap()).unwrap_or_default();
        (output.logits.to_vec2::<f32>().unwrap(), hidden)
    };
    let (logits, hidden) = run(|_| true, |_| true);
    assert_eq!((logits.len(), hidden.len(), hidden[0].len()), (90, 90, 64));
    type Wanted = fn(usize) -> bool;
    let wanted: [(Wanted, Wanted); 4] = [
        (|_| false, |_| true),
        (|_| true, |_| false),
        (|row| row % 7 == 3, |row| row >= 30 && row % 5 < 2),
        (|row| row == 89, |row| row == 0),
    ];
    for (logit, state) in wanted {
        let some = |all: &[Vec<f32>], wanted: Wanted| -> Vec<Vec<f32>> {
            (0..90).filter(|row| wanted(*row)).map(|row| all[row].clone()).collect()
        };
        assert_eq!(run(logit, state), (some(&logits, logit), some(&hidden, state)));
    }
}

#[test]
fn a_weighted_sum_equals_one_adapter_with_both_deltas() {
    let mut runner = Runner::new(None);
    let (a, b) = (runner.load("all-linear-r8"), runner.load("r33"));
    let read = |name: &str, weight: f32| {
        let adapter = reader::read(&fixture(name), runner.decoder.config()).unwrap().weights;
        let mut slot = SlotWeights::from_adapter(&adapter, runner.decoder.config());
        slot.layers.iter_mut().flatten().flatten().for_each(|pair| pair.scale *= weight);
        slot
    };
    let (mut both, other) = (read("all-linear-r8", 0.6), read("r33", -1.5));
    for (sites, others) in both.layers.iter_mut().flatten().zip(other.layers.into_iter().flatten()) {
        sites.extend(others);
    }
    let both = runner.slots.insert(both);
    let sum = runner.run(&Sequence::new(0, 50, &[(a, 0.6), (b, -1.5)]), 50);
    let one = runner.run(&Sequence::new(0, 50, &[(both, 1.0)]), 50);
    let base = runner.run(&Sequence::new(0, 50, &[]), 50);
    assert!(distance(&sum, &one) < 1e-5, "{}", distance(&sum, &one));
    assert!(distance(&base, &one) > 1e-2);
}

#[test]
fn a_batch_that_contradicts_itself_is_an_error() {
    let mut runner = Runner::new(None);
    let sequence = Sequence::new(0, 20, &[(0, 1.0)]);
    let good = batch(&[(&sequence, 0..20)], &|_| true);
    type Damage = fn(&mut Batch);
    let damages: [(&str, Damage); 10] = [
        ("token id 97", |b| b.tokens[3] = 97),
        ("19 positions", |b| b.positions.truncate(19)),
        ("position 128", |b| b.positions[0] = 128),
        ("slot 1024 is outside the KV cache", |b| b.slot_mapping[19] = 1024),
        ("in a cache of 64 blocks", |b| b.block_tables[0] = 64),
        ("context_len: 19", |b| b.spans[0].context_len = 19),
        ("not ascending", |b| b.logit_rows.swap(0, 1)),
        ("not ascending", |b| b.logit_rows[19] = 20),
        ("hidden rows [20]", |b| b.hidden_rows = vec![20]),
        ("15..21", |b| b.segments[0].rows = 15..21),
    ];
    for (message, damage) in damages {
        let mut batch = good.clone();
        damage(&mut batch);
        let error = runner.decoder.forward(&batch, &mut runner.kv, &runner.slots).err().unwrap();
        assert!(error.message.contains(message), "{message}: {error}");
    }
    let nothing = runner.decoder.forward(&Batch::default(), &mut runner.kv, &runner.slots).unwrap();
    assert_eq!((nothing.logits.dims(), nothing.hidden.is_none()), (&[0, 97][..], true));
    assert!(runner.decoder.forward(&good, &mut runner.kv, &runner.slots).is_ok());
}

#[test]
fn weights_of_another_shape_are_refused() {
    let refused = |damage: fn(&mut Weights)| {
        let mut weights = weights(None);
        damage(&mut weights);
        Decoder::new(weights).err().expect("shapes that contradict the config").message
    };
    assert!(refused(|w| w.config.hidden_size = 65).contains("embedding is [97, 64]"));
    assert!(refused(|w| w.config.num_kv_heads = 3).contains("3 key-value heads"));
    assert!(refused(|w| w.config.num_layers = 3).contains("2 decoder blocks"));
    assert!(refused(|w| w.layers[1].down = w.layers[1].o.clone()).contains("block 1 down is [64, 64]"));
    assert!(refused(|w| w.norm = w.norm.narrow(0, 0, 8).unwrap()).contains("final norm is [8]"));
    assert!(KvCache::new(&weights(None).config, 0, &Device::Cpu).is_err());
}
