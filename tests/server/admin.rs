//! The admin routes, vLLM's load and unload, and the keys for them.

use serde_json::json;

use crate::harness::{Answer, BASE, Options, Server};

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
    assert_eq!(message, format!("Loading lora x failed: No adapter found for {missing}"));
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
