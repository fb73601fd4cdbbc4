//! `quiver serve` as a child process.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A running `quiver serve`, killed on drop.
pub struct Server {
    pub process: Child,
    pub url: String,
}

impl Server {
    /// Starts the binary with the project's adapters and waits until it is ready.
    pub fn start(extra: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let adapters = Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters");
        let process = Command::new(env!("CARGO_BIN_EXE_quiver"))
            .args(["serve", "--log-level", "warn,tower_http=error", "--port", &port.to_string(), "--adapters"])
            .arg(adapters)
            .args(extra)
            .stdout(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let server = Self { process, url: format!("http://127.0.0.1:{port}") };
        let start = Instant::now();
        while ureq::get(format!("{}/ready", server.url)).call().is_err() {
            assert!(start.elapsed() < Duration::from_secs(300), "not ready after five minutes");
            thread::sleep(Duration::from_millis(100));
        }
        server
    }

    /// Sends JSON and returns the status and the reply.
    pub fn call(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .body(body.to_string())
            .expect("a valid request");
        let agent: ureq::Agent =
            ureq::Agent::config_builder().http_status_as_error(false).allow_non_standard_methods(true).build().into();
        let mut reply = agent.run(request).expect("an HTTP reply");
        let text = reply.body_mut().read_to_string().expect("a body");
        (reply.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Greedy completion of `prompt` with an adapter, or with the base alone.
    pub fn complete(&self, adapter: Option<&str>, prompt: &str, tokens: usize) -> String {
        let mut body = json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0});
        if let Some(adapter) = adapter {
            body["adapter"] = json!(adapter);
        }
        let (status, reply) = self.call("POST", "/v1/completions", body);
        assert_eq!(status, 200, "{reply}");
        reply["choices"][0]["text"].as_str().expect("text").to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A Python that can import `modules`, such as "openai, anthropic": `QUIVER_TEST_PYTHON`, which must have them, or `python3`. If that
/// lacks one, prints that the test is skipped.
pub fn python_with(modules: &str) -> Option<String> {
    let python = std::env::var("QUIVER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_them = Command::new(&python).args(["-c", &format!("import {modules}")]).stderr(Stdio::null()).status();
    if has_them.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    assert!(std::env::var_os("QUIVER_TEST_PYTHON").is_none(), "QUIVER_TEST_PYTHON cannot import {modules}");
    eprintln!("skipped: set QUIVER_TEST_PYTHON to a Python with tests/clients/requirements.txt");
    None
}
