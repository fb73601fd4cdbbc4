//! Structured output of the real model over HTTP: every reply parses and validates.

#[path = "common/process.rs"]
mod process;

use std::io::{BufRead, BufReader};
use std::thread;

use process::Server;
use serde_json::{Map, Value, json};

/// A chat request with `more`; the reply.
fn chat(server: &Server, prompt: &str, more: &Value) -> Value {
    let mut body =
        json!({"messages": [{"role": "user", "content": prompt}], "max_tokens": 400, "temperature": 0.7, "seed": 5});
    merge(&mut body, more);
    let (status, reply) = server.call("POST", "/v1/chat/completions", body);
    assert_eq!(status, 200, "{more}: {reply}");
    reply
}

fn merge(body: &mut Value, more: &Value) {
    let more: Map<String, Value> = more.as_object().expect("an object").clone();
    body.as_object_mut().expect("an object").extend(more);
}

fn texts(reply: &Value) -> Vec<String> {
    let choices = reply["choices"].as_array().expect("choices");
    let text = |choice: &Value| choice["message"]["content"].as_str().expect("a text").to_owned();
    for choice in choices {
        assert_eq!(choice["finish_reason"], "stop", "{reply}");
    }
    choices.iter().map(text).collect()
}

fn validate(schema: &Value, text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let validator = jsonschema::validator_for(schema).expect("a valid schema");
    let faults: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
    assert!(faults.is_empty(), "{text} against {schema}: {faults:?}");
}

fn object(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().expect("an object").keys().collect();
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

/// Prompts with schemas of every common kind. Strings are bounded, so that the small model comes to an end.
fn schemas() -> Vec<(&'static str, Value)> {
    let short = json!({"type": "string", "maxLength": 20});
    let tree = json!({
        "$defs": {"node": {
            "type": "object",
            "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9},
                           "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/leaf"}}},
            "required": ["value", "children"], "additionalProperties": false,
        }, "leaf": object(json!({"value": {"type": "boolean"}}))},
        "$ref": "#/$defs/node",
    });
    vec![
        (
            "Describe a city.",
            object(json!({
                "name": short,
                "place": object(json!({"country": short, "position": object(json!({
                    "north": {"type": "number", "minimum": -90, "maximum": 90},
                    "east": {"type": "number", "exclusiveMinimum": -180, "exclusiveMaximum": 180}}))})),
            })),
        ),
        (
            "List three fruits.",
            object(json!({
                "fruits": {"type": "array", "items": short, "minItems": 3, "maxItems": 3},
                "counts": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 20}, "minItems": 1, "maxItems": 4},
            })),
        ),
        (
            "What is the weather?",
            object(json!({
                "sky": {"enum": ["clear", "cloudy", null, 3]}, "kind": {"const": "weather"}, "rain": {"type": "boolean"},
            })),
        ),
        (
            "Invent a person.",
            object(json!({
                "email": {"type": "string", "pattern": "^[a-z]{2,8}@[a-z]{2,8}\\.(com|org)$"},
                "born": {"type": "string", "format": "date"},
                "code": {"type": "string", "minLength": 2, "maxLength": 4},
            })),
        ),
        (
            "Pay by card or by cheque?",
            object(json!({
                "payment": {"anyOf": [object(json!({"card": {"type": "string", "pattern": "^[0-9]{4}$"}})),
                                      object(json!({"cheque": {"type": "integer"}})), {"type": "null"}]},
                "note": {"type": ["string", "null"], "maxLength": 10},
            })),
        ),
        ("Draw a tree.", tree),
    ]
}

#[test]
fn every_reply_validates() {
    let server = Server::start(&[]);
    for (prompt, schema) in schemas() {
        let format = json!({"type": "json_schema", "json_schema": {"name": "reply", "strict": true, "schema": schema}});
        for (i, adapter) in [json!(null), json!("qa"), json!("writing")].into_iter().enumerate() {
            let more = json!({"response_format": format, "adapter": adapter, "n": 3, "seed": i});
            texts(&chat(&server, prompt, &more)).iter().for_each(|text| validate(&schema, text));
        }
        let greedy =
            json!({"structured_outputs": {"json": schema}, "temperature": 0, "logprobs": true, "top_logprobs": 2});
        let reply = chat(&server, prompt, &greedy);
        texts(&reply).iter().for_each(|text| validate(&schema, text));
        let tokens = reply["choices"][0]["logprobs"]["content"].as_array().expect("log-probabilities");
        assert_eq!(tokens.len() as u64, reply["usage"]["completion_tokens"].as_u64().expect("a count"));
        // Greedy: each token is the most likely one of those that the schema allows.
        assert!(tokens.iter().all(|t| t["logprob"] == t["top_logprobs"][0]["logprob"]), "{reply}");
    }
    let reply =
        chat(&server, "Say anything in JSON.", &json!({"response_format": {"type": "json_object"}, "max_tokens": 40}));
    assert!(reply["choices"][0]["message"]["content"].as_str().expect("a text").starts_with('{'));
}

#[test]
fn mixed_batches_equal_requests_alone_and_streams_equal_whole_replies() {
    let server = Server::start(&[]);
    let expression = "root ::= sum\nsum ::= term ([+*] term){1,3}\nterm ::= [1-9] [0-9]? | \"(\" sum \")\"";
    let constraints = [
        json!({"guided_regex": "(Yes|No), because [a-z ]{5,30}\\."}),
        json!({"guided_choice": ["red", "green", "dark blue"]}),
        json!({"guided_grammar": expression, "temperature": 0}),
        json!({"guided_json": schemas()[0].1}),
        json!({"max_tokens": 20, "temperature": 0}),
        json!({"max_tokens": 20, "bad_words": ["the", "is"]}),
    ];
    let cases: Vec<Value> = (0..18)
        .map(|i| {
            let mut case = constraints[i % 6].clone();
            case["seed"] = json!(i);
            case["max_tokens"] = json!(case["max_tokens"].as_u64().unwrap_or(200));
            case["adapter"] = [json!(null), json!("qa"), json!("code")][i / 6].clone();
            case
        })
        .collect();
    let text = |case: &Value| {
        let reply = chat(&server, "What colour is the sky?", case);
        reply["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
    };
    let alone: Vec<String> = cases.iter().map(text).collect();
    let mixed: Vec<String> = thread::scope(|scope| {
        let clients: Vec<_> = cases.iter().map(|case| scope.spawn(|| text(case))).collect();
        clients.into_iter().map(|client| client.join().expect("a client thread")).collect()
    });
    assert_eq!(alone, mixed);
    let sentence = regex("^(Yes|No), because [a-z ]{5,30}\\.$");
    for (case, text) in cases.iter().zip(&alone) {
        if case["guided_regex"].is_string() {
            assert!(sentence.is_match(text).expect("a match"), "{text}");
        } else if let Some(choices) = case["guided_choice"].as_array() {
            assert!(choices.contains(&json!(text)), "{text}");
        } else if case["guided_json"].is_object() {
            validate(&case["guided_json"], text);
        } else if case["guided_grammar"].is_string() {
            assert!(text.bytes().all(|b| b"0123456789+*()".contains(&b)), "{text}");
        } else if case["bad_words"].is_array() {
            let word = regex("\\b(the|is)\\b");
            assert!(!word.is_match(text).expect("a match"), "{text}");
        }
        assert_eq!(stream(&server, "What colour is the sky?", case), *text);
    }
}

fn regex(pattern: &str) -> fancy_regex::Regex {
    fancy_regex::Regex::new(pattern).expect("a pattern")
}

/// The text of a streamed reply.
fn stream(server: &Server, prompt: &str, more: &Value) -> String {
    let mut body = json!({"messages": [{"role": "user", "content": prompt}], "temperature": 0.7, "stream": true});
    merge(&mut body, more);
    let reply = ureq::post(format!("{}/v1/chat/completions", server.url)).send_json(&body).expect("a stream");
    let lines = BufReader::new(reply.into_body().into_reader()).lines();
    let data = lines.filter_map(|line| line.expect("a line").strip_prefix("data: ").map(str::to_owned));
    let chunks = data.filter_map(|data| serde_json::from_str::<Value>(&data).ok());
    chunks.map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()).collect()
}
