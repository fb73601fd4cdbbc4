//! LoRA deltas on a GPU, against f64 and against themselves in other batches; and the loading of adapters.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use half::bf16;
use quiver::adapter::reader;
use quiver::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use quiver::adapter::tiers::Residency;
use quiver::arch::{ModelConfig, RopeScaling};
use quiver::arch::{Module, Site};
use quiver::engine::cuda::{Bucket, StepBuffers};
use quiver::lora::delta::{Adapters, add_delta, has_dora_gains};
use quiver::lora::slots::SlotPool;
use quiver::lora::weights::{AdapterWeights, FloatVec, ModuleWeights};
use quiver::ops::batch::Capacity;
use quiver::ops::batch::{Batch, Segment};

use crate::common::{device, random, relative_error};

/// Relative error of a result that is rounded to bf16 once: no value is off by more than 2^-8 of itself.
const BF16: f64 = 1.0 / 256.0;
/// The same of an f32 result: x·Aᵀ is rounded to 16 bits, sums are f32.
const F32: f64 = 5e-5;

/// One decoder block of these widths.
pub fn model(hidden: usize, intermediate: usize, heads: (usize, usize, usize), vocab: usize) -> ModelConfig {
    ModelConfig {
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_layers: 1,
        num_heads: heads.0,
        num_kv_heads: heads.1,
        head_dim: heads.2,
        vocab_size: vocab,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        qkv_bias: false,
        qk_norm: false,
        max_position_embeddings: 128,
    }
}

/// The model of `fixtures/peft-tiny/base`.
fn tiny() -> ModelConfig {
    ModelConfig { num_layers: 2, ..model(64, 160, (4, 2, 16), 97) }
}

/// An adapter whose delta is about as large as `y`, with a rank of its own for each module that it has.
pub fn adapter(model: &ModelConfig, seed: u64, modules: &[(Module, usize, bool)]) -> AdapterWeights {
    let module = |(i, &(module, rank, bias)): (usize, &(Module, usize, bool))| {
        let (n, k) = module.shape(model);
        let seed = 1000 * seed + 10 * i as u64;
        let values = |seed: u64, len: usize| FloatVec::BF16(random(seed, len).into());
        ModuleWeights {
            layer: if module == Module::LmHead { model.num_layers } else { 0 },
            module,
            rank,
            scale: 6.0 / ((k * rank) as f32).sqrt(),
            a: values(seed + 1, rank * k),
            b: values(seed + 2, rank * n),
            bias: bias.then(|| values(seed + 3, n)),
            magnitude: None,
        }
    };
    AdapterWeights { modules: modules.iter().enumerate().map(module).collect() }
}

/// All ranks that the tests use, mixed over modules; some modules have biases, and some are missing.
fn adapters(model: &ModelConfig) -> Vec<AdapterWeights> {
    use Module::*;
    let all = |rank: usize| -> Vec<(Module, usize, bool)> {
        [Q, K, V, O, Gate, Up, Down, LmHead].map(|module| (module, rank, false)).to_vec()
    };
    let modules: [Vec<(Module, usize, bool)>; 8] = [
        all(16),
        all(8),
        vec![(Q, 1, false), (K, 4, true), (V, 12, false), (O, 4, true), (Gate, 1, true), (Up, 256, false)],
        vec![(Q, 64, true), (V, 32, true), (Gate, 12, false), (Down, 1, true), (LmHead, 12, true)],
        vec![(K, 128, false), (O, 256, false), (Up, 12, true), (Down, 128, false), (LmHead, 1, false)],
        vec![(V, 256, false), (O, 1, true), (Down, 64, true)],
        all(32),
        vec![(Q, 12, false)],
    ];
    modules.iter().enumerate().map(|(i, modules)| adapter(model, i as u64, modules)).collect()
}

/// A step's inputs: `x [rows, k]`, `y [rows, n]`.
pub struct Rows {
    pub rows: usize,
    pub x: Vec<bf16>,
    pub y: Vec<bf16>,
}

impl Rows {
    pub fn new(model: &ModelConfig, site: Site, rows: usize) -> Self {
        let (n, k) = shape(model, site);
        Self { rows, x: random(7, rows * k), y: random(8, rows * n) }
    }

    /// Some of the rows, as a step of their own.
    pub fn some(&self, rows: impl Iterator<Item = usize>) -> Self {
        let (n, k) = (self.y.len() / self.rows, self.x.len() / self.rows);
        let mut some = Self { rows: 0, x: vec![], y: vec![] };
        for row in rows {
            some.rows += 1;
            some.x.extend(&self.x[row * k..(row + 1) * k]);
            some.y.extend(&self.y[row * n..(row + 1) * n]);
        }
        some
    }
}

/// Output and input features of a site.
pub fn shape(model: &ModelConfig, site: Site) -> (usize, usize) {
    let modules = site.modules();
    (modules.iter().map(|m| m.shape(model).0).sum(), modules[0].shape(model).1)
}

/// `y` with the deltas of layer 0 or the head, in bf16 or f32, widened to f32. `bucket` makes it a captured step, whose padding rows are
/// NaN.
pub fn run(
    model: &ModelConfig,
    pool: &SlotPool,
    site: Site,
    rows: &Rows,
    segments: &[Segment],
    dtype: DType,
    bucket: Option<usize>,
) -> Vec<f32> {
    let device = device();
    let (n, k) = shape(model, site);
    let all = bucket.unwrap_or(rows.rows);
    let fill = |values: &[bf16], width: usize| {
        let mut values = values.to_vec();
        values.resize(all * width, bf16::NAN);
        Tensor::from_vec(values, (all, width), &device).unwrap()
    };
    let (x, y) = (fill(&rows.x, k), fill(&rows.y, n).to_dtype(dtype).unwrap());
    let batch = Batch {
        tokens: vec![0; rows.rows],
        positions: vec![0; rows.rows],
        slot_mapping: vec![u32::MAX; rows.rows],
        segments: segments.to_vec(),
        ..Batch::default()
    };
    let capacity = Capacity { rows: all, spans: segments.len().max(1), block_table_len: 1 };
    let mut buffers = StepBuffers::new(device.as_cuda_device().unwrap(), capacity).unwrap();
    let gains = has_dora_gains(segments, pool).unwrap();
    let step = buffers.upload(&batch, pool, bucket.map(|rows| Bucket { rows, adapters: true, gains })).unwrap();
    let adapters = Adapters { segments, slots: pool, step: Some(&step), logit_rows_only: false };
    add_delta(&y, &x, &adapters, if site == Site::Head { model.num_layers } else { 0 }, site).unwrap();
    let y: Vec<f32> = y.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    assert!(y[rows.rows * n..].iter().all(|v| v.is_nan()), "padding rows are left alone");
    y[..rows.rows * n].to_vec()
}

/// One row in f64.
pub fn reference(
    model: &ModelConfig,
    site: Site,
    x: &[bf16],
    y: &[bf16],
    terms: &[(u32, f32)],
    adapters: &[AdapterWeights],
) -> Vec<f64> {
    let mut y: Vec<f64> = y.iter().map(|v| v.to_f64()).collect();
    for &(slot, weight) in terms {
        for m in adapters[slot as usize].modules.iter().filter(|m| m.module.site() == site) {
            let (n, k) = m.module.shape(model);
            let (a, b) = (m.a.to_f32(), m.b.to_f32());
            let bias = m.bias.as_ref().map(FloatVec::to_f32);
            let h: Vec<f64> =
                (0..m.rank).map(|r| x.iter().zip(&a[r * k..]).map(|(x, a)| x.to_f64() * f64::from(*a)).sum()).collect();
            let scale = f64::from(weight) * f64::from(m.scale);
            for i in 0..n {
                let sum: f64 = h.iter().zip(&b[i * m.rank..]).map(|(h, b)| h * f64::from(*b)).sum();
                let bias = bias.as_ref().map_or(0.0, |bias| f64::from(bias[i]));
                y[m.module.offset(model) + i] += scale * (sum + bias);
            }
        }
    }
    y
}

/// A pool whose slot `i` holds adapter `i`.
pub fn pool(model: &ModelConfig, adapters: &[AdapterWeights]) -> SlotPool {
    let mut pool = SlotPool::new(&device(), model, 512 << 20).unwrap();
    for (i, adapter) in adapters.iter().enumerate() {
        assert_eq!(pool.load(adapter, model).unwrap(), i as u32);
    }
    pool
}

/// Consecutive segments of the given lengths and terms; without terms, they are rows of the base model.
pub fn segments(parts: &[(usize, &[(u32, f32)])]) -> (usize, Vec<Segment>) {
    let (mut row, mut segments) = (0, Vec::new());
    for (rows, terms) in parts {
        if !terms.is_empty() {
            segments.push(Segment { rows: row..row + rows, terms: terms.to_vec() });
        }
        row += rows;
    }
    (row, segments)
}

/// Batches of all kinds: one adapter, all distinct, few among base rows, interleaved, weighted sums, more segments than
/// a warp has lanes.
fn batches() -> Vec<(usize, Vec<Segment>)> {
    let base: &[(u32, f32)] = &[];
    let single: [[(u32, f32); 1]; 8] = std::array::from_fn(|slot| [(slot as u32, 1.0)]);
    let many: Vec<(usize, &[(u32, f32)])> = (0..70).map(|i| (1, &single[i * 3 % 8][..])).collect();
    vec![
        segments(&[(1, &[(0, 1.0)])]),
        segments(&[(21, &[(3, 1.0)])]),
        segments(&[
            (1, &[(0, 1.0)]),
            (1, &[(1, 1.0)]),
            (1, &[(2, 1.0)]),
            (1, &[(3, 1.0)]),
            (1, &[(4, 1.0)]),
            (1, &[(5, 1.0)]),
        ]),
        segments(&[(9, base), (2, &[(2, 0.5)]), (30, base)]),
        segments(&[
            (1, &[(6, 1.0)]),
            (1, base),
            (1, &[(7, 1.0)]),
            (1, base),
            (3, &[(6, 1.0)]),
            (2, base),
            (9, &[(4, 1.0)]),
        ]),
        segments(&[
            (2, &[(0, 0.7), (3, -0.3), (2, 0.5)]),
            (1, base),
            (10, &[(5, 1.5), (4, 0.25)]),
            (1, &[(7, 1.0), (7, 2.0)]),
        ]),
        segments(&many),
    ]
}

const MODELS: [fn() -> ModelConfig; 4] = [
    || model(64, 96, (4, 2, 12), 97),
    || model(96, 64, (3, 1, 32), 1000),
    || model(576, 1536, (9, 3, 64), 2048),
    || model(4096, 14336, (32, 8, 128), 1537),
];

#[test]
fn matches_f64_and_leaves_other_rows() {
    for model in MODELS.map(|model| model()) {
        let adapters = adapters(&model);
        let pool = pool(&model, &adapters);
        for site in Site::ALL {
            let (n, k) = shape(&model, site);
            for (which, (count, segments)) in batches().into_iter().enumerate() {
                let rows = Rows::new(&model, site, count);
                let half = run(&model, &pool, site, &rows, &segments, DType::BF16, None);
                let full = run(&model, &pool, site, &rows, &segments, DType::F32, None);
                for row in 0..count {
                    let (x, y) = (&rows.x[row * k..(row + 1) * k], &rows.y[row * n..(row + 1) * n]);
                    let (half, full) = (&half[row * n..(row + 1) * n], &full[row * n..(row + 1) * n]);
                    let segment = segments.iter().find(|s| s.rows.contains(&row));
                    let what = format!("{site:?} of {} to {n}, batch {which}, row {row}", k);
                    let Some(segment) = segment else {
                        let same = |(a, b): (&f32, &bf16)| a.to_bits() == b.to_f32().to_bits();
                        assert!(half.iter().zip(y).all(same) && full.iter().zip(y).all(same), "{what}");
                        continue;
                    };
                    let want = reference(&model, site, x, y, &segment.terms, &adapters);
                    let errors = (relative_error(half, &want), relative_error(full, &want));
                    assert!(errors.0 <= BF16 && errors.1 <= F32, "{what}: {errors:?}");
                }
            }
        }
    }
}

/// A row's bits are the same alone, among others, in a captured step, and in the large list.
#[test]
fn a_row_does_not_depend_on_its_company() {
    for model in [MODELS[0](), MODELS[3]()] {
        let pool = pool(&model, &adapters(&model));
        for site in Site::ALL {
            let n = shape(&model, site).0;
            for (dtype, bucket) in [(DType::BF16, 72), (DType::F32, 96)] {
                for (count, segments) in batches() {
                    let rows = Rows::new(&model, site, count);
                    let eager = run(&model, &pool, site, &rows, &segments, dtype, None);
                    assert_eq!(eager, run(&model, &pool, site, &rows, &segments, dtype, Some(bucket)));
                    for segment in &segments {
                        let row = segment.rows.end - 1;
                        let alone = [Segment { rows: 0..1, terms: segment.terms.clone() }];
                        let out = run(&model, &pool, site, &rows.some(row..row + 1), &alone, dtype, None);
                        assert_eq!(out, eager[row * n..(row + 1) * n], "{site:?}, row {row} of {count}");
                    }
                }
                // The large list: planes of h by split of k, or, with many rows, one block that sums all splits; each also as a captured step.
                for parts in [[70, 3, 200, 1, 9, 33], [100, 8, 400, 1, 240, 2]] {
                    let terms: [&[(u32, f32)]; 6] =
                        [&[(0, 1.0)], &[(3, 1.0)], &[(3, 0.5), (2, 1.0)], &[], &[(1, 1.0)], &[(5, 1.0), (6, 1.0)]];
                    let parts: Vec<_> = parts.into_iter().zip(terms).collect();
                    let (count, segments) = segments(&parts);
                    let rows = Rows::new(&model, site, count);
                    let large = run(&model, &pool, site, &rows, &segments, dtype, None);
                    let captured = run(&model, &pool, site, &rows, &segments, dtype, Some(count + 20));
                    assert_eq!(large, captured, "{site:?} {count}");
                    for segment in &segments {
                        for row in [segment.rows.start, segment.rows.end - 1] {
                            let alone = [Segment { rows: 0..1, terms: segment.terms.clone() }];
                            let out = run(&model, &pool, site, &rows.some(row..row + 1), &alone, dtype, None);
                            assert_eq!(out, large[row * n..(row + 1) * n], "{site:?}, row {row} of {count}");
                        }
                    }
                }
            }
        }
    }
}

/// NaN in one row does not spread to others.
#[test]
fn a_broken_row_breaks_no_other() {
    let model = MODELS[2]();
    let pool = pool(&model, &adapters(&model));
    let (n, k) = shape(&model, Site::Qkv);
    for (count, parts) in [(20, segments(&[(20, &[(0, 1.0)])]).1), (400, segments(&[(400, &[(0, 1.0)])]).1)] {
        let mut rows = Rows::new(&model, Site::Qkv, count);
        let whole = run(&model, &pool, Site::Qkv, &rows, &parts, DType::BF16, None);
        rows.x[5 * k + 9] = bf16::NAN;
        rows.x[17 * k] = bf16::INFINITY;
        let broken = run(&model, &pool, Site::Qkv, &rows, &parts, DType::BF16, None);
        for row in 0..count {
            let (whole, broken) = (&whole[row * n..(row + 1) * n], &broken[row * n..(row + 1) * n]);
            let fine = row != 5 && row != 17;
            assert!(if fine { whole == broken } else { broken.iter().all(|v| !v.is_finite()) }, "row {row}");
        }
    }
}

/// Once a slot holds another adapter, the next step computes that adapter's delta.
#[test]
fn a_slot_given_to_another_computes_the_other() {
    let model = MODELS[2]();
    let all = adapters(&model);
    let mut pool = SlotPool::new(&device(), &model, 64 << 20).unwrap();
    let alone = all.iter().map(|a| self::pool(&model, std::slice::from_ref(a))).collect::<Vec<_>>();
    let rows = Rows::new(&model, Site::GateUp, 3);
    let one = [Segment { rows: 0..3, terms: vec![(0, 1.0)] }];
    let run = |pool: &SlotPool| run(&model, pool, Site::GateUp, &rows, &one, DType::BF16, Some(4));
    for i in [0, 1, 2, 0, 6, 3, 7, 4, 2] {
        assert_eq!(pool.load(&all[i], &model).unwrap(), 0);
        assert_eq!(run(&pool), run(&alone[i]), "adapter {i}");
        pool.remove(0);
    }
    // A batch must not name a free slot.
    assert!(quiver::lora::delta::work(&one, &pool).is_err());
}

/// An adapter that does not fit is refused, and the memory of removed adapters is one free range again.
#[test]
fn a_full_arena_takes_the_next_once_others_go() {
    let model = MODELS[2]();
    let adapter = adapter(&model, 1, &[(Module::Up, 16, false), (Module::Down, 16, false)]);
    let one = quiver::lora::slots::slot_bytes(&adapter, &model, &device()).unwrap();
    assert_eq!(one, 2 * 16 * 2 * (576 + 1536));
    let mut pool = SlotPool::new(&device(), &model, 4 * one + one / 2).unwrap();
    let slots: Vec<u32> = (0..4).map(|_| pool.load(&adapter, &model).unwrap()).collect();
    assert!(pool.load(&adapter, &model).is_err());
    assert_eq!(pool.evictions(2 * one, [slots[0], slots[2], slots[1]]), Some(3));
    assert_eq!(pool.evictions(one, slots.clone()), Some(1));
    assert_eq!(pool.evictions(5 * one, slots.clone()), None);
    pool.remove(slots[1]);
    pool.remove(slots[2]);
    assert_eq!(pool.evictions(2 * one, []), Some(0));
    assert_eq!(pool.load(&adapter, &model).unwrap(), slots[1]);
}

/// Adapters go from disk through the loader threads into slots that hold two or three of six, over and over. Each time the delta is
/// that of the requested adapter.
#[tokio::test]
async fn adapters_come_and_go_while_steps_run() {
    let model = tiny();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny");
    let names = ["all-linear-r8", "qv-r4", "lora-bias", "rslora-patterns", "r33", "lm-head"];
    let read = |name: &str| reader::read(&fixtures.join(name), &model).unwrap().weights;
    let alone: Vec<SlotPool> = names.iter().map(|name| self::pool(&model, &[read(name)])).collect();
    let largest = names.iter().map(|name| quiver::lora::slots::slot_bytes(&read(name), &model, &device()).unwrap());
    let slot_budget = 2 * largest.max().unwrap();
    let config = RegistryConfig { device: device(), slot_budget, host_budget: 1 << 20, ..Default::default() };
    let registry = Registry::new(Arc::new(model.clone()), config).unwrap();
    for name in names {
        registry.load(name, fixtures.join(name).to_str().unwrap(), LoadOptions::default()).await.unwrap();
    }
    let mut tiers = registry.tiers().unwrap();
    let rows = [Site::Qkv, Site::GateUp, Site::Head].map(|site| (site, Rows::new(&model, site, 2)));
    for turn in 0..60 {
        let which = turn * 5 % names.len();
        let lease = registry.lease(names[which]).unwrap();
        let started = Instant::now();
        let slot = loop {
            match tiers.acquire(&lease) {
                Residency::Ready(slot) => break slot,
                Residency::Loading => assert!(started.elapsed() < Duration::from_secs(30), "loading never ends"),
                other => panic!("{} is not ready: {other:?}", lease.name),
            }
        };
        for (site, rows) in &rows {
            let segments = |slot: u32| [Segment { rows: 0..2, terms: vec![(slot, 1.0)] }];
            let out = run(&model, tiers.pool(), *site, rows, &segments(slot), DType::BF16, None);
            let want = run(&model, &alone[which], *site, rows, &segments(0), DType::BF16, None);
            assert_eq!(out, want, "{} at {site:?}", names[which]);
        }
        tiers.release(slot);
    }
    assert!(registry.stats().slot_evictions.load(std::sync::atomic::Ordering::Relaxed) > 0);
}
