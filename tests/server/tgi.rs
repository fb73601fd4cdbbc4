//! TGI's and LoRAX's routes on the fake model.

use serde_json::{Value, json};

use crate::harness::{Answer, BASE, EOS, Options, Server, merged};

fn ask(server: &Server, path: &str, inputs: &str, parameters: Value) -> Answer {
    server.post(path, json!({"inputs": inputs, "parameters": parameters}))
}

fn text_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["generated_text"].as_str().expect("a text").to_owned()
}

/// `(status, error_type, error)`.
fn error_of(answer: &Answer) -> (u16, String, String) {
    let body = answer.json();
    let text = |key: &str| body[key].as_str().unwrap_or_else(|| panic!("{}", answer.text)).to_owned();
    (answer.status, text("error_type"), text("error"))
}

fn events_of(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream", "{}", answer.text);
    let event = |event: &str| serde_json::from_str(event.strip_prefix("data: ").expect(event)).expect("JSON");
    answer.text.split_terminator("\n\n").map(event).collect()
}

#[test]
fn texts() {
    let server = Server::start();
    for (parameters, text) in [
        (json!({"max_new_tokens": 3}), "abc"),
        // To the model's end, not to a default length.
        (json!({}), "abcdefghijklmnopqrstuvwxyz"),
        (json!({"stop": ["x", "de"]}), "abcde"),
        (json!({"max_new_tokens": 2, "return_full_text": true}), ".ab"),
        (json!({"max_new_tokens": 2, "adapter_id": "a", "adapter_source": "local"}), "AB"),
        (json!({"max_new_tokens": 2, "adapter_id": "__base__"}), "ab"),
        (json!({"max_new_tokens": 2, "merged_adapters": {"ids": ["a", "b"], "weights": [1, 1], "density": 0.0}}), "01"),
        (json!({"grammar": {"type": "regex", "value": "[x-z]{2}"}}), "xy"),
        (
            json!({"grammar": {"type": "json", "value": {"const": "a"}}, "do_sample": true, "seed": 7, "top_k": 1}),
            "\"a\"",
        ),
        (json!({"grammar": {"type": "json_schema", "value": {"name": "n", "schema": {"const": "a"}}}}), "\"a\""),
        (json!({"max_new_tokens": 1, "watermark": false, "typical_p": null, "api_token": null}), "a"),
    ] {
        assert_eq!(text_of(&ask(&server, "/generate", ".", parameters.clone())), text, "{parameters}");
    }
    assert_eq!(text_of(&server.post("/generate", json!({"inputs": "x"}))), "yz");
    assert_eq!(text_of(&ask(&server, "/generate", "abcw", json!({"truncate": 1}))), "xyz");
    let list = ask(&server, "/", "w", json!({})).json();
    assert_eq!(list[0]["generated_text"], "xyz", "{list}");
    assert_eq!(list.as_array().map(Vec::len), Some(1));
}

#[test]
fn details() {
    let server = Server::start();
    let more = json!({"details": true, "decoder_input_details": true, "top_n_tokens": 2, "seed": 5});
    let body = ask(&server, "/generate", ".x", more).json();
    let details = &body["details"];
    assert_eq!(
        (&details["finish_reason"], &details["generated_tokens"], &details["prompt_tokens"], &details["seed"]),
        (&json!("eos_token"), &json!(3), &json!(2), &json!(5))
    );
    let tokens = details["tokens"].as_array().unwrap();
    let shown: Vec<_> =
        tokens.iter().map(|t| (t["id"].as_u64().unwrap(), t["text"].as_str().unwrap(), t["special"] == true)).collect();
    assert_eq!(shown, [(121, "y", false), (122, "z", false), (u64::from(EOS), "<|im_end|>", true)]);
    assert!(tokens.iter().all(|t| t["logprob"].as_f64().is_some_and(|p| p > -0.01)), "{details}");
    let prefill = details["prefill"].as_array().unwrap();
    assert_eq!(
        (&prefill[0]["text"], &prefill[0]["logprob"], &prefill[1]["text"]),
        (&json!("."), &Value::Null, &json!("x"))
    );
    assert!(prefill[1]["logprob"].is_number());
    let top = details["top_tokens"].as_array().unwrap();
    assert_eq!((top.len(), top[0].as_array().unwrap().len(), &top[0][0]["text"]), (3, 2, &json!("y")));

    let plain = ask(&server, "/generate", ".", json!({"max_new_tokens": 1})).json();
    assert_eq!(plain.get("details"), None);
    let more = json!({"details": true, "max_new_tokens": 1, "return_k_alternatives": 1});
    let details = ask(&server, "/generate", ".", more).json()["details"].clone();
    assert_eq!((&details["finish_reason"], &details["prefill"]), (&json!("length"), &json!([])));
    assert_eq!(details["tokens"][0]["alternative_tokens"][0]["text"], "a");
    let more = json!({"details": true, "stop": ["bc"]});
    assert_eq!(ask(&server, "/generate", ".", more).json()["details"]["finish_reason"], "stop_sequence");
}

#[test]
fn the_best_of_several() {
    let server = Server::start();
    let more = json!({"best_of": 3, "do_sample": true, "details": true, "max_new_tokens": 2});
    let body = ask(&server, "/generate", ".", more).json();
    assert_eq!(body["generated_text"], "ab");
    let others = body["details"]["best_of_sequences"].as_array().unwrap();
    assert_eq!(
        (others.len(), &others[0]["generated_text"], &others[0]["tokens"][0]["text"]),
        (2, &json!("ab"), &json!("a"))
    );
}

#[test]
fn a_stream_has_an_event_for_each_token() {
    let server = Server::start();
    for (path, body) in [
        ("/generate_stream", json!({"inputs": "w"})),
        ("/", json!({"inputs": "w", "stream": true, "parameters": null})),
    ] {
        let events = events_of(&server.post(path, body));
        let shown: Vec<_> =
            events.iter().map(|e| (e["index"].as_u64().unwrap(), e["token"]["text"].as_str().unwrap())).collect();
        assert_eq!(shown, [(1, "x"), (2, "y"), (3, "z"), (4, "<|im_end|>")]);
        assert!(events.iter().all(|e| e["token"]["logprob"].is_number()));
        let (last, others) = events.split_last().unwrap();
        assert!(others.iter().all(|e| e["generated_text"].is_null() && e["details"].is_null()));
        assert_eq!((&last["generated_text"], &last["token"]["special"]), (&json!("xyz"), &json!(true)));
        let details = &last["details"];
        assert_eq!(
            (&details["finish_reason"], &details["generated_tokens"], &details["input_length"]),
            (&json!("eos_token"), &json!(4), &json!(1))
        );
    }
    // Without an end token, the last token has the whole text.
    for (parameters, texts, whole, reason) in [
        (json!({"max_new_tokens": 2}), vec!["a", "b"], "ab", "length"),
        (json!({"stop": ["cd"]}), vec!["a", "b", "c", "d"], "abcd", "stop_sequence"),
        (json!({"max_new_tokens": 1, "adapter_id": "b", "return_full_text": true}), vec!["A"], ".A", "length"),
    ] {
        let events = events_of(&ask(&server, "/generate_stream", ".", parameters.clone()));
        let shown: Vec<_> = events.iter().map(|e| e["token"]["text"].as_str().unwrap()).collect();
        assert_eq!(shown, texts, "{parameters}");
        let last = events.last().unwrap();
        assert_eq!((&last["generated_text"], &last["details"]["finish_reason"]), (&json!(whole), &json!(reason)));
    }
    // Half a character has no text, and the other half has all of it.
    let events = events_of(&ask(&server, "/generate_stream", "#", json!({"max_new_tokens": 4, "top_n_tokens": 1})));
    let shown: Vec<_> = events.iter().map(|e| e["token"]["text"].as_str().unwrap()).collect();
    assert_eq!(shown, ["", "é", "", "é"]);
    assert_eq!(events[0]["top_tokens"].as_array().map(Vec::len), Some(1));
}

#[test]
fn a_stream_that_fails() {
    let server = Server::start();
    let events = events_of(&server.post("/generate_stream", json!({"inputs": "?"})));
    let error = &events[0];
    assert_eq!(error["error_type"], "generation");
    assert!(error["error"].as_str().unwrap().starts_with("internal error;"), "{error}");
    let (status, kind, _) = error_of(&server.post("/generate", json!({"inputs": "?"})));
    assert_eq!((status, kind.as_str()), (424, "generation"));
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let server = Server::start();
    let merged = |more: Value| {
        let merged = merged(json!({"ids": ["a", "b"], "weights": [1, 1]}), &more);
        json!({"merged_adapters": merged})
    };
    for (parameters, says) in [
        (json!({"max_new_tokens": 0}), "`parameters.max_new_tokens` must be"),
        (json!({"max_new_tokens": 1000}), "maximum context length is 256 tokens"),
        (json!({"temperature": -1}), "`parameters.temperature` must be"),
        (json!({"top_p": 2}), "`parameters.top_p` must be"),
        (json!({"top_k": -1}), "`parameters.top_k` must be"),
        (json!({"repetition_penalty": 0}), "`parameters.repetition_penalty` must be"),
        (json!({"typical_p": 0.5}), "`parameters.typical_p`: use"),
        (json!({"watermark": true}), "`parameters.watermark`"),
        (json!({"api_token": "hf_x"}), "`parameters.api_token`"),
        (json!({"adapter_source": "hub"}), "`parameters.adapter_source`: only loaded adapters"),
        (json!({"apply_chat_template": true}), "`parameters.apply_chat_template`"),
        (json!({"stop": "x"}), "`parameters.stop` must be an array"),
        (json!({"stop": [""]}), "`parameters.stop[0]`"),
        (json!({"truncate": 0}), "`parameters.truncate` must be"),
        (json!({"best_of": 2}), "set `parameters.do_sample`"),
        (json!({"best_of": 100, "do_sample": true}), "100 sequences"),
        (json!({"grammar": {"type": "xml", "value": "x"}}), "`parameters.grammar.type` must be"),
        (json!({"grammar": {"type": "regex", "value": "("}}), "`parameters.grammar.value`"),
        (
            json!({"response_format": {"type": "json_object", "schema": {"type": "odd"}}}),
            "`parameters.response_format.schema`",
        ),
        (json!({"max_tokens": 3}), "unknown field `parameters.max_tokens`"),
        (json!({"adapter_id": "a", "merged_adapters": {"ids": ["b"], "weights": [1]}}), "give one of them"),
        (merged(json!({"merge_strategy": "ties"})), "`parameters.merged_adapters.merge_strategy` must be \"linear\""),
        (merged(json!({"weights": [1]})), "2 ids and 1 weights"),
        (merged(json!({"ids": ["a", 1]})), "`parameters.merged_adapters.ids[1]` must be"),
    ] {
        let (status, kind, message) = error_of(&ask(&server, "/generate", ".", parameters.clone()));
        assert_eq!((status, kind.as_str()), (422, "validation"), "{parameters}: {message}");
        assert!(message.contains(says), "{parameters}: {message}");
    }
    for (path, body, status, says) in [
        ("/generate", json!({"inputs": ""}), 422, "`inputs` must be"),
        ("/generate", json!({}), 422, "`inputs` is required"),
        ("/generate", json!({"inputs": "x", "stream": true}), 422, "POST /generate_stream"),
        ("/generate_stream", json!({"inputs": "x", "stream": false}), 422, "POST /generate"),
        (
            "/generate_stream",
            json!({"inputs": "x", "parameters": {"decoder_input_details": true}}),
            422,
            "cannot be streamed",
        ),
        ("/", json!({"inputs": "x", "adapter": "a"}), 422, "`adapter`: use `parameters.adapter_id`"),
        ("/", json!({"inputs": "x", "parameters": {"adapter_id": "gone"}}), 404, "gone"),
        ("/", json!({"inputs": "x".repeat(300)}), 422, "maximum context length"),
    ] {
        let (got, kind, message) = error_of(&server.post(path, body.clone()));
        assert_eq!((got, kind.as_str()), (status, "validation"), "{body}: {message}");
        assert!(message.contains(says), "{body}: {message}");
    }
}

#[test]
fn info_and_keys() {
    let server = Server::with(Options { api_keys: vec!["one".into()], ..Options::default() });
    let (status, kind, _) = error_of(&server.get("/info"));
    assert_eq!((status, kind.as_str()), (401, "unauthorized"));
    let info = server.send("GET", "/info", &[("authorization", "Bearer one")], b"").json();
    assert_eq!(
        (&info["model_id"], &info["max_total_tokens"], &info["max_input_tokens"]),
        (&json!(BASE), &json!(256), &json!(255))
    );
}

#[test]
fn chats_of_hugging_faces_client() {
    let server = Server::start();
    // The client sends such names where it has only a URL: they mean the base.
    for name in ["tgi", "dummy"] {
        let body = json!({"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
        let answer = server.post("/v1/chat/completions", body);
        assert_eq!((answer.status, &answer.json()["adapter"]), (200, &json!(null)));
    }
    // It puts a schema where TGI reads it.
    let body = json!({"messages": [{"role": "user", "content": "x"}], "temperature": 0,
                      "response_format": {"type": "json_object", "value": {"const": "a"}}});
    assert_eq!(server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"], "\"a\"");
}

#[test]
fn a_completion_without_a_limit_fills_the_context() {
    let server = Server::start();
    assert_eq!(server.complete(json!({"prompt": ".", "n_predict": -1})), "abcdefghijklmnopqrstuvwxyz");
    let long = server.complete(json!({"prompt": "#", "n_predict": -1}));
    assert_eq!(long.chars().count(), 128, "255 bytes after the prompt: the last character is half of one");
}
