//! `quiver bench engine`: prompt and output speed of the engine, without HTTP.
//!
//! A batch of equal requests runs twice, for one token and for more; the difference is the time of the steps between. Both
//! are repeated and the median taken. The prefix cache is off, and prompts are random, so that every prompt is computed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand, ValueEnum};
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_pcg::Pcg64;
use serde_json::{Value, json};
use tokio::sync::mpsc::unbounded_channel;

use super::backend::Backend;
use super::bench_serve::{Page, ServeBench};
use super::serve::start_logs;
use crate::bench::traffic::Popularity;
use crate::config::ServeConfig;
use crate::engine::request::{Event, Request, SamplingParams};
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
    /// Of a step.
    step: f64,
}

impl EngineBench {
    async fn run(mut self) -> Result<()> {
        let most = self.batch.iter().copied().max().unwrap_or(1);
        self.serve.no_prefix_cache = true;
        self.serve.max_running = self.serve.max_running.max(most);
        self.serve.max_model_len = self.serve.max_model_len.or(Some(self.input + self.output + 1));
        let started = Instant::now();
        let backend = Backend::load(&self.serve, None, |_| {}).await?;
        eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
        let adapters: Vec<String> = backend.registry.list().into_iter().map(|a| a.name).collect();
        if self.registered.is_empty() {
            self.registered.push(adapters.len());
        }
        let least = usize::from(self.mix.iter().any(|mix| *mix != Mix::None));
        if let Some(n) = self.registered.iter().find(|n| !(least..=adapters.len()).contains(*n)) {
            return Err(Error::invalid(format!(
                "{n} adapters to take part, of {} loaded (--adapters DIR): --mix needs at least {least}",
                adapters.len()
            )));
        }
        println!(
            "| batch | adapters | of | ms a step | tok/s | prompt ms | prompt tok/s |\n|---|---|---|---|---|---|---|"
        );
        let mut rows: Vec<Value> = Vec::new();
        let cases = self.mix.iter().flat_map(|mix| self.registered.iter().map(move |n| (*mix, *n)));
        for (mix, registered, batch) in cases.flat_map(|(mix, n)| self.batch.iter().map(move |b| (mix, n, *b))) {
            let adapters = &adapters[..registered];
            let mut draws = Draws { mix, adapters, random: Pcg64::seed_from_u64(0), turn: 0 };
            // Once unmeasured: adapters come into their slots.
            self.measure(&backend, batch, &mut draws).await?;
            let mut samples = Vec::new();
            for _ in 0..self.repeat.max(1) {
                samples.push(self.measure(&backend, batch, &mut draws).await?);
            }
            let step = median(samples.iter().map(|s| s.step).collect());
            let prompt = median(samples.iter().map(|s| s.prompt.as_secs_f64()).collect());
            let mix = mix.to_possible_value().map_or(String::new(), |v| v.get_name().to_owned());
            println!(
                "| {batch} | {mix} | {registered} | {step:.3} | {:.0} | {:.2} | {:.0} |",
                batch as f64 / step * 1e3,
                prompt * 1e3,
                (batch * self.input) as f64 / prompt
            );
            rows.push(json!({
                "batch": batch, "adapters": mix, "registered": registered, "input": self.input, "output": self.output,
                "step_ms": samples.iter().map(|s| s.step).collect::<Vec<_>>(),
                "prompt_s": samples.iter().map(|s| s.prompt.as_secs_f64()).collect::<Vec<_>>(),
            }));
        }
        if let Some(out) = &self.out {
            std::fs::write(out, format!("{:#}\n", Value::Array(rows)))?;
        }
        Ok(())
    }

    /// Time to the first tokens, and of a step.
    async fn measure(&self, backend: &Backend, batch: usize, draws: &mut Draws<'_>) -> Result<Sample> {
        let mut names = draws.names(batch);
        let prompt = self.time(backend, &names, 1).await?;
        if draws.mix == Mix::Turns {
            names = draws.names(batch);
        }
        let all = self.time(backend, &names, self.output + 1).await?;
        let step = all.saturating_sub(prompt).as_secs_f64() * 1e3 / self.output as f64;
        Ok(Sample { prompt, step })
    }

    /// Time until all of a batch have their tokens.
    async fn time(&self, backend: &Backend, names: &[Option<&str>], tokens: usize) -> Result<Duration> {
        let vocab = backend.codec.vocab_size().min(30_000) as u32;
        let mut replies = Vec::new();
        let mut requests = Vec::new();
        for name in names {
            let (events, receiver) = unbounded_channel();
            let adapters = match name {
                Some(name) => vec![(backend.registry.lease(name)?, 1.0)],
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
            backend.engine.submit(request)?;
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

/// Gives sequences their adapters.
struct Draws<'a> {
    mix: Mix,
    /// Names to draw from.
    adapters: &'a [String],
    random: Pcg64,
    /// Adapters given in turn so far.
    turn: usize,
}

impl<'a> Draws<'a> {
    fn names(&mut self, batch: usize) -> Vec<Option<&'a str>> {
        (0..batch).map(|i| self.index(i).map(|index| self.adapters[index].as_str())).collect()
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
