//! Batches: requests in files, answered when the engine has room.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::files::change_stored;
use crate::finetune::text;
use crate::harness::{BASE, Options, Server, eventually, merged, read_answer};

const COMPLETIONS: &str = "/v1/completions";

fn line(id: &str, url: &str, body: Value) -> String {
    json!({"custom_id": id, "method": "POST", "url": url, "body": body}).to_string() + "\n"
}

/// Requests `r0`, `r1`, ... for a few letters.
fn lines(count: usize) -> String {
    let body = json!({"model": BASE, "prompt": ".", "max_tokens": 3});
    (0..count).map(|i| line(&format!("r{i}"), COMPLETIONS, body.clone())).collect()
}

impl Server {
    fn batch_file(&self, lines: &str) -> String {
        let file = self.upload("batch", lines);
        assert_eq!(file.status, 200, "{}", file.text);
        text(&file.json()["id"])
    }

    fn batch(&self, endpoint: &str, lines: &str) -> String {
        let body = json!({"input_file_id": self.batch_file(lines), "endpoint": endpoint, "completion_window": "24h"});
        let batch = self.post("/v1/batches", body);
        assert_eq!(batch.status, 200, "{}", batch.text);
        assert_eq!(batch.json()["status"], "validating");
        text(&batch.json()["id"])
    }

    fn batch_at(&self, id: &str) -> Value {
        self.get(&format!("/v1/batches/{id}")).json()
    }

    /// Waits until a batch has a status, and returns the batch.
    fn batch_ends(&self, id: &str, status: &str) -> Value {
        eventually(&format!("{id} is {status}"), || {
            let now = self.batch_at(id);
            let ended = ["completed", "failed", "cancelled", "expired"].contains(&now["status"].as_str().unwrap());
            assert!(now["status"] == status || !ended, "{now}");
            now["status"] == status
        });
        self.batch_at(id)
    }

    /// The lines of a result file by their ids, sorted.
    fn results(&self, file: &Value) -> Vec<(String, Value)> {
        let content = self.get(&format!("/v1/files/{}/content", text(file))).text;
        let mut lines: Vec<(String, Value)> = content
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .map(|line| (text(&line["custom_id"]), line))
            .collect();
        lines.sort_by(|a, b| a.0.cmp(&b.0));
        lines
    }

    fn cancel_batch(&self, id: &str) -> Value {
        self.post(&format!("/v1/batches/{id}/cancel"), json!({})).json()
    }
}

fn with_state(state: &Path) -> Server {
    Server::with(Options { state: Some(state.to_owned()), ..Options::default() })
}

#[test]
fn each_request_is_answered_as_on_its_route() {
    let server = Server::start();
    let body = |model: &str| json!({"model": model, "prompt": ".", "max_tokens": 3});
    let mut streamed = body(BASE);
    streamed["stream"] = true.into();
    let mut misspelt = body(BASE);
    misspelt["max_tokns"] = 3.into();
    let input = [
        ("base", body(BASE)),
        ("adapter", body("a")),
        ("gone", body("x")),
        ("streamed", streamed),
        ("misspelt", misspelt),
    ]
    .map(|(id, body)| line(id, COMPLETIONS, body))
    .concat();
    let file = server.batch_file(&input);
    let created = server.post(
        "/v1/batches",
        json!({
            "input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h", "metadata": {"team": "letters"},
            "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        }),
    );
    let id = text(&created.json()["id"]);
    let done = server.batch_ends(&id, "completed");
    assert_eq!(done["request_counts"], json!({"total": 5, "completed": 2, "failed": 3}), "{done}");
    assert_eq!(
        (&done["object"], &done["endpoint"], &done["input_file_id"], &done["completion_window"], &done["metadata"]),
        (&json!("batch"), &json!(COMPLETIONS), &json!(file), &json!("24h"), &json!({"team": "letters"}))
    );
    for time in ["created_at", "in_progress_at", "finalizing_at", "completed_at", "expires_at"] {
        assert!(done[time].is_u64(), "{time}: {done}");
    }
    for time in ["failed_at", "expired_at", "cancelling_at", "cancelled_at", "errors"] {
        assert!(done[time].is_null(), "{time}: {done}");
    }

    let output = server.results(&done["output_file_id"]);
    let texts: Vec<_> = output
        .iter()
        .map(|(id, line)| (id.as_str(), line["response"]["body"]["choices"][0]["text"].as_str().unwrap()))
        .collect();
    assert_eq!(texts, [("adapter", "ABC"), ("base", "abc")]);
    let first = &output[0].1;
    assert!(text(&first["id"]).starts_with("batch_req_") && first["error"].is_null(), "{first}");
    assert_eq!(first["response"]["status_code"], 200);
    assert!(!text(&first["response"]["request_id"]).is_empty());
    let errors = server.results(&done["error_file_id"]);
    let found: Vec<_> = errors
        .iter()
        .map(|(id, line)| (id.as_str(), &line["response"]["status_code"], &line["response"]["body"]["error"]["param"]))
        .collect();
    let want = [("gone", 404, "model"), ("misspelt", 400, "max_tokns"), ("streamed", 400, "stream")];
    assert_eq!(
        found,
        want.each_ref().map(|(id, s, p)| (*id, json!(s), json!(p))).each_ref().map(|(i, s, p)| (*i, s, p))
    );
    for (file, name) in [("output_file_id", "output"), ("error_file_id", "error")] {
        let file = server.get(&format!("/v1/files/{}", text(&done[file]))).json();
        assert_eq!(
            (&file["purpose"], &file["filename"]),
            (&json!("batch_output"), &json!(format!("{id}_{name}.jsonl")))
        );
        assert_eq!(file["expires_at"].as_u64().unwrap(), file["created_at"].as_u64().unwrap() + 3600);
    }
    assert_eq!(server.cancel_batch(&id)["error"]["code"], "invalid_batch_status");
}

#[test]
fn a_batch_needs_no_key_of_its_own() {
    let server = Server::with(Options { api_keys: vec!["k".into()], ..Options::default() });
    let key = ("authorization", "Bearer k");
    let file = format!(
        "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nbatch\r\n\
         --x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"b\"\r\n\r\n{}\r\n--x--\r\n",
        lines(1)
    );
    let form = ("content-type", "multipart/form-data; boundary=x");
    assert_eq!(server.send("POST", "/v1/files", &[form], file.as_bytes()).status, 401);
    let file = text(&server.send("POST", "/v1/files", &[form, key], file.as_bytes()).json()["id"]);
    let body = json!({"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}).to_string();
    assert_eq!(server.send("POST", "/v1/batches", &[], body.as_bytes()).status, 401);
    let id = text(&server.send("POST", "/v1/batches", &[key], body.as_bytes()).json()["id"]);
    eventually("the batch is completed", || {
        server.send("GET", &format!("/v1/batches/{id}"), &[key], b"").json()["request_counts"]["completed"] == 1
    });
}

#[test]
fn a_faulty_file_fails_the_batch_and_a_faulty_request_is_refused() {
    let server = Server::start();
    let id = server.batch(COMPLETIONS, &(lines(2) + &lines(1) + "{\n" + &line("x", "/v1/embeddings", json!({}))));
    let failed = server.batch_ends(&id, "failed");
    let faults: Vec<_> =
        failed["errors"]["data"].as_array().unwrap().iter().map(|e| (&e["line"], &e["code"], &e["param"])).collect();
    let want =
        json!([[3, "duplicate_custom_id", "custom_id"], [4, "invalid_json_line", null], [5, "invalid_url", "url"]]);
    assert_eq!(json!(faults), want);
    assert!(failed["failed_at"].is_u64() && failed["output_file_id"].is_null() && failed["in_progress_at"].is_null());
    let other = server.file();
    let file = server.batch_file(&lines(1));
    for (fields, param) in [
        (json!({"input_file_id": "file-x"}), "input_file_id"),
        (json!({"input_file_id": other}), "input_file_id"),
        (json!({"endpoint": "/v1/models"}), "endpoint"),
        (json!({"completion_window": "1h"}), "completion_window"),
        (json!({"completion_window": null}), "completion_window"),
        (json!({"metadata": {"a": 1}}), "metadata.a"),
        (json!({"output_expires_after": {"anchor": "created_at", "seconds": 1}}), "output_expires_after.seconds"),
        (json!({"priority": 1}), "priority"),
    ] {
        let body = merged(json!({"input_file_id": file, "endpoint": COMPLETIONS, "completion_window": "24h"}), &fields);
        let (status, message, at, _) = server.post("/v1/batches", body).error();
        assert_eq!((status, at), (400, json!(param)), "{message}");
    }
    assert_eq!(server.get("/v1/batches/x").error().2, "batch_id");
    let list = server.get("/v1/batches?limit=1").json();
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(id), &json!(false)));
    let second = server.batch(COMPLETIONS, &lines(1));
    server.batch_ends(&second, "completed");
    let list = server.get("/v1/batches?limit=1").json();
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(second), &json!(true)));
    let rest = server.get(&format!("/v1/batches?after={second}")).json();
    assert_eq!((&rest["data"][0]["id"], &rest["has_more"]), (&json!(id), &json!(false)));
}

#[test]
fn interactive_requests_come_first() {
    let server = Server::start();
    server.gate.set(true);
    let ask = || {
        let body = json!({"prompt": ".", "max_tokens": 3}).to_string();
        server.begin("POST", COMPLETIONS, &[("content-type", "application/json")], body.as_bytes())
    };
    // Half of the engine's eight places are taken, so no request of the batch may start.
    let asked: Vec<_> = (0..4).map(|_| ask()).collect();
    eventually("they have places", || server.open() == 4);
    let id = server.batch(COMPLETIONS, &lines(20));
    eventually("the batch is in progress", || server.batch_at(&id)["status"] == "in_progress");
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(server.open(), 4);
    let file = text(&server.batch_at(&id)["input_file_id"]);
    let (status, message, _, code) = server.send("DELETE", &format!("/v1/files/{file}"), &[], b"").error();
    assert_eq!((status, code), (409, json!("file_in_use")));
    assert!(message.contains(&id), "{message}");
    server.gate.set(false);
    asked.into_iter().for_each(|stream| assert_eq!(read_answer(stream).status, 200));
    assert_eq!(server.batch_ends(&id, "completed")["request_counts"]["completed"], 20);
    assert_eq!(server.send("DELETE", &format!("/v1/files/{file}"), &[], b"").status, 200);
}

#[test]
fn a_cancelled_batch_keeps_what_was_answered() {
    let server = Server::start();
    server.gate.set(true);
    let id = server.batch(COMPLETIONS, &lines(10));
    eventually("half of the places are taken", || server.open() == 4);
    let cancelling = server.cancel_batch(&id);
    assert!(cancelling["status"] == "cancelling" && cancelling["cancelling_at"].is_u64(), "{cancelling}");
    assert_eq!(server.cancel_batch(&id)["status"], "cancelling");
    server.gate.set(false);
    let cancelled = server.batch_ends(&id, "cancelled");
    assert_eq!(cancelled["request_counts"], json!({"total": 10, "completed": 4, "failed": 6}));
    assert_eq!(server.results(&cancelled["output_file_id"]).len(), 4);
    for (_, line) in server.results(&cancelled["error_file_id"]) {
        assert!(line["response"].is_null() && line["error"]["code"] == "batch_cancelled", "{line}");
    }
    assert_eq!(server.cancel_batch(&id)["status"], "cancelled");
}

/// Path of a result file of a batch that runs.
fn partial_output(state: &Path) -> PathBuf {
    let files = std::fs::read_dir(state.join("files")).unwrap().map(|entry| entry.unwrap().path());
    let holds_results = |path: &PathBuf| std::fs::read_to_string(path).unwrap().contains("batch_req_");
    files.into_iter().find(holds_results).expect("a result file")
}

#[test]
fn a_batch_goes_on_after_a_kill() {
    const COUNT: usize = 300;
    let state = tempfile::tempdir().unwrap();
    let server = with_state(state.path());
    let id = server.batch(COMPLETIONS, &lines(COUNT));
    eventually("some are answered", || server.batch_at(&id)["request_counts"]["completed"].as_u64() > Some(2));
    server.gate.set(true);
    assert_eq!(server.batch_at(&id)["status"], "in_progress");
    drop(server);
    let path = partial_output(state.path());
    let before = std::fs::read_to_string(&path).unwrap();
    assert!(before.lines().count() < COUNT);
    // A kill in the middle of a write leaves half a line.
    std::fs::write(&path, before.clone() + "{\"id\": \"batch_req_1\", \"custom_id\": \"r299").unwrap();

    let server = with_state(state.path());
    let done = server.batch_ends(&id, "completed");
    assert_eq!(done["request_counts"], json!({"total": COUNT, "completed": COUNT, "failed": 0}));
    let output = server.results(&done["output_file_id"]);
    let ids: std::collections::BTreeSet<&str> = output.iter().map(|(id, _)| id.as_str()).collect();
    assert_eq!((output.len(), ids.len()), (COUNT, COUNT), "each request is answered once");
    let after = server.get(&format!("/v1/files/{}/content", text(&done["output_file_id"]))).text;
    assert!(after.starts_with(&before), "what was written is kept");
}

#[test]
fn a_batch_whose_window_ends_expires() {
    let state = tempfile::tempdir().unwrap();
    let server = with_state(state.path());
    server.gate.set(true);
    let id = server.batch(COMPLETIONS, &lines(300));
    eventually("it runs", || server.open() == 4);
    drop(server);
    change_stored(state.path(), &id, "expires_at", 1);
    let server = with_state(state.path());
    let expired = server.batch_ends(&id, "expired");
    let counts = &expired["request_counts"];
    assert_eq!(counts["completed"].as_u64().unwrap() + counts["failed"].as_u64().unwrap(), 300, "{expired}");
    assert!(counts["failed"].as_u64() > Some(1) && expired["expired_at"].is_u64(), "{expired}");
    for (_, line) in server.results(&expired["error_file_id"]) {
        assert_eq!(line["error"]["code"], "batch_expired", "{line}");
    }
}
