//! The server under load: its process, its models, its request format and its metrics.

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
use super::traffic::PlannedRequest;
use crate::{Error, Result};

/// Longest time until a started server is ready.
const START_TIMEOUT: Duration = Duration::from_secs(600);

/// Longest time until a stopped server ends; then it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(40);

/// The request field that names the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AdapterField {
    /// `model`: quiver, vLLM, SGLang, LoRAX
    Model,
    /// `adapter`: quiver, mistral.rs
    Adapter,
    /// `lora`, by index: llama.cpp
    Lora,
}

/// A server and its request format.
#[derive(Clone)]
pub struct TargetServer {
    /// Client of the server.
    pub client: Client,
    /// Name of the base.
    pub model: String,
    /// Names of the adapters, most popular first.
    pub adapters: Vec<String>,
    /// Field that names them.
    pub field: AdapterField,
    /// Send chat completions instead of completions.
    pub chat: bool,
    /// Further fields of every request.
    pub extra: Map<String, Value>,
    /// Process id, if this program started the server.
    pub pid: Option<u32>,
}

/// State of a server, from its metrics page or its process.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Observed {
    /// Resident memory, bytes.
    pub resident_bytes: Option<u64>,
    /// Adapters loaded into a slot so far.
    pub adapter_misses: Option<u64>,
    /// Those that were read from disk.
    pub disk_reads: Option<u64>,
    /// Running and waiting sequences.
    pub unfinished: Option<u64>,
    /// Registered adapters.
    pub adapters: Option<u64>,
}

impl TargetServer {
    /// Takes the names of the base and the adapters from the server's model list. `model` and `pattern` (`{}` is the index,
    /// `{:04}` the index with four digits) replace those names. Errors: no model, or fewer than `count` adapters.
    pub(crate) async fn discover(
        &mut self,
        model: Option<String>,
        pattern: Option<&str>,
        count: Option<usize>,
    ) -> Result<()> {
        let models = self.client.get("/v1/models").await.unwrap_or_default();
        let cards = || models["data"].as_array().into_iter().flatten();
        let id = |card: &Value| card["id"].as_str().map(str::to_owned);
        let base = cards().find(|card| card["parent"].is_null()).and_then(id);
        self.model = model
            .or(base)
            .ok_or_else(|| Error::invalid(format!("{}/v1/models lists no model: pass --model", self.client.url())))?;
        self.adapters = match (pattern, self.field, count) {
            (Some(pattern), _, count) => (0..count.unwrap_or(1)).map(|i| fill_in(pattern, i)).collect(),
            (None, AdapterField::Lora, _) => {
                let list = self.client.get("/lora-adapters").await.unwrap_or_default();
                (0..list.as_array().map_or(0, Vec::len)).map(|i| i.to_string()).collect()
            }
            (None, _, _) => cards().filter(|card| !card["parent"].is_null()).filter_map(id).collect(),
        };
        if count.is_some_and(|count| count > self.adapters.len()) {
            return Err(Error::invalid(format!(
                "--adapters {}: the server has {}: load more, or pass their names with --adapter-names",
                count.unwrap_or_default(),
                self.adapters.len()
            )));
        }
        Ok(())
    }

    /// Route of the requests.
    pub(super) fn path(&self) -> &'static str {
        if self.chat { "/v1/chat/completions" } else { "/v1/completions" }
    }

    /// Body of a request.
    pub fn body(&self, planned: &PlannedRequest) -> Bytes {
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

    /// Reads the server's metrics page, if it has one in Prometheus format with quiver's or vLLM's names.
    pub(super) async fn observe(&self) -> Observed {
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
    pub(super) fn watch_memory(&self) -> MemoryWatch {
        let (target, samples) = (self.clone(), Arc::new(Mutex::new(Vec::new())));
        let kept = samples.clone();
        let task = tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            // Missed ticks are dropped: a slow server gets no extra requests.
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

    /// Name and version as the server reports them.
    pub(crate) async fn version(&self) -> Value {
        self.client.get("/version").await.unwrap_or_default()
    }
}

/// Replaces the placeholder of a pattern such as `dummy-{:04}` by an index.
fn fill_in(pattern: &str, i: usize) -> String {
    let Some((before, (width, after))) =
        pattern.split_once('{').and_then(|(before, rest)| Some((before, rest.split_once('}')?)))
    else {
        return pattern.to_owned();
    };
    let width = width.trim_start_matches(':').parse().unwrap_or(0);
    format!("{before}{i:0width$}{after}")
}

/// A server's memory over time.
pub(super) struct MemoryWatch {
    /// Bytes, one sample per second.
    samples: Arc<Mutex<Vec<u64>>>,
    /// Takes the samples.
    task: JoinHandle<()>,
}

impl MemoryWatch {
    /// Samples so far; empty if the server does not report its memory.
    pub(super) fn samples(&self) -> Vec<u64> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Resident memory of a process, bytes.
fn resident(pid: u32) -> Option<u64> {
    let pid = Pid::from_u32(pid);
    let mut system = System::new();
    system.refresh_processes(ProcessesToUpdate::Some(&[pid]), false);
    system.process(pid).map(sysinfo::Process::memory)
}

/// A server that this program starts and stops.
pub(crate) struct ServerProcess {
    child: Child,
    /// Its output, shown if it fails.
    log: tempfile::NamedTempFile,
}

impl ServerProcess {
    /// Starts a shell command. The server replaces the shell, so that the child's memory and exit are the server's.
    pub(crate) fn start(command: &str) -> Result<Self> {
        let log = tempfile::NamedTempFile::new()?;
        let child = Command::new("sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::null())
            .stdout(log.reopen()?)
            .stderr(log.reopen()?)
            .kill_on_drop(true)
            // In a process group of its own, so that ctrl-C reaches only the generator.
            .process_group(0)
            .spawn()?;
        Ok(Self { child, log })
    }

    /// Process id.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Waits until the server is ready. Errors: it exited, or is not ready after ten minutes; with the end of its output.
    pub(crate) async fn ready(&mut self, client: &Client) -> Result<()> {
        let start = Instant::now();
        while !ready(client).await {
            let ended = self.child.try_wait()?;
            if ended.is_some() || start.elapsed() > START_TIMEOUT {
                let said = std::fs::read_to_string(self.log.path()).unwrap_or_default();
                let tail: Vec<&str> = said.lines().rev().take(15).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                let what = ended.map_or("is not ready after ten minutes".into(), |status| format!("exited: {status}"));
                return Err(Error::invalid(format!("the server {what}\n{tail}")));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Sends SIGTERM and waits; kills a server that does not exit.
    pub(crate) async fn stop(mut self) -> Result<()> {
        if let Some(pid) = self.pid().map(Pid::from_u32) {
            let mut system = System::new();
            system.refresh_processes(ProcessesToUpdate::Some(&[pid]), false);
            system.process(pid).and_then(|process| process.kill_with(Signal::Term));
        }
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        Ok(())
    }
}

/// Whether a server accepts requests, which vLLM, llama.cpp and quiver report at `/health`.
async fn ready(client: &Client) -> bool {
    client.call(hyper::Method::GET, "/health", None).await.is_ok_and(|(status, _)| status.is_success())
}
