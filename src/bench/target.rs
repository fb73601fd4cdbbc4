//! The server under load: its process, its models, its form of a request, what it says of itself.

use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use hyper::body::Bytes;
use serde::Serialize;
use serde_json::{Map, Value, json};
use sysinfo::{Pid, ProcessesToUpdate, Signal, System};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::client::Client;
use super::traffic::Planned;
use crate::{Error, Result};

/// How long a started server may take to be ready.
const START: Duration = Duration::from_secs(600);

/// How long it may take to end before it is killed.
const STOP: Duration = Duration::from_secs(40);

/// How a request names its adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterField {
    /// As `model`: quiver, vLLM, SGLang, LoRAX
    Model,
    /// As `adapter`: quiver, mistral.rs
    Adapter,
    /// As `lora`, by number: llama.cpp
    Lora,
}

/// A server and how to speak to it.
#[derive(Clone)]
pub struct Target {
    /// Where it is.
    pub client: Client,
    /// Name of the base.
    pub model: String,
    /// Names of the adapters, in the order of popularity.
    pub adapters: Vec<String>,
    /// Where requests name them.
    pub field: AdapterField,
    /// Chat completions rather than completions.
    pub chat: bool,
    /// Put into every request as it is.
    pub extra: Map<String, Value>,
    /// The process, where this program started it.
    pub pid: Option<u32>,
}

/// What a server says of itself, or the system of its process.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Observed {
    /// Bytes of memory in use.
    pub resident_bytes: Option<u64>,
    /// Adapters brought into a slot so far: requests that found theirs elsewhere.
    pub adapter_misses: Option<u64>,
    /// Of these, read from disk.
    pub disk_reads: Option<u64>,
    /// Sequences that run or wait.
    pub unfinished: Option<u64>,
    /// Adapters it holds.
    pub adapters: Option<u64>,
}

impl Target {
    /// Asks the server for the names of its base and adapters. `model` and `pattern` (`{}` stands for the number, `{:04}` for four
    /// digits of it) go before what it says; `count` adapters are taken. Errors: there are not as many.
    pub async fn discover(&mut self, model: Option<String>, pattern: Option<&str>, count: Option<usize>) -> Result<()> {
        let models = self.client.get("/v1/models").await.unwrap_or_default();
        let cards = || models["data"].as_array().into_iter().flatten();
        let id = |card: &Value| card["id"].as_str().map(str::to_owned);
        let base = cards().find(|card| card["parent"].is_null()).and_then(id);
        self.model = model
            .or(base)
            .ok_or_else(|| Error::invalid(format!("{}/v1/models names no model: pass --model", self.client.url())))?;
        self.adapters = match (pattern, self.field, count) {
            (Some(pattern), _, count) => (0..count.unwrap_or(1)).map(|i| number(pattern, i)).collect(),
            (None, AdapterField::Lora, _) => {
                let list = self.client.get("/lora-adapters").await.unwrap_or_default();
                (0..list.as_array().map_or(0, Vec::len)).map(|i| i.to_string()).collect()
            }
            (None, _, _) => cards().filter(|card| !card["parent"].is_null()).filter_map(id).collect(),
        };
        if count.is_some_and(|count| count > self.adapters.len()) {
            return Err(Error::invalid(format!(
                "--adapters {}: the server has {}; load more, or give their names with --adapter-names",
                count.unwrap_or_default(),
                self.adapters.len()
            )));
        }
        Ok(())
    }

    /// The route that requests go to.
    pub fn path(&self) -> &'static str {
        if self.chat { "/v1/chat/completions" } else { "/v1/completions" }
    }

    /// A request as bytes.
    pub fn body(&self, planned: &Planned) -> Bytes {
        let mut body = json!({
            "model": self.model,
            "max_tokens": planned.output,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        match self.chat {
            true => body["messages"] = json!([{"role": "user", "content": planned.prompt}]),
            false => body["prompt"] = planned.prompt.clone(),
        }
        if let Some(adapter) = planned.adapter {
            match self.field {
                AdapterField::Model => body["model"] = json!(self.adapters[adapter]),
                AdapterField::Adapter => body["adapter"] = json!(self.adapters[adapter]),
                AdapterField::Lora => body["lora"] = json!([{"id": adapter, "scale": 1.0}]),
            }
        }
        for (key, value) in &self.extra {
            body[key] = value.clone();
        }
        body.to_string().into()
    }

    /// Reads the server's metrics page, where it has one in Prometheus's format with our names or vLLM's.
    pub async fn observe(&self) -> Observed {
        let page = self.client.get("/metrics").await;
        let page = page.as_ref().and_then(Value::as_str).unwrap_or_default();
        let sum = |name: &str| {
            let values = page.lines().filter_map(|line| {
                let (series, value) = line.rsplit_once(' ')?;
                (series.split('{').next() == Some(name)).then(|| value.parse::<f64>().ok())?
            });
            values.reduce(|a, b| a + b).map(|sum| sum as u64)
        };
        let running = sum("vllm:num_requests_running");
        Observed {
            resident_bytes: self.pid.and_then(resident).or_else(|| sum("process_resident_memory_bytes")),
            adapter_misses: sum("quiver_adapter_slot_loads_total"),
            disk_reads: sum("quiver_adapter_disk_reads_total"),
            unfinished: running.map(|running| running + sum("vllm:num_requests_waiting").unwrap_or(0)),
            adapters: sum("quiver_adapters"),
        }
    }

    /// Samples the server's memory every second until the watch is dropped.
    pub fn watch_memory(&self) -> MemoryWatch {
        let (target, samples) = (self.clone(), Arc::new(Mutex::new(Vec::new())));
        let kept = samples.clone();
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            // A server that is slow to answer is not asked for what was missed.
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                let bytes = match target.pid {
                    Some(pid) => resident(pid),
                    None => target.observe().await.resident_bytes,
                };
                kept.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
            }
        });
        MemoryWatch { samples, task }
    }

    /// What the server calls itself.
    pub async fn version(&self) -> Value {
        self.client.get("/version").await.unwrap_or_default()
    }
}

/// `dummy-{:04}` with a number.
fn number(pattern: &str, i: usize) -> String {
    let Some((before, (width, after))) =
        pattern.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)))
    else {
        return pattern.to_owned();
    };
    let width = width.trim_start_matches(':').parse().unwrap_or(0);
    format!("{before}{i:0width$}{after}")
}

/// A server's memory over time.
pub struct MemoryWatch {
    /// Bytes, one a second.
    samples: Arc<Mutex<Vec<u64>>>,
    /// Takes them.
    task: JoinHandle<()>,
}

impl MemoryWatch {
    /// Bytes so far, one a second; none where the server does not say.
    pub fn samples(&self) -> Vec<u64> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Resident bytes of a process.
fn resident(pid: u32) -> Option<u64> {
    let pid = Pid::from_u32(pid);
    let mut system = System::new();
    system.refresh_processes(ProcessesToUpdate::Some(&[pid]), false);
    system.process(pid).map(sysinfo::Process::memory)
}

/// A server that this program started, and ends.
pub struct Process {
    child: Child,
    /// What it printed, to show when it fails.
    log: tempfile::NamedTempFile,
}

impl Process {
    /// Starts a shell command; the process takes the shell's place, so that its memory and its end are the server's.
    pub fn start(command: &str) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let child = Command::new("sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::null())
            .stdout(log.reopen()?)
            .stderr(log.reopen()?)
            .kill_on_drop(true)
            // Out of reach of the terminal's ctrl-C, which is for the generator.
            .process_group(0)
            .spawn()?;
        Ok(Self { child, log })
    }

    /// Its number.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until it answers. Errors: it ended, or is not ready after ten minutes; with what it said.
    pub async fn ready(&mut self, client: &Client) -> Result<()> {
        let start = Instant::now();
        while !ready(client).await {
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > START {
                let said = std::fs::read_to_string(self.log.path()).unwrap_or_default();
                let tail: Vec<&str> = said.lines().rev().take(15).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                let what = ended.map_or("is not ready after ten minutes".into(), |status| format!("ended: {status}"));
                return Err(Error::invalid(format!("the server {what}\n{tail}")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Asks it to end, and waits; kills it if it does not.
    pub async fn stop(mut self) -> Result<()> {
        if let Some(pid) = self.pid().map(Pid::from_u32) {
            let mut system = System::new();
            system.refresh_processes(ProcessesToUpdate::Some(&[pid]), false);
            system.process(pid).and_then(|process| process.kill_with(Signal::Term));
        }
        if tokio::time::timeout(STOP, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }
}

/// Whether a server takes requests. `/health` says so with vLLM and llama.cpp, the list of models with us.
async fn ready(client: &Client) -> bool {
    let answers = |path: &'static str| async move {
        client.call(hyper::Method::GET, path, None).await.is_ok_and(|(status, _)| status.is_success())
    };
    answers("/health").await && answers("/v1/models").await
}
