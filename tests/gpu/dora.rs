//! DoRA's gains on a GPU: against f64 and the CPU half, in batches with rows of other adapters and of none, and in captured steps
//! while slots get new adapters.

use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use quiver::adapter::reader;
use quiver::arch::ModelConfig;
use quiver::arch::{Module, Site};
use quiver::engine::cuda::Steps;
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::lora::BaseMatrices;
use quiver::lora::delta::{Adapters, add_delta, has_dora_gains};
use quiver::lora::slots::SlotPool;
use quiver::lora::weights::{AdapterWeights, FloatVec};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::{LayerWeights, Weights};
use quiver::ops::batch::{Batch, Segment};
use quiver::ops::quant::{Codec, QMatrix, Source};

use crate::common::{device, random, relative_error};
use crate::lora::{Rows, adapter, model, pool, reference, run, segments, shape};
use crate::quant::{codebook, source};

/// Relative error of a result that is rounded to bf16 after the sum and after the gain, each by no more than 2^-8 of itself.
const BF16: f64 = 1.0 / 128.0;
/// The same of an f32 result, whose gains come from a product of bf16 values with the base.
const F32: f64 = 1e-4;

/// Makes a random matrix `[n, k]` from a seed.
type Make = fn(usize, usize, u64) -> Source<'static>;

fn dense(n: usize, k: usize, seed: u64) -> Source<'static> {
    source(Codec::BF16, n, k, seed)
}

fn with_minimums(n: usize, k: usize, seed: u64) -> Source<'static> {
    source(Codec::Q4_1, n, k, seed)
}

fn of_codebook(n: usize, k: usize, seed: u64) -> Source<'static> {
    codebook(n, k, 64, seed)
}

/// Shapes, each with a kind of base: widths that are no powers of two, and vectors that do not end at a multiple of eight.
fn models() -> Vec<(ModelConfig, Make)> {
    vec![
        (model(64, 96, (4, 2, 12), 97), dense as Make),
        (model(576, 1536, (9, 3, 64), 1003), of_codebook as Make),
        (model(1024, 512, (8, 1, 128), 520), with_minimums as Make),
    ]
}

/// One decoder block of random matrices, the same on every device.
fn base(config: &ModelConfig, of: Make, device: &Device) -> Weights {
    let matrix = |site: Site| {
        let seed = 50 + 10 * site as u64;
        let sources = site.modules().iter().enumerate().map(|(i, m)| {
            let (n, k) = m.shape(config);
            of(n, k, seed + i as u64)
        });
        Arc::new(QMatrix::pack(&sources.collect::<Vec<_>>(), device).unwrap())
    };
    let norm = || Tensor::ones(config.hidden_size, DType::F32, device).unwrap();
    let layer = LayerWeights {
        attn_norm: norm(),
        qkv: matrix(Site::Qkv),
        qkv_bias: None,
        qk_norm: None,
        o: matrix(Site::O),
        ffn_norm: norm(),
        gate_up: matrix(Site::GateUp),
        down: matrix(Site::Down),
    };
    let head = matrix(Site::Head);
    Weights {
        config: config.clone(),
        embedding: head.clone(),
        layers: vec![layer],
        norm: norm(),
        head,
        fingerprint: String::new(),
    }
}

/// A DoRA adapter with magnitudes of either sign and zero, and a delta about as large as the base; one row of each B is zero.
fn dora(model: &ModelConfig, seed: u64, modules: &[(Module, usize)]) -> AdapterWeights {
    let modules: Vec<_> = modules.iter().map(|&(module, rank)| (module, rank, false)).collect();
    let mut adapter = adapter(model, seed, &modules);
    for m in &mut adapter.modules {
        let (n, k) = m.module.shape(model);
        m.scale *= (k as f32).sqrt() / 4.0;
        let mut b = m.b.to_f32();
        b[(n - 1) * m.rank..].fill(0.0);
        m.b = FloatVec::F32(b.into());
        let mut magnitudes: Vec<f32> = random(seed + 9, n).iter().map(|v| (1.0 + v.to_f32()) * 10.0).collect();
        (magnitudes[0], magnitudes[1]) = (0.0, -3.0);
        m.magnitude = Some(FloatVec::F32(magnitudes.into()));
    }
    adapter
}

/// Slots 0, 2 and 4 have gains: for all modules, for some modules with padded ranks, and with high ranks.
fn adapters(model: &ModelConfig) -> Vec<AdapterWeights> {
    use Module::*;
    vec![
        dora(model, 1, &[Q, K, V, O, Gate, Up, Down, LmHead].map(|module| (module, 16))),
        adapter(model, 2, &[Q, K, V, O, Gate, Up, Down, LmHead].map(|module| (module, 8, false))),
        dora(model, 3, &[(Q, 5), (V, 12), (Down, 1)]),
        adapter(model, 4, &[(Q, 12, true), (Up, 4, true), (O, 33, false), (LmHead, 1, true)]),
        dora(model, 5, &[(K, 128), (Up, 256), (O, 33), (LmHead, 3)]),
    ]
}

fn batches() -> Vec<(usize, Vec<Segment>)> {
    let base: &[(u32, f32)] = &[];
    let single: [[(u32, f32); 1]; 5] = std::array::from_fn(|slot| [(slot as u32, 1.0)]);
    let [a, b, c, d, e] = single.each_ref().map(|terms| &terms[..]);
    let many: Vec<(usize, &[(u32, f32)])> = (0..70).map(|i| (1, &single[i * 3 % 5][..])).collect();
    vec![
        segments(&[(1, a)]),
        segments(&[(1, a), (1, base), (1, b), (3, c), (1, &[(1, 0.5), (3, -0.7)]), (9, e), (2, base), (1, d), (1, a)]),
        segments(&many),
        segments(&[(70, a), (3, base), (130, c), (9, b), (33, e), (1, c), (40, &[(3, 1.0), (1, 0.5)])]),
    ]
}

/// A pool on the GPU whose gains are ready.
fn prepared(model: &ModelConfig, adapters: &[AdapterWeights], base: &Weights) -> SlotPool {
    let mut pool = pool(model, adapters);
    (0..adapters.len() as u32).for_each(|slot| pool.prepare_gains(slot, base).unwrap());
    pool
}

/// The gains of a site's outputs, 1 where an adapter has none.
fn gains(adapter: &AdapterWeights, model: &ModelConfig, site: Site, base: &QMatrix) -> Vec<f64> {
    let mut gains = vec![1.0; base.n()];
    for m in adapter.modules.iter().filter(|m| m.module.site() == site) {
        let Some(magnitudes) = &m.magnitude else { continue };
        let (offset, (n, k)) = (m.module.offset(model), m.module.shape(model));
        let (a, b, magnitudes) = (m.a.to_f32(), m.b.to_f32(), magnitudes.to_f32());
        for j in 0..n {
            let mut row: Vec<f64> = base.row((offset + j) as u32).unwrap().into_iter().map(f64::from).collect();
            for r in 0..m.rank {
                let factor = f64::from(m.scale) * f64::from(b[j * m.rank + r]);
                row.iter_mut().zip(&a[r * k..]).for_each(|(w, a)| *w += factor * f64::from(*a));
            }
            gains[offset + j] = f64::from(magnitudes[j]) / row.iter().map(|w| w * w).sum::<f64>().sqrt();
        }
    }
    gains
}

/// The CPU half on the same values.
fn on_cpu(pool: &SlotPool, base: &QMatrix, site: Site, layer: usize, rows: &Rows, segments: &[Segment]) -> Vec<f32> {
    let tensor = |values: &[half::bf16], width: usize| {
        let values: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        Tensor::from_vec(values, (rows.rows, width), &Device::Cpu).unwrap()
    };
    let (x, y) = (tensor(&rows.x, base.k()), tensor(&rows.y, base.n()));
    let adapters = Adapters { segments, slots: pool, step: None, logit_rows_only: false };
    adapters.pairs(layer, site).try_for_each(|pair| pair.prepare_gains(base)).unwrap();
    add_delta(&y, &x, &adapters, layer, site).unwrap();
    y.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn matches_f64_and_the_cpu() {
    for (model, of) in models() {
        let adapters = adapters(&model);
        let (host, base) = (self::base(&model, of, &Device::Cpu), self::base(&model, of, &device()));
        let pool = prepared(&model, &adapters, &base);
        let mut cpu = SlotPool::default();
        for adapter in &adapters {
            cpu.load(adapter, &model).unwrap();
        }
        for site in Site::ALL {
            let layer = if site == Site::Head { 1 } else { 0 };
            let weight = host.matrix(layer, site);
            let gains: Vec<Vec<f64>> = adapters.iter().map(|a| self::gains(a, &model, site, weight)).collect();
            let (n, k) = shape(&model, site);
            for (which, (count, segments)) in batches().into_iter().enumerate() {
                let rows = Rows::new(&model, site, count);
                let half = run(&model, &pool, site, &rows, &segments, DType::BF16, None);
                let full = run(&model, &pool, site, &rows, &segments, DType::F32, None);
                let want_cpu = on_cpu(&cpu, weight, site, layer, &rows, &segments);
                for row in 0..count {
                    let (x, y) = (&rows.x[row * k..(row + 1) * k], &rows.y[row * n..(row + 1) * n]);
                    let (half, full) = (&half[row * n..(row + 1) * n], &full[row * n..(row + 1) * n]);
                    let what = format!("{site:?} of {k} to {n}, batch {which}, row {row}");
                    let Some(segment) = segments.iter().find(|s| s.rows.contains(&row)) else {
                        let same = |(a, b): (&f32, &half::bf16)| a.to_bits() == b.to_f32().to_bits();
                        assert!(half.iter().zip(y).all(same) && full.iter().zip(y).all(same), "{what}");
                        continue;
                    };
                    let mut want = reference(&model, site, x, y, &segment.terms, &adapters);
                    if let [(slot, 1.0)] = segment.terms[..] {
                        want.iter_mut().zip(&gains[slot as usize]).for_each(|(want, gain)| *want *= gain);
                    }
                    let of_cpu: Vec<f64> = want_cpu[row * n..(row + 1) * n].iter().map(|v| f64::from(*v)).collect();
                    for want in [&want, &of_cpu] {
                        let errors = (relative_error(half, want), relative_error(full, want));
                        assert!(errors.0 <= BF16 && errors.1 <= F32, "{what}: {errors:?}");
                    }
                }
            }
        }
    }
}

/// A row's bits are the same alone, among others, in a captured step, and in the large list, whether other rows have gains or not. Rows
/// without gains have the bits of a step without any gains.
#[test]
fn a_row_does_not_depend_on_its_company() {
    let (model, of) = models().swap_remove(0);
    let pool = prepared(&model, &adapters(&model), &base(&model, of, &device()));
    for site in Site::ALL {
        let n = shape(&model, site).0;
        for dtype in [DType::BF16, DType::F32] {
            for (count, segments) in batches() {
                let rows = Rows::new(&model, site, count);
                let all = run(&model, &pool, site, &rows, &segments, dtype, None);
                assert_eq!(all, run(&model, &pool, site, &rows, &segments, dtype, Some(count + 20)));
                for segment in &segments {
                    for row in [segment.rows.start, segment.rows.end - 1] {
                        let alone = [Segment { rows: 0..1, terms: segment.terms.clone() }];
                        let out = run(&model, &pool, site, &rows.some(row..row + 1), &alone, dtype, None);
                        assert_eq!(out, all[row * n..(row + 1) * n], "{site:?}, row {row} of {count}");
                    }
                }
            }
        }
    }
}

/// Gains belong to the slot's adapter and are computed once. No step runs without them or applies them twice.
#[test]
fn a_slot_is_named_only_with_gains_of_its_own() {
    let (model, of) = models().swap_remove(1);
    let (all, base) = (adapters(&model), base(&model, of, &device()));
    let alone: Vec<SlotPool> = all.iter().map(|a| prepared(&model, std::slice::from_ref(a), &base)).collect();
    let mut pool = SlotPool::new(&device(), &model, 64 << 20).unwrap();
    let rows = Rows::new(&model, Site::Qkv, 3);
    let one = [Segment { rows: 0..3, terms: vec![(0, 1.0)] }];
    let run = |pool: &SlotPool| run(&model, pool, Site::Qkv, &rows, &one, DType::BF16, Some(4));
    for i in [0, 1, 2, 4, 0, 3, 2] {
        assert_eq!(pool.load(&all[i], &model).unwrap(), 0);
        assert_eq!(has_dora_gains(&one, &pool).is_err(), i % 2 == 0, "adapter {i}");
        (0..2).for_each(|_| pool.prepare_gains(0, &base).unwrap());
        assert_eq!(run(&pool), run(&alone[i]), "adapter {i}");
        pool.remove(0);
    }
    let slot = pool.load(&all[0], &model).unwrap();
    pool.prepare_gains(slot, &base).unwrap();
    for terms in [vec![(slot, 0.5)], vec![(slot, 1.0), (slot, 1.0)]] {
        assert!(has_dora_gains(&[Segment { rows: 0..1, terms }], &pool).is_err());
    }
}

/// A model with its KV cache, slots and steps, on one device.
struct Served {
    model: Decoder,
    kv: KvCache,
    pool: SlotPool,
    steps: Option<Steps>,
}

impl Served {
    fn new(device: &Device) -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny/base");
        let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(fixtures) };
        let model = Decoder::new(Weights::load(&files, None, device, |_| {}).unwrap()).unwrap();
        let mut kv = KvCache::new(model.config(), 8, device).unwrap();
        let pool = SlotPool::new(device, model.config(), 1 << 20).unwrap();
        let mut steps = Steps::on(device, model.config(), 8, 8, 64).unwrap();
        if let Some(steps) = &mut steps {
            steps.capture(&model, &mut kv, &pool, |_| {}).unwrap();
        }
        Self { model, kv, pool, steps }
    }

    /// Logits of a step with one row for each of `slots`: the first row of a sequence, with its own token.
    fn decode(&mut self, slots: &[(u32, Option<u32>)]) -> Vec<Vec<f32>> {
        let mut batch = Batch::default();
        for (i, (token, slot)) in slots.iter().enumerate() {
            let terms: Vec<(u32, f32)> = slot.iter().map(|slot| (*slot, 1.0)).collect();
            batch.push(&[*token], 0, &[i as u32], KvCache::BLOCK_SIZE, &terms);
            batch.logit_rows.push(i as u32);
        }
        let output = match &mut self.steps {
            Some(steps) => steps.run(&batch, &self.model, &mut self.kv, &mut self.pool).unwrap(),
            None => self.model.forward(&batch, &mut self.kv, &self.pool).unwrap(),
        };
        output.logits.to_vec2().unwrap()
    }
}

/// Captured steps serve whatever adapter is in a slot, with gains or without, and their rows are equal to those of steps of one row.
#[test]
fn captured_steps_see_slots_change_hands() {
    let (mut gpu, mut cpu) = (Served::new(&device()), Served::new(&Device::Cpu));
    let config = gpu.model.config().clone();
    let read = |name: &str, factor: f32| {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny");
        let mut weights = reader::read(&fixtures.join(name), &config).unwrap().weights;
        for magnitude in weights.modules.iter_mut().filter_map(|m| m.magnitude.as_mut()) {
            *magnitude = FloatVec::F32(magnitude.to_f32().iter().map(|m| m * factor).collect());
        }
        weights
    };
    let plain = read("all-linear-r8", 1.0);
    for served in [&mut gpu, &mut cpu] {
        assert_eq!(served.pool.load(&plain, &config).unwrap(), 0);
    }
    // The first step of a bucket with gains is captured, the others are replays.
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for (name, factor) in [("dora", 2.0), ("dora", 0.5), ("qv-r4", 1.0), ("dora", 1.0), ("r33", 1.0), ("dora", 3.0)] {
        let adapter = read(name, factor);
        for served in [&mut gpu, &mut cpu] {
            assert_eq!(served.pool.load(&adapter, &config).unwrap(), 1);
        }
        let rows = [(5, Some(1)), (6, Some(0)), (7, None), (8, Some(1)), (9, Some(1))];
        let (have, want) = (gpu.decode(&rows), cpu.decode(&rows));
        for (i, row) in rows.iter().enumerate() {
            let error = relative_error(&have[i], &want[i].iter().map(|v| f64::from(*v)).collect::<Vec<_>>());
            assert!(error < 0.02, "{name} times {factor}, row {i}: {error}");
            assert_eq!(have[i], gpu.decode(&[*row])[0], "{name} times {factor}, row {i} alone");
        }
        assert!(!seen.contains(&have[0]), "{name} times {factor} has an effect");
        seen.push(have[0].clone());
        for served in [&mut gpu, &mut cpu] {
            served.pool.remove(1);
        }
    }
}
