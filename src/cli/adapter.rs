//! `quiver adapter`: the admin routes of a running server, from a terminal.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::{Error, Result};

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
