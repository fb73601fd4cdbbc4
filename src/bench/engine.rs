//! Prompt and step times of the engine, without HTTP.
//!
//! A batch of equal requests runs twice, for one token and for more; the difference is the time of the steps between. Both
//! runs are repeated and the median counts. The prefix cache is off and prompts are random, so that every prompt is computed.
//!
//! A step reads the base's matrices once, each adapter of the batch once, and the keys and values of every sequence. The table
//! compares these bytes per second with the measured memory bandwidth, which bounds a step. A small model stays in the CPU's
//! cache in part and may exceed 100%.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_pcg::Pcg64;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::bandwidth;
use super::traffic::Popularity;
use crate::adapter::registry::AdapterInfo;
use crate::engine::request::{Event, Request, SamplingParams};
use crate::model::kv::KvCache;
use crate::runtime::Runtime;
use crate::{Error, Result};

/// The measurements of `quiver bench engine`.
#[derive(Debug, Clone, Args)]
pub(crate) struct EngineBench {
    /// Sequences at once; several values are separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,32,64")]
    pub(crate) batch: Vec<usize>,
    /// Which of the loaded adapters the sequences use; several values are separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none")]
    mix: Vec<AdapterMix>,
    /// Use only adapters of this rank; several values are separated by commas [default: adapters of any rank]
    #[arg(long, value_name = "RANK", value_delimiter = ',')]
    rank: Vec<usize>,
    /// Use only this many of the adapters; several values are separated by commas [default: all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    registered: Vec<usize>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    pub(crate) input: usize,
    /// Steps to time
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) output: usize,
    /// Number of measurements; the table shows their median
    #[arg(long, default_value_t = 3)]
    repeat: usize,
}

/// Adapters of the sequences of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AdapterMix {
    /// The base alone
    None,
    /// The first adapter for all sequences
    One,
    /// A different adapter for each sequence; with fewer adapters than sequences, they repeat
    Distinct,
    /// The next adapter in turn for each sequence; if --adapter-memory holds fewer, it is loaded from host memory first
    Turns,
    /// A random adapter for each sequence: the first twice as often as the second, three times as often as the third, ...
    Zipf,
}

/// A case to measure: one row of the table.
pub(crate) struct BenchCase {
    mix: AdapterMix,
    /// Rank of the adapters; `None` is any.
    rank: Option<usize>,
    /// Adapters in use.
    adapters: Vec<AdapterInfo>,
    /// Sequences at once.
    batch: usize,
}

/// One measurement of a batch.
struct StepSample {
    /// Until every sequence has its first token.
    prompt: Duration,
    /// Time of a step, milliseconds.
    step: f64,
    /// Mean bytes that a step reads.
    bytes: f64,
}

/// The measurements of a case.
pub(crate) struct CaseResult {
    case: BenchCase,
    samples: Vec<StepSample>,
    /// Tokens of a prompt.
    input: usize,
    /// Steps that were timed.
    output: usize,
    /// Memory bandwidth, bytes per second.
    bandwidth: f64,
}

/// Header of the table, in Markdown.
pub(crate) const HEAD: &str = "| batch | adapters | rank | adapters registered | ms a step | tok/s | MB a step | % of bandwidth | prompt ms | prompt tok/s |\n\
     |---|---|---|---|---|---|---|---|---|---|";

impl EngineBench {
    /// Measures the cases and passes each result to `show`. Returns the results as JSON. `bandwidth` is in bytes per second.
    pub(crate) async fn run(
        &self,
        runtime: &Runtime,
        cases: Vec<BenchCase>,
        bandwidth: f64,
        mut show: impl FnMut(&CaseResult),
    ) -> Result<Value> {
        let mut rows = Vec::new();
        for case in cases {
            let samples = self.samples(runtime, &case).await?;
            let result = CaseResult { case, samples, input: self.input, output: self.output, bandwidth };
            show(&result);
            rows.push(result.json());
        }
        Ok(Value::Array(rows))
    }

    /// Every mix with every rank, number of adapters and batch; without adapters, every batch. Errors: fewer adapters are loaded
    /// than asked for.
    pub(crate) fn cases(&self, loaded: &[AdapterInfo]) -> Result<Vec<BenchCase>> {
        let ranks = if self.rank.is_empty() { vec![None] } else { self.rank.iter().copied().map(Some).collect() };
        let mut cases = Vec::new();
        for &mix in &self.mix {
            let mut groups = Vec::new();
            if mix == AdapterMix::None {
                groups.push((None, Vec::new()));
            }
            for &rank in ranks.iter().filter(|_| mix != AdapterMix::None) {
                let fits = |a: &&AdapterInfo| rank.is_none_or(|rank| a.rank == rank);
                let adapters: Vec<AdapterInfo> = loaded.iter().filter(fits).cloned().collect();
                let counts = if self.registered.is_empty() { vec![adapters.len()] } else { self.registered.clone() };
                for count in counts {
                    if count == 0 || count > adapters.len() {
                        let of_rank = rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
                        return Err(Error::invalid(format!(
                            "--mix needs at least 1 adapter{of_rank}: asked for {count}, {} loaded (--adapters DIR)",
                            adapters.len(),
                        )));
                    }
                    groups.push((rank, adapters[..count].to_vec()));
                }
            }
            for (rank, adapters) in groups {
                let case = |&batch: &usize| BenchCase { mix, rank, adapters: adapters.clone(), batch };
                cases.extend(self.batch.iter().map(case));
            }
        }
        Ok(cases)
    }

    /// Measures a case several times.
    async fn samples(&self, runtime: &Runtime, case: &BenchCase) -> Result<Vec<StepSample>> {
        let mut draws =
            AdapterDraws { mix: case.mix, adapters: &case.adapters, random: Pcg64::seed_from_u64(0), turn: 0 };
        // The first measurement does not count: it loads adapters into their slots.
        self.measure(runtime, case.batch, &mut draws).await?;
        let mut samples = Vec::new();
        for _ in 0..self.repeat.max(1) {
            samples.push(self.measure(runtime, case.batch, &mut draws).await?);
        }
        Ok(samples)
    }

    /// Measures a batch once.
    async fn measure(&self, runtime: &Runtime, batch: usize, draws: &mut AdapterDraws<'_>) -> Result<StepSample> {
        let mut adapters = draws.adapters(batch);
        let prompt = self.time(runtime, &adapters, 1).await?;
        if draws.mix == AdapterMix::Turns {
            adapters = draws.adapters(batch);
        }
        let all = self.time(runtime, &adapters, self.output + 1).await?;
        let step = all.saturating_sub(prompt).as_secs_f64() * 1e3 / self.output as f64;
        let distinct: HashMap<&str, usize> = adapters.iter().flatten().map(|a| (a.name.as_str(), a.bytes)).collect();
        let base = &runtime.base;
        let token = KvCache::bytes_per_block(&base.shape, &base.device) as f64 / KvCache::BLOCK_SIZE as f64;
        // The first step reads one token more than the prompt, the last one all tokens.
        let kept = batch as f64 * (self.input as f64 + (self.output as f64 + 1.0) / 2.0) * token;
        let bytes = (base.step_bytes + distinct.values().sum::<usize>()) as f64 + kept;
        Ok(StepSample { prompt, step, bytes })
    }

    /// Time until every sequence of a batch has `tokens` tokens.
    async fn time(&self, runtime: &Runtime, adapters: &[Option<&AdapterInfo>], tokens: usize) -> Result<Duration> {
        let vocab = runtime.codec.vocab_size().min(30_000) as u32;
        let mut replies = Vec::new();
        let mut requests = Vec::new();
        for adapter in adapters {
            let (events, receiver) = unbounded_channel();
            let adapters = match adapter {
                Some(adapter) => vec![(runtime.registry.lease(&adapter.name)?, 1.0)],
                None => Vec::new(),
            };
            let params =
                SamplingParams { temperature: 0.0, max_tokens: tokens, ignore_eos: true, ..SamplingParams::default() };
            let prompt = (0..self.input).map(|_| rand::random::<u32>() % vocab).collect();
            requests.push(Request { adapters, ..Request::new("bench", prompt, params, events) });
            replies.push(receiver);
        }
        let started = Instant::now();
        for request in requests {
            runtime.engine.submit(request)?;
        }
        for reply in &mut replies {
            loop {
                match reply.recv().await {
                    Some(Event::Finished { .. }) => break,
                    Some(Event::Failed(error)) => return Err(error),
                    Some(_) => {}
                    None => return Err(Error::internal("the engine dropped a request without an answer")),
                }
            }
        }
        Ok(started.elapsed())
    }
}

/// Measures the memory bandwidth of a runtime's device, bytes per second.
pub(crate) fn bandwidth(runtime: &Runtime) -> Result<f64> {
    bandwidth::measure(&runtime.base.device)
}

impl CaseResult {
    /// Row of the table.
    pub(crate) fn row(&self) -> String {
        let BenchCase { rank, adapters, batch, .. } = &self.case;
        let step = self.median(|s| s.step);
        let prompt = self.median(|s| s.prompt.as_secs_f64());
        let bytes = self.median(|s| s.bytes);
        format!(
            "| {batch} | {} | {} | {} | {step:.3} | {:.0} | {:.1} | {:.0}% | {:.2} | {:.0} |",
            self.mix(),
            rank.map_or(String::new(), |rank| rank.to_string()),
            adapters.len(),
            *batch as f64 / step * 1e3,
            bytes / 1e6,
            bytes / step * 1e3 / self.bandwidth * 100.0,
            prompt * 1e3,
            (batch * self.input) as f64 / prompt
        )
    }

    /// All samples.
    fn json(&self) -> Value {
        let BenchCase { rank, adapters, batch, .. } = &self.case;
        json!({
            "batch": batch, "adapters": self.mix(), "rank": rank, "registered": adapters.len(), "input": self.input,
            "output": self.output, "bandwidth": self.bandwidth,
            "step_ms": self.each(|s| s.step),
            "step_bytes": self.each(|s| s.bytes),
            "prompt_s": self.each(|s| s.prompt.as_secs_f64()),
        })
    }

    /// Name of the mix.
    fn mix(&self) -> String {
        self.case.mix.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
    }

    fn each(&self, of: fn(&StepSample) -> f64) -> Vec<f64> {
        self.samples.iter().map(of).collect()
    }

    fn median(&self, of: fn(&StepSample) -> f64) -> f64 {
        let mut values = self.each(of);
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }
}

/// Chooses the adapters of sequences.
struct AdapterDraws<'a> {
    mix: AdapterMix,
    /// The adapters to choose from.
    adapters: &'a [AdapterInfo],
    /// Has a fixed seed: every run draws the same.
    random: Pcg64,
    /// Adapters given in turn so far.
    turn: usize,
}

impl<'a> AdapterDraws<'a> {
    fn adapters(&mut self, batch: usize) -> Vec<Option<&'a AdapterInfo>> {
        (0..batch).map(|i| self.index(i).map(|index| &self.adapters[index])).collect()
    }

    /// Index of the adapter of sequence `i` of a batch.
    fn index(&mut self, i: usize) -> Option<usize> {
        let count = self.adapters.len();
        Some(match self.mix {
            AdapterMix::None => return None,
            AdapterMix::One => 0,
            AdapterMix::Distinct => i % count,
            AdapterMix::Turns => {
                self.turn += 1;
                (self.turn - 1) % count
            }
            AdapterMix::Zipf => {
                let weights = Popularity::Zipf(1.0).weights(count).unwrap_or_default();
                WeightedIndex::new(weights)
                    .expect("at least one adapter, all weights positive")
                    .sample(&mut self.random)
            }
        })
    }
}
