//! `quiver adapter`: the admin routes of a running server, from a terminal; and adapters made up for benchmarks.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::adapter::dummy;
use crate::arch::Module;
use crate::model::weights;
use crate::{Error, Result, hub};

/// Where the server is, and what to do there.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    #[command(subcommand)]
    action: Action,
    /// The running server
    #[arg(long, global = true, env = "QUIVER_URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Its admin key, if it has one
    #[arg(long, global = true, env = "QUIVER_ADMIN_KEY", value_name = "KEY", hide_env_values = true)]
    admin_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List adapters
    List,
    /// Load an adapter, or replace the one of this name
    Load {
        /// The name requests use
        name: String,
        /// Its directory, as the server sees it
        source: String,
        /// Keep it in its slot
        #[arg(long)]
        pinned: bool,
    },
    /// Unload an adapter
    Unload {
        /// The name requests use
        name: String,
    },
    /// Keep an adapter in its slot
    Pin {
        /// The name requests use
        name: String,
    },
    /// Let an adapter be put out of its slot
    Unpin {
        /// The name requests use
        name: String,
    },
    /// Write made-up adapters to measure with: dummy-0000, dummy-0001, ...
    Dummy(Dummy),
}

#[derive(Debug, Args)]
struct Dummy {
    /// The base they are for: as in `serve`, or a config.json
    #[arg(long)]
    model: String,
    /// How many
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Rank of all
    #[arg(long, default_value = "16", value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Ranks that they take in turn, instead
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..), conflicts_with = "rank")]
    ranks: Vec<u16>,
    /// Modules that they change: all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head
    #[arg(long, default_value = "all", value_delimiter = ',')]
    targets: Vec<String>,
    /// Where their directories go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl Dummy {
    fn run(&self) -> Result<()> {
        let files = match self.model.ends_with(".json") {
            true => hub::shape(&self.model)?,
            false => hub::resolve(&self.model, &hub::default_cache(), true)?,
        };
        let model = weights::shape(&files)?;
        let mut modules = Module::BLOCK.to_vec();
        if self.targets != ["all"] {
            let known = Module::BLOCK.into_iter().chain([Module::LmHead]);
            let named = |name: &String| {
                let mut modules = known.clone().filter(|m| m.path(0).rsplit('.').next() == Some(name));
                modules.next().ok_or_else(|| Error::invalid(format!("--targets {name}: there is no such module")))
            };
            modules = self.targets.iter().map(named).collect::<Result<_>>()?;
        }
        let ranks = if self.ranks.is_empty() { &[self.rank][..] } else { &self.ranks };
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            loop {
                let i = next.fetch_add(1, Relaxed);
                if i >= self.count {
                    return Ok(());
                }
                let rank = usize::from(ranks[i % ranks.len()]);
                dummy::write(&self.out.join(format!("dummy-{i:04}")), &model, &modules, rank)?;
            }
        };
        let failed = |_| Error::internal("a writing thread panicked");
        thread::scope(|scope| {
            let threads = thread::available_parallelism().map_or(1, usize::from).min(self.count);
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().try_for_each(|thread| thread.join().map_err(failed)?)
        })?;
        println!("{} adapters in {}", self.count, self.out.display());
        Ok(())
    }
}

impl AdapterArgs {
    /// Does it, and prints what the server says.
    pub fn run(self) -> Result<()> {
        match &self.action {
            Action::List => {
                let list = self.call("GET", "", None)?;
                println!("{:<24} {:<18} {:>5} {:>12} {:<6} pinned", "name", "generation", "rank", "bytes", "level");
                for info in list["data"].as_array().into_iter().flatten() {
                    let text = |key: &str| info[key].as_str().unwrap_or("?").to_owned();
                    println!(
                        "{:<24} {:<18} {:>5} {:>12} {:<6} {}",
                        text("name"),
                        text("generation"),
                        info["rank"],
                        info["bytes"],
                        text("level"),
                        info["pinned"]
                    );
                }
                return Ok(());
            }
            Action::Load { name, source, pinned } => {
                self.call("PUT", &segment(name), Some(json!({"source": source, "pinned": pinned})))
            }
            Action::Unload { name } => self.call("DELETE", &segment(name), None),
            Action::Pin { name } => self.call("POST", &(segment(name) + "/pin"), None),
            Action::Unpin { name } => self.call("POST", &(segment(name) + "/unpin"), None),
            Action::Dummy(dummy) => return dummy.run(),
        }
        .map(|answer| println!("{answer:#}"))
    }

    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let url = format!("{}/admin/adapters{path}", self.url.trim_end_matches('/'));
        // Statuses are answers here: the envelope says more than the number.
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(key) = &self.admin_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = body.map_or_else(String::new, |body| body.to_string());
        let request = request.header("content-type", "application/json").body(body);
        let failed = |e: &dyn std::fmt::Display| Error::invalid(format!("{method} {url}: {e}"));
        let mut response = agent.run(request.map_err(|e| failed(&e))?).map_err(|e| failed(&e))?;
        let text = response.body_mut().read_to_string().map_err(|e| failed(&e))?;
        let answer = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if response.status().is_success() {
            return Ok(answer);
        }
        let message = answer["error"]["message"].as_str().unwrap_or("no reason given");
        Err(Error::invalid(format!("{}: {message}", response.status())))
    }
}

/// `/name`, escaped for a path.
fn segment(name: &str) -> String {
    let escaped = name.bytes().map(|b| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        other => format!("%{other:02X}"),
    });
    std::iter::once("/".to_owned()).chain(escaped).collect()
}
