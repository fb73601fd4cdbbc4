//! `quiver serve` as a child process.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

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
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
