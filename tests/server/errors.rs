//! Internal errors: the client gets a fixed sentence with the request id, the log has everything.

use std::io::Write;
use std::sync::{Mutex, OnceLock};

use serde_json::{Value, json};

use crate::harness::{BROKEN, Server, eventually};
use crate::trainer::BREAKS;

/// All log lines of this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn keep_log() {
    static STARTED: OnceLock<()> = OnceLock::new();
    STARTED.get_or_init(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| LogWriter).init());
}

/// The log lines that name `reference`.
fn logged(reference: &str) -> String {
    let log = String::from_utf8_lossy(&LOG.lock().unwrap()).into_owned();
    log.lines().filter(|line| line.contains(reference)).collect::<Vec<_>>().join("\n")
}

/// Checks the message that a client got for an internal error, and that the log has `details` under the same reference.
fn check(message: &Value, reference: &str, details: &[&str]) {
    assert_eq!(*message, json!(format!("internal error; the server's log has the details under {reference}")));
    let id = reference.rsplit(' ').next().unwrap();
    let lines = logged(id);
    details.iter().for_each(|part| assert!(lines.contains(part), "{part} is not in the log under {id}:\n{lines}"));
}

#[test]
fn a_failed_step_is_hidden_from_whole_and_streamed_answers() {
    keep_log();
    let server = Server::start();
    let completion = |stream: bool| ("/v1/completions", json!({"prompt": "?", "stream": stream}));
    let chat = |stream: bool| {
        ("/v1/chat/completions", json!({"messages": [{"role": "user", "content": "?"}], "stream": stream}))
    };
    for (i, (path, body)) in [completion(false), completion(true), chat(false), chat(true)].into_iter().enumerate() {
        let id = format!("failed-step-{i}");
        let answer = server.send("POST", path, &[("x-request-id", &id)], body.to_string().as_bytes());
        let error = match body["stream"] == true {
            false => {
                assert_eq!(answer.status, 500);
                answer.error();
                answer.json()["error"].take()
            }
            true => answer.events().last_mut().expect("an event")["error"].take(),
        };
        assert_eq!((&error["type"], &error["param"]), (&json!("server_error"), &Value::Null));
        check(&error["message"], &format!("request id {id}"), &[BROKEN]);
        assert!(!answer.text.contains(BROKEN), "{}", answer.text);
    }
    // Without an id from the client, the server's own is in the header and in the message.
    let answer = server.post("/v1/completions", json!({"prompt": "?"}));
    let id = &answer.headers["x-request-id"];
    check(&answer.json()["error"]["message"], &format!("request id {id}"), &[BROKEN]);
}

#[test]
fn a_missing_file_is_named_in_the_log_only() {
    keep_log();
    let server = Server::start();
    let file = server.file();
    let path = server.dir.path().join("state/files").join(&file);
    std::fs::remove_file(&path).unwrap();
    let answer = server.send("GET", &format!("/v1/files/{file}/content"), &[("x-request-id", "missing-file")], b"");
    assert_eq!(answer.error().0, 500, "{}", answer.text);
    let message = &answer.json()["error"]["message"];
    check(message, "request id missing-file", &["No such file", path.to_str().unwrap()]);
    assert_eq!(server.send("DELETE", &format!("/v1/files/{file}"), &[], b"").status, 200);
}

#[test]
fn an_internal_error_of_a_job_is_hidden_from_its_record() {
    keep_log();
    let server = Server::start();
    let id = server.job(json!({"seed": BREAKS}))["id"].as_str().unwrap().to_owned();
    let failed = server.wait(&id, "failed");
    assert_eq!(failed["error"]["code"], "training_failed");
    check(&failed["error"]["message"], &format!("job {id}"), &[BROKEN]);
    // The event follows the record.
    let event = format!("The job failed: {}", failed["error"]["message"].as_str().unwrap());
    eventually("the event says the same", || server.messages(&id)[0] == event);
}
