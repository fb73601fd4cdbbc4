//! From logits to a token on the CPU: greedy, and with all filters.

use criterion::{BenchmarkId, Criterion, Throughput};
use quiver::engine::request::SamplingParams;
use quiver::engine::sampler::{LogitsTask, SamplingMetadata, TokenCounts, run_tasks};

use crate::{VOCAB, must, values};

pub fn bench(c: &mut Criterion) {
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let full =
        SamplingParams { top_k: 50, top_p: 0.9, min_p: 0.01, repetition_penalty: 1.1, ..SamplingParams::default() };
    let mut group = c.benchmark_group("sample");
    for (name, params) in [("greedy", greedy), ("all filters", full)] {
        let counts = TokenCounts::new(&params, &[1, 2, 3]);
        for rows in [1, 32] {
            let logits = values((rows, VOCAB));
            let metadata =
                || SamplingMetadata { params: &params, counts: &counts, masked: &[], allowed: None, seed: 1, index: 0 };
            let tasks: Vec<LogitsTask> = (0..rows).map(|_| LogitsTask::Sample(metadata())).collect();
            group.throughput(Throughput::Elements(rows as u64));
            group.bench_function(BenchmarkId::new(name, rows), |b| b.iter(|| must(run_tasks(&logits, &tasks))));
        }
    }
}
