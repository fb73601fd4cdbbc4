//! `POST /v1/embeddings`. The fake's hidden states are the token, its position and the number of adapters, then zeros.

use serde_json::{Value, json};

use crate::harness::{BASE, HIDDEN, Options, Server, eventually};

/// The vectors of a request whose vectors are not normalised.
fn vectors(server: &Server, mut body: Value) -> (Vec<Vec<f64>>, Value) {
    body["normalize"] = json!(false);
    let answer = server.post("/v1/embeddings", body);
    assert_eq!(answer.status, 200, "{}", answer.text);
    let body = answer.json();
    let data = body["data"].as_array().expect("a list");
    let vector = |(index, object): (usize, &Value)| {
        assert_eq!((&object["object"], &object["index"]), (&json!("embedding"), &json!(index)));
        let vector: Vec<f64> = serde_json::from_value(object["embedding"].clone()).expect("numbers");
        assert_eq!(vector.len(), HIDDEN);
        vector
    };
    (data.iter().enumerate().map(vector).collect(), body)
}

/// The parts of a vector that are not always 0.
fn values(server: &Server, body: Value) -> Vec<[f64; 3]> {
    vectors(server, body).0.iter().map(|vector| [vector[0], vector[1], vector[2]]).collect()
}

#[test]
fn inputs_in_every_form_and_both_poolings() {
    let server = Server::start();
    assert_eq!(values(&server, json!({"input": "ac"})), [[99.0, 1.0, 0.0]]);
    assert_eq!(values(&server, json!({"input": "ac", "pooling": "mean"})), [[98.0, 0.5, 0.0]]);
    assert_eq!(values(&server, json!({"input": ["a", "abc"]})), [[97.0, 0.0, 0.0], [99.0, 2.0, 0.0]]);
    assert_eq!(values(&server, json!({"input": [97, 98]})), [[98.0, 1.0, 0.0]]);
    assert_eq!(values(&server, json!({"input": [[97], [98, 99]]})), [[97.0, 0.0, 0.0], [99.0, 1.0, 0.0]]);
    // More rows than a step has.
    let long = "ac".repeat(100);
    assert_eq!(values(&server, json!({"input": long, "pooling": "mean"})), [[98.0, 99.5, 0.0]]);
}

#[test]
fn the_answer_has_openais_form_and_names_the_adapter() {
    let server = Server::start();
    let (_, body) = vectors(&server, json!({"model": BASE, "input": ["ab", "c"], "user": "me"}));
    assert_eq!((&body["object"], &body["model"]), (&json!("list"), &json!(BASE)));
    assert_eq!(body["usage"], json!({"prompt_tokens": 3, "total_tokens": 3}));
    assert_eq!((&body["adapter"], &body["adapter_generation"]), (&Value::Null, &Value::Null));
    for (selector, terms) in [
        (json!({"model": "a"}), 1.0),
        (json!({"adapter": "a"}), 1.0),
        (json!({"adapter": [{"name": "a", "weight": 0.5}, {"name": "b"}]}), 2.0),
    ] {
        let mut request = selector.clone();
        request["input"] = json!("a");
        let (vectors, body) = vectors(&server, request);
        assert_eq!(vectors[0][2], terms);
        assert_ne!(body["adapter_generation"], Value::Null);
        assert_eq!(body["model"], *selector.get("model").unwrap_or(&json!(BASE)));
    }
    let gone = server.post("/v1/embeddings", json!({"input": "a", "adapter": "gone"})).error();
    assert_eq!((gone.0, gone.3), (404, json!("adapter_not_found")));
}

#[test]
fn vectors_have_length_one_unless_the_request_says_no() {
    let server = Server::start();
    let length = |body: Value| {
        let answer = server.post("/v1/embeddings", body).json();
        let vector: Vec<f64> = serde_json::from_value(answer["data"][0]["embedding"].clone()).expect("numbers");
        vector.iter().map(|value| value * value).sum::<f64>().sqrt()
    };
    for body in [json!({}), json!({"normalize": true}), json!({"use_activation": true}), json!({"normalize": null})] {
        let mut body = body;
        body["input"] = json!("ac");
        assert!((length(body.clone()) - 1.0).abs() < 1e-6, "{body}");
    }
    for name in ["normalize", "use_activation"] {
        assert!((length(json!({"input": "ac", name: false})) - 99.0_f64.hypot(1.0)).abs() < 1e-4);
    }
}

#[test]
fn base64_is_little_endian_f32() {
    let server = Server::start();
    let body = json!({"input": "a", "normalize": false, "encoding_format": "base64", "adapter": "a"});
    let answer = server.post("/v1/embeddings", body).json();
    // 97, 0, 1, and five zeros.
    assert_eq!(answer["data"][0]["embedding"], "AADCQgAAAAAAAIA/AAAAAAAAAAAAAAAAAAAAAAAAAAA=");
}

#[test]
fn long_inputs_are_cut_only_if_asked() {
    let server = Server::start();
    let (status, message, param, code) =
        server.post("/v1/embeddings", json!({"input": ["a", "b".repeat(257)]})).error();
    assert_eq!((status, param, code), (400, json!("input[1]"), json!("context_length_exceeded")));
    assert!(message.starts_with("This model's maximum context length is 256 tokens"), "{message}");
    assert_eq!(values(&server, json!({"input": "b".repeat(256)})), [[98.0, 255.0, 0.0]]);
    for (truncation, want) in [
        (json!({"truncate_prompt_tokens": -1}), [99.0, 255.0]),
        (json!({"truncate_prompt_tokens": 2}), [99.0, 1.0]),
        (json!({"truncate_prompt_tokens": 2, "truncation_side": "right"}), [97.0, 1.0]),
    ] {
        let text = "a".repeat(200) + &"b".repeat(100) + "c";
        for input in [json!(text), json!([text.bytes().collect::<Vec<_>>()])] {
            let mut body = truncation.clone();
            body["input"] = input;
            let value = values(&server, body)[0];
            assert_eq!([value[0], value[1]], want, "{truncation}");
        }
    }
}

#[test]
fn refusals_name_the_field() {
    let server = Server::start();
    for (body, param, word) in [
        (json!({}), "input", "required"),
        (json!({"input": []}), "input", "an empty array"),
        (json!({"input": [[]]}), "input[0]", "an empty array"),
        (json!({"input": ""}), "input", "at least one token"),
        (json!({"input": ["a", ""]}), "input[1]", "at least one token"),
        (json!({"input": ["a", 3]}), "input[1]", "a string"),
        (json!({"input": [97, 258]}), "input[1]", "from 0 to 257"),
        (json!({"input": vec!["a"; 2049]}), "input", "at most 2048"),
        (json!({"input": "a", "dimensions": 4}), "dimensions", "must be 8"),
        (json!({"input": "a", "encoding_format": "bytes"}), "encoding_format", "\"float\" or \"base64\""),
        (json!({"input": "a", "pooling": "cls"}), "pooling", "\"last\" or \"mean\""),
        (json!({"input": "a", "embed_dtype": "float16"}), "embed_dtype", "float32"),
        (json!({"input": "a", "endianness": "big"}), "endianness", "little"),
        (json!({"input": "a", "priority": "high"}), "priority", "an integer"),
        (json!({"input": "a", "cache_salt": ""}), "cache_salt", "from 1 to 1024"),
        (json!({"input": "a", "normalize": true, "use_activation": false}), "use_activation", "the same"),
        (json!({"input": "a", "truncate_prompt_tokens": 0}), "truncate_prompt_tokens", "from 1 to 256"),
        (json!({"input": "a", "truncate_prompt_tokens": 257}), "truncate_prompt_tokens", "to 256"),
        (json!({"input": "a", "truncation_side": "both"}), "truncation_side", "right"),
        (json!({"messages": [{}]}), "messages", "/tokenize"),
        (json!({"input": "a", "input_type": "query"}), "input_type", "unknown field"),
        (json!({"input": "a", "lora": "a"}), "lora", "did you mean `adapter`"),
    ] {
        let (status, message, found, _) = server.post("/v1/embeddings", body.clone()).error();
        assert_eq!((status, &found), (400, &json!(param)), "{body}: {message}");
        assert!(message.contains(word), "{body}: {message}");
    }
    let same = json!({"input": "a", "dimensions": 8, "embed_dtype": "float32", "endianness": "little", "priority": -3, "cache_salt": "s"});
    assert_eq!(server.post("/v1/embeddings", same).status, 200);
}

/// A list that is longer than the queue is no reason to refuse it: it runs a part at a time.
#[test]
fn a_long_list_leaves_room_in_the_queue() {
    let server = Server::with(Options { max_running: 2, max_waiting: 1, ..Options::default() });
    server.gate.set(true);
    let inputs: Vec<String> = (0..40).map(|i| "a".repeat(i + 1)).collect();
    let body = json!({"input": inputs, "normalize": false}).to_string();
    let list = server.begin("POST", "/v1/embeddings", &[], body.as_bytes());
    eventually("two inputs are in the engine", || server.open() == 2);
    let text =
        server.begin("POST", "/v1/completions", &[], json!({"prompt": ".", "max_tokens": 2}).to_string().as_bytes());
    eventually("the completion is in the queue", || server.open() == 3);
    server.gate.set(false);
    assert_eq!(crate::harness::read_answer(text).json()["choices"][0]["text"], "ab");
    let list = crate::harness::read_answer(list).json();
    let positions: Vec<f64> =
        list["data"].as_array().unwrap().iter().map(|object| object["embedding"][1].as_f64().unwrap()).collect();
    assert_eq!(positions, (0..40).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn a_failed_step_and_a_client_that_leaves() {
    let server = Server::start();
    let (status, message, _, _) = server.post("/v1/embeddings", json!({"input": ["a", "?"]})).error();
    assert_eq!(status, 500);
    assert!(message.starts_with("internal error"), "{message}");
    eventually("the other input is cancelled", || server.open() == 0);
    server.gate.set(true);
    let client = server.begin("POST", "/v1/embeddings", &[], json!({"input": vec!["a"; 20]}).to_string().as_bytes());
    eventually("it runs", || server.open() == 8);
    drop(client);
    server.gate.set(false);
    eventually("its inputs are cancelled", || server.open() == 0);
}

#[test]
fn embeddings_count_in_the_metrics() {
    let server = Server::start();
    server.post("/v1/embeddings", json!({"input": ["abc", "de"], "adapter": "a"}));
    server.post("/v1/embeddings", json!({"input": "a", "adapter": "a", "pooling": "max"}));
    let page = server.get("/metrics").text;
    for line in [
        "quiver_requests_total{adapter=\"a\",finished_reason=\"stop\"} 2",
        "quiver_prompt_tokens_total{adapter=\"a\"} 5",
        "quiver_request_seconds_count{adapter=\"a\"} 2",
        "quiver_queue_seconds_count{adapter=\"a\"} 2",
        "quiver_errors_total{adapter=\"a\",kind=\"invalid\"} 1",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
}
