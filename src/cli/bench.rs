//! `quiver bench engine`: prompt and output speed of the engine, without HTTP.
//!
//! A batch of equal requests runs twice, for one token and for more; the difference is the time of the steps between. Both
//! are repeated and the median taken. The prefix cache is off, and prompts are random, so that every prompt is computed.
//!
//! A step moves the base's matrices once, each adapter of the batch once, and the keys and values of every sequence. Those bytes over
//! the time of the step, over the bandwidth of memory as measured at the start, say how far a step is from the least that it can take; a
//! small model stays in the processor's cache in part, and may come to more than all of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_pcg::Pcg64;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::bench_serve::{Page, ServeBench};
use super::serve::start_logs;
use crate::adapter::registry::AdapterInfo;
use crate::bench::bandwidth;
use crate::bench::traffic::Popularity;
use crate::config::ServeConfig;
use crate::engine::request::{Event, Request, SamplingParams};
use crate::model::kv::KvCache;
use crate::runtime::Runtime;
use crate::{Error, Result};

/// What to measure.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Steps of the engine, without HTTP
    Engine(Box<EngineBench>),
    /// Load on a server over HTTP: this one's, vLLM's, llama.cpp's, any that speaks OpenAI's API
    Serve(Box<ServeBench>),
    /// Plots of what `bench serve` wrote
    Page(Page),
}

#[derive(Debug, Args)]
struct EngineBench {
    /// Sequences at once; give several, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,8,32,64")]
    batch: Vec<usize>,
    /// Which adapters the sequences have, of those loaded; give several, separated by commas
    #[arg(long, value_enum, value_delimiter = ',', default_value = "none")]
    mix: Vec<Mix>,
    /// Only adapters of this rank take part; give several, separated by commas [default: all adapters, whatever their rank]
    #[arg(long, value_name = "RANK", value_delimiter = ',')]
    rank: Vec<usize>,
    /// How many of the adapters take part, for growth over their number; give several, separated by commas [default: all]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    registered: Vec<usize>,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 512)]
    input: usize,
    /// Steps to time
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    output: usize,
    /// Times to measure; the median counts
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Write all samples here, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeConfig,
}

/// Which adapters the sequences of a batch have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mix {
    /// No sequence has one
    None,
    /// All have the first
    One,
    /// Each has its own, as far as they go
    Distinct,
    /// Each has the next of all in turn: with --adapter-memory for fewer, one that has to come from the host first
    Turns,
    /// Each draws one, the first twice as often as the second, three times as often as the third, ...
    Zipf,
}

impl BenchArgs {
    /// Measures and prints a table.
    pub fn run(self) -> Result<()> {
        let bench = match self.what {
            What::Serve(bench) => return bench.run(),
            What::Page(page) => return page.run(),
            What::Engine(bench) => bench,
        };
        start_logs(&bench.serve)?;
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(bench.run())
    }
}

/// One measured batch.
struct Sample {
    /// Until every sequence has its first token.
    prompt: Duration,
    /// Of a step, milliseconds.
    step: f64,
    /// That a step moves on average.
    bytes: f64,
}

impl EngineBench {
    async fn run(mut self) -> Result<()> {
        let most = self.batch.iter().copied().max().unwrap_or(1);
        self.serve.no_prefix_cache = true;
        self.serve.max_running = self.serve.max_running.max(most);
        self.serve.max_model_len = self.serve.max_model_len.or(Some(self.input + self.output + 1));
        let started = Instant::now();
        let runtime = Runtime::load(&self.serve).await?;
        eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
        let cases = self.cases(&runtime.registry.list())?;
        let bandwidth = bandwidth::measure(&runtime.base.device)?;
        eprintln!("memory: {:.1} GB/s", bandwidth / 1e9);
        println!(
            "| batch | adapters | rank | of | ms a step | tok/s | MB a step | of bandwidth | prompt ms | prompt tok/s |\n\
             |---|---|---|---|---|---|---|---|---|---|"
        );
        let mut rows: Vec<Value> = Vec::new();
        for Case { mix, rank, adapters, batch } in &cases {
            let mut draws = Draws { mix: *mix, adapters, random: Pcg64::seed_from_u64(0), turn: 0 };
            // Once unmeasured: adapters come into their slots.
            self.measure(&runtime, *batch, &mut draws).await?;
            let mut samples = Vec::new();
            for _ in 0..self.repeat.max(1) {
                samples.push(self.measure(&runtime, *batch, &mut draws).await?);
            }
            let step = median(samples.iter().map(|s| s.step).collect());
            let prompt = median(samples.iter().map(|s| s.prompt.as_secs_f64()).collect());
            let bytes = median(samples.iter().map(|s| s.bytes).collect());
            let mix = mix.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
            println!(
                "| {batch} | {mix} | {} | {} | {step:.3} | {:.0} | {:.1} | {:.0}% | {:.2} | {:.0} |",
                rank.map_or(String::new(), |rank| rank.to_string()),
                adapters.len(),
                *batch as f64 / step * 1e3,
                bytes / 1e6,
                bytes / step * 1e3 / bandwidth * 100.0,
                prompt * 1e3,
                (batch * self.input) as f64 / prompt
            );
            rows.push(json!({
                "batch": batch, "adapters": mix, "rank": rank, "registered": adapters.len(), "input": self.input,
                "output": self.output, "bandwidth": bandwidth,
                "step_ms": samples.iter().map(|s| s.step).collect::<Vec<_>>(),
                "step_bytes": samples.iter().map(|s| s.bytes).collect::<Vec<_>>(),
                "prompt_s": samples.iter().map(|s| s.prompt.as_secs_f64()).collect::<Vec<_>>(),
            }));
        }
        if let Some(out) = &self.out {
            std::fs::write(out, format!("{:#}\n", Value::Array(rows)))?;
        }
        Ok(())
    }

    /// Every mix with every rank, number of adapters and batch; without adapters there is only the batch. Errors: fewer adapters
    /// than asked for.
    fn cases(&self, loaded: &[AdapterInfo]) -> Result<Vec<Case>> {
        let ranks = if self.rank.is_empty() { vec![None] } else { self.rank.iter().copied().map(Some).collect() };
        let mut cases = Vec::new();
        for &mix in &self.mix {
            let mut groups = Vec::new();
            if mix == Mix::None {
                groups.push((None, Vec::new()));
            }
            for &rank in ranks.iter().filter(|_| mix != Mix::None) {
                let fits = |a: &&AdapterInfo| rank.is_none_or(|rank| a.rank == rank);
                let adapters: Vec<AdapterInfo> = loaded.iter().filter(fits).cloned().collect();
                let counts = if self.registered.is_empty() { vec![adapters.len()] } else { self.registered.clone() };
                for count in counts {
                    if count == 0 || count > adapters.len() {
                        let of_rank = rank.map_or(String::new(), |rank| format!(" of rank {rank}"));
                        return Err(Error::invalid(format!(
                            "--mix needs at least 1 adapter{of_rank}: {count} to take part, of {} loaded (--adapters DIR)",
                            adapters.len(),
                        )));
                    }
                    groups.push((rank, adapters[..count].to_vec()));
                }
            }
            for (rank, adapters) in groups {
                let case = |&batch: &usize| Case { mix, rank, adapters: adapters.clone(), batch };
                cases.extend(self.batch.iter().map(case));
            }
        }
        Ok(cases)
    }

    /// Time to the first tokens, and of a step.
    async fn measure(&self, runtime: &Runtime, batch: usize, draws: &mut Draws<'_>) -> Result<Sample> {
        let mut adapters = draws.adapters(batch);
        let prompt = self.time(runtime, &adapters, 1).await?;
        if draws.mix == Mix::Turns {
            adapters = draws.adapters(batch);
        }
        let all = self.time(runtime, &adapters, self.output + 1).await?;
        let step = all.saturating_sub(prompt).as_secs_f64() * 1e3 / self.output as f64;
        let distinct: HashMap<&str, usize> = adapters.iter().flatten().map(|a| (a.name.as_str(), a.bytes)).collect();
        let base = &runtime.base;
        let token = KvCache::bytes_per_block(&base.shape, &base.device) as f64 / KvCache::BLOCK_SIZE as f64;
        // The first of the steps sees one token more than the prompt, the last one all of them.
        let kept = batch as f64 * (self.input as f64 + (self.output as f64 + 1.0) / 2.0) * token;
        let bytes = (base.step_bytes + distinct.values().sum::<usize>()) as f64 + kept;
        Ok(Sample { prompt, step, bytes })
    }

    /// Time until all of a batch have their tokens.
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
            requests.push(Request { id: "bench".into(), prompt, params, adapters, arrived: Instant::now(), events });
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
                    None => return Err(Error::internal("a request ended without a word")),
                }
            }
        }
        Ok(started.elapsed())
    }
}

/// What one row of the table measures.
struct Case {
    /// Which adapters the sequences have.
    mix: Mix,
    /// Of the adapters; none is any.
    rank: Option<usize>,
    /// That take part.
    adapters: Vec<AdapterInfo>,
    /// Sequences at once.
    batch: usize,
}

/// Gives sequences their adapters.
struct Draws<'a> {
    /// How.
    mix: Mix,
    /// To draw from.
    adapters: &'a [AdapterInfo],
    /// Of a fixed seed: every run draws alike.
    random: Pcg64,
    /// Adapters given in turn so far.
    turn: usize,
}

impl<'a> Draws<'a> {
    fn adapters(&mut self, batch: usize) -> Vec<Option<&'a AdapterInfo>> {
        (0..batch).map(|i| self.index(i).map(|index| &self.adapters[index])).collect()
    }

    /// Which adapter sequence `i` of a batch has.
    fn index(&mut self, i: usize) -> Option<usize> {
        let count = self.adapters.len();
        Some(match self.mix {
            Mix::None => return None,
            Mix::One => 0,
            Mix::Distinct => i % count,
            Mix::Turns => {
                self.turn += 1;
                (self.turn - 1) % count
            }
            Mix::Zipf => {
                let weights = Popularity::Zipf(1.0).weights(count).unwrap_or_default();
                WeightedIndex::new(weights)
                    .expect("one adapter at least, all weights positive")
                    .sample(&mut self.random)
            }
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
