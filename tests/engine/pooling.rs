//! Embeddings: pooled hidden states, on the fake and on a tiny model against the logits of transformers and PEFT.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use candle_core::{DType, Device, Tensor};
use quiver::adapter::Lease;
use quiver::adapter::registry::{LoadOptions, Registry, RegistryConfig};
use quiver::engine::request::{FinishReason, Pooling, SamplingParams};
use quiver::engine::runner::ModelRunner;
use quiver::engine::{Engine, EngineConfig};
use quiver::hub::{ModelFiles, ModelFormat};
use quiver::model::decoder::Decoder;
use quiver::model::kv::KvCache;
use quiver::model::weights::Weights;
use tokio::sync::mpsc::UnboundedReceiver;

use crate::fake::{Answer, Bench, Fake, config, greedy, lease, reference, reference_pooled, request};

fn embedding(pooling: Pooling) -> SamplingParams {
    SamplingParams { max_tokens: 0, pooling: Some(pooling), ..SamplingParams::default() }
}

#[test]
fn an_embedding_is_the_mean_or_the_last_hidden_state() {
    let mut bench = Bench::new(&config());
    let adapters = [(lease("a", "a"), 0.5), (lease("b", "b"), 2.0)];
    // Longer than a step has rows.
    let prompt: Vec<u32> = (0..90).map(|i| i * 7 % 40).collect();
    for pooling in [Pooling::Mean, Pooling::Last] {
        let answer = bench.answer(&prompt, &adapters, embedding(pooling));
        assert_eq!(answer.pooled, Some(reference_pooled(&adapters, &prompt, pooling)));
        assert_eq!((answer.finished, answer.ids()), (Some((FinishReason::Length, None)), vec![]));
    }
    // A prompt of one token, and one that fills the context.
    for len in [1, 200] {
        let prompt = vec![3; len];
        let answer = bench.answer(&prompt, &[], embedding(Pooling::Mean));
        assert_eq!(answer.pooled, Some(reference_pooled(&[], &prompt, Pooling::Mean)));
    }
    assert!(bench.submit(&[3; 201], &[], embedding(Pooling::Mean)).is_err());
}

#[test]
fn a_mean_skips_no_row_and_the_last_state_uses_the_prefix_cache() {
    let mut bench = Bench::new(&config());
    let prompt: Vec<u32> = (0..22).collect();
    bench.answer(&prompt, &[], greedy(1));
    for (pooling, cached) in [(Pooling::Mean, 0), (Pooling::Last, 20), (Pooling::Mean, 0)] {
        let queries = bench.engine.stats().prefix_queries.load(Relaxed);
        let answer = bench.answer(&prompt, &[], embedding(pooling));
        assert_eq!(answer.cached_tokens, cached);
        assert_eq!(answer.pooled, Some(reference_pooled(&[], &prompt, pooling)));
        let looked_up = bench.engine.stats().prefix_queries.load(Relaxed) - queries;
        assert_eq!(looked_up, if cached == 0 { 0 } else { 22 });
    }
    // Its rows are in the cache for others.
    let other: Vec<u32> = (100..122).map(|i| i % 40).collect();
    bench.answer(&other, &[], embedding(Pooling::Mean));
    assert_eq!(bench.answer(&other, &[], greedy(1)).cached_tokens, 20);
}

/// Embeddings of long prompts are preempted by decoding sequences, and continue.
#[test]
fn preemption_changes_no_embedding() {
    let tight = EngineConfig { num_blocks: 16, max_batch_tokens: 9, ..config() };
    let mut bench = Bench::new(&tight);
    let adapters = [(lease("a", "a"), 1.0)];
    let mut jobs = Vec::new();
    for i in 0..6_u32 {
        let prompt: Vec<u32> = (0..5).map(|t| (t * 3 + i) % 40).collect();
        jobs.push((prompt, vec![], greedy(30)));
        let prompt: Vec<u32> = (0..30).map(|t| (t * 5 + i) % 40).collect();
        let pooling = if i % 2 == 0 { Pooling::Mean } else { Pooling::Last };
        jobs.push((prompt, adapters.to_vec(), embedding(pooling)));
    }
    let mut events: Vec<_> =
        jobs.iter().map(|(prompt, adapters, params)| bench.submit(prompt, adapters, params.clone()).unwrap()).collect();
    bench.finish();
    assert!(bench.engine.stats().preemptions.load(Relaxed) > 0);
    for ((prompt, adapters, params), events) in jobs.iter().zip(&mut events) {
        let mut answer = Answer::default();
        answer.take(events);
        let want = reference(prompt, adapters, params, 200);
        assert_eq!((answer.pooled, answer.tokens), (want.pooled, want.tokens));
    }
}

#[test]
fn a_hidden_state_that_is_not_finite_fails_its_request_only() {
    let mut fake = Fake::new(&config());
    fake.poison = Some(5);
    let mut bench = Bench::with(fake, &config());
    let mut bad = bench.submit(&[1, 5, 2], &[], embedding(Pooling::Mean)).unwrap();
    let mut good = bench.submit(&[1, 4, 2], &[], embedding(Pooling::Mean)).unwrap();
    bench.finish();
    let (mut failed, mut served) = (Answer::default(), Answer::default());
    failed.take(&mut bad);
    served.take(&mut good);
    assert!(failed.failed.unwrap().contains("NaN"));
    assert_eq!(served.pooled, Some(reference_pooled(&[], &[1, 4, 2], Pooling::Mean)));
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft-tiny").join(name)
}

fn tensors(path: PathBuf) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// An engine on the tiny model, with its adapters.
struct Tiny {
    engine: Engine,
    registry: Registry,
}

impl Tiny {
    const ADAPTERS: [&str; 4] = ["all-linear-r8", "r33", "rslora-patterns", "dora"];

    async fn start() -> Self {
        let files = ModelFiles { name: "tiny".into(), format: ModelFormat::HuggingFace(fixture("base")) };
        let model = Decoder::new(Weights::load(&files, None, &Device::Cpu, |_| {}).unwrap()).unwrap();
        let registry = Registry::new(
            Arc::new(model.config().clone()),
            RegistryConfig { slot_budget: 1 << 24, host_budget: 1 << 24, ..RegistryConfig::default() },
        )
        .unwrap();
        for name in Self::ADAPTERS {
            registry.load(name, fixture(name).to_str().unwrap(), LoadOptions::default()).await.unwrap();
        }
        let kv = KvCache::new(model.config(), 64, &Device::Cpu).unwrap();
        let tiers = registry.tiers().unwrap();
        let limits = EngineConfig {
            block_size: KvCache::BLOCK_SIZE,
            num_blocks: 64,
            // Less than a prompt.
            max_batch_tokens: 24,
            max_running: 16,
            max_model_len: 128,
            ..config()
        };
        let runner = ModelRunner { model: Arc::new(model), kv, tiers, steps: None };
        Self { engine: Engine::start(runner, limits, None).unwrap(), registry }
    }

    fn lease(&self, name: &str) -> Lease {
        self.registry.lease(name).unwrap()
    }

    fn submit(
        &self,
        prompt: &[u32],
        adapters: &[(Lease, f32)],
        params: SamplingParams,
    ) -> UnboundedReceiver<quiver::engine::request::Event> {
        let (request, events) = request(prompt, adapters, params);
        self.engine.submit(request).unwrap();
        events
    }
}

async fn end(mut events: UnboundedReceiver<quiver::engine::request::Event>) -> Answer {
    let mut answer = Answer::default();
    while let Some(event) = events.recv().await {
        answer.push(event);
    }
    assert_eq!(answer.failed, None);
    answer
}

/// The head is linear and has full column rank, so a hidden state is right exactly if the head turns it into the right logits, and
/// a mean of hidden states if it turns it into the mean of the logits.
#[tokio::test]
async fn the_head_turns_embeddings_into_the_logits_of_transformers_and_peft() {
    let tiny = Tiny::start().await;
    let ids = tensors(fixture("base/expected.safetensors"))["input_ids"].flatten_all().unwrap();
    let ids: Vec<u32> = ids.to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect();
    let weights = tensors(fixture("base/model.safetensors"));
    let head = weights.get("lm_head.weight").unwrap_or_else(|| &weights["model.embed_tokens.weight"]);
    let head = head.to_dtype(DType::F32).unwrap();
    let mut seen = Vec::new();
    for name in ["base"].into_iter().chain(Tiny::ADAPTERS) {
        let adapters = if name == "base" { vec![] } else { vec![(tiny.lease(name), 1.0)] };
        let logits = tensors(fixture(name).join("expected.safetensors"))["logits"].squeeze(0).unwrap();
        let last = logits.get(ids.len() - 1).unwrap();
        for (pooling, want) in [(Pooling::Mean, logits.mean(0).unwrap()), (Pooling::Last, last)] {
            let vector = end(tiny.submit(&ids, &adapters, embedding(pooling))).await.pooled.unwrap();
            let vector = Tensor::from_vec(vector, (64, 1), &Device::Cpu).unwrap();
            let have = head.matmul(&vector).unwrap().flatten_all().unwrap();
            let norm = |t: &Tensor| t.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let distance = norm(&(&have - &want).unwrap()) / norm(&want);
            assert!(distance < 1e-5, "{name} {pooling:?}: {distance}");
            seen.push(have.to_vec1::<f32>().unwrap());
        }
    }
    for (i, vector) in seen.iter().enumerate() {
        assert!(!seen[..i].contains(vector), "adapters and poolings differ");
    }
}

/// On the CPU an embedding has the same bits whatever else is in the batch, under any adapters.
#[tokio::test]
async fn embeddings_in_a_mixed_batch_equal_those_alone() {
    let tiny = Tiny::start().await;
    let [a, b] = ["all-linear-r8", "r33"].map(|name| tiny.lease(name));
    let sums = [
        vec![],
        vec![(a.clone(), 1.0)],
        vec![(b.clone(), 1.0)],
        vec![(tiny.lease("dora"), 1.0)],
        vec![(a, 0.6), (b, -1.5)],
    ];
    let mut jobs = Vec::new();
    for (i, adapters) in sums.iter().enumerate() {
        for (len, pooling) in [(1, Pooling::Mean), (37, Pooling::Mean), (50, Pooling::Last)] {
            let prompt: Vec<u32> = (0..len).map(|t| (t * t * 7 + t * 13 + i as u32 * 31) % 97).collect();
            jobs.push((prompt, adapters.clone(), embedding(pooling)));
        }
        let prompt: Vec<u32> = (0..9).map(|t| (t * 11 + i as u32) % 97).collect();
        jobs.push((prompt, adapters.clone(), greedy(20)));
    }
    let mut alone = Vec::new();
    for (prompt, adapters, params) in &jobs {
        alone.push(end(tiny.submit(prompt, adapters, params.clone())).await);
    }
    let mixed: Vec<_> = jobs.iter().map(|(prompt, of, params)| tiny.submit(prompt, of, params.clone())).collect();
    for (events, alone) in mixed.into_iter().zip(alone) {
        let mixed = end(events).await;
        assert_eq!((mixed.pooled, mixed.tokens), (alone.pooled, alone.tokens));
    }
}
