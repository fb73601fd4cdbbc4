//! Structured output over HTTP. The fake model's tokens are bytes, and tokens that a mask allows are all alike to it, but for
//! the letter that it wants.

use serde_json::{Value, json};

use crate::harness::{Options, Server, merged};

/// A completion with `more`: its text and finish reason.
fn complete(server: &Server, more: Value) -> (String, String) {
    let body = merged(json!({"prompt": ".", "max_tokens": 60, "temperature": 0}), &more);
    let answer = server.post("/v1/completions", body);
    assert_eq!(answer.status, 200, "{more}: {}", answer.text);
    let choice = &answer.json()["choices"][0];
    let text = |field: &str| choice[field].as_str().unwrap_or_default().to_owned();
    (text("text"), text("finish_reason"))
}

#[test]
fn every_form_of_a_constraint() {
    let server = Server::start();
    let schema = json!({"type": "object", "properties": {"n": {"enum": ["a", "b"]}}, "required": ["n"],
                        "additionalProperties": false});
    let wrapped = json!({"type": "json_schema", "json_schema": {"name": "n", "strict": true, "schema": schema}});
    let compact = json!({"json": schema, "disable_any_whitespace": true});
    let pattern = json!({"json": schema, "whitespace_pattern": " "});
    for (more, text) in [
        (json!({"guided_regex": "[0-9]{3}"}), "000"),
        (json!({"guided_regex": "^(x|yz)$"}), "x"),
        (json!({"structured_outputs": {"regex": "zy?x"}}), "zx"),
        (json!({"guided_choice": ["yes", "no"]}), "no"),
        (json!({"structured_outputs": {"choice": ["abcde", "x\"\\\n"]}}), "abcde"),
        (json!({"guided_grammar": "start: A B\nA: \"x\" | \"y\"\nB: /[b-d]/"}), "xb"),
        (
            json!({"grammar": "root ::= \"(\" root \")\" | [q-s]"}),
            "((((((((((((((((((((((((((((((((((((((((((((((((((((((((((((",
        ),
        (json!({"grammar": "root ::= \"<\" item{2} \">\"\nitem ::= [u-w] | \"x\""}), "<uv>"),
        (json!({"structured_outputs": {"grammar": "root ::= \"k\""}}), "k"),
        (json!({"structured_outputs": compact}), "{\"n\":\"a\"}"),
        (json!({"structured_outputs": pattern}), "{ \"n\" : \"a\" }"),
        (json!({"guided_regex": "", "prompt": "w"}), ""),
    ] {
        assert_eq!(complete(&server, more.clone()).0, text, "{more}");
    }
    for more in [
        json!({"response_format": wrapped}),
        json!({"response_format": {"type": "json_object", "schema": schema}}),
        json!({"guided_json": schema}),
        json!({"guided_json": schema.to_string()}),
        json!({"json_schema": schema}),
        json!({"structured_outputs": {"json": schema}}),
    ] {
        // Greedy on equal logits: the lowest id, a line end and tabs, as often as it may come.
        let (text, reason) = complete(
            &server,
            merged(json!({"max_tokens": 250, "stop": "\"n\"", "include_stop_str_in_output": true}), &more),
        );
        assert_eq!(
            (text.as_str(), reason.as_str()),
            (format!("{{\n{}\"n\"", "\t".repeat(20)).as_str(), "stop"),
            "{more}"
        );
    }
    let (text, _) = complete(&server, json!({"response_format": {"type": "json_object"}, "max_tokens": 2}));
    assert_eq!(text, "{\n");
    // No constraint.
    for more in
        [json!({"structured_outputs": {}}), json!({"grammar": ""}), json!({"response_format": {"type": "text"}})]
    {
        assert_eq!(complete(&server, more).0, "abcdefghijklmnopqrstuvwxyz");
    }
}

#[test]
fn the_end_of_an_output() {
    let server = Server::start();
    for (more, text, reason) in [
        (json!({"guided_regex": "[x-z]+"}), "xyz", "stop"),
        (json!({"guided_regex": "[a-z]+"}), "abcdefghijklmnopqrstuvwxyz", "stop"),
        (json!({"guided_regex": "[b-z]{5}", "max_tokens": 3}), "bcd", "length"),
        (json!({"guided_regex": "[b-z]{3}", "max_tokens": 3}), "bcd", "stop"),
        (json!({"guided_regex": "[b-z]{3}", "min_tokens": 9}), "bcd", "stop"),
        (json!({"guided_regex": "[a-z]+", "stop": "d"}), "abc", "stop"),
    ] {
        let (got, why) = complete(&server, more.clone());
        assert_eq!((got.as_str(), why.as_str()), (text, reason), "{more}");
    }
    // The fake model would end after `z`, and writes any letter while it may not.
    let (got, _) =
        complete(&server, json!({"guided_regex": "[b-z]{1,9}", "min_tokens": 4, "prompt": "w", "max_tokens": 9}));
    assert!(got.starts_with("xyz") && got.len() >= 4, "{got}");
}

#[test]
fn choices_streams_and_logprobs() {
    let server = Server::start();
    let ask = |more: Value| {
        let body = merged(
            json!({"messages": [{"role": "user", "content": "."}], "guided_regex": "[xyz]{8}", "seed": 3,
                              "n": 3, "logprobs": true, "top_logprobs": 4}),
            &more,
        );
        server.post("/v1/chat/completions", body)
    };
    let whole = ask(json!({})).json();
    let choices = whole["choices"].as_array().unwrap();
    let texts: Vec<&str> = choices.iter().map(|c| c["message"]["content"].as_str().unwrap()).collect();
    assert!(texts.iter().all(|text| text.len() == 8 && text.bytes().all(|b| b"xyz".contains(&b))), "{texts:?}");
    assert!(texts[0] != texts[1] || texts[1] != texts[2], "each choice has its own state");
    for token in choices.iter().flat_map(|c| c["logprobs"]["content"].as_array().unwrap()) {
        // The distribution of the allowed tokens: three equal ones, or nearly certain where the model wants one.
        let logprob = token["logprob"].as_f64().unwrap();
        assert!((logprob + 3f64.ln()).abs() < 1e-4 || !(-30.0..=-1e-4).contains(&logprob), "{token}");
        let top = token["top_logprobs"].as_array().unwrap();
        assert_eq!(top.iter().filter(|t| t["logprob"].as_f64() > Some(-9999.0)).count(), 3, "{token}");
    }
    let mut streamed = vec![String::new(); 3];
    for event in ask(json!({"stream": true})).events() {
        for choice in event["choices"].as_array().unwrap() {
            streamed[choice["index"].as_u64().unwrap() as usize] +=
                choice["delta"]["content"].as_str().unwrap_or_default();
        }
    }
    assert_eq!(streamed, texts);
}

#[test]
fn mixed_requests_equal_those_alone() {
    let server = Server::with(Options { max_running: 16, ..Options::default() });
    let cases: Vec<Value> = (0..24)
        .map(|i| {
            let mut body = match i % 4 {
                0 => json!({"guided_regex": format!("[a-z]{{{}}}", 5 + i)}),
                1 => json!({"structured_outputs": {"json": {"type": "array", "items": {"type": "integer"}, "maxItems": 4},
                                                   "disable_any_whitespace": true}}),
                2 => json!({"bad_words": ["ef"], "allowed_token_ids": (97..123).collect::<Vec<_>>()}),
                _ => json!({}),
            };
            body["seed"] = json!(i);
            body["temperature"] = json!(1);
            if i % 3 == 0 {
                body["adapter"] = json!(["a", "b"][i % 2]);
            }
            body
        })
        .collect();
    let alone: Vec<_> = cases.iter().map(|case| complete(&server, case.clone())).collect();
    let mixed: Vec<_> = std::thread::scope(|scope| {
        let server = &server;
        let clients: Vec<_> = cases.iter().map(|case| scope.spawn(move || complete(server, case.clone()))).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(alone, mixed);
    for ((text, _), case) in alone.iter().zip(&cases) {
        match case {
            case if case["structured_outputs"].is_object() => {
                let list: Vec<i64> = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
                assert!(list.len() <= 4);
            }
            case if case["bad_words"].is_array() => {
                assert!(!text.contains("ef") && text.bytes().all(|b| b.is_ascii_lowercase()), "{text}");
            }
            _ => {}
        }
    }
}

#[test]
fn allowed_ids_and_bad_words() {
    let server = Server::start();
    let text = |more: Value| complete(&server, more).0;
    assert_eq!(text(json!({"allowed_token_ids": [98, 99, 100], "max_tokens": 5})), "bcdbc");
    assert_eq!(text(json!({"allowed_token_ids": [97, 99], "guided_regex": "[a-d]{4}"})), "aaaa");
    let without = text(json!({"bad_words": ["de", "x"]}));
    assert!(without.starts_with("abcd") && !without.contains("de") && !without.contains('x'), "{without:?}");
    let (status, message, param, _) =
        server.post("/v1/completions", json!({"prompt": ".", "bad_words": ["q"], "guided_regex": "pq"})).error();
    assert_eq!((status, param), (400, Value::Null), "{message}");
    assert!(message.contains("no token is left"), "{message}");
}

#[test]
fn limits() {
    let server = Server::with(Options { max_body: 4 << 20, ..Options::default() });
    let refuse = |more: Value| {
        let body = merged(json!({"prompt": "."}), &more);
        let answer = server.post("/v1/completions", body);
        assert_eq!(answer.status, 400, "{:.80}: {}", more.to_string(), answer.text);
        let (_, message, param, _) = answer.error();
        (param.as_str().unwrap_or_default().to_owned(), message)
    };
    let nested = |depth: usize| format!("{}a{}", "(".repeat(depth), ")".repeat(depth));
    let chain: String = (0..3000).map(|i| format!("r{i}: r{} \"a\"\n", i + 1)).collect();
    let terminals: String = (0..3000).map(|i| format!("R{i}: R{} \"a\"\n", i + 1)).collect();
    for (field, value, what) in [
        ("guided_regex", json!("a".repeat(70_000)), "65536 bytes"),
        ("guided_json", json!({"enum": ["a".repeat(600_000)]}), "524288 bytes"),
        ("guided_choice", json!(vec!["a"; 5000]), "1 to 4096"),
        ("guided_regex", json!(nested(30_000)), ""),
        ("guided_grammar", json!(format!("start: {}", nested(30_000).replace('a', "\"a\""))), "nested"),
        ("grammar", json!(format!("root ::= {}", nested(30_000).replace('a', "\"a\""))), "nested"),
        // Deep enough to overflow a small stack.
        ("guided_grammar", json!(format!("start: r0\n{chain}")), "r3000"),
        ("guided_grammar", json!(format!("start: R0\n{terminals}")), "R3000"),
    ] {
        let (param, message) = refuse(json!({field: value}));
        assert_eq!(param, field, "{message}");
        // A busy machine may reach the limit on compile time in the long chains, before their last rule.
        let slow = what.ends_with("3000") && message.contains("longer than 10 s");
        let refused = message.contains(what) || slow;
        assert!(refused && message.len() < 2000, "{message}");
    }
    // Automata with exponentially many states, of which only the visited ones are made.
    for hostile in ["((((a{1,99}){1,99}){1,99}){1,99}){1,99}", "(a|b)*a(a|b){5000}", "(.*a){300}", "(a?){900}a{900}"] {
        let answer = server.post("/v1/completions", json!({"prompt": ".", "guided_regex": hostile, "max_tokens": 50}));
        assert!([200, 400].contains(&answer.status), "{hostile}: {}", answer.text);
    }
    assert_eq!(server.complete(json!({"prompt": ".", "max_tokens": 2})), "ab", "the server lives on");
}
