//! `quiver bench`: measurements of the engine and of servers.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, Subcommand};

use super::bench_serve::{PageArgs, ServeBenchArgs};
use super::{block_on, start_logs};
use crate::Result;
use crate::bench::engine::{self, EngineBench};
use crate::config::ServeConfig;
use crate::runtime::Runtime;

/// Arguments of `quiver bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Measure steps of the engine, without HTTP
    Engine(Box<EngineBenchArgs>),
    /// Measure a server under load over HTTP: quiver, vLLM, llama.cpp or any other with OpenAI's API
    Serve(Box<ServeBenchArgs>),
    /// Draw the reports that `bench serve` wrote
    Page(PageArgs),
}

#[derive(Debug, Args)]
struct EngineBenchArgs {
    #[command(flatten)]
    bench: EngineBench,
    /// Write all samples to this file, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    serve: ServeConfig,
}

impl BenchArgs {
    pub(super) fn run(self) -> Result<()> {
        match self.command {
            BenchCommand::Engine(args) => {
                start_logs(&args.serve)?;
                block_on(args.run())
            }
            BenchCommand::Serve(args) => block_on(args.run()),
            BenchCommand::Page(args) => args.run(),
        }
    }
}

impl EngineBenchArgs {
    /// Measures and prints a table.
    async fn run(mut self) -> Result<()> {
        let EngineBench { batch, input, output, .. } = &self.bench;
        let most = batch.iter().copied().max().unwrap_or(1);
        self.serve.no_prefix_cache = true;
        self.serve.max_running = self.serve.max_running.max(most);
        self.serve.max_model_len = self.serve.max_model_len.or(Some(input + output + 1));
        let started = Instant::now();
        let runtime = Runtime::load(&self.serve).await?;
        eprintln!("loaded in {:.1} s", started.elapsed().as_secs_f64());
        let cases = self.bench.cases(&runtime.registry.list())?;
        let bandwidth = engine::bandwidth(&runtime)?;
        eprintln!("memory bandwidth: {:.1} GB/s", bandwidth / 1e9);
        println!("{}", engine::HEAD);
        let rows = self.bench.run(&runtime, cases, bandwidth, |case| println!("{}", case.row())).await?;
        if let Some(out) = &self.out {
            std::fs::write(out, format!("{rows:#}\n"))?;
        }
        Ok(())
    }
}
