//! Runs that end with a verdict: overload, and a soak with adapters that come and go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::client::{Client, Reply};
use super::load::{Record, Run, Stop};
use super::stats::{Quantiles, Summary};
use super::target::{Observed, Target};
use crate::{Error, Result};

/// Faults after which a soak gives up.
const MOST_FAULTS: usize = 20;

/// Memory may grow by a twentieth and this, bytes, before it counts as a leak.
const GROWTH: u64 = 32 << 20;

/// Samples of memory that a verdict shows.
const SHOWN: usize = 20;

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Verdict {
    /// What was seen.
    pub facts: Vec<String>,
    /// What must not be.
    pub faults: Vec<String>,
}

impl Verdict {
    fn check(&mut self, good: bool, fault: impl Into<String>) {
        if !good {
            self.faults.push(fault.into());
        }
    }

    /// Judges memory over a run, bytes. Its first third is for caches to fill; what is most in the last third must not be much more
    /// than what is most in the middle one.
    fn memory(&mut self, samples: &[u64]) {
        let Some([middle, end]) = peaks(samples) else {
            return self.facts.push("memory: the server does not say, or the run was too short".into());
        };
        let shown = (0..SHOWN).map(|i| (samples[i * (samples.len() - 1) / (SHOWN - 1)] >> 20).to_string());
        let shown: Vec<String> = shown.collect();
        self.facts.push(format!("memory over time, MiB: {}", shown.join(" ")));
        self.check(
            end <= middle + middle / 20 + GROWTH,
            format!(
                "memory grew from {} MiB to {} MiB after the first third (so does a KV cache that still fills: give the server a \
                 small one)",
                middle >> 20,
                end >> 20
            ),
        );
    }
}

/// The most of the second and of the last third.
fn peaks(samples: &[u64]) -> Option<[u64; 2]> {
    let third = samples.len() / 3;
    Some([*samples[third..2 * third].iter().max()?, *samples[2 * third..].iter().max()?])
}

/// Judges a run at a rate beyond `sustained` requests a second.
pub fn overload(run: &Run, summary: &Summary, sustained: f64) -> Verdict {
    let mut verdict = Verdict::default();
    let refused: Vec<&Record> = run.records.iter().filter(|r| r.failure.as_deref() == Some("http 429")).collect();
    verdict.facts.push(format!(
        "{} offered, {} answered, {} refused with 429",
        summary.requests,
        summary.completed,
        refused.len()
    ));
    verdict.check(
        !refused.is_empty(),
        "nothing was refused: the queue is longer than the run, start the server with a shorter one",
    );
    let silent = refused.iter().filter(|r| r.retry_after.is_none()).count();
    verdict.check(silent == 0, format!("{silent} refusals without Retry-After"));
    let other = summary.failures() - refused.len();
    verdict.check(other == 0, format!("{other} requests failed otherwise: {:?}", summary.failed));
    // The queue fills in the first third.
    let third = |i: usize| {
        let part = |r: &&Record| (r.due * 3.0 / summary.seconds) as usize == i;
        Quantiles::of(run.records.iter().filter(part).filter(|r| r.failure.is_none()).filter_map(|r| r.first))
    };
    let (middle, end) = (third(1), third(2));
    verdict.facts.push(format!("first token of admitted requests: p50 {:.2} s, p99 {:.2} s", middle.p50, middle.p99));
    verdict.check(end.p50 <= middle.p50 * 1.5 + 0.5, format!("latency still rises: p50 {:.2} s at the end", end.p50));
    verdict
        .facts
        .push(format!("{:.2} requests a second answered, {sustained:.2} without overload", summary.requests_per_s));
    verdict.check(summary.requests_per_s >= 0.8 * sustained, "less than 0.8 of the sustainable rate was answered");
    verdict.memory(&run.memory);
    verdict
}

/// A soak: clients in a closed loop, some with adapters that are loaded, replaced and unloaded meanwhile.
pub struct Soak {
    /// The server, with at least two adapters; `adapter` names them in requests.
    pub target: Target,
    /// For the admin routes.
    pub admin: Client,
    /// How long.
    pub duration: Duration,
    /// Requests at once.
    pub clients: usize,
    /// Decides who asks what.
    pub seed: u64,
}

/// Names that come and go.
const NAMES: usize = 4;
/// Different prompts, every second one sampled with a seed.
const PROMPTS: usize = 4;
/// Tokens of a reply.
const TOKENS: usize = 24;
/// Adapters that take part.
const ADAPTERS: usize = 8;

/// A loaded adapter.
#[derive(Clone)]
struct Content {
    source: String,
    generation: String,
}

/// What the admin calls have made of a name.
#[derive(Clone, Default, PartialEq)]
struct Slot {
    /// Present content, as the last answer said.
    generation: Option<String>,
    /// An admin call is on its way: either answer is right.
    changing: bool,
    /// Calls so far, to tell whether one came in between.
    changes: usize,
}

/// What the tasks of a soak share.
struct Shared {
    soak: Soak,
    contents: Vec<Content>,
    /// Texts that each content (none: the base) gives alone, by prompt.
    expected: HashMap<Option<String>, Vec<String>>,
    slots: Mutex<Vec<Slot>>,
    verdict: Mutex<Verdict>,
    /// Replies that were checked, names that were rightly not there, admin calls.
    counts: Mutex<[usize; 3]>,
}

impl Soak {
    /// A request for a prompt, greedy or sampled with a seed.
    fn body(&self, adapter: Option<&str>, prompt: usize) -> hyper::body::Bytes {
        const OPENINGS: [&str; PROMPTS] = [
            "The lantern is",
            "def add(a, b):\n",
            "KING. What news from the north?",
            "Once, in a small town by the sea,",
        ];
        let mut body = json!({
            "model": self.target.model, "prompt": OPENINGS[prompt], "max_tokens": TOKENS, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true}, "temperature": if prompt.is_multiple_of(2) { 0.0 } else { 0.8 }, "seed": prompt,
        });
        if let Some(adapter) = adapter {
            body["adapter"] = json!(adapter);
        }
        body.to_string().into()
    }

    async fn ask(&self, adapter: Option<&str>, prompt: usize) -> Reply {
        self.target.client.stream("/v1/completions", self.body(adapter, prompt)).await
    }

    /// The answer of an admin route. Errors: no answer, or not 200.
    async fn admin(&self, method: Method, name: &str, body: Option<Value>) -> Result<Value> {
        let path = format!("/admin/adapters{name}");
        let (status, text) = self.admin.call(method.clone(), &path, body.as_ref()).await?;
        if status != StatusCode::OK {
            return Err(Error::invalid(format!("{method} {path}: {status} {text}")));
        }
        serde_json::from_str(&text).map_err(|e| Error::invalid(format!("{method} {path}: {e}")))
    }

    /// Runs it. Errors: a server without our admin routes or without adapters, or one that does not answer one by one.
    pub async fn run(self, mut stop: Stop) -> Result<Verdict> {
        let list = self.admin(Method::GET, "", None).await?;
        let content = |info: &Value| {
            let text = |key: &str| info[key].as_str().map(str::to_owned);
            Some((text("name")?, Content { source: text("source")?, generation: text("generation")? }))
        };
        let loaded: Vec<(String, Content)> =
            list["data"].as_array().into_iter().flatten().filter_map(content).take(ADAPTERS).collect();
        if loaded.len() < 2 {
            return Err(Error::invalid("a soak needs a server with two adapters or more"));
        }
        let mut expected: HashMap<Option<String>, Vec<String>> = HashMap::new();
        let everyone = loaded.iter().map(|(name, content)| (Some(name.as_str()), Some(content.generation.clone())));
        for (name, generation) in everyone.chain([(None, None)]) {
            let mut texts = Vec::new();
            for prompt in 0..PROMPTS {
                let reply = self.ask(name, prompt).await;
                if let Some(failure) = reply.failure {
                    return Err(Error::invalid(format!("one by one, {name:?} failed: {failure}")));
                }
                texts.push(reply.text);
            }
            expected.insert(generation, texts);
        }
        let (names, contents): (Vec<String>, Vec<Content>) = loaded.into_iter().unzip();
        let before = self.target.observe().await;
        let shared = Arc::new(Shared {
            contents,
            expected,
            slots: Mutex::new(vec![Slot::default(); NAMES]),
            verdict: Mutex::default(),
            counts: Mutex::default(),
            soak: self,
        });
        let start = Instant::now();
        let duration = shared.soak.duration;
        let mut tasks = JoinSet::new();
        for i in 0..shared.soak.clients {
            let (shared, names) = (shared.clone(), names.clone());
            tasks.spawn(async move { shared.client(i as u64, &names, start + duration).await });
        }
        let churn = shared.clone();
        tasks.spawn(async move { churn.churn(start + duration).await });
        let memory = shared.soak.target.watch_memory();
        let all = async { while tasks.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            _ = stop.wait_for(|stopped| *stopped) => {}
        }
        tasks.shutdown().await;
        shared.end(&before, &memory.samples(), start.elapsed()).await
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn fault(&self, fault: String) {
        lock(&self.verdict).faults.push(fault);
    }

    fn over(&self, end: Instant) -> bool {
        Instant::now() >= end || lock(&self.verdict).faults.len() >= MOST_FAULTS
    }

    /// Asks and checks until the end.
    async fn client(&self, number: u64, names: &[String], end: Instant) {
        let mut rng = Pcg64::seed_from_u64(self.soak.seed ^ (number << 32));
        while !self.over(end) {
            let prompt = rng.random_range(0..PROMPTS);
            match rng.random_range(0..5) {
                0 => {
                    let reply = self.soak.ask(None, prompt).await;
                    self.check("the base", None, prompt, reply);
                }
                1 | 2 => {
                    let i = rng.random_range(0..names.len());
                    let reply = self.soak.ask(Some(&names[i]), prompt).await;
                    self.check(&names[i], Some(&self.contents[i].generation), prompt, reply);
                }
                _ => self.ask_slot(rng.random_range(0..NAMES), prompt).await,
            }
        }
    }

    /// Asks for a name that comes and goes.
    async fn ask_slot(&self, i: usize, prompt: usize) {
        let name = format!("soak-{i}");
        let before = lock(&self.slots)[i].clone();
        let reply = self.soak.ask(Some(&name), prompt).await;
        let after = lock(&self.slots)[i].clone();
        let settled = before == after && !before.changing;
        let missing = reply.failure.as_deref() == Some("http 404");
        if missing && !(settled && before.generation.is_some()) {
            lock(&self.counts)[1] += 1;
            return;
        }
        // While a name changes, which content answers is open, but not that it gives its own text.
        let generation = if settled { before.generation } else { reply.generation.clone() };
        if generation.is_none() && reply.failure.is_none() {
            return self.fault(format!("{name} answered without being loaded"));
        }
        self.check(&name, generation.as_ref(), prompt, reply);
    }

    fn check(&self, name: &str, generation: Option<&String>, prompt: usize, reply: Reply) {
        lock(&self.counts)[0] += 1;
        if let Some(failure) = reply.failure {
            return self.fault(format!("{name}: {failure}"));
        }
        if reply.generation.as_ref() != generation {
            return self.fault(format!("{name} answered with {:?} for {generation:?}", reply.generation));
        }
        match self.expected.get(&reply.generation) {
            Some(texts) if texts[prompt] == reply.text => {}
            Some(texts) => self.fault(format!("{name}, prompt {prompt}: {:?}, alone {:?}", reply.text, texts[prompt])),
            None => self.fault(format!("{name} answered with an unknown generation {:?}", reply.generation)),
        }
    }

    /// Loads, replaces or unloads one name a second.
    async fn churn(&self, end: Instant) {
        let mut rng = Pcg64::seed_from_u64(self.soak.seed);
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        while !self.over(end) {
            tick.tick().await;
            let i = rng.random_range(0..NAMES);
            let there = lock(&self.slots)[i].generation.is_some();
            let content = &self.contents[rng.random_range(0..self.contents.len())];
            let load = !there || rng.random_bool(0.5);
            self.change(i, load.then_some(content)).await;
        }
    }

    /// Loads content under a name, or unloads it.
    async fn change(&self, i: usize, content: Option<&Content>) {
        {
            let slot = &mut lock(&self.slots)[i];
            (slot.changing, slot.changes) = (true, slot.changes + 1);
        }
        let path = format!("/soak-{i}");
        let answer = match content {
            Some(content) => self.soak.admin(Method::PUT, &path, Some(json!({"source": content.source}))).await,
            None => self.soak.admin(Method::DELETE, &path, None).await,
        };
        match (answer, content) {
            (Err(error), _) => self.fault(error.to_string()),
            (Ok(answer), Some(content)) if answer["generation"] != json!(content.generation) => {
                self.fault(format!("soak-{i} was loaded as {}, not as {}", answer["generation"], content.generation));
            }
            _ => {}
        }
        lock(&self.counts)[2] += 1;
        let slot = &mut lock(&self.slots)[i];
        slot.generation = content.map(|content| content.generation.clone());
        slot.changing = false;
    }

    /// Takes the names away again and looks at what is left.
    async fn end(&self, before: &Observed, memory: &[u64], took: Duration) -> Result<Verdict> {
        for i in 0..NAMES {
            let Slot { generation, changing, .. } = lock(&self.slots)[i].clone();
            if changing {
                // Its call was broken off: it may be there or not.
                _ = self.soak.admin(Method::DELETE, &format!("/soak-{i}"), None).await;
            } else if generation.is_some() {
                self.change(i, None).await;
            }
        }
        // Sequences of clients that were broken off end with the next step.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after = self.soak.target.observe().await;
        let [checked, missing, changes] = *lock(&self.counts);
        let mut verdict = std::mem::take(&mut *lock(&self.verdict));
        verdict.facts.push(format!(
            "{checked} replies checked against one-by-one runs in {:.0} s, {missing} rightly refused, {changes} admin calls",
            took.as_secs_f64()
        ));
        verdict.check(checked > 0, "no reply was checked");
        verdict.check(
            after.adapters == before.adapters,
            format!("{:?} adapters before, {:?} after", before.adapters, after.adapters),
        );
        verdict.check(after.unfinished.unwrap_or(0) == 0, format!("{:?} sequences are left", after.unfinished));
        verdict.memory(memory);
        Ok(verdict)
    }
}
