//! A soak: clients in a closed loop check every reply while adapters are loaded, replaced and unloaded.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::{Method, StatusCode};
use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::client::{Client, StreamedReply};
use super::load::Stop;
use super::target::{Observed, TargetServer};
use super::verdict::Verdict;
use crate::{Error, Result};

/// Number of faults after which a soak stops.
const MAX_FAULTS: usize = 20;

/// A soak of one server.
pub(crate) struct Soak {
    /// The server, with at least two adapters. Requests name them in the field `adapter`.
    pub(crate) target: TargetServer,
    /// Client of the admin routes.
    pub(crate) admin: Client,
    /// Length of the soak.
    pub(crate) duration: Duration,
    /// Requests at once.
    pub(crate) clients: usize,
    /// Seed of the choices of all tasks.
    pub(crate) seed: u64,
}

/// Names whose adapters change.
const NAMES: usize = 4;
/// Number of prompts. Every second one is sampled with a seed, the others greedily.
const PROMPTS: usize = 4;
/// Tokens of a reply.
const TOKENS: usize = 24;
/// Most adapters in use.
const ADAPTERS: usize = 8;

/// Content of a loaded adapter.
#[derive(Clone)]
struct AdapterContent {
    source: String,
    generation: String,
}

/// State of a name whose adapter changes.
#[derive(Clone, Default, PartialEq)]
struct ChangingName {
    /// Loaded generation after the last admin call.
    generation: Option<String>,
    /// An admin call is under way: the state before or after it is correct.
    changing: bool,
    /// Number of admin calls, which shows whether one came in between.
    changes: usize,
}

/// Counts of a soak.
#[derive(Clone, Copy, Default)]
struct SoakCounts {
    /// Replies that were checked.
    checked: usize,
    /// Requests correctly refused because their adapter was not loaded.
    missing: usize,
    /// Admin calls.
    changes: usize,
}

/// State shared by the tasks of a soak.
struct SoakState {
    soak: Soak,
    contents: Vec<AdapterContent>,
    /// Texts by prompt that each generation (`None` is the base) generated without other requests.
    expected: HashMap<Option<String>, Vec<String>>,
    names: Mutex<Vec<ChangingName>>,
    verdict: Mutex<Verdict>,
    counts: Mutex<SoakCounts>,
}

impl Soak {
    /// Body of a request for a prompt, greedy or sampled with a seed.
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

    async fn ask(&self, adapter: Option<&str>, prompt: usize) -> StreamedReply {
        self.target.client.stream("/v1/completions", self.body(adapter, prompt)).await
    }

    /// Answer of an admin route. Errors: no answer, or a status other than 200.
    async fn admin(&self, method: Method, name: &str, body: Option<Value>) -> Result<Value> {
        let path = format!("/admin/adapters{name}");
        let (status, text) = self.admin.call(method.clone(), &path, body.as_ref()).await?;
        if status != StatusCode::OK {
            return Err(Error::invalid(format!("{method} {path}: {status} {text}")));
        }
        serde_json::from_str(&text).map_err(|e| Error::invalid(format!("{method} {path}: {e}")))
    }

    /// Runs the soak until its end or until `stop`. Errors: the server has no admin routes, fewer than two adapters, or fails a
    /// request that runs without others.
    pub(crate) async fn run(self, mut stop: Stop) -> Result<Verdict> {
        let loaded = self.loaded().await?;
        let expected = self.expected(&loaded).await?;
        let (names, contents): (Vec<String>, Vec<AdapterContent>) = loaded.into_iter().unzip();
        let before = self.target.observe().await;
        let state = Arc::new(SoakState {
            contents,
            expected,
            names: Mutex::new(vec![ChangingName::default(); NAMES]),
            verdict: Mutex::default(),
            counts: Mutex::default(),
            soak: self,
        });
        let start = Instant::now();
        let end = start + state.soak.duration;
        let mut tasks = JoinSet::new();
        for i in 0..state.soak.clients {
            let (state, names) = (state.clone(), names.clone());
            tasks.spawn(async move { state.client(i as u64, &names, end).await });
        }
        let churn = state.clone();
        tasks.spawn(async move { churn.churn(end).await });
        let memory = state.soak.target.watch_memory();
        let all = async { while tasks.join_next().await.is_some() {} };
        tokio::select! {
            () = all => {}
            _ = stop.wait_for(|stopped| *stopped) => {}
        }
        tasks.shutdown().await;
        state.end(&before, &memory.samples(), start.elapsed()).await
    }

    /// Names and contents of the adapters in use.
    async fn loaded(&self) -> Result<Vec<(String, AdapterContent)>> {
        let list = self.admin(Method::GET, "", None).await?;
        let content = |info: &Value| {
            let text = |key: &str| info[key].as_str().map(str::to_owned);
            Some((text("name")?, AdapterContent { source: text("source")?, generation: text("generation")? }))
        };
        let infos = list["data"].as_array().into_iter().flatten();
        let loaded: Vec<_> = infos.filter_map(content).take(ADAPTERS).collect();
        if loaded.len() < 2 {
            return Err(Error::invalid("a soak needs a server with at least two adapters"));
        }
        Ok(loaded)
    }

    /// Texts of each generation and of the base, by prompt, one request at a time.
    async fn expected(&self, loaded: &[(String, AdapterContent)]) -> Result<HashMap<Option<String>, Vec<String>>> {
        let mut expected = HashMap::new();
        let adapters = loaded.iter().map(|(name, content)| (Some(name.as_str()), Some(content.generation.clone())));
        for (name, generation) in adapters.chain([(None, None)]) {
            let mut texts = Vec::new();
            for prompt in 0..PROMPTS {
                let reply = self.ask(name, prompt).await;
                if let Some(failure) = reply.failure {
                    return Err(Error::invalid(format!(
                        "a request without others failed, adapter {name:?}: {failure}"
                    )));
                }
                texts.push(reply.text);
            }
            expected.insert(generation, texts);
        }
        Ok(expected)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SoakState {
    fn fault(&self, fault: String) {
        lock(&self.verdict).faults.push(fault);
    }

    fn over(&self, end: Instant) -> bool {
        Instant::now() >= end || lock(&self.verdict).faults.len() >= MAX_FAULTS
    }

    /// Sends requests and checks the replies until the end.
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
                _ => self.ask_changing(rng.random_range(0..NAMES), prompt).await,
            }
        }
    }

    /// Sends a request for a name whose adapter changes, and checks the reply.
    async fn ask_changing(&self, i: usize, prompt: usize) {
        let name = format!("soak-{i}");
        let before = lock(&self.names)[i].clone();
        let reply = self.soak.ask(Some(&name), prompt).await;
        let after = lock(&self.names)[i].clone();
        let settled = before == after && !before.changing;
        let missing = reply.failure.as_deref() == Some("http 404");
        if missing && !(settled && before.generation.is_some()) {
            lock(&self.counts).missing += 1;
            return;
        }
        // While a name changes, either generation may answer, but its text must be its own.
        let generation = if settled { before.generation } else { reply.generation.clone() };
        if generation.is_none() && reply.failure.is_none() {
            return self.fault(format!("{name} answered although it is not loaded"));
        }
        self.check(&name, generation.as_ref(), prompt, reply);
    }

    fn check(&self, name: &str, generation: Option<&String>, prompt: usize, reply: StreamedReply) {
        lock(&self.counts).checked += 1;
        if let Some(failure) = reply.failure {
            return self.fault(format!("{name}: {failure}"));
        }
        if reply.generation.as_ref() != generation {
            return self
                .fault(format!("{name} answered with generation {:?} instead of {generation:?}", reply.generation));
        }
        match self.expected.get(&reply.generation) {
            Some(texts) if texts[prompt] == reply.text => {}
            Some(texts) => self.fault(format!(
                "{name}, prompt {prompt}: {:?}, but {:?} without other requests",
                reply.text, texts[prompt]
            )),
            None => self.fault(format!("{name} answered with an unknown generation {:?}", reply.generation)),
        }
    }

    /// Loads, replaces or unloads one name per second.
    async fn churn(&self, end: Instant) {
        let mut rng = Pcg64::seed_from_u64(self.soak.seed);
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        while !self.over(end) {
            tick.tick().await;
            let i = rng.random_range(0..NAMES);
            let there = lock(&self.names)[i].generation.is_some();
            let content = &self.contents[rng.random_range(0..self.contents.len())];
            let load = !there || rng.random_bool(0.5);
            self.change(i, load.then_some(content)).await;
        }
    }

    /// Loads content under a name, or unloads the name.
    async fn change(&self, i: usize, content: Option<&AdapterContent>) {
        {
            let name = &mut lock(&self.names)[i];
            (name.changing, name.changes) = (true, name.changes + 1);
        }
        let path = format!("/soak-{i}");
        let answer = match content {
            Some(content) => self.soak.admin(Method::PUT, &path, Some(json!({"source": content.source}))).await,
            None => self.soak.admin(Method::DELETE, &path, None).await,
        };
        match (answer, content) {
            (Err(error), _) => self.fault(error.to_string()),
            (Ok(answer), Some(content)) if answer["generation"] != json!(content.generation) => {
                self.fault(format!(
                    "soak-{i} was loaded as generation {} instead of {}",
                    answer["generation"], content.generation
                ));
            }
            _ => {}
        }
        lock(&self.counts).changes += 1;
        let name = &mut lock(&self.names)[i];
        name.generation = content.map(|content| content.generation.clone());
        name.changing = false;
    }

    /// Unloads the names and judges the state of the server.
    async fn end(&self, before: &Observed, memory: &[u64], took: Duration) -> Result<Verdict> {
        for i in 0..NAMES {
            let ChangingName { generation, changing, .. } = lock(&self.names)[i].clone();
            if changing {
                // Its admin call was interrupted: it may be loaded or not.
                _ = self.soak.admin(Method::DELETE, &format!("/soak-{i}"), None).await;
            } else if generation.is_some() {
                self.change(i, None).await;
            }
        }
        // Sequences of interrupted clients end with the next step.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let after = self.soak.target.observe().await;
        let SoakCounts { checked, missing, changes } = *lock(&self.counts);
        let mut verdict = std::mem::take(&mut *lock(&self.verdict));
        verdict.facts.push(format!(
            "{checked} replies checked against runs without other requests in {:.0} s, {missing} correctly refused, {changes} admin calls",
            took.as_secs_f64()
        ));
        verdict.check(checked > 0, "no reply was checked");
        verdict.check(
            after.adapters == before.adapters,
            format!("{:?} adapters before the soak, {:?} after it", before.adapters, after.adapters),
        );
        verdict.check(
            after.unfinished.unwrap_or(0) == 0,
            format!("{:?} sequences are left after the soak", after.unfinished),
        );
        verdict.memory(memory);
        Ok(verdict)
    }
}
