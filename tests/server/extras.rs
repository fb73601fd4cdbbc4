//! Fields of vLLM's and llama.cpp's APIs that add to a reply or change the prompt.

use serde_json::{Value, json};

use crate::harness::{EOS, Server, merged};

fn ask(server: &Server, path: &str, more: Value) -> Value {
    let prompt = match path.contains("chat") {
        true => json!({"messages": [{"role": "user", "content": "x"}]}),
        false => json!({"prompt": "."}),
    };
    let body = merged(json!({"max_tokens": 2, "temperature": 0}), &prompt);
    let answer = server.post(path, merged(body, &more));
    assert_eq!(answer.status, 200, "{more}: {}", answer.text);
    answer.json()
}

#[test]
fn token_ids_of_prompt_and_output() {
    let server = Server::start();
    let body =
        ask(&server, "/v1/completions", json!({"prompt": ["x", ".."], "max_tokens": 9, "return_token_ids": true}));
    let choices = body["choices"].as_array().unwrap();
    // The end token belongs to the ids.
    assert_eq!(choices[0]["token_ids"], json!([b'y', b'z', EOS]));
    assert_eq!(
        (&choices[0]["prompt_token_ids"], &choices[1]["prompt_token_ids"]),
        (&json!([b'x']), &json!([b'.', b'.']))
    );
    let body = ask(&server, "/v1/chat/completions", json!({"return_token_ids": true}));
    assert_eq!(body["choices"][0]["token_ids"], json!([b'a', b'b']));
    assert!(body["prompt_token_ids"].as_array().unwrap().len() > 10, "the rendered template");

    let streamed = json!({"prompt": "x", "max_tokens": 9, "return_token_ids": true, "stream": true});
    let chunks = server.post("/v1/completions", streamed).events();
    assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], json!([b'x']));
    let ids: Vec<&Value> = chunks.iter().flat_map(|c| c["choices"][0]["token_ids"].as_array().unwrap()).collect();
    assert_eq!(ids, [&json!(b'y'), &json!(b'z'), &json!(EOS)]);
}

#[test]
fn log_probabilities_of_the_prompt() {
    let server = Server::start();
    let body = ask(&server, "/v1/completions", json!({"prompt": "abx", "prompt_logprobs": 1}));
    let rows = body["choices"][0]["prompt_logprobs"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]), (3, &Value::Null));
    let own = &rows[1][b'b'.to_string()];
    assert_eq!((&own["rank"], &own["decoded_token"]), (&json!(1), &json!("b")));
    // The fake model expects `c`: both are listed.
    assert_eq!(rows[2].as_object().unwrap().len(), 2);
    assert_eq!(rows[2][b'c'.to_string()]["rank"], 1);
    assert!(rows[2][b'x'.to_string()]["logprob"].as_f64().unwrap() < -30.0);
    let body = ask(&server, "/v1/chat/completions", json!({"prompt_logprobs": 0}));
    assert_eq!(body["prompt_logprobs"][0], Value::Null);
    assert!(body["prompt_logprobs"].as_array().unwrap().len() > 10);
    let (status, _, param, _) =
        server.post("/v1/completions", json!({"prompt": "a", "prompt_logprobs": 1, "stream": true})).error();
    assert_eq!((status, param), (400, json!("prompt_logprobs")));
}

#[test]
fn names_of_tokens() {
    let server = Server::start();
    let of = |more: Value| ask(&server, "/v1/completions", more)["choices"][0]["logprobs"].clone();
    let ids = of(json!({"logprobs": 1, "return_tokens_as_token_ids": true, "max_tokens": 1}));
    assert_eq!(ids["tokens"], json!(["token_id:97"]));
    assert_eq!(ids["top_logprobs"][0].as_object().unwrap().keys().collect::<Vec<_>>(), ["token_id:97"]);
    // A part of a character is named by its bytes, so no two tokens share a name.
    let parts = of(json!({"prompt": "é", "max_tokens": 0, "echo": true, "logprobs": 5}));
    assert_eq!(parts["tokens"], json!(["bytes:\\xc3", "bytes:\\xa9"]));
    let top = parts["top_logprobs"][1].as_object().unwrap();
    assert_eq!(top["bytes:\\xa9"], parts["token_logprobs"][1]);
    assert!(top.len() >= 5, "{top:?}");
    let chosen = of(json!({"logprobs": 3, "logprob_token_ids": [b'q', b'a'], "max_tokens": 1}));
    assert_eq!(chosen["top_logprobs"][0].as_object().unwrap().keys().collect::<Vec<_>>(), ["q", "a"]);
}

#[test]
fn prompts_are_cut_where_the_request_says() {
    let server = Server::start();
    let first = |more: Value| ask(&server, "/v1/completions", more)["choices"][0]["text"].clone();
    // The fake model continues the last letter of the prompt.
    assert_eq!(first(json!({"prompt": "qax", "truncate_prompt_tokens": 2, "max_tokens": 1})), "y");
    let right = json!({"prompt": "qax", "truncate_prompt_tokens": 2, "truncation_side": "right", "max_tokens": 1});
    assert_eq!(first(right), "b");
    let echo = ask(
        &server,
        "/v1/completions",
        json!({"prompt": "qax", "truncate_prompt_tokens": 1, "echo": true, "max_tokens": 1}),
    );
    assert_eq!((&echo["choices"][0]["text"], &echo["usage"]["prompt_tokens"]), (&json!("xy"), &json!(1)));
    let long = ".".repeat(100_000);
    assert_eq!(first(json!({"prompt": long, "truncate_prompt_tokens": 10, "max_tokens": 1})), "a");
}

#[test]
fn what_identifies_a_reply() {
    let server = Server::start();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let body = ask(&server, path, json!({"request_id": "mine-1", "service_tier": "flex", "seed": u64::MAX}));
        assert!(body["id"].as_str().unwrap().ends_with("-mine-1"), "{body}");
        assert_eq!(body["service_tier"], "default");
        assert!(body["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
        assert_eq!(body["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
        let (status, ..) = server.post(path, json!({"request_id": "a b"})).error();
        assert_eq!(status, 400);
    }
}

#[test]
fn usage_in_every_chunk() {
    let server = Server::start();
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": ".", "max_tokens": 3, "stream": true, "stream_options": options});
    let chunks = server.post("/v1/completions", body).events();
    let counts: Vec<u64> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.windows(2).all(|pair| pair[0] <= pair[1]), "{counts:?}");
    assert_eq!(counts.last(), Some(&3));
    assert!(chunks.iter().all(|chunk| chunk["usage"]["prompt_tokens"] == 1));
    // Without the option, chunks have no usage at all.
    let chunks = server.post("/v1/completions", json!({"prompt": ".", "max_tokens": 2, "stream": true})).events();
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

#[test]
fn a_suffix_needs_tokens_for_it() {
    let server = Server::start();
    let (status, message, param, _) = server.post("/v1/completions", json!({"prompt": "a", "suffix": "z"})).error();
    assert_eq!((status, param), (400, json!("suffix")), "{message}");
}
