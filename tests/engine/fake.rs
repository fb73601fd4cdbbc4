//! A fake runner: a row's logits and hidden state are a hash of its adapters and of all tokens to which the batch's block table leads, so a wrong
//! table, a stale block, a wrong position or a wrong slot changes the output.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use candle_core::{Device, Tensor};
use quiver::adapter::tiers::Residency;
use quiver::adapter::{Generation, HostTier, Lease};
use quiver::engine::request::{Event, FinishReason, Logprobs, Pooling, Request, SamplingParams};
use quiver::engine::sampler::{self, SamplingMetadata, TokenCounts};
use quiver::engine::worker::{Tick, Worker};
use quiver::engine::{BackgroundTask, Engine, EngineConfig, InFlightStep, Runner};
use quiver::lora::weights::AdapterWeights;
use quiver::model::decoder::StepOutput;
use quiver::ops::batch::Batch;
use quiver::{Error, Result};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

pub const VOCAB: usize = 48;
pub const EOS: u32 = 47;
/// Width of a hidden state.
pub const HIDDEN: usize = 3;
/// Most rows of a step whose logits give prompt log-probabilities.
pub const MAX_SCORED_ROWS: usize = 64;

/// The state of a generation in the fake.
#[derive(Debug, Clone, Default)]
struct Residence {
    slot: u32,
    uses: usize,
    /// Calls of `update_slots` until it is loaded.
    loading: usize,
    last_used: usize,
    /// Whether it has not been used since it was loaded.
    fresh: bool,
}

/// The content of a KV cell: token, position, adapters.
type Cell = (u32, u32, u64);

pub struct Fake {
    block_size: usize,
    max_rows: usize,
    max_logits: usize,
    cells: Vec<Option<Cell>>,
    /// Number of slots.
    pub slots: usize,
    /// Calls of `update_slots` that a load takes.
    pub load_ticks: usize,
    /// Generations that cannot be loaded.
    pub broken: Vec<String>,
    /// The step that panics.
    pub panic_at: Option<usize>,
    /// The token after which all logits and hidden states of a sequence are NaN.
    pub poison: Option<u32>,
    /// Duration of a step.
    pub step: Duration,
    resident: HashMap<String, Residence>,
    clock: usize,
    pub steps: usize,
    /// Number of rows of each step.
    pub rows: Vec<usize>,
}

impl Fake {
    pub fn new(config: &EngineConfig) -> Self {
        Self {
            block_size: config.block_size,
            max_rows: config.max_batch_tokens,
            max_logits: config.max_running + MAX_SCORED_ROWS,
            cells: vec![None; config.block_size * config.num_blocks],
            slots: 8,
            load_ticks: 0,
            broken: Vec::new(),
            panic_at: None,
            poison: None,
            step: Duration::ZERO,
            resident: HashMap::new(),
            clock: 0,
            steps: 0,
            rows: Vec::new(),
        }
    }

    /// Number of slot uses that have not been released.
    pub fn uses(&self) -> usize {
        self.resident.values().map(|r| r.uses).sum()
    }

    fn terms(&self, batch: &Batch, row: usize) -> u64 {
        let Some(segment) = batch.segments.iter().find(|s| s.rows.contains(&row)) else { return terms_hash(&[]) };
        let terms = segment.terms.iter().map(|(slot, weight)| {
            let found = self.resident.iter().find(|(_, r)| r.slot == *slot && r.loading == 0);
            let (id, residence) = found.expect("the slot holds an adapter");
            assert!(residence.uses > 0, "slot {slot} is used without being acquired");
            (id.as_str(), *weight)
        });
        terms_hash(&terms.collect::<Vec<_>>())
    }

    /// `[rows, width]`: `output` of the cells to which each row attends, or NaN after the poison.
    fn outputs(&self, batch: &Batch, rows: &[u32], width: usize, output: fn(&[Cell]) -> Vec<f32>) -> Result<Tensor> {
        let mut values = Vec::new();
        for &row in rows {
            let span = batch.spans.iter().find(|s| s.rows.contains(&(row as usize))).expect("each row has a span");
            let table = &batch.block_tables[span.table.clone()];
            let cells = (0..=batch.positions[row as usize] as usize).map(|position| {
                let cell = table[position / self.block_size] as usize * self.block_size + position % self.block_size;
                self.cells[cell].expect("a cell is written before it is read")
            });
            let cells: Vec<_> = cells.collect();
            let poisoned = self.poison.is_some_and(|token| cells.iter().any(|cell| cell.0 == token));
            values.extend(if poisoned { vec![f32::NAN; width] } else { output(&cells) });
        }
        Ok(Tensor::from_vec(values, (rows.len(), width), &Device::Cpu)?)
    }

    fn check(&self, batch: &Batch) {
        let rows = batch.tokens.len();
        assert!(rows > 0 && rows <= self.max_rows, "{rows} rows of {}", self.max_rows);
        assert!(batch.logit_rows.len() <= self.max_logits, "{} logit rows", batch.logit_rows.len());
        assert!(batch.logit_rows.is_sorted_by(|a, b| a < b), "logit rows ascend");
        assert!(batch.hidden_rows.is_sorted_by(|a, b| a < b), "hidden rows ascend");
        assert_eq!((batch.positions.len(), batch.slot_mapping.len()), (rows, rows));
        assert_eq!(batch.spans.iter().map(|s| s.rows.len()).sum::<usize>(), rows);
        let segments_apart = batch.segments.windows(2).all(|w| w[0].rows.end <= w[1].rows.start && w[0] != w[1]);
        assert!(segments_apart, "segments are in order and apart");
        let mut written = HashMap::new();
        for (index, span) in batch.spans.iter().enumerate() {
            let table = &batch.block_tables[span.table.clone()];
            assert_eq!(table.len(), span.context_len.div_ceil(self.block_size));
            for (i, row) in span.rows.clone().enumerate() {
                let position = span.context_len - span.rows.len() + i;
                assert_eq!(batch.positions[row] as usize, position);
                let block = table[position / self.block_size];
                let cell = block as usize * self.block_size + position % self.block_size;
                assert_eq!(batch.slot_mapping[row] as usize, cell);
                written.insert(block, index);
            }
        }
        for (index, span) in batch.spans.iter().enumerate() {
            for block in &batch.block_tables[span.table.clone()] {
                assert!(
                    written.get(block).is_none_or(|writer| *writer == index),
                    "block {block} is shared and written"
                );
            }
        }
    }
}

impl Runner for Fake {
    fn acquire(&mut self, lease: &Lease) -> Residency {
        self.clock += 1;
        if self.broken.contains(&lease.id) {
            return Residency::Failed(Error::not_found(format!("{} is gone", lease.name)));
        }
        if let Some(residence) = self.resident.get_mut(&lease.id) {
            if residence.loading > 0 {
                return Residency::Loading;
            }
            residence.uses += 1;
            residence.fresh = false;
            residence.last_used = self.clock;
            return Residency::Ready(residence.slot);
        }
        let clock = self.clock;
        let mut slot = (0..self.slots as u32).find(|slot| self.resident.values().all(|r| r.slot != *slot));
        if slot.is_none() {
            let idle = |r: &Residence| r.loading == 0 && r.uses == 0 && !(r.fresh && clock - r.last_used < 256);
            let victims = self.resident.iter().filter(|(_, r)| idle(r));
            let victim = victims.min_by_key(|(_, r)| r.last_used).map(|(id, _)| id.clone());
            slot = victim.and_then(|id| self.resident.remove(&id)).map(|r| r.slot);
        }
        let Some(slot) = slot else { return Residency::Full };
        let loading = self.load_ticks;
        let uses = usize::from(loading == 0);
        self.resident.insert(lease.id.clone(), Residence { slot, uses, loading, last_used: clock, fresh: loading > 0 });
        if loading == 0 { Residency::Ready(slot) } else { Residency::Loading }
    }

    fn release(&mut self, slot: u32) {
        let residence = self.resident.values_mut().find(|r| r.slot == slot).expect("a released slot holds an adapter");
        assert!(residence.uses > 0, "slot {slot} was released too often");
        residence.uses -= 1;
    }

    fn launch(&mut self, batch: &Batch) -> Result<InFlightStep> {
        self.steps += 1;
        assert_ne!(self.panic_at, Some(self.steps), "requested by the test");
        self.check(batch);
        std::thread::sleep(self.step);
        self.rows.push(batch.tokens.len());
        for row in 0..batch.tokens.len() {
            let cell = (batch.tokens[row], batch.positions[row], self.terms(batch, row));
            self.cells[batch.slot_mapping[row] as usize] = Some(cell);
        }
        let logits = self.outputs(batch, &batch.logit_rows, VOCAB, fake_logits)?;
        let hidden = match batch.hidden_rows.is_empty() {
            true => None,
            false => Some(self.outputs(batch, &batch.hidden_rows, HIDDEN, fake_hidden)?),
        };
        Ok(InFlightStep::new(StepOutput { logits, hidden }))
    }

    fn collect(&mut self, step: InFlightStep) -> Result<StepOutput> {
        Ok(step.into_output())
    }

    fn update_slots(&mut self) {
        self.resident.values_mut().for_each(|r| r.loading = r.loading.saturating_sub(1));
    }
}

/// The finaliser of SplitMix64 over a running state.
fn mix(state: u64, value: u64) -> u64 {
    let mut z = (state ^ value).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn terms_hash(terms: &[(&str, f32)]) -> u64 {
    terms.iter().fold(1, |state, (id, weight)| {
        let state = id.bytes().fold(state, |state, byte| mix(state, byte.into()));
        mix(state, weight.to_bits().into())
    })
}

/// `count` numbers from -4 to 4.
fn numbers(cells: &[Cell], seed: u64, count: usize) -> Vec<f32> {
    let state = cells.iter().fold(seed, |state, cell| mix(mix(mix(state, cell.0.into()), cell.1.into()), cell.2));
    (0..count).map(|i| (mix(state, i as u64) >> 40) as f32 / (1 << 24) as f32 * 8.0 - 4.0).collect()
}

fn fake_logits(cells: &[Cell]) -> Vec<f32> {
    numbers(cells, 7, VOCAB)
}

fn fake_hidden(cells: &[Cell]) -> Vec<f32> {
    numbers(cells, 8, HIDDEN)
}

/// The KV cells of `tokens`, computed without an engine.
fn reference_cells(adapters: &[(Lease, f32)], tokens: &[u32]) -> Vec<Cell> {
    let terms: Vec<_> = adapters.iter().map(|(lease, weight)| (lease.id.as_str(), *weight)).collect();
    let hash = terms_hash(&terms);
    tokens.iter().zip(0..).map(|(token, position)| (*token, position, hash)).collect()
}

/// The logits after `tokens`, computed without an engine.
pub fn reference_logits(adapters: &[(Lease, f32)], tokens: &[u32]) -> Vec<f32> {
    fake_logits(&reference_cells(adapters, tokens))
}

/// The pooled hidden states of `tokens`, computed without an engine.
pub fn reference_pooled(adapters: &[(Lease, f32)], tokens: &[u32], pooling: Pooling) -> Vec<f32> {
    let cells = reference_cells(adapters, tokens);
    let all: Vec<Vec<f32>> = (1..=cells.len()).map(|end| fake_hidden(&cells[..end])).collect();
    let rows = match pooling {
        Pooling::Mean => &all[..],
        Pooling::Last => &all[all.len() - 1..],
    };
    let mean = |i: usize| (rows.iter().map(|row| f64::from(row[i])).sum::<f64>() / rows.len() as f64) as f32;
    (0..HIDDEN).map(mean).collect()
}

/// The outcome of a request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    pub prompt: Option<Vec<Option<Logprobs>>>,
    pub pooled: Option<Vec<f32>>,
    pub tokens: Vec<(u32, Option<Logprobs>)>,
    /// Reason and stop token.
    pub finished: Option<(FinishReason, Option<u32>)>,
    pub cached_tokens: usize,
    pub failed: Option<String>,
}

impl Answer {
    /// Takes all events so far.
    pub fn take(&mut self, events: &mut UnboundedReceiver<Event>) {
        while let Ok(event) = events.try_recv() {
            self.push(event);
        }
    }

    pub fn push(&mut self, event: Event) {
        assert!(!self.ended(), "{event:?} after the end");
        match event {
            Event::Scheduled { cached_tokens } => self.cached_tokens = cached_tokens,
            Event::Prompt(prompt) => {
                assert!(self.tokens.is_empty() && self.prompt.is_none(), "the prompt is reported once, first");
                self.prompt = Some(prompt);
            }
            Event::Pooled(pooled) => {
                assert!(self.tokens.is_empty() && self.pooled.is_none(), "the embedding comes once, before the output");
                self.pooled = Some(pooled);
            }
            Event::Token { id, logprobs } => self.tokens.push((id, logprobs)),
            Event::Finished { reason, end_token, requested_stop, .. } => {
                self.finished = Some((reason, end_token.filter(|_| requested_stop)));
            }
            Event::Failed(error) => self.failed = Some(error.message),
        }
    }

    pub fn ended(&self) -> bool {
        self.finished.is_some() || self.failed.is_some()
    }

    pub fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|(id, _)| *id).collect()
    }
}

/// The answer of a plain loop without batching, caching or chunks.
pub fn reference(prompt: &[u32], adapters: &[(Lease, f32)], params: &SamplingParams, max_model_len: usize) -> Answer {
    let mut answer = Answer::default();
    let mut tokens = prompt.to_vec();
    if let Some(top) = params.prompt_logprobs {
        let scores = (1..prompt.len()).map(|i| {
            Some(sampler::score(&reference_logits(adapters, &prompt[..i]), prompt[i], top).expect("finite logits"))
        });
        answer.prompt = Some(std::iter::once(None).chain(scores).collect());
    }
    answer.pooled = params.pooling.map(|pooling| reference_pooled(adapters, prompt, pooling));
    let mut counts = TokenCounts::new(params, prompt);
    let eos = if params.ignore_eos { vec![] } else { vec![EOS] };
    let stops: Vec<u32> = eos.into_iter().chain(params.stop_token_ids.clone()).collect();
    while answer.tokens.len() < params.max_tokens && tokens.len() < max_model_len {
        let index = answer.tokens.len();
        let masked = if index < params.min_tokens { &stops[..] } else { &[] };
        let metadata =
            SamplingMetadata { params, counts: &counts, masked, allowed: None, seed: params.seed.unwrap_or(0), index };
        let sample = sampler::sample(&reference_logits(adapters, &tokens), &metadata).expect("finite logits");
        if stops.contains(&sample.id) {
            let own = params.stop_token_ids.contains(&sample.id).then_some(sample.id);
            answer.finished = Some((FinishReason::Stop, own));
            return answer;
        }
        tokens.push(sample.id);
        counts.push(sample.id);
        answer.tokens.push((sample.id, sample.logprobs));
    }
    answer.finished = Some((FinishReason::Length, None));
    answer
}

pub fn lease(name: &str, id: &str) -> Lease {
    lease_of(name, id, &AdapterWeights::default())
}

pub fn lease_of(name: &str, id: &str, weights: &AdapterWeights) -> Lease {
    let host = Arc::new(HostTier::new(0, Arc::default()));
    Lease::new(Arc::new(Generation::new(name, id.into(), PathBuf::new(), weights, 0, host)))
}

pub fn config() -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 64,
        max_batch_tokens: 32,
        max_running: 8,
        max_waiting: 1000,
        max_model_len: 200,
        eos_token_ids: vec![EOS],
        prefix_cache: true,
    }
}

/// Greedy sampling that does not end before `max_tokens`.
pub fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens, ignore_eos: true, ..SamplingParams::default() }
}

pub fn request(
    prompt: &[u32],
    adapters: &[(Lease, f32)],
    params: SamplingParams,
) -> (Request, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    let request = Request::new("test", prompt.to_vec(), params, events);
    (Request { adapters: adapters.to_vec(), ..request }, receiver)
}

/// An engine without a thread, for tests that count ticks.
pub struct Bench {
    pub engine: Engine,
    pub worker: Worker<Fake>,
}

impl Bench {
    pub fn new(config: &EngineConfig) -> Self {
        Self::with(Fake::new(config), config)
    }

    pub fn with(fake: Fake, config: &EngineConfig) -> Self {
        Self::with_background(fake, config, None)
    }

    pub fn with_background(fake: Fake, config: &EngineConfig, task: Option<BackgroundTask>) -> Self {
        let (engine, worker) = Engine::new(fake, config.clone(), task).expect("limits agree");
        Self { engine, worker }
    }

    pub fn submit(
        &self,
        prompt: &[u32],
        adapters: &[(Lease, f32)],
        params: SamplingParams,
    ) -> Result<UnboundedReceiver<Event>> {
        let (request, events) = request(prompt, adapters, params);
        self.engine.submit(request).map(|()| events)
    }

    /// Runs until the engine is idle.
    pub fn finish(&mut self) {
        for _ in 0..100_000 {
            if self.worker.tick() == Tick::Idle {
                return self.assert_empty();
            }
        }
        panic!("the engine does not become idle");
    }

    pub fn assert_empty(&self) {
        let stats = self.engine.stats();
        let left = [&stats.running, &stats.waiting, &stats.open].map(|counter| counter.load(Relaxed));
        assert_eq!(left, [0; 3], "no request runs, waits or holds a place at the end");
        assert_eq!(stats.used_blocks.load(Relaxed), 0, "all blocks are free at the end");
        assert_eq!(self.worker.runner().uses(), 0, "all slots are released at the end");
    }

    /// Serves one request to its end.
    pub fn answer(&mut self, prompt: &[u32], adapters: &[(Lease, f32)], params: SamplingParams) -> Answer {
        let mut events = self.submit(prompt, adapters, params).expect("accepted");
        self.finish();
        let mut answer = Answer::default();
        answer.take(&mut events);
        answer
    }
}
