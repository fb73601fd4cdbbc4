//! Invalid input: every field, malformed bodies, limits, and the error body on every route.

use serde_json::{Value, json};

use crate::harness::{BASE, Options, Server, merged};

/// Posts `body` over a valid base and returns `(status, message, param, code)`.
fn refuse(server: &Server, path: &str, more: &Value) -> (u16, String, Value, Value) {
    let body = match path {
        "/v1/completions" => json!({"prompt": "."}),
        _ => json!({"messages": [{"role": "user", "content": "x"}]}),
    };
    let answer = server.post(path, merged(body, more));
    assert_ne!(answer.status, 200, "{more} was accepted: {}", answer.text);
    answer.error()
}

#[test]
fn every_bad_field_is_named_with_what_is_allowed() {
    let server = Server::start();
    let both = [
        (json!({"temperature": "hot"}), "temperature", "from 0 to 2"),
        (json!({"temperature": -0.1}), "temperature", "from 0 to 2"),
        (json!({"temperature": 2.1}), "temperature", "from 0 to 2, not 2.1"),
        (json!({"top_p": 1.1}), "top_p", "from 0 to 1"),
        (json!({"top_p": []}), "top_p", "an empty array"),
        (json!({"top_k": -2}), "top_k", "at least -1"),
        (json!({"top_k": 1.5}), "top_k", "an integer"),
        (json!({"min_p": 2}), "min_p", "from 0 to 1"),
        (json!({"repetition_penalty": 0}), "repetition_penalty", "above 0"),
        (json!({"repetition_penalty": -1}), "repetition_penalty", "from 0 to 10"),
        (json!({"presence_penalty": 3}), "presence_penalty", "from -2 to 2"),
        (json!({"frequency_penalty": -3}), "frequency_penalty", "from -2 to 2"),
        (json!({"seed": 0.5}), "seed", "an integer"),
        (json!({"seed": "1"}), "seed", "the string \"1\""),
        (json!({"max_tokens": -1}), "max_tokens", "at least"),
        (json!({"max_tokens": "4"}), "max_tokens", "an integer"),
        (json!({"max_tokens": 4, "max_completion_tokens": 5}), "max_completion_tokens", "mean the same"),
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens", "at most `max_tokens` (4)"),
        (json!({"n": 0}), "n", "from 1 to 128"),
        (json!({"n": 129}), "n", "from 1 to 128"),
        (json!({"n": 100}), "", "this server takes 64 at once"),
        (json!({"stream": "yes"}), "stream", "true or false"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "when `stream` is true"),
        (json!({"stream": true, "stream_options": 1}), "stream_options", "an object"),
        (
            json!({"stream": true, "stream_options": {"include_usage": 1}}),
            "stream_options.include_usage",
            "true or false",
        ),
        (
            json!({"stream": true, "stream_options": {"include_usages": true}}),
            "stream_options.include_usages",
            "`stream_options.include_usage`",
        ),
        (json!({"stop": 1}), "stop", "a string or an array"),
        (json!({"stop": ""}), "stop", "1 to 1024 bytes"),
        (json!({"stop": ["a", 2]}), "stop[1]", "not 2"),
        (json!({"stop": vec!["a"; 17]}), "stop", "up to 16 strings"),
        (json!({"stop_token_ids": [1, 9999]}), "stop_token_ids[1]", "from 0 to 257"),
        (json!({"stop_token_ids": 1}), "stop_token_ids", "an array"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias", "token ids from 0 to 257"),
        (json!({"logit_bias": {"258": 1}}), "logit_bias", "token ids from 0 to 257"),
        (json!({"logit_bias": {"1": 101}}), "logit_bias.1", "from -100 to 100"),
        (json!({"logit_bias": []}), "logit_bias", "an object"),
        (json!({"ignore_eos": 1}), "ignore_eos", "true or false"),
        (json!({"skip_special_tokens": 1}), "skip_special_tokens", "true or false"),
        (json!({"include_stop_str_in_output": 1}), "include_stop_str_in_output", "true or false"),
        (json!({"model": 1}), "model", "a string"),
        (json!({"adapter": 1}), "adapter", "an adapter's name"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type", "\"json_schema\""),
        (json!({"response_format": {"type": "text", "schema": {}}}), "response_format.schema", "unknown field"),
        (json!({"guided_whitespace_pattern": " "}), "guided_whitespace_pattern", "with `guided_json`"),
        (json!({"json_schema": {"name": "n", "schema": {"type": "object"}}}), "json_schema", "the schema itself"),
        (json!({"response_format": {}}), "response_format.type", "is required"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema", "is required"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}),
            "response_format.json_schema.schema",
            "is required",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "no"}}}}),
            "response_format.json_schema.schema",
            "no",
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
            "response_format.json_schema.strict",
            "true or false",
        ),
        (json!({"guided_json": "{"}), "guided_json", "not JSON"),
        (json!({"guided_json": [1]}), "guided_json", "a JSON schema"),
        (json!({"guided_json": {"type": "string", "pattern": "(?=a)"}}), "guided_json", "look"),
        (json!({"guided_json": {"$ref": "#/$defs/gone"}}), "guided_json", "gone"),
        (json!({"guided_json": {"type": "string", "uniqueItems": true}}), "guided_json", "uniqueItems"),
        (json!({"guided_regex": "(a"}), "guided_regex", "unclosed"),
        (json!({"guided_regex": 1}), "guided_regex", "a string"),
        (json!({"guided_choice": []}), "guided_choice", "1 to 4096"),
        (json!({"guided_choice": ["a", ""]}), "guided_choice[1]", "at least one character"),
        (json!({"guided_grammar": "root ::= other"}), "guided_grammar", "`other`"),
        (json!({"guided_grammar": "start: other"}), "guided_grammar", "other"),
        (json!({"grammar": "root ::= ("}), "grammar", "line 1"),
        (json!({"grammar": "root ::= \"a\"", "json_schema": {}}), "json_schema", "`grammar` and `json_schema` both"),
        (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs.regex", "give one of them"),
        (json!({"structured_outputs": {"regex": "a"}, "guided_json": {}}), "structured_outputs.regex", "`guided_json`"),
        (json!({"structured_outputs": {"structural_tag": "a"}}), "structured_outputs.structural_tag", "known fields"),
        (json!({"guided_regex": "a", "ignore_eos": true}), "ignore_eos", "`guided_regex`"),
        (json!({"allowed_token_ids": []}), "allowed_token_ids", "at least one"),
        (json!({"allowed_token_ids": [258]}), "allowed_token_ids[0]", "from 0 to 257"),
        (json!({"allowed_token_ids": [97], "guided_regex": "b"}), "allowed_token_ids", "allows next"),
        (json!({"bad_words": "a"}), "bad_words", "an array"),
        (json!({"bad_words": ["a", " "]}), "bad_words[1]", "1 to 256 bytes"),
        (json!({"bad_words": vec!["a"; 257]}), "bad_words", "up to 256"),
    ];
    let completions = [
        (json!({"suffix": "x"}), "suffix", "fill in the middle"),
        (json!({"tools": [{}]}), "tools", "/v1/chat/completions"),
        (json!({"prompt": null}), "prompt", "is required"),
        (json!({"prompt": 1}), "prompt", "a string, an array"),
        (json!({"prompt": []}), "prompt", "an empty array"),
        (json!({"prompt": {}}), "prompt", "an object"),
        (json!({"prompt": ["a", 1]}), "prompt[1]", "a string"),
        (json!({"prompt": [[1], []]}), "prompt[1]", "an empty array"),
        (json!({"prompt": [1, "a"]}), "prompt[1]", "an integer"),
        (json!({"prompt": [258]}), "prompt[0]", "from 0 to 257"),
        (json!({"prompt": [-1]}), "prompt[0]", "from 0 to 257"),
        (json!({"prompt": [[true]]}), "prompt[0][0]", "not true"),
        (json!({"prompt": ""}), "prompt", "empty"),
        (json!({"prompt": null, "messages": [1]}), "messages", "/v1/chat/completions"),
        (json!({"prompt": vec!["x"; 65]}), "prompt", "this server takes 64 at once"),
        (json!({"best_of": 0}), "best_of", "from 1 to"),
        (json!({"n": 3, "best_of": 2}), "best_of", "at least `n` (3)"),
        (json!({"best_of": 2, "stream": true}), "best_of", "cannot be streamed"),
        (json!({"logprobs": true}), "logprobs", "from 0 to 20"),
        (json!({"logprobs": 21}), "logprobs", "from 0 to 20"),
        (json!({"echo": "yes"}), "echo", "true or false"),
    ];
    let chat = [
        (json!({"suffix": "x"}), "suffix", "only on /v1/completions"),
        (json!({"tools": [{}]}), "tools[0].type", "is required"),
        (json!({"functions": [{}]}), "functions[0].name", "is required"),
        (json!({"messages": null}), "messages", "is required"),
        (json!({"messages": "hi"}), "messages", "an array"),
        (json!({"messages": []}), "messages", "at least one"),
        (json!({"messages": [1]}), "messages[0]", "an object"),
        (json!({"messages": [{"content": "x"}]}), "messages[0].role", "is required"),
        (json!({"messages": [{"role": "", "content": "x"}]}), "messages[0].role", "a name such as system"),
        (json!({"chat_template": "x"}), "chat_template", "time and memory"),
        (json!({"chat_template_kwargs": {"tools": []}}), "chat_template_kwargs.tools", "use the field `tools`"),
        (
            json!({"chat_template_kwargs": {"enable_thinking": true}}),
            "chat_template_kwargs.enable_thinking",
            "no effect",
        ),
        (json!({"documents": [{"text": "x"}]}), "documents", "has no place"),
        (json!({"continue_final_message": true, "add_generation_prompt": true}), "continue_final_message", "both"),
        (
            json!({"messages": [{"role": "user", "content": "x", "colour": "red"}]}),
            "messages[0].colour",
            "has no place",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content", "is required"),
        (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content", "text parts"),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "messages[0].content[0].type",
            "\"text\"",
        ),
        (
            json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "messages[0].content[0].text",
            "is required",
        ),
        (json!({"max_tokens": 0}), "max_tokens", "at least 1"),
        (json!({"logprobs": 1}), "logprobs", "true or false"),
        (json!({"top_logprobs": 2}), "top_logprobs", "when `logprobs` is true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "from 0 to 20"),
        (json!({"messages": null, "prompt": "."}), "prompt", "/v1/completions"),
    ];
    let check = |path, (more, param, what): &(Value, &str, &str)| {
        let (status, message, got, code) = refuse(&server, path, more);
        assert_eq!(status, 400, "{more}: {message}");
        if !param.is_empty() {
            assert_eq!(got, json!(param), "{more}: {message}");
        }
        assert!(message.contains(what), "{more}: {message}");
        assert!(code.is_string() || code.is_null());
    };
    both.iter().chain(&completions).for_each(|case| check("/v1/completions", case));
    both.iter().chain(&chat).for_each(|case| check("/v1/chat/completions", case));
}

#[test]
fn misspelt_fields_and_foreign_selectors_are_refused() {
    let server = Server::start();
    for (field, meant) in [
        ("temprature", "temperature"),
        ("Temperature", "temperature"),
        ("maxTokens", "max_tokens"),
        ("max_token", "max_tokens"),
        ("adaptor", "adapter"),
        ("Adapter", "adapter"),
        ("lora", "adapter"),
        ("lora_path", "adapter"),
        ("lora_name", "adapter"),
        ("lora_request", "adapter"),
        ("adapter_id", "adapter"),
        ("adapter_name", "adapter"),
        ("adapters", "adapter"),
        ("stops", "stop"),
        ("topp", "top_p"),
        ("modle", "model"),
    ] {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let (status, message, param, code) = refuse(&server, path, &json!({field: "a"}));
            assert_eq!((status, &param, &code), (400, &json!(field), &json!("unknown_field")), "{message}");
            assert!(message.contains(&format!("`{meant}`")), "{message}");
        }
    }
}

#[test]
fn fields_of_other_servers_that_change_nothing_are_accepted() {
    let server = Server::start();
    let extras = json!({
        "prompt": ".", "max_tokens": 1, "user": "me", "metadata": {}, "store": false, "service_tier": "auto", "tools": [],
        "functions": [], "suffix": "", "response_format": {"type": "text"}, "top_a": 0, "mode": null,
        "tool_choice": "none", "parallel_tool_calls": false, "temperature": null, "top_k": 5.0, "best_of": null,
    });
    assert_eq!(server.complete(extras), "a");
}

#[test]
fn unknown_fields_are_refused_by_name() {
    let server = Server::start();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let (status, message, param, code) = refuse(&server, path, &json!({"frobnicate": 1}));
        assert_eq!((status, param, code), (400, json!("frobnicate"), json!("unknown_field")), "{message}");
        assert!(message.contains(path), "{message}");
        // `null` asks for nothing.
        let (status, ..) = refuse(&server, path, &json!({"frobnicate": null, "max_tokens": "x"}));
        assert_eq!(status, 400);
    }
}

/// The fields of the request types of OpenAI, Anthropic, vLLM, llama.cpp, TGI and LoRAX: each is honoured, has no effect, or is refused by name.
#[test]
fn every_field_of_the_published_request_types_is_in_a_table() {
    let server = Server::start();
    let routes: Value = serde_json::from_str(include_str!("../fixtures/request_fields.json")).unwrap();
    for (route, sources) in routes.as_object().unwrap().iter().filter(|(route, _)| route.starts_with('/')) {
        for field in sources.as_object().unwrap().values().flat_map(|names| names.as_array().unwrap()) {
            let field = field.as_str().unwrap();
            let odd = json!({"an": ["odd", "value"]});
            let reply = match field.strip_prefix("parameters.") {
                Some(inner) => server.post(route, json!({"inputs": "x", "parameters": {inner: odd}})),
                None => server.post(route, json!({field: odd})),
            };
            assert!(reply.status < 500, "{route} {field}: {}", reply.text);
            // Each API has an error body of its own.
            let unknown = reply.text.contains(&format!("unknown field `{field}`"));
            assert!(!unknown, "{route} has no entry for {field}: {}", reply.text);
        }
    }
}

#[test]
fn malformed_bodies() {
    let server = Server::with(Options { max_body: 1000, ..Options::default() });
    let send = |body: &[u8]| server.send("POST", "/v1/completions", &[], body);
    for (body, what) in [
        (&b""[..], "empty"),
        (b"{\"prompt\": \".\",}", "line 1 column 16"),
        (b"{\n\"prompt\": nope}", "line 2 column"),
        (b"[]", "must be a JSON object, not an empty array"),
        (b"\"x\"", "not the string \"x\""),
        (b"{\"prompt\": \".\"} tail", "trailing characters"),
        (b"{\"prompt\": \"\xff\"}", "line 1 column"),
        (b"{\"temperature\": 1e999, \"prompt\": \".\"}", "out of range"),
    ] {
        let (status, message, _, _) = send(body).error();
        assert_eq!(status, 400);
        assert!(message.contains(what), "{message}");
    }
    let deep = [vec![b'['; 400], vec![b']'; 400]].concat();
    assert_eq!(send(&deep).error().0, 400);
    let long = json!({"prompt": ".".repeat(2000)}).to_string();
    let (status, message, _, code) = send(long.as_bytes()).error();
    assert_eq!((status, code), (413, json!("body_too_large")), "{message}");
    // Any content type will do, as long as it is JSON.
    let form = [("content-type", "application/x-www-form-urlencoded")];
    assert_eq!(server.send("POST", "/v1/completions", &form, b"{\"prompt\": \".\"}").status, 200);
    let header = "h".repeat(40_000);
    let (status, _, _, _) = server.send("GET", "/health", &[("x-long", &header)], b"").error();
    assert_eq!(status, 431);
}

#[test]
fn the_envelope_on_every_route() {
    let server = Server::start();
    for (method, path, status) in [
        ("GET", "/", 405),
        ("POST", "/v1/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("PATCH", "/admin/adapters/a", 405),
        ("GET", "/v1/load_lora_adapter", 405),
        ("GET", "/admin/adapters/gone", 404),
        ("POST", "/v1/completions", 400),
        ("POST", "/v1/chat/completions", 400),
        ("POST", "/tokenize", 400),
        ("POST", "/detokenize", 400),
        ("PUT", "/admin/adapters/new", 400),
        ("GET", "/admin/adapters/%ff", 400),
        ("GET", "/v1/models/%ff", 400),
    ] {
        let answer = server.send(method, path, &[], b"");
        assert_eq!(answer.error().0, status, "{method} {path}");
        assert_eq!(answer.headers.contains_key("allow"), status == 405, "{method} {path}");
        assert!(answer.headers.contains_key("x-request-id"));
    }
}

#[test]
fn api_keys() {
    let server = Server::with(Options { api_keys: vec!["one".into(), "two".into()], ..Options::default() });
    let get = |auth: Option<&str>, path: &str| {
        let headers: Vec<(&str, &str)> = auth.iter().map(|a| ("authorization", *a)).collect();
        server.send("GET", path, &headers, b"")
    };
    for key in ["Bearer one", "bearer two", "Bearer  one"] {
        assert_eq!(get(Some(key), "/v1/models").status, 200, "{key}");
    }
    for wrong in [None, Some("Bearer three"), Some("Bearer "), Some("Basic one"), Some("one"), Some("Bearer onetwo")] {
        let answer = get(wrong, "/v1/models");
        let (status, _, _, code) = answer.error();
        assert_eq!((status, code), (401, json!("invalid_api_key")), "{wrong:?}");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    assert_eq!(server.post("/v1/completions", json!({"prompt": "."})).error().0, 401);
    assert_eq!(server.post("/tokenize", json!({"prompt": "."})).error().0, 401);
    for open in ["/live", "/health", "/ready", "/version", "/metrics"] {
        assert_eq!(get(None, open).status, 200, "{open}");
    }
    assert_eq!(get(None, "/v1/nowhere").status, 404);
    assert!(get(Some("Bearer one"), "/v1/models").text.contains(BASE));
}

#[test]
fn no_value_of_any_field_is_a_500() {
    let server = Server::start();
    let odd = [
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(2.5),
        json!(1e308),
        json!(-1e308),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(""),
        json!("a\u{0}é"),
        json!([]),
        json!([null]),
        json!([[], "x", 1]),
        json!([0]),
        json!({}),
        json!({"0": 1, "name": "a", "type": "text"}),
        json!([{"role": "user", "content": "", "name": "a"}]),
    ];
    let fields = "model adapter stream stream_options n max_tokens max_completion_tokens min_tokens temperature top_p top_k \
                  min_p repetition_penalty presence_penalty frequency_penalty logit_bias seed stop stop_token_ids \
                  include_stop_str_in_output skip_special_tokens ignore_eos logprobs user prompt echo best_of \
                  add_special_tokens messages top_logprobs add_generation_prompt continue_final_message \
                  chat_template chat_template_kwargs documents reasoning_effort tools response_format suffix \
                  structured_outputs guided_json guided_regex guided_choice guided_grammar grammar json_schema \
                  allowed_token_ids bad_words";
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        for field in fields.split(' ').chain(["tokens"]) {
            for value in &odd {
                let mut body = match path {
                    // A step with `?` fails in the fake model, which draws any token where it may not end.
                    "/v1/completions" => json!({"prompt": ".", "logit_bias": {"63": -100}}),
                    "/v1/chat/completions" => {
                        json!({"messages": [{"role": "user", "content": "."}], "logit_bias": {"63": -100}})
                    }
                    "/tokenize" => json!({"prompt": "."}),
                    _ => json!({"tokens": [97]}),
                };
                body[field] = value.clone();
                let answer = server.post(path, body);
                assert!([200, 400, 404].contains(&answer.status), "{path} {field} {value}: {}", answer.text);
                assert!(answer.status == 200 || answer.error().0 == answer.status);
            }
        }
    }
}
