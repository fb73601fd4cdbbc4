//! From examples to a served adapter, with the binary and the default model: through the API, with the `openai` client, across
//! a kill, and from the command line.

#[path = "common/complete.rs"]
mod complete;
#[path = "common/process.rs"]
mod process;
#[path = "common/python.rs"]
mod python;

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use process::Server;
use serde_json::{Value, json};

/// Examples with answers that the base does not give, so that a few steps change the loss.
fn examples() -> String {
    let lines = (0..8).map(|i| {
        let prompt = format!("Q: What is the code word{}?\nA:", ["", " today", " now", " again"][i % 4]);
        json!({"prompt": prompt, "completion": " purple elephants"}).to_string() + "\n"
    });
    lines.collect()
}

fn upload(server: &Server) -> String {
    let content = examples();
    let body = format!(
        "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n\
         --x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\r\n{content}\r\n--x--\r\n"
    );
    let reply = ureq::post(format!("{}/v1/files", server.url))
        .header("content-type", "multipart/form-data; boundary=x")
        .send(body)
        .expect("accepted")
        .body_mut()
        .read_json::<Value>()
        .expect("JSON");
    reply["id"].as_str().expect("an id").to_owned()
}

/// Waits until `holds` is true of the job, and returns the job.
fn wait(server: &Server, job: &str, holds: impl Fn(&Value) -> bool) -> Value {
    let start = Instant::now();
    loop {
        let (_, now) = server.call("GET", &format!("/v1/fine_tuning/jobs/{job}"), Value::Null);
        if holds(&now) {
            return now;
        }
        assert!(now["status"] != "failed" && start.elapsed() < Duration::from_secs(120), "{now}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_openai_python_client_fine_tunes() {
    let Some(python) = python::python_with("openai") else { return };
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("train.jsonl");
    std::fs::write(&file, examples()).expect("written");
    let server = Server::start(&[]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/finetune_client.py");
    let status = Command::new(python).arg(script).arg(&server.url).arg(&file).status().expect("Python runs");
    assert!(status.success());
}

#[test]
fn a_job_survives_a_kill_while_the_server_answers() {
    let state = tempfile::tempdir().expect("a temporary directory");
    let flags = ["--state-dir", state.path().to_str().expect("UTF-8")];
    let server = Server::start(&flags);
    let alone = server.complete(Some("qa"), "The lantern is", 24);
    let body = json!({
        "model": "smollm2-135m-instruct", "training_file": upload(&server), "lora": {"r": 4},
        "training": {"max_steps": 12, "checkpoint_every": 2},
    });
    let (status, job) = server.call("POST", "/v1/fine_tuning/jobs", body);
    assert_eq!(status, 200, "{job}");
    let id = job["id"].as_str().expect("an id");
    wait(&server, id, |job| job["trained_tokens"].as_u64() > Some(0));
    assert_eq!(server.complete(Some("qa"), "The lantern is", 24), alone, "training changes no answer");
    let checkpoints = |server: &Server| {
        server.call("GET", &format!("/v1/fine_tuning/jobs/{id}/checkpoints?limit=100"), Value::Null).1["data"].clone()
    };
    while checkpoints(&server).as_array().is_none_or(Vec::is_empty) {
        thread::sleep(Duration::from_millis(20));
    }
    // Kills the server, without a shutdown.
    drop(server);

    let server = Server::start(&flags);
    let done = wait(&server, id, |job| job["status"] == "succeeded");
    let steps: Vec<Value> =
        checkpoints(&server).as_array().expect("a list").iter().map(|c| c["step_number"].clone()).collect();
    assert_eq!(steps, [12, 10, 8, 6, 4, 2].map(|n| json!(n)));
    let model = done["fine_tuned_model"].as_str().expect("a model");
    let text = server.complete(Some(model), "Q: What is the code word?\nA:", 4);
    assert_ne!(text, server.complete(None, "Q: What is the code word?\nA:", 4));
}

#[test]
fn a_killed_quiver_train_resumes_with_its_metrics() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (file, out) = (dir.path().join("train.jsonl"), dir.path().join("adapter"));
    std::fs::write(&file, examples()).expect("written");
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quiver"));
        command.arg("train").arg("--file").arg(&file).arg("--validation-file").arg(&file).arg("--out").arg(&out);
        command.args(["--r", "4", "--max-steps", "12", "--checkpoint-every", "3", "--eval-every", "1"]);
        command
    };
    let mut killed = command().stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary runs");
    let start = Instant::now();
    // The state to resume from is written after the checkpoint.
    while !out.join("checkpoints/state.safetensors").exists() {
        assert!(start.elapsed() < Duration::from_secs(120), "no checkpoint");
        thread::sleep(Duration::from_millis(5));
    }
    killed.kill().and_then(|()| killed.wait()).expect("killed");
    assert!(!out.join("training_metrics.csv").exists(), "it was killed before its end");

    let output = command().arg("--resume").output().expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("12 steps") && !text.contains(", 0 done"), "{text}");
    let csv = std::fs::read_to_string(out.join("training_metrics.csv")).expect("metrics");
    let rows: Vec<Vec<&str>> = csv.lines().skip(1).map(|row| row.split(',').collect()).collect();
    assert_eq!(rows.iter().map(|row| row[0].parse().unwrap()).collect::<Vec<usize>>(), (1..=12).collect::<Vec<_>>());
    assert!(rows.iter().all(|row| row[3].parse::<f64>().is_ok()), "a held-out loss each: {csv}");
    assert!(text.contains("| 1 |") && text.contains("| 12 |"), "{text}");
    assert!(!out.join("checkpoints/state.safetensors").exists(), "the state to resume from is removed");
}

#[test]
fn quiver_train_writes_an_adapter_that_is_served() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (file, out) = (dir.path().join("train.jsonl"), dir.path().join("adapter"));
    std::fs::write(&file, examples()).expect("written");
    let train = |extra: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quiver"));
        let output = command.arg("train").arg("--file").arg(&file).arg("--out").arg(&out).args(extra).output();
        let output = output.expect("the binary runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (ok, text) = train(&["--dry-run", "--adalora", "init_r=4,target_r=3"]);
    assert!(ok && text.contains("\"init_r\":4"), "{text}");
    assert!(text.contains("A:⟦ purple elephants<|im_end|>⟧") && !out.exists(), "{text}");
    let (ok, text) = train(&["--r", "0"]);
    assert!(!ok && text.contains("`lora.r` must be an integer from 1"), "{text}");
    let (ok, text) = train(&["--r", "4", "--max-steps", "6", "--lr", "5e-3"]);
    assert!(ok && text.contains("| 6 |"), "{text}");
    let server = Server::start(&["--adapter", &format!("made={}", out.display())]);
    let prompt = "Q: What is the code word?\nA:";
    assert_ne!(server.complete(Some("made"), prompt, 4), server.complete(None, prompt, 4));
    let (ok, text) = train(&["--max-steps", "4"]);
    assert!(!ok && text.contains("--resume"), "existing checkpoints are not overwritten: {text}");
}
