//! `quiver adapter`: a client of the admin routes, and random adapters for benchmarks.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::adapter::dummy;
use crate::arch::Module;
use crate::bench::secrets::Secrets;
use crate::model::weights;
use crate::{Error, Result, hub};

/// Arguments of `quiver adapter`.
#[derive(Debug, Args)]
pub(super) struct AdapterArgs {
    #[command(subcommand)]
    command: AdapterCommand,
    /// URL of the server
    #[arg(long, global = true, env = "QUIVER_URL", default_value = "http://127.0.0.1:8000")]
    url: String,
    /// Admin key of the server
    #[arg(long, global = true, env = "QUIVER_ADMIN_KEY", value_name = "KEY", hide_env_values = true)]
    admin_key: Option<String>,
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    /// List adapters
    List,
    /// Load an adapter, or replace the one with this name
    Load {
        /// Name in requests
        name: String,
        /// Its directory, or GGUF file, on the server's machine
        source: String,
        /// Never evict it from its slot
        #[arg(long)]
        pinned: bool,
    },
    /// Unload an adapter
    Unload {
        /// Name in requests
        name: String,
    },
    /// Never evict an adapter from its slot
    Pin {
        /// Name in requests
        name: String,
    },
    /// Allow an adapter to be evicted from its slot
    Unpin {
        /// Name in requests
        name: String,
    },
    /// Write random adapters for benchmarks: dummy-0000, dummy-0001, ...
    Dummy(DummyArgs),
}

/// Arguments of `quiver adapter dummy`.
#[derive(Debug, Args)]
struct DummyArgs {
    /// Base model, as in `quiver serve`, or its config.json
    #[arg(long)]
    model: String,
    /// Number of adapters
    #[arg(long, default_value_t = 1)]
    count: usize,
    /// Rank of all adapters
    #[arg(long, default_value = "16", value_parser = clap::value_parser!(u16).range(1..))]
    rank: u16,
    /// Ranks that the adapters take in turn
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..), conflicts_with = "rank")]
    ranks: Vec<u16>,
    /// Target modules: all, or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head
    #[arg(long, default_value = "all", value_delimiter = ',')]
    targets: Vec<String>,
    /// Write the adapter directories below this directory
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

impl DummyArgs {
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
                modules.next().ok_or_else(|| Error::invalid(format!("--targets: unknown module {name:?}")))
            };
            modules = self.targets.iter().map(named).collect::<Result<_>>()?;
        }
        let ranks = if self.ranks.is_empty() { &[self.rank][..] } else { &self.ranks };
        let ranks = ranks.iter().copied().map(usize::from).cycle().take(self.count);
        dummy::write_all(&self.out, &model, &modules, &ranks.collect::<Vec<_>>())?;
        println!("{} adapters in {}", self.count, self.out.display());
        Ok(())
    }
}

impl AdapterArgs {
    /// Runs the command and prints the server's answer.
    pub(super) fn run(self) -> Result<()> {
        match &self.command {
            AdapterCommand::List => {
                print_list(&self.call("GET", "", None)?);
                return Ok(());
            }
            AdapterCommand::Load { name, source, pinned } => {
                self.call("PUT", &segment(name), Some(json!({"source": source, "pinned": pinned})))
            }
            AdapterCommand::Unload { name } => self.call("DELETE", &segment(name), None),
            AdapterCommand::Pin { name } => self.call("POST", &(segment(name) + "/pin"), None),
            AdapterCommand::Unpin { name } => self.call("POST", &(segment(name) + "/unpin"), None),
            AdapterCommand::Dummy(dummy) => return dummy.run(),
        }
        .map(|answer| println!("{answer:#}"))
    }

    fn call(&self, method: &str, path: &str, body: Option<Value>) -> Result<Value> {
        let url = format!("{}/admin/adapters{path}", self.url.trim_end_matches('/'));
        // Error statuses are answers too: the error envelope has a message.
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder().method(method).uri(&url);
        if let Some(key) = &self.admin_key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let body = body.map_or_else(String::new, |body| body.to_string());
        let request = request.header("content-type", "application/json").body(body);
        let secrets = Secrets::new([self.admin_key.clone()]);
        let failed = |e: &dyn std::fmt::Display| Error::invalid(secrets.hide(&format!("{method} {url}: {e}")));
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

/// Prints a list of adapters as a table.
fn print_list(list: &Value) {
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
        for warning in info["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            println!("  warning: {warning}");
        }
    }
}

/// `/name`, percent-encoded for a path.
fn segment(name: &str) -> String {
    let escaped = name.bytes().map(|b| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
        other => format!("%{other:02X}"),
    });
    std::iter::once("/".to_owned()).chain(escaped).collect()
}
