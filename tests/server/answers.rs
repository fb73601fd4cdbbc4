//! Answers of completions, chat completions and models.

use serde_json::{Value, json};

use crate::harness::{BASE, Options, Server, merged};

#[test]
fn completion() {
    let server = Server::start();
    let answer = server.post("/v1/completions", json!({"prompt": ".", "max_tokens": 3}));
    assert_eq!(answer.status, 200);
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    assert_eq!(body["model"], BASE);
    assert!(body["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    assert_eq!(body["adapter"], Value::Null);
    assert_eq!(
        body["choices"],
        json!([{"index": 0, "text": "abc", "logprobs": null, "finish_reason": "length", "stop_reason": null}])
    );
    let usage = &body["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"], &usage["total_tokens"]),
        (&json!(1), &json!(3), &json!(4))
    );
    // OpenAI's default of 16, and the model's own end.
    assert_eq!(server.complete(json!({"prompt": "."})), "abcdefghijklmnop");
    let end = server.post("/v1/completions", json!({"prompt": "w", "max_tokens": 9})).json();
    assert_eq!((&end["choices"][0]["text"], &end["choices"][0]["finish_reason"]), (&json!("xyz"), &json!("stop")));
    assert_eq!(end["choices"][0]["stop_reason"], Value::Null);
    // The end token counts.
    assert_eq!(end["usage"]["completion_tokens"], 4);
}

#[test]
fn prompts_in_every_form() {
    let server = Server::start();
    let texts = |prompt: Value, n: usize| {
        let body = server.post("/v1/completions", json!({"prompt": prompt, "max_tokens": 1, "n": n})).json();
        let choices = body["choices"].as_array().unwrap_or_else(|| panic!("{body}")).clone();
        assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i));
        (choices.iter().map(|c| c["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>(), body["usage"].clone())
    };
    assert_eq!(texts(json!("a"), 1).0, ["b"]);
    assert_eq!(texts(json!(["a", "b"]), 1).0, ["b", "c"]);
    assert_eq!(texts(json!([97, 98]), 1).0, ["c"]);
    assert_eq!(texts(json!([[97], [98, 99]]), 1).0, ["b", "d"]);
    let (choices, usage) = texts(json!(["a", "bc"]), 2);
    assert_eq!(choices, ["b", "b", "d", "d"]);
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(3), &json!(4)));
}

#[test]
fn every_way_to_select_an_adapter() {
    let server = Server::start();
    let ask = |selector: Value| {
        let body = merged(json!({"prompt": ".", "max_tokens": 2}), &selector);
        let answer = server.post("/v1/completions", body).json();
        (answer["choices"][0]["text"].as_str().unwrap_or_default().to_owned(), answer)
    };
    for selector in [json!({"adapter": "a"}), json!({"model": "a"}), json!({"model": "org/base:a"})] {
        let (text, answer) = ask(selector);
        assert_eq!((text.as_str(), &answer["adapter"]), ("AB", &json!("a")));
        assert_eq!(answer["adapter_generation"].as_str().map(str::len), Some(16));
    }
    let (text, answer) = ask(json!({"adapter": [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]}));
    assert_eq!(text, "01");
    assert_eq!(answer["adapter"], json!([{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]));
    assert_eq!(answer["adapter_generation"].as_array().map(Vec::len), Some(2));
    for (selector, status, code) in [
        (json!({"adapter": "gone"}), 404, "adapter_not_found"),
        (json!({"adapter": [{"name": "a"}, {"name": "gone"}]}), 404, "adapter_not_found"),
        (json!({"model": "gone"}), 404, "model_not_found"),
        (json!({"model": "org/base:gone"}), 404, "adapter_not_found"),
        (json!({"model": "a", "adapter": "b"}), 400, "adapter_conflict"),
    ] {
        let body = merged(json!({"prompt": "."}), &selector);
        let (got, _, _, got_code) = server.post("/v1/completions", body).error();
        assert_eq!((got, &got_code), (status, &json!(code)), "{selector}");
    }
}

#[test]
fn chat() {
    let server = Server::start();
    let ask = |body: Value| {
        let answer = server.post("/v1/chat/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    };
    let body = ask(json!({"messages": [{"role": "user", "content": "hi"}], "model": "a"}));
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    // Without `max_tokens` it goes on to the end.
    assert_eq!(body["choices"][0]["message"]["content"], "ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let parts = json!([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]);
    let split = ask(json!({"messages": [{"role": "developer", "content": parts}], "max_completion_tokens": 2}));
    assert_eq!(split["choices"][0]["message"]["content"], "ab");
    let whole = ask(json!({"messages": [{"role": "system", "content": "h\ni"}], "max_tokens": 2}));
    assert_eq!(split["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
}

#[test]
fn logprobs() {
    let server = Server::start();
    let body = server.post("/v1/completions", json!({"prompt": ".", "max_tokens": 2, "logprobs": 2})).json();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b"]));
    assert_eq!(logprobs["text_offset"], json!([0, 1]));
    assert!(logprobs["token_logprobs"][0].as_f64().unwrap() > -0.001);
    assert_eq!(logprobs["top_logprobs"][1].as_object().map(|o| o.len()), Some(2));
    assert!(logprobs["top_logprobs"][1]["b"].is_number());

    // As evaluation harnesses score a text.
    for prompt in [json!("abx"), json!([97, 98, 120])] {
        let scored = json!({"prompt": prompt, "max_tokens": 0, "echo": true, "logprobs": 1});
        let body = server.post("/v1/completions", scored).json();
        let choice = &body["choices"][0];
        assert_eq!(choice["text"], "abx");
        assert_eq!(choice["logprobs"]["tokens"], json!(["a", "b", "x"]));
        assert_eq!(choice["logprobs"]["text_offset"], json!([0, 1, 2]));
        let token_logprobs = &choice["logprobs"]["token_logprobs"];
        assert_eq!(token_logprobs[0], Value::Null);
        assert_eq!(choice["logprobs"]["top_logprobs"][0], Value::Null);
        // The fake model writes `b` after `a`, and never `x` after `b`. The entry of `x` follows the likelier `c`.
        assert!(token_logprobs[1].as_f64().unwrap() > -0.001 && token_logprobs[2].as_f64().unwrap() < -30.0);
        let top = choice["logprobs"]["top_logprobs"][2].as_object().unwrap();
        assert_eq!(top.keys().collect::<Vec<_>>(), ["c", "x"]);
        assert_eq!(body["usage"]["completion_tokens"], 0);
    }
    let echo = json!({"prompt": "é.", "max_tokens": 2, "echo": true, "logprobs": 0});
    let choice = server.post("/v1/completions", echo).json()["choices"][0].clone();
    assert_eq!(choice["text"], "é.ab");
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 0, 1, 2, 3]));

    let ask =
        json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": true, "top_logprobs": 2});
    let content = server.post("/v1/chat/completions", ask).json()["choices"][0]["logprobs"]["content"].clone();
    assert_eq!((&content[0]["token"], &content[0]["bytes"]), (&json!("a"), &json!([97])));
    assert_eq!(content[0]["top_logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(content[0]["top_logprobs"][0]["token"], "a");
}

#[test]
fn best_of_answers_the_best() {
    let server = Server::start();
    let body = json!({"prompt": [".", "!"], "max_tokens": 2, "n": 1, "best_of": 3});
    let body = server.post("/v1/completions", body).json();
    assert_eq!(body["choices"].as_array().map(Vec::len), Some(2));
    assert_eq!(body["usage"]["completion_tokens"], 12);
    assert_eq!(body["choices"][1]["logprobs"], Value::Null);
}

#[test]
fn stops() {
    let server = Server::start();
    let ask = |more: Value| {
        let body = merged(json!({"prompt": ".", "max_tokens": 20}), &more);
        let choice = server.post("/v1/completions", body).json()["choices"][0].clone();
        (
            choice["text"].as_str().unwrap().to_owned(),
            choice["finish_reason"].as_str().unwrap().to_owned(),
            choice["stop_reason"].clone(),
        )
    };
    let stop = |text: &str, reason: Value| (text.to_owned(), "stop".to_owned(), reason);
    assert_eq!(ask(json!({"stop": "def"})), stop("abc", json!("def")));
    assert_eq!(ask(json!({"stop": ["zz", "fg", "de"]})), stop("abc", json!("de")));
    assert_eq!(ask(json!({"stop": "def", "include_stop_str_in_output": true})), stop("abcdef", json!("def")));
    assert_eq!(ask(json!({"stop_token_ids": [100]})), stop("abc", json!(100)));
    assert_eq!(
        ask(json!({"stop": "cd", "min_tokens": 6, "max_tokens": 7})),
        ("abcdefg".into(), "length".into(), Value::Null)
    );
    assert_eq!(ask(json!({"stop": "no", "max_tokens": 14})), ("abcdefghijklmn".into(), "length".into(), Value::Null));
    assert_eq!(
        ask(json!({"prompt": "w", "ignore_eos": true, "max_tokens": 5, "skip_special_tokens": false})).0,
        "xyz<|im_end|>a"
    );
}

#[test]
fn models() {
    let server = Server::start();
    let list = server.get("/v1/models").json();
    let ids: Vec<&str> = list["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, [BASE, "a", "b"]);
    assert_eq!(list["data"][0]["parent"], Value::Null);
    assert_eq!(list["data"][1]["parent"], BASE);
    assert!(list["data"][1]["root"].as_str().unwrap().ends_with("/a"));
    assert_eq!(list["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/org/base").json()["id"], BASE);
    assert_eq!(server.get("/v1/models/b").json()["id"], "b");
    assert_eq!(server.get("/v1/models/gone").error().0, 404);
    let llama = server.get("/lora-adapters").json();
    assert_eq!((&llama[1]["id"], &llama[1]["task_name"], &llama[1]["scale"]), (&json!(1), &json!("b"), &json!(0.0)));
}

#[test]
fn context_length() {
    let server = Server::with(Options { max_model_len: 32, ..Options::default() });
    let long = "a".repeat(32);
    for (body, param) in [
        (json!({"prompt": long}), "prompt"),
        (json!({"prompt": &long[..20], "max_tokens": 13}), "max_tokens"),
        (json!({"prompt": ".", "max_tokens": i64::MAX}), "max_tokens"),
    ] {
        let (status, message, got, code) = server.post("/v1/completions", body).error();
        assert_eq!((status, got, code), (400, json!(param), json!("context_length_exceeded")));
        // LiteLLM looks for these words.
        let words = "This model's maximum context length is 32 tokens. However, you requested ";
        assert!(message.starts_with(words), "{message}");
    }
    // The default shrinks to what is left.
    assert_eq!(server.complete(json!({"prompt": &long[..30]})).len(), 2);
    assert_eq!(server.complete(json!({"prompt": &long[..20], "max_tokens": 12})).len(), 12);
    let scored = json!({"prompt": long, "max_tokens": 0, "echo": true, "logprobs": 1});
    assert_eq!(server.complete(scored).len(), 32);
}

#[test]
fn health_version_and_request_ids() {
    let mut server = Server::with(Options { loaded: false, ..Options::default() });
    assert_eq!(server.get("/live").status, 200);
    assert_eq!(server.get("/metrics").status, 200);
    let completion = server.post("/v1/completions", json!({"prompt": "."}));
    for answer in [server.get("/health"), server.get("/ready"), completion, server.get("/v1/models")] {
        let (status, _, _, code) = answer.error();
        assert_eq!((status, code), (503, json!("model_loading")));
        assert!(answer.headers.contains_key("retry-after"));
    }
    server.finish_loading();
    for path in ["/live", "/health", "/ready"] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
    assert_eq!(server.get("/version").json()["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(server.get("/health").headers["x-request-id"].len(), 36);
    let given = server.send("GET", "/nowhere", &[("x-request-id", "mine")], b"");
    assert_eq!(given.headers["x-request-id"], "mine");
}
