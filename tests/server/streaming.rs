//! Server-sent events: their shape, stop strings, disconnects, overload.

use std::io::{BufRead, BufReader, Read};
use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use crate::harness::{Options, Server, eventually, merged, read_answer};

fn text_of(chunks: &[Value]) -> String {
    let texts = chunks.iter().flat_map(|c| c["choices"].as_array().expect("choices").clone());
    texts.filter_map(|c| c["text"].as_str().or(c["delta"]["content"].as_str()).map(str::to_owned)).collect()
}

#[test]
fn completion_chunks() {
    let server = Server::start();
    let body = json!({"prompt": ".", "max_tokens": 3, "stream": true, "model": "a"});
    let answer = server.post("/v1/completions", body);
    assert_eq!(answer.headers["cache-control"], "no-cache");
    let chunks = answer.events();
    assert_eq!(text_of(&chunks), "ABC");
    let first = &chunks[0];
    assert_eq!(
        (&first["object"], &first["model"], &first["adapter"]),
        (&json!("text_completion"), &json!("a"), &json!("a"))
    );
    assert_eq!(first["choices"][0], json!({"index": 0, "text": "A", "logprobs": null, "finish_reason": null}));
    assert!(chunks.iter().all(|c| c["id"] == first["id"] && c["adapter_generation"] == first["adapter_generation"]));
    let last = chunks.last().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert!(last.get("usage").is_none());
}

#[test]
fn chat_chunks() {
    let server = Server::start();
    let body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "stream": true, "n": 2,
                      "stream_options": {"include_usage": true}});
    let chunks = server.post("/v1/chat/completions", body).events();
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk"));
    for index in 0..2 {
        let of: Vec<&Value> =
            chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index).collect();
        assert_eq!(of[0]["delta"], json!({"role": "assistant", "content": ""}));
        let text: String = of[1..].iter().filter_map(|c| c["delta"]["content"].as_str()).collect();
        assert_eq!(text, "ab");
        let last = of.last().unwrap();
        assert_eq!((&last["delta"], &last["finish_reason"]), (&json!({}), &json!("length")));
    }
    let (usage, others) = chunks.split_last().unwrap();
    assert_eq!((&usage["choices"], &usage["usage"]["completion_tokens"]), (&json!([]), &json!(4)));
    assert!(others.iter().all(|c| c["usage"].is_null() && c.get("usage").is_some()));
}

#[test]
fn a_stream_adds_up_to_the_whole_answer() {
    let server = Server::start();
    for more in [
        json!({"stop": "def"}),
        json!({"stop": ["efx", "gh"], "logprobs": 1}),
        json!({"echo": true, "logprobs": 1}),
        json!({"prompt": "#", "max_tokens": 7, "logprobs": 0}),
        json!({"prompt": ["#", "."], "n": 2}),
    ] {
        let mut body = merged(json!({"prompt": ".", "max_tokens": 12}), &more);
        let whole = server.post("/v1/completions", body.clone()).json();
        body["stream"] = true.into();
        let chunks = server.post("/v1/completions", body).events();
        for choice in whole["choices"].as_array().unwrap() {
            let of: Vec<&Value> =
                chunks.iter().map(|c| &c["choices"][0]).filter(|c| c["index"] == choice["index"]).collect();
            let text: String = of.iter().map(|c| c["text"].as_str().unwrap()).collect();
            assert_eq!(choice["text"], text, "{more}");
            assert_eq!(of.last().unwrap()["finish_reason"], choice["finish_reason"], "{more}");
            assert_eq!(of.last().unwrap()["stop_reason"], choice["stop_reason"], "{more}");
            for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
                let joined: Vec<Value> =
                    of.iter().filter_map(|c| c["logprobs"][list].as_array()).flatten().cloned().collect();
                let want = choice["logprobs"][list].as_array().cloned().unwrap_or_default();
                assert_eq!(joined, want, "{list} of {more}");
            }
        }
    }
}

#[test]
fn never_half_a_character() {
    let server = Server::start();
    let body = json!({"prompt": "#", "max_tokens": 5, "stream": true});
    let chunks = server.post("/v1/completions", body).events();
    let texts: Vec<&str> = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["é", "é", "\u{FFFD}"]);
}

#[test]
fn nothing_of_a_stop_string_is_sent() {
    let server = Server::start();
    let body = json!({"prompt": ".", "max_tokens": 20, "stream": true, "stop": ["cdz", "efgh"]});
    let chunks = server.post("/v1/completions", body).events();
    let texts: Vec<&str> = chunks.iter().map(|c| c["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a", "b", "cd", ""]);
}

#[test]
fn tokens_come_one_by_one() {
    let server = Server::start();
    server.gate.set(true);
    let body = json!({"prompt": ".", "max_tokens": 3, "stream": true}).to_string();
    let stream = server.begin("POST", "/v1/completions", &[], body.as_bytes());
    let mut lines = BufReader::new(stream).lines();
    // The headers are there before the first token.
    assert_eq!(lines.next().unwrap().unwrap(), "HTTP/1.1 200 OK");
    server.gate.set(false);
    assert!(lines.map_while(Result::ok).any(|line| line == "data: [DONE]"));
}

#[test]
fn a_client_that_leaves_is_cancelled() {
    let server = Server::start();
    for stream in [true, false] {
        // Held at its first step, with far more to come than the test would wait for.
        server.gate.set(true);
        let body = json!({"prompt": ".", "max_tokens": 200, "ignore_eos": true, "stream": stream}).to_string();
        let connection = server.begin("POST", "/v1/completions", &[], body.as_bytes());
        eventually("it runs", || server.gate.holds_a_step());
        drop(connection);
        std::thread::sleep(std::time::Duration::from_millis(50));
        let steps = server.engine.stats().steps.load(Relaxed);
        server.gate.set(false);
        eventually("it is gone", || server.open() == 0);
        assert!(server.engine.stats().steps.load(Relaxed) - steps < 100, "it ran on without a client");
        eventually("it counts as aborted", || {
            let wanted = if stream { 1 } else { 2 };
            server.get("/metrics").text.contains(&format!("finished_reason=\"abort\"}} {wanted}"))
        });
    }
}

#[test]
fn overload_is_429_and_nothing_of_the_request_stays() {
    let server = Server::with(Options { max_running: 1, max_waiting: 2, ..Options::default() });
    server.gate.set(true);
    let body = |n: usize| json!({"prompt": ".", "max_tokens": 2, "n": n}).to_string();
    let begin = |n: usize| server.begin("POST", "/v1/completions", &[], body(n).as_bytes());
    let running = begin(1);
    eventually("one runs", || server.gate.holds_a_step());
    let waiting = begin(1);
    eventually("one waits", || server.open() == 2);
    // One of its two sequences would fit.
    let answer = read_answer(begin(2));
    assert_eq!(answer.error().0, 429);
    assert!(answer.headers["retry-after"].parse::<u32>().unwrap() >= 1);
    server.gate.set(false);
    for stream in [running, waiting] {
        assert_eq!(read_answer(stream).json()["choices"][0]["text"], "ab");
    }
    eventually("the queue is empty", || server.open() == 0);
    assert_eq!(server.complete(json!({"prompt": ".", "max_tokens": 1})), "a");
}

#[test]
fn many_clients_at_once() {
    let server = Server::start();
    std::thread::scope(|scope| {
        for i in 0..24 {
            let server = &server;
            scope.spawn(move || {
                let (adapter, text) =
                    [(Value::Null, "abcde"), (json!("a"), "ABCDE"), (json!("b"), "ABCDE")][i % 3].clone();
                let body = json!({"prompt": ".", "max_tokens": 5, "adapter": adapter, "stream": i % 2 == 0});
                let answer = server.post("/v1/completions", body);
                let got = if i % 2 == 0 { text_of(&answer.events()) } else { text_of(&[answer.json()]) };
                assert_eq!(got, text);
            });
        }
    });
    let mut rest = String::new();
    let _ = server.begin("GET", "/health", &[], b"").read_to_string(&mut rest);
    assert!(rest.starts_with("HTTP/1.1 200"));
}
