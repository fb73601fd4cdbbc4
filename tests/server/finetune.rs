//! Files and fine-tuning jobs over HTTP, with a fake trainer whose adapters answer in capitals.

use base64::prelude::{BASE64_STANDARD, Engine};
use serde_json::{Value, json};

use crate::harness::{Answer, BASE, Options, Server, eventually, merged, write_adapter};
use crate::trainer::{DIVERGES, LIES, STEPS, VANISHES};

pub const LINES: &str =
    "{\"prompt\": \"What comes first? \", \"completion\": \"A\"}\n{\"prompt\": \"Then? \", \"completion\": \"B\"}\n";

impl Server {
    pub fn upload(&self, purpose: &str, content: &str) -> Answer {
        self.multipart(&format!(
            "--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
             --x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\
             content-type: application/octet-stream\r\n\r\n{content}\r\n--x--\r\n"
        ))
    }

    pub fn multipart(&self, body: &str) -> Answer {
        self.send("POST", "/v1/files", &[("content-type", "multipart/form-data; boundary=x")], body.as_bytes())
    }

    pub fn file(&self) -> String {
        let answer = self.upload("fine-tune", LINES);
        assert_eq!(answer.status, 200, "{}", answer.text);
        text(&answer.json()["id"])
    }

    /// Creates a job on a new file, with more `fields` in the request.
    pub fn job(&self, fields: Value) -> Value {
        let body = merged(json!({"model": BASE, "training_file": self.file()}), &fields);
        let answer = self.post("/v1/fine_tuning/jobs", body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    }

    fn at(&self, job: &str) -> Value {
        self.get(&format!("/v1/fine_tuning/jobs/{job}")).json()
    }

    /// Waits until a job has a status, and returns the job.
    pub fn wait(&self, job: &str, status: &str) -> Value {
        eventually(&format!("{job} is {status}"), || {
            let now = self.at(job);
            let ended = ["succeeded", "failed", "cancelled"].contains(&now["status"].as_str().unwrap());
            assert!(now["status"] == status || !ended, "{now}");
            now["status"] == status
        });
        self.at(job)
    }

    fn act(&self, job: &str, action: &str) -> Answer {
        let json = [("content-type", "application/json")];
        self.send("POST", &format!("/v1/fine_tuning/jobs/{job}/{action}"), &json, b"")
    }

    pub fn messages(&self, job: &str) -> Vec<String> {
        let events = self.get(&format!("/v1/fine_tuning/jobs/{job}/events?limit=100")).json();
        events["data"].as_array().unwrap().iter().map(|event| text(&event["message"])).collect()
    }
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no string: {value}")).to_owned()
}

fn long() -> Value {
    json!({"training": {"max_steps": 100_000}})
}

#[test]
fn a_job_makes_a_model_that_answers() {
    let server = Server::start();
    let validation = server.file();
    let job = server.job(json!({
        "validation_file": validation, "suffix": "capitals", "seed": 7, "metadata": {"team": "letters"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        "lora": {"r": 4, "target_modules": ["v_proj", "q_proj"]}, "training": {"lr": 1e-3, "checkpoint_every": 2},
    }));
    let id = text(&job["id"]);
    assert_eq!(job["object"], "fine_tuning.job");
    assert!(id.starts_with("ftjob-") && ["validating_files", "queued"].contains(&job["status"].as_str().unwrap()));
    assert!(job["fine_tuned_model"].is_null() && job["finished_at"].is_null() && job["error"].is_null(), "{job}");
    let done = server.wait(&id, "succeeded");
    let model = format!("ft:{BASE}:quiver:capitals:{}", &id[6..14]);
    assert_eq!(done["fine_tuned_model"], model);
    assert_eq!(done["trained_tokens"], 10 * STEPS);
    assert_eq!(done["hyperparameters"], json!({"n_epochs": 2, "batch_size": 2, "learning_rate_multiplier": 5.0}));
    assert_eq!(done["method"]["supervised"]["hyperparameters"], done["hyperparameters"]);
    assert_eq!(done["lora"]["target_modules"], json!(["q_proj", "v_proj"]));
    assert_eq!((&done["lora"]["r"], &done["lora"]["alpha"]), (&json!(4), &json!(8.0)));
    assert_eq!((&done["training"]["lr"], &done["seed"]), (&json!(0.001), &json!(7)));
    assert_eq!(done["metadata"], json!({"team": "letters"}));
    assert!(done["finished_at"].as_u64() >= done["created_at"].as_u64());

    assert_eq!(server.complete(json!({"prompt": "..", "max_tokens": 3, "model": model})), "ABC");
    assert_eq!(server.complete(json!({"prompt": "..", "max_tokens": 3, "adapter": model})), "ABC");
    assert_eq!(server.complete(json!({"prompt": "..", "max_tokens": 3, "model": BASE})), "abc");
    assert_eq!(server.get(&format!("/v1/models/{model}")).json()["parent"], BASE);

    let checkpoints = server.get(&format!("/v1/fine_tuning/jobs/{id}/checkpoints")).json();
    let list = checkpoints["data"].as_array().unwrap();
    assert_eq!(list.iter().map(|c| c["step_number"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(list[0]["fine_tuned_model_checkpoint"], format!("{model}:ckpt-step-3"));
    assert_eq!(list[0]["metrics"]["full_valid_loss"], 0.25);
    assert_eq!(list[1]["metrics"]["train_loss"], 0.5);
    assert!(list[1]["metrics"]["valid_loss"].is_null());
    assert_eq!(
        server.complete(json!({"prompt": ".", "max_tokens": 2, "model": list[1]["fine_tuned_model_checkpoint"]})),
        "AB"
    );

    let messages = server.messages(&id);
    let first = ["The job has successfully completed", &format!("New fine-tuned model created: {model}")];
    assert_eq!(messages[..2], first);
    assert_eq!(messages.last().unwrap(), &format!("Created fine-tuning job: {id}"));
    let events = server.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=100")).json();
    let metrics: Vec<&Value> = events["data"].as_array().unwrap().iter().filter(|e| e["type"] == "metrics").collect();
    assert_eq!(metrics.len(), STEPS + 1);
    assert_eq!((&metrics[3]["data"]["step"], &metrics[3]["data"]["train_loss"]), (&json!(1), &json!(1.0)));

    let result = text(&done["result_files"][0]);
    assert_eq!(server.get(&format!("/v1/files/{result}")).json()["purpose"], "fine-tune-results");
    let encoded = server.get(&format!("/v1/files/{result}/content")).text;
    assert_eq!(server.get(&format!("/v1/files/{result}")).json()["bytes"], encoded.len());
    let csv = server.get(&format!("/v1/files/{result}/content?format=csv")).text;
    assert_eq!(BASE64_STANDARD.decode(encoded).unwrap(), csv.as_bytes(), "as OpenAI's examples decode it");
    let rows: Vec<&str> = csv.lines().collect();
    assert!(rows[0].starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"), "{csv}");
    assert!(rows[1].starts_with("1,1,0.5,,,") && rows[3].contains(",0.25,0.75,"), "{csv}");
    assert_eq!(rows.len(), 1 + STEPS);
    let plot = text(&done["result_files"][1]);
    assert_eq!(server.get(&format!("/v1/files/{plot}")).json()["filename"], "loss.svg");
    assert!(server.get(&format!("/v1/files/{plot}/content")).text.starts_with("<svg"));
    for (file, format) in [(&plot, "csv"), (&result, "xml")] {
        let (status, _, param, _) = server.get(&format!("/v1/files/{file}/content?format={format}")).error();
        assert_eq!((status, param), (400, json!("format")));
    }

    // A job can continue from the model, and the model can be deleted.
    let more = server.job(json!({"model": model}));
    assert_eq!(server.wait(&text(&more["id"]), "succeeded")["training"]["from_checkpoint"], model);
    let source = text(&server.get(&format!("/admin/adapters/{}", model.replace('/', "%2F"))).json()["source"]);
    let delete = |model: &str| server.send("DELETE", &format!("/v1/models/{model}"), &[], b"");
    assert_eq!(delete(&model).json(), json!({"id": model, "object": "model", "deleted": true}));
    assert_eq!(server.post("/v1/completions", json!({"model": model, "prompt": "x"})).status, 404);
    assert!(std::path::Path::new(&source).exists(), "the last checkpoint is served under another name too");
    assert_eq!(delete(&format!("{model}:ckpt-step-3")).status, 200);
    assert!(!std::path::Path::new(&source).exists());
    assert_eq!(delete(&model).error().0, 404);
    assert_eq!((delete("a").error().0, delete(BASE).error().0), (403, 403));
}

#[test]
fn an_invalid_field_is_named() {
    let server = Server::start();
    let file = server.file();
    for (mut fields, param, message) in [
        (json!({"model": null}), "model", "is required"),
        (json!({"model": "gone"}), "model", "does not exist"),
        (json!({"training_file": null}), "training_file", "is required"),
        (json!({"training_file": "file-gone"}), "training_file", "there is no file"),
        (json!({"validation_file": "file-gone"}), "validation_file", "there is no file"),
        (json!({"suffix": "a b"}), "suffix", "A-Z"),
        (json!({"suffix": "a".repeat(65)}), "suffix", "64"),
        (json!({"seed": -1}), "seed", "from 0"),
        (json!({"metadata": {"a": 1}}), "metadata.a", "a string"),
        (json!({"integrations": [{"type": "wandb"}]}), "integrations", "not supported"),
        (json!({"trainingfile": file}), "trainingfile", "did you mean `training_file`"),
        (json!({"method": {"type": "dpo"}}), "method.type", "\"supervised\""),
        (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs", "from 1 to 50"),
        (json!({"hyperparameters": {"epochs": 1}}), "hyperparameters.epochs", "n_epochs"),
        (
            json!({"method": {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": "big"}}}}),
            "method.supervised.hyperparameters.batch_size",
            "from 1 to 256",
        ),
        (
            json!({"hyperparameters": {"learning_rate_multiplier": 0}}),
            "hyperparameters.learning_rate_multiplier",
            "above 0",
        ),
        (json!({"lora": {"r": 0}}), "lora.r", "from 1"),
        (json!({"lora": {"lora_alpha": 4}}), "lora.lora_alpha", "alpha"),
        (json!({"lora": {"target_modules": ["lm_head"]}}), "lora.target_modules", "q_proj"),
        (json!({"lora": {"target_modules": ["q_proj", "q_proj"]}}), "lora.target_modules", "once"),
        (json!({"lora": {"init": "pissa"}}), "lora.init", "orthogonal"),
        (json!({"lora": {"adalora": {"init_r": 4}}}), "lora.adalora.target_r", "init_r"),
        (json!({"lora": {"adalora": {}, "use_dora": true}}), "lora.adalora", "use_dora"),
        (json!({"training": {"lr": "fast"}}), "training.lr", "above 0"),
        (json!({"training": {"optim": "sgd"}}), "training.optim", "adamw_8bit"),
        (json!({"training": {"learning_rate": 1}}), "training.learning_rate", "lr"),
        (json!({"training": {"max_length": 1000}}), "training.max_length", "256"),
        (json!({"training": {"warmup_steps": 1, "warmup_ratio": 0.1}}), "training.warmup_ratio", "one of them"),
        (json!({"training": {"from_checkpoint": "a"}, "model": "b"}), "training.from_checkpoint", "two adapters"),
    ] {
        let mut body = json!({"model": BASE, "training_file": file});
        body.as_object_mut().unwrap().append(fields.as_object_mut().unwrap());
        let (status, text, at, _) = server.post("/v1/fine_tuning/jobs", body.clone()).error();
        let want = if message == "does not exist" { 404 } else { 400 };
        assert_eq!((status, at), (want, json!(param)), "{body}: {text}");
        assert!(text.contains(message), "{body}: {text}");
    }
    assert_eq!(server.get("/v1/fine_tuning/jobs").json()["data"], json!([]));
    for (path, param) in [("gone", "fine_tuning_job_id"), ("gone/events", "fine_tuning_job_id")] {
        let (status, _, at, _) = server.get(&format!("/v1/fine_tuning/jobs/{path}")).error();
        assert_eq!((status, at), (404, json!(param)));
    }
    for (query, param) in [("limit=0", "limit"), ("limit=x", "limit"), ("after=gone", "after")] {
        let (status, _, at, _) = server.get(&format!("/v1/fine_tuning/jobs?{query}")).error();
        assert_eq!((status, at), (400, json!(param)));
    }
}

#[test]
fn a_dry_run_shows_the_examples_and_creates_nothing() {
    let server = Server::start();
    let body = json!({"model": BASE, "training_file": server.file(), "dry_run": true, "lora": {"adalora": {}},
                      "training": {"max_length": 20}});
    let run = server.post("/v1/fine_tuning/jobs", body).json();
    assert_eq!(run["object"], "fine_tuning.dry_run");
    let example = &run["examples"][1];
    assert_eq!(example["text"], "Then? ⟦B<|im_end|>⟧");
    assert_eq!(example["token_ids"], json!(b"Then? B".iter().map(|b| u32::from(*b)).chain([257]).collect::<Vec<_>>()));
    assert_eq!(run["hyperparameters"]["n_epochs"], 25, "few examples get many epochs");
    assert_eq!((&run["estimate"]["steps"], &run["lora"]["adalora"]["tinit"]), (&json!(25), &json!(2)));
    assert_eq!(run["statistics"]["examples"], 2);
    assert!(server.get("/v1/fine_tuning/jobs").json()["data"].as_array().unwrap().is_empty());
}

#[test]
fn jobs_wait_for_a_place_and_are_paused_resumed_and_cancelled() {
    let server = Server::start();
    let [first, second, third] = [(); 3].map(|()| text(&server.job(long())["id"]));
    server.wait(&first, "running");
    server.wait(&second, "running");
    server.wait(&third, "queued");
    eventually("an end is estimated", || server.at(&first)["estimated_finish"].is_u64());

    assert_eq!(server.act(&first, "pause").json()["status"], "paused");
    server.wait(&third, "running");
    let (status, message, param, code) = server.act(&first, "pause").error();
    assert_eq!((status, param, code), (400, json!("fine_tuning_job_id"), json!("invalid_job_status")), "{message}");
    assert_eq!(server.act(&first, "resume").json()["status"], "queued");
    let file = text(&server.at(&first)["training_file"]);
    let (status, _, _, code) = server.send("DELETE", &format!("/v1/files/{file}"), &[], b"").error();
    assert_eq!((status, code), (409, json!("file_in_use")));

    assert_eq!(server.act(&second, "cancel").json()["status"], "cancelled");
    server.wait(&first, "running");
    assert!(server.messages(&first).iter().any(|m| m.contains("from step")), "it continues where it was paused");
    for job in [&first, &third] {
        assert_eq!(server.act(job, "cancel").json()["status"], "cancelled");
    }
    assert_eq!(server.act(&first, "resume").error().0, 400);
    assert_eq!(server.act("gone", "cancel").error().0, 404);
    // The cancelled jobs have freed their places.
    server.wait(&text(&server.job(json!({}))["id"]), "succeeded");
}

#[test]
fn a_failed_job_has_an_error_and_the_next_job_runs() {
    let server = Server::start();
    for (seed, code, message) in [
        (DIVERGES, "training_diverged", "NaN"),
        (LIES, "train_serve_mismatch", "differ: by 1.0000 nats"),
        (VANISHES, "training_failed", "the trainer has ended"),
    ] {
        let id = text(&server.job(json!({"seed": seed}))["id"]);
        let failed = server.wait(&id, "failed");
        assert_eq!(failed["error"]["code"], code);
        assert!(text(&failed["error"]["message"]).contains(message), "{failed}");
        assert!(failed["fine_tuned_model"].is_null());
        assert!(server.messages(&id)[0].contains(message));
    }
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"].as_array().unwrap().len(), 3, "no failed checkpoint is served: {models}");
    server.wait(&text(&server.job(json!({}))["id"]), "succeeded");
}

#[test]
fn a_bad_training_file_fails_the_job() {
    let server = Server::start();
    let bad = "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"prompt\": 1}\n";
    let file = text(&server.upload("fine-tune", bad).json()["id"]);
    let good = server.file();
    for (training, validation, param) in [(&file, &good, "training_file"), (&good, &file, "validation_file")] {
        let id = text(&server.job(json!({"training_file": training, "validation_file": validation}))["id"]);
        let error = server.wait(&id, "failed")["error"].take();
        assert_eq!((&error["code"], &error["param"]), (&json!("invalid_training_file"), &json!(param)), "{error}");
        assert!(text(&error["message"]).contains("line 2"), "{error}");
    }
}

#[test]
fn an_adapter_that_went_fails_the_job_without_a_path() {
    let state = tempfile::tempdir().unwrap();
    let start = || Server::with(Options { state: Some(state.path().to_owned()), ..Options::default() });
    let server = start();
    let from = text(&server.wait(&text(&server.job(json!({}))["id"]), "succeeded")["fine_tuned_model"]);
    let source = state.path().join("jobs");
    for job in std::fs::read_dir(source).unwrap() {
        std::fs::remove_dir_all(job.unwrap().path()).unwrap();
    }
    let id = text(&server.job(json!({"model": from}))["id"]);
    let error = server.wait(&id, "failed")["error"].take();
    assert_eq!(error["param"], "training.from_checkpoint", "{error}");
    assert!(text(&error["message"]).contains(&from), "{error}");
    assert!(!error.to_string().contains(state.path().to_str().unwrap()), "{error}");
}

#[test]
fn checkpoints_have_no_permissions() {
    let server = Server::start();
    let path = |id: &str| format!("/v1/fine_tuning/checkpoints/{id}/permissions");
    let list = server.get(&path("a")).json();
    let empty = json!({"object": "list", "first_id": null, "last_id": null, "data": [], "has_more": false});
    assert_eq!(list, empty);
    assert_eq!(server.get(&path("gone")).error().0, 404);
    for (method, path) in [("POST", path("a")), ("DELETE", path("a") + "/cp_1")] {
        let (status, message, _, code) = server.send(method, &path, &[], b"{}").error();
        assert_eq!((status, code), (400, json!("unsupported_route")));
        assert!(message.contains("every key may use every model"), "{message}");
    }
}

#[test]
fn a_restarted_server_continues_every_job() {
    let state = tempfile::tempdir().unwrap();
    let start = || Server::with(Options { state: Some(state.path().to_owned()), ..Options::default() });
    let server = start();
    let done = text(&server.job(json!({"suffix": "kept"}))["id"]);
    let model = text(&server.wait(&done, "succeeded")["fine_tuned_model"]);
    let paused = text(&server.job(long())["id"]);
    server.wait(&paused, "running");
    server.act(&paused, "pause");
    let running = text(&server.job(json!({"training": {"max_steps": 40}}))["id"]);
    eventually("a few steps", || server.at(&running)["trained_tokens"].as_u64() >= Some(50));
    drop(server);

    let server = start();
    assert_eq!(server.complete(json!({"prompt": "..", "max_tokens": 3, "model": model})), "ABC");
    let ended = server.wait(&running, "succeeded");
    assert_eq!(ended["trained_tokens"], 400, "no step is lost or counted twice");
    let csv = server.get(&format!("/v1/files/{}/content?format=csv", text(&ended["result_files"][0]))).text;
    let steps: Vec<usize> = csv.lines().skip(1).map(|row| row.split(',').next().unwrap().parse().unwrap()).collect();
    assert_eq!(steps, (1..=40).collect::<Vec<_>>(), "with the steps before the restart");
    let left = state.path().join("jobs").join(&running).join("state.safetensors");
    eventually("nothing is left to go on with", || !left.exists());
    let messages = server.messages(&running);
    assert!(messages.iter().any(|m| m.contains("restarted")) && messages.iter().any(|m| m.contains("from step")));
    assert_eq!(server.at(&paused)["status"], "paused");
    assert_eq!(server.act(&paused, "cancel").status, 200);
}

#[test]
fn an_unreported_checkpoint_is_compared_before_it_is_served() {
    let state = tempfile::tempdir().unwrap();
    let start = || Server::with(Options { state: Some(state.path().to_owned()), ..Options::default() });
    let server = start();
    let [honest, lying] = [1, LIES].map(|seed| {
        let training = json!({"max_steps": 100_000, "checkpoint_every": 99_999});
        let id = text(&server.job(json!({"seed": seed, "training": training}))["id"]);
        server.wait(&id, "running");
        server.act(&id, "pause");
        id
    });
    drop(server);
    // The files of a process that was killed after it had written a checkpoint.
    for id in [&honest, &lying] {
        let dir = state.path().join("jobs").join(id);
        write_adapter(&dir.join("step-7"), 0.7);
        std::fs::write(dir.join("state.safetensors"), "7").unwrap();
    }

    let server = start();
    let model = |id: &str| format!("ft:{BASE}:quiver::{}:ckpt-step-7", &id[6..14]);
    assert_eq!(server.act(&lying, "resume").status, 200);
    assert_eq!(server.wait(&lying, "failed")["error"]["code"], "train_serve_mismatch");
    assert_eq!(server.post("/v1/completions", json!({"model": model(&lying), "prompt": "x"})).status, 404);
    // The checkpoint is reported at every start, but served and listed once.
    for _ in 0..2 {
        assert_eq!(server.act(&honest, "resume").status, 200);
        server.wait(&honest, "running");
        eventually("a step", || server.messages(&honest)[0].starts_with("Step"));
        assert_eq!(server.act(&honest, "pause").status, 200);
    }
    assert_eq!(server.complete(json!({"model": model(&honest), "prompt": "..", "max_tokens": 3})), "ABC");
    let checkpoints = server.get(&format!("/v1/fine_tuning/jobs/{honest}/checkpoints")).json();
    assert_eq!(checkpoints["data"].as_array().unwrap().len(), 1, "{checkpoints}");
    let made = server.messages(&honest).iter().filter(|m| m.contains("differ by 0.0000 nats")).count();
    assert_eq!(made, 1);
}

#[test]
fn lists_are_paged_and_filtered() {
    let server = Server::start();
    let jobs = ["a", "b", "a"].map(|team| text(&server.job(json!({"metadata": {"team": team}}))["id"]));
    let list = |query: &str| {
        let list = server.get(&format!("/v1/fine_tuning/jobs?{query}")).json();
        let ids: Vec<String> = list["data"].as_array().unwrap().iter().map(|job| text(&job["id"])).collect();
        (ids, list["has_more"] == true)
    };
    assert_eq!(list("limit=2"), (vec![jobs[2].clone(), jobs[1].clone()], true));
    assert_eq!(list(&format!("limit=2&after={}", jobs[1])), (vec![jobs[0].clone()], false));
    assert_eq!(list("metadata%5Bteam%5D=a"), (vec![jobs[2].clone(), jobs[0].clone()], false));
    assert_eq!(list("metadata%5Bteam%5D=c"), (vec![], false));
    server.wait(&jobs[0], "succeeded");
    let events = |query: &str| server.get(&format!("/v1/fine_tuning/jobs/{}/events?{query}", jobs[0])).json();
    let first = events("limit=2");
    assert_eq!(first["has_more"], true);
    let rest = events(&format!("limit=100&after={}", text(&first["last_id"])));
    assert_eq!(rest["has_more"], false);
    assert_eq!(rest["data"].as_array().unwrap().len() + 2, server.messages(&jobs[0]).len());
}

#[test]
fn the_inference_key_grants_access_and_the_metrics_page_shows_jobs() {
    let server = Server::with(Options { api_keys: vec!["k".into()], ..Options::default() });
    for path in ["/v1/files", "/v1/fine_tuning/jobs"] {
        assert_eq!(server.get(path).error().0, 401);
        assert_eq!(server.send("GET", path, &[("authorization", "Bearer k")], b"").status, 200);
    }
    let server = Server::start();
    let id = text(&server.job(json!({}))["id"]);
    server.wait(&id, "succeeded");
    let page = server.get("/metrics").text;
    for line in [
        format!("quiver_train_job_state{{job=\"{id}\",state=\"succeeded\"}} 1"),
        format!("quiver_train_step{{job=\"{id}\"}} {STEPS}"),
        format!("quiver_train_steps{{job=\"{id}\"}} {STEPS}"),
        format!("quiver_train_tokens_per_second{{job=\"{id}\"}} 1000"),
    ] {
        assert!(page.lines().any(|l| l == line), "{line}\n{page}");
    }
    assert!(page.contains(&format!("quiver_train_loss{{job=\"{id}\"}} 0.3333")));
}
