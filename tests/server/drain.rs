//! Shutdown: running requests finish, new ones are refused.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;

use crate::harness::{Options, Server, eventually};

#[test]
fn running_requests_finish() {
    let mut server = Server::start();
    server.gate.set(true);
    let body = json!({"prompt": ".", "max_tokens": 20, "stream": true}).to_string();
    let stream = server.begin("POST", "/v1/completions", &[], body.as_bytes());
    eventually("it runs", || server.gate.holds_a_step());
    server.stop();
    eventually("new connections are refused", || TcpStream::connect(server.address).is_err());
    server.gate.set(false);
    let lines: Vec<String> = BufReader::new(stream).lines().map_while(Result::ok).collect();
    assert!(lines.iter().any(|line| line.contains("\"text\":\"t\"")), "{lines:?}");
    assert!(lines.iter().any(|line| line == "data: [DONE]"));
    server.join().expect("a clean end");
}

#[test]
fn the_drain_timeout_ends_the_rest() {
    let mut server = Server::with(Options { drain_timeout: Duration::from_millis(50), ..Options::default() });
    server.gate.set(true);
    let body = json!({"prompt": ".", "max_tokens": 20}).to_string();
    let _stream = server.begin("POST", "/v1/completions", &[], body.as_bytes());
    eventually("it runs", || server.gate.holds_a_step());
    server.stop();
    server.join().expect("a clean end");
}
