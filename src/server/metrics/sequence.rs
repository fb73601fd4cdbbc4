//! The clocks and counters of one sequence, from its admission to its end.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec};

use super::{Metrics, lock};
use crate::engine::request::FinishReason;
use crate::error::ErrorKind;

/// Sequences that wait for their first token, by adapter label.
pub(super) type WaitingSequences = Arc<Mutex<HashMap<String, usize>>>;

/// The metrics of one sequence, under our names and vLLM's. Dropped before its end, it counts as aborted.
pub(in crate::server) struct SequenceMetrics {
    arrived: Instant,
    /// For the log.
    prompt_tokens: usize,
    tokens: usize,
    scheduled_after: Option<Duration>,
    first_token_after: Option<Duration>,
    last_token: Option<Instant>,
    /// Where it is counted as waiting, until its first token.
    waiting: Option<(WaitingSequences, String)>,
    ended: bool,
    generated: [IntCounter; 2],
    first_token: [Histogram; 2],
    inter_token: [Histogram; 2],
    request: [Histogram; 2],
    queue: [Histogram; 2],
    ended_sequence: EndedSequence,
    requests: IntCounterVec,
    vllm_success: IntCounterVec,
    errors: IntCounterVec,
    label: String,
    model: String,
}

/// vLLM's histograms of sequences that ended.
struct EndedSequence {
    prompt: Histogram,
    generation: Histogram,
    prefill: Histogram,
    decode: Histogram,
    per_token: Histogram,
}

impl Metrics {
    /// Begins to watch a sequence that the engine has admitted. `adapter` is empty for the base.
    pub(in crate::server) fn track(
        &self,
        model: &str,
        adapter: &str,
        prompt_tokens: usize,
        arrived: Instant,
    ) -> SequenceMetrics {
        let label = self.label(adapter);
        let engine = [model, "0"];
        let (own, vllm) = (&self.requests, &self.vllm);
        own.prompt_tokens.with_label_values(&[&label]).inc_by(prompt_tokens as u64);
        vllm.prompt_tokens.with_label_values(&engine).inc_by(prompt_tokens as u64);
        *lock(&self.waiting).entry(adapter.to_owned()).or_default() += 1;
        let pair = |own: &HistogramVec, vllm: &HistogramVec| {
            [own.with_label_values(&[&label]), vllm.with_label_values(&engine)]
        };
        SequenceMetrics {
            arrived,
            prompt_tokens,
            tokens: 0,
            scheduled_after: None,
            first_token_after: None,
            last_token: None,
            waiting: Some((self.waiting.clone(), adapter.to_owned())),
            ended: false,
            generated: [
                own.generated_tokens.with_label_values(&[&label]),
                vllm.generation_tokens.with_label_values(&engine),
            ],
            first_token: pair(&own.first_token, &vllm.first_token),
            inter_token: pair(&own.inter_token, &vllm.inter_token),
            request: pair(&own.request, &vllm.request),
            queue: pair(&own.queue, &vllm.queue),
            ended_sequence: EndedSequence {
                prompt: vllm.request_prompt.with_label_values(&engine),
                generation: vllm.request_generation.with_label_values(&engine),
                prefill: vllm.prefill.with_label_values(&engine),
                decode: vllm.decode.with_label_values(&engine),
                per_token: vllm.per_token.with_label_values(&engine),
            },
            requests: own.requests.clone(),
            vllm_success: vllm.success.clone(),
            errors: own.errors.clone(),
            label,
            model: model.to_owned(),
        }
    }
}

impl SequenceMetrics {
    /// It left the queue.
    pub(in crate::server) fn scheduled(&mut self) {
        let waited = self.arrived.elapsed();
        self.scheduled_after = Some(waited);
        observe(&self.queue, waited);
    }

    /// A token came.
    pub(in crate::server) fn token(&mut self) {
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => {
                self.stop_waiting();
                self.first_token_after = Some(now - self.arrived);
                observe(&self.first_token, now - self.arrived);
            }
            Some(last) => observe(&self.inter_token, now - last),
        }
        self.tokens += 1;
        self.generated.iter().for_each(IntCounter::inc);
    }

    /// A token came that ends the sequence. It has no text, and no client sees it.
    pub(in crate::server) fn end_token(&mut self) {
        self.tokens += 1;
        self.generated.iter().for_each(IntCounter::inc);
    }

    /// It ended without an error.
    pub(in crate::server) fn finish(&mut self, reason: FinishReason) {
        observe(&self.request, self.arrived.elapsed());
        self.observe_ended();
        self.end(reason.word());
    }

    fn observe_ended(&self) {
        let ended = &self.ended_sequence;
        ended.prompt.observe(self.prompt_tokens as f64);
        ended.generation.observe(self.tokens as f64);
        let (Some(first), Some(last)) = (self.first_token_after, self.last_token) else { return };
        let decode = (last - self.arrived).saturating_sub(first).as_secs_f64();
        ended.prefill.observe(first.saturating_sub(self.scheduled_after.unwrap_or_default()).as_secs_f64());
        ended.decode.observe(decode);
        if self.tokens > 1 {
            ended.per_token.observe(decode / (self.tokens - 1) as f64);
        }
    }

    /// It failed after it was admitted.
    pub(in crate::server) fn fail(&mut self, kind: ErrorKind) {
        self.errors.with_label_values(&[kind.word(), &self.label]).inc();
        self.end("error");
    }

    fn end(&mut self, reason: &str) {
        self.ended = true;
        self.stop_waiting();
        tracing::info!(
            adapter = self.label,
            reason,
            prompt_tokens = self.prompt_tokens,
            tokens = self.tokens,
            first_token_ms = self.first_token_after.map(|t| t.as_millis() as u64),
            ms = self.arrived.elapsed().as_millis() as u64,
            "sequence ended"
        );
        self.requests.with_label_values(&[self.label.as_str(), reason]).inc();
        self.vllm_success.with_label_values(&[self.model.as_str(), "0", reason]).inc();
    }

    fn stop_waiting(&mut self) {
        let Some((waiting, adapter)) = self.waiting.take() else { return };
        let mut waiting = lock(&waiting);
        if let Some(count) = waiting.get_mut(&adapter) {
            *count -= 1;
            if *count == 0 {
                waiting.remove(&adapter);
            }
        }
    }
}

impl Drop for SequenceMetrics {
    fn drop(&mut self) {
        if !self.ended {
            self.end("abort");
        }
    }
}

fn observe(pair: &[Histogram; 2], time: Duration) {
    pair.iter().for_each(|histogram| histogram.observe(time.as_secs_f64()));
}
