//! The binary with the default model over HTTP, as a user runs it.

#[path = "common/complete.rs"]
mod complete;
#[path = "common/process.rs"]
mod process;
#[path = "common/python.rs"]
mod python;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use process::Server;
use serde_json::{Value, json};

/// Directory of one of the project's adapters.
fn adapter_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("adapters").join(name)
}

const PROMPTS: [&str; 3] = ["The lantern is", "def add(a, b):\n", "KING. What news from the north?"];

#[test]
fn many_clients_with_different_adapters_get_what_one_client_gets() {
    let server = Server::start(&[]);
    let cases: Vec<(Option<&str>, &str)> = [None, Some("qa"), Some("writing"), Some("code")]
        .into_iter()
        .flat_map(|adapter| PROMPTS.into_iter().map(move |prompt| (adapter, prompt)))
        .collect();
    let alone: Vec<String> = cases.iter().map(|(adapter, prompt)| server.complete(*adapter, prompt, 24)).collect();
    assert!(alone[0] != alone[3] && alone[3] != alone[6] && alone[6] != alone[9], "adapters change the answer");
    let mixed: Vec<String> = thread::scope(|scope| {
        let server = &server;
        let clients: Vec<_> =
            cases.iter().map(|&(adapter, prompt)| scope.spawn(move || server.complete(adapter, prompt, 24))).collect();
        clients.into_iter().map(|client| client.join().expect("a client thread")).collect()
    });
    assert_eq!(alone, mixed);
}

#[test]
fn adapters_are_replaced_and_unloaded_while_requests_run() {
    let server = Server::start(&[]);
    let put = |source: &str| {
        let (status, reply) =
            server.call("PUT", "/admin/adapters/tenant", json!({"source": adapter_dir(source).to_str()}));
        assert!(status == 200 || status == 201, "{reply}");
        reply["generation"].as_str().expect("a generation").to_owned()
    };
    let first = put("qa");
    let qa = server.complete(Some("qa"), PROMPTS[0], 16);
    let code = server.complete(Some("code"), PROMPTS[0], 16);
    assert_eq!(server.complete(Some("tenant"), PROMPTS[0], 16), qa);

    // A long stream keeps its generation while another one gets its name.
    let body = json!({"adapter": "tenant", "prompt": PROMPTS[0], "max_tokens": 120, "temperature": 0, "ignore_eos": true, "stream": true});
    let reply = ureq::post(format!("{}/v1/completions", server.url)).send_json(&body).expect("a stream");
    let mut lines = BufReader::new(reply.into_body().into_reader()).lines();
    let mut next = || -> Option<Value> {
        loop {
            let line = lines.next()?.expect("a line");
            if let Some(data) = line.strip_prefix("data: ") {
                return serde_json::from_str(data).ok();
            }
        }
    };
    let opening = next().expect("a first chunk");
    let second = put("code");
    assert_ne!(first, second);
    assert_eq!(server.complete(Some("tenant"), PROMPTS[0], 16), code, "new requests use the new generation");
    let mut text = opening["choices"][0]["text"].as_str().expect("text").to_owned();
    while let Some(chunk) = next() {
        assert_eq!(chunk["adapter_generation"], json!(first));
        text += chunk["choices"][0]["text"].as_str().unwrap_or_default();
    }
    assert!(text.starts_with(&qa), "the stream ended on another generation: {text:?}");

    // Back to the first content: the same generation, and nothing of the second one's KV cache.
    assert_eq!(put("qa"), first);
    assert_eq!(server.complete(Some("tenant"), PROMPTS[0], 16), qa);
    let (status, reply) = server.call("DELETE", "/admin/adapters/tenant", Value::Null);
    assert_eq!(status, 200, "{reply}");
    let (status, reply) = server.call("POST", "/v1/completions", json!({"adapter": "tenant", "prompt": "x"}));
    assert_eq!((status, &reply["error"]["param"]), (404, &json!("adapter")), "{reply}");
}

#[test]
fn a_restart_brings_the_same_adapters_back_and_sigterm_lets_requests_finish() {
    let state = tempfile::tempdir().expect("a temporary directory");
    let flags = ["--state-dir", state.path().to_str().expect("UTF-8")];
    let mut server = Server::start(&flags);
    let (status, loaded) =
        server.call("PUT", "/admin/adapters/tenant", json!({"source": adapter_dir("writing").to_str()}));
    assert!(status == 200 || status == 201, "{loaded}");
    let text = server.complete(Some("tenant"), PROMPTS[2], 16);
    let running = thread::spawn({
        let url = server.url.clone();
        move || {
            let body = json!({"adapter": "tenant", "prompt": PROMPTS[2], "max_tokens": 150, "ignore_eos": true});
            let mut reply =
                ureq::post(format!("{url}/v1/completions")).send_json(&body).expect("served while draining");
            reply.body_mut().read_json::<Value>().expect("JSON")
        }
    });
    thread::sleep(Duration::from_millis(300));
    let pid = server.process.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    let reply = running.join().expect("the client thread");
    assert_eq!(reply["usage"]["completion_tokens"], json!(150), "{reply}");
    assert!(server.process.wait().expect("it ends").success());

    let server = Server::start(&flags);
    let (_, info) = server.call("GET", "/admin/adapters/tenant", Value::Null);
    assert_eq!(info["generation"], loaded["generation"]);
    assert_eq!(server.complete(Some("tenant"), PROMPTS[2], 16), text);
}

#[test]
fn the_openai_python_client_works() {
    let Some(python) = python::python_with("openai") else { return };
    let server = Server::start(&["--api-key", "k"]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py");
    let status = Command::new(python).arg(script).args([&server.url, "qa", "k"]).status().expect("Python runs");
    assert!(status.success());
}
