//! The admin routes, vLLM's load and unload, and the keys for them.

use serde_json::json;

use crate::harness::{Answer, BASE, Options, Server, write_adapter};

fn vllm_error(answer: &Answer) -> (u16, String, String) {
    let error = answer.json()["error"].clone();
    assert_eq!(error["code"], json!(answer.status), "{}", answer.text);
    let text = |key: &str| error[key].as_str().expect("a string").to_owned();
    (answer.status, text("type"), text("message"))
}

#[test]
fn the_life_of_an_adapter() {
    let server = Server::start();
    let put = |name: &str, body: serde_json::Value| {
        server.send("PUT", &format!("/admin/adapters/{name}"), &[], body.to_string().as_bytes())
    };
    let loaded = put("new", json!({"source": server.adapter("spare")}));
    assert_eq!(loaded.status, 200, "{}", loaded.text);
    let info = loaded.json();
    assert_eq!((&info["name"], &info["object"], &info["rank"]), (&json!("new"), &json!("adapter"), &json!(2)));
    assert_eq!((&info["pinned"], &info["leases"]), (&json!(false), &json!(0)));
    assert!(info["loaded_at"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(server.complete(json!({"prompt": ".", "adapter": "new", "max_tokens": 1})), "A");

    let names = |answer: Answer| {
        let list = answer.json()["data"].clone();
        list.as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(server.get("/admin/adapters")), ["a", "b", "new"]);
    let replaced = put("new", json!({"source": server.adapter("a"), "pinned": true})).json();
    assert_ne!(replaced["generation"], info["generation"]);
    assert_eq!(replaced["pinned"], true);
    assert_eq!(server.post("/admin/adapters/new/unpin", json!(null)).json()["pinned"], false);
    assert_eq!(server.post("/admin/adapters/new/pin", json!(null)).json()["pinned"], true);
    assert_eq!(server.get("/admin/adapters/new").json()["generation"], replaced["generation"]);
    let deleted = server.send("DELETE", "/admin/adapters/new", &[], b"").json();
    assert_eq!((&deleted["name"], &deleted["generation"]), (&json!("new"), &replaced["generation"]));
    assert!(deleted["freed_bytes"].is_u64() && deleted["pending_bytes"].is_u64());
    assert_eq!(server.get("/admin/adapters/new").error().0, 404);
    assert_eq!(server.post("/v1/completions", json!({"prompt": ".", "adapter": "new"})).error().0, 404);

    for (name, body, status, param) in [
        ("new", json!({}), 400, json!("source")),
        ("new", json!({"source": 1}), 400, json!("source")),
        ("new", json!({"source": "x", "pinnned": true}), 400, json!("pinnned")),
        ("new", json!({"source": server.adapter("nowhere")}), 404, json!("source")),
        ("org%2Fbase", json!({"source": server.adapter("a")}), 400, json!("name")),
        ("a%2Cb", json!({"source": server.adapter("a")}), 400, json!("name")),
    ] {
        let (got, message, got_param, _) = put(name, body.clone()).error();
        assert_eq!((got, got_param), (status, param), "{name} {body}: {message}");
    }
    for (method, path) in [("DELETE", "/admin/adapters/gone"), ("POST", "/admin/adapters/gone/pin")] {
        let (status, _, _, code) = server.send(method, path, &[], b"").error();
        assert_eq!((status, code), (404, json!("adapter_not_found")));
    }
}

#[test]
fn vllm_bodies_and_statuses() {
    let server = Server::start();
    let load = |body: serde_json::Value| server.post("/v1/load_lora_adapter", body);
    let unload = |body: serde_json::Value| server.post("/v1/unload_lora_adapter", body);
    let ok = |answer: Answer| {
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert!(answer.headers["content-type"].starts_with("text/plain"));
        answer.text
    };
    // The Kubernetes LoRA syncer sends a field that vLLM does not know.
    let body = json!({"lora_name": "new", "lora_path": server.adapter("spare"), "base_model_name": "x"});
    assert_eq!(ok(load(body.clone())), "Success: LoRA adapter 'new' added successfully.");
    let (status, kind, message) = vllm_error(&load(body));
    assert_eq!((status, kind.as_str()), (400, "InvalidUserInput"));
    assert!(message.contains("has already been loaded") && message.contains("load_inplace"), "{message}");
    let inplace = json!({"lora_name": "new", "lora_path": server.adapter("a"), "load_inplace": true});
    assert_eq!(ok(load(inplace)), "Success: LoRA adapter 'new' added successfully.");
    assert_eq!(
        ok(unload(json!({"lora_name": "new", "lora_int_id": 3}))),
        "Success: LoRA adapter 'new' removed successfully."
    );
    let (status, kind, message) = vllm_error(&unload(json!({"lora_name": "new"})));
    assert_eq!(
        (status, kind.as_str(), message.as_str()),
        (404, "NotFoundError", "The lora adapter 'new' cannot be found.")
    );
    for body in
        [json!({}), json!({"lora_name": "x"}), json!({"lora_path": "x"}), json!({"lora_name": "", "lora_path": "x"})]
    {
        assert_eq!(vllm_error(&load(body)).0, 400);
    }
    assert_eq!(vllm_error(&unload(json!({}))).0, 400);
    assert_eq!(vllm_error(&load(json!({"lora_name": BASE, "lora_path": server.adapter("a")}))).0, 400);
    let missing = server.adapter("nowhere");
    let (status, kind, message) = vllm_error(&load(json!({"lora_name": "x", "lora_path": missing})));
    assert_eq!((status, kind.as_str()), (404, "NotFoundError"));
    assert!(
        message.starts_with(&format!("Loading lora x failed: No adapter found for {missing} (no adapter in ")),
        "{message}"
    );
}

#[test]
fn the_admin_key() {
    let server =
        Server::with(Options { api_keys: vec!["user".into()], admin_key: Some("boss".into()), ..Options::default() });
    let routes = [
        ("GET", "/admin/adapters"),
        ("GET", "/admin/adapters/a"),
        ("POST", "/admin/adapters/a/pin"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
        ("PUT", "/admin/adapters/a"),
        ("DELETE", "/admin/adapters/a"),
    ];
    for (method, path) in routes {
        assert_eq!(server.send(method, path, &[], b"{}").error().0, 401, "{method} {path}");
        let user = [("authorization", "Bearer user")];
        assert_eq!(server.send(method, path, &user, b"{}").error().0, 401, "{method} {path}");
        let boss = [("authorization", "Bearer boss")];
        assert_ne!(server.send(method, path, &boss, b"{}").status, 401, "{method} {path}");
    }
    // Neither key opens the other routes.
    assert_eq!(server.send("GET", "/v1/models", &[("authorization", "Bearer boss")], b"").status, 401);
}

#[test]
fn without_an_admin_key_only_this_machine() {
    let server = Server::start();
    assert_eq!(server.get("/admin/adapters").status, 200);
    for header in ["x-forwarded-for", "forwarded", "x-real-ip", "origin"] {
        let (status, _, _, code) = server.send("GET", "/admin/adapters", &[(header, "10.0.0.1")], b"").error();
        assert_eq!((status, code), (403, json!("admin_forbidden")), "{header}");
        assert_eq!(server.send("GET", "/v1/models", &[(header, "10.0.0.1")], b"").status, 200, "{header}");
    }
}

/// An adapter that names another base, or changes nothing, is served with a warning wherever it is shown.
#[test]
fn warnings_are_shown() {
    let server = Server::start();
    let path = server.dir.path().join("spare/adapter_config.json");
    let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = json!("org/another");
    config["lora_alpha"] = json!(0);
    std::fs::write(&path, config.to_string()).unwrap();
    let loaded = server.send(
        "PUT",
        "/admin/adapters/odd one",
        &[],
        json!({"source": server.adapter("spare")}).to_string().as_bytes(),
    );
    assert_eq!(loaded.status, 400, "a raw space does not belong in a path");
    let loaded = server.send(
        "PUT",
        "/admin/adapters/odd%20one",
        &[],
        json!({"source": server.adapter("spare")}).to_string().as_bytes(),
    );
    assert_eq!(loaded.status, 200, "{}", loaded.text);
    for shown in
        [loaded.json(), server.get("/admin/adapters/odd%20one").json(), server.get("/v1/models/odd%20one").json()]
    {
        let warnings = shown["warnings"].as_array().expect("a list");
        assert_eq!(warnings.len(), 2, "{shown}");
        assert!(
            warnings[0].as_str().unwrap().contains("\"org/another\"") && warnings[0].as_str().unwrap().contains(BASE)
        );
        assert!(warnings[1].as_str().unwrap().contains("zero"), "{shown}");
    }
    let cards = server.get("/v1/models").json()["data"].clone();
    assert_eq!((&cards[0]["root"], cards[0].get("warnings")), (&json!(BASE), None), "the base's root is no path");
    assert_eq!(cards[1]["warnings"], json!([]));
}

/// vLLM's `lora_filesystem_resolver`: a folder in the adapters directory is served to the request that names it.
#[test]
fn an_adapter_put_into_the_directory_later() {
    let server = Server::with(Options { adapters_dir: true, ..Options::default() });
    assert_eq!(server.get("/admin/adapters/spare").status, 404);
    assert_eq!(server.complete(json!({"prompt": ".", "model": "spare", "max_tokens": 1})), "A");
    write_adapter(&server.dir.path().join("late one"), 0.7);
    assert_eq!(server.complete(json!({"prompt": ".", "adapter": "late one", "max_tokens": 1})), "A");
    assert_eq!(server.get("/admin/adapters/late%20one").json()["rank"], 2);
    write_adapter(&server.dir.path().join("c"), 0.7);
    let sum = json!([{"name": "a"}, {"name": "c", "weight": 0.5}]);
    assert_eq!(server.complete(json!({"prompt": ".", "adapter": sum, "max_tokens": 1})), "0");

    std::fs::create_dir(server.dir.path().join("broken")).unwrap();
    std::fs::write(server.dir.path().join("broken/adapter_config.json"), "{\"peft_type\": \"IA3\"}").unwrap();
    for field in ["model", "adapter"] {
        let (status, message, param, code) =
            server.post("/v1/completions", json!({"prompt": ".", field: "broken"})).error();
        assert_eq!((status, param, code), (400, json!("adapter"), json!("adapter_unsupported")), "{message}");
        assert!(message.contains("\"broken\"") && message.contains("IA3"), "{message}");
    }
    for name in ["../a", "gone", ".", "state/../a"] {
        assert_eq!(server.post("/v1/completions", json!({"prompt": ".", "model": name})).error().0, 404, "{name}");
    }
}
