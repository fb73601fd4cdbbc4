//! Anthropic's Messages API on the fake model.

use serde_json::{Value, json};

use crate::harness::{Answer, BASE, Options, Server, merged};

fn start() -> Server {
    // Instructions for tools are long where a token is a byte.
    Server::with(Options { max_model_len: 3000, api_keys: vec![], ..Options::default() })
}

/// Posts a short conversation with `more`.
fn ask(server: &Server, more: Value) -> Answer {
    let body = merged(json!({"model": BASE, "max_tokens": 40, "messages": [{"role": "user", "content": "."}]}), &more);
    server.post("/v1/messages", body)
}

/// `(status, type, message)` of an error in Anthropic's form.
fn error_of(answer: &Answer) -> (u16, String, String) {
    let body = answer.json();
    assert_eq!(body["type"], "error", "{}", answer.text);
    assert_eq!(body["request_id"], json!(answer.headers["x-request-id"]));
    let text = |key: &str| body["error"][key].as_str().expect(key).to_owned();
    (answer.status, text("type"), text("message"))
}

/// The events of a stream, each with its name checked.
fn events_of(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream", "{}", answer.text);
    let event = |event: &str| {
        let (name, data) = event.strip_prefix("event: ").and_then(|e| e.split_once("\ndata: ")).expect(event);
        let data: Value = serde_json::from_str(data).expect("JSON");
        assert_eq!(data["type"], name);
        data
    };
    answer.text.split_terminator("\n\n").map(event).collect()
}

#[test]
fn a_message() {
    let server = start();
    let answer = ask(&server, json!({"model": "a", "max_tokens": 3}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    let mut body = answer.json();
    assert!(body["id"].take().as_str().unwrap().starts_with("msg_"));
    assert_eq!(body["adapter_generation"].take().as_str().map(str::is_empty), Some(false));
    let want = json!({
        "id": null, "type": "message", "role": "assistant", "model": "a",
        "content": [{"type": "text", "text": "ABC", "citations": null}],
        "stop_reason": "max_tokens", "stop_sequence": null,
        "usage": {"input_tokens": 30, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
                  "output_tokens": 3, "output_tokens_details": {"thinking_tokens": 0}},
        "adapter": "a", "adapter_generation": null,
    });
    let prompt = server.post("/v1/messages/count_tokens", json!({"messages": [{"role": "user", "content": "."}]}));
    let tokens = prompt.json()["input_tokens"].clone();
    let mut want = want;
    want["usage"]["input_tokens"] = tokens;
    assert_eq!(body, want);
}

#[test]
fn how_an_answer_ends() {
    let server = start();
    for (more, text, reason, sequence) in [
        (json!({}), "abcdefghijklmnopqrstuvwxyz", "end_turn", Value::Null),
        (json!({"stop_sequences": ["x", "de"]}), "abc", "stop_sequence", json!("de")),
        (json!({"max_tokens": 1}), "a", "max_tokens", Value::Null),
        (json!({"adapter": [{"name": "a"}, {"name": "b"}], "max_tokens": 2}), "01", "max_tokens", Value::Null),
        (
            json!({"model": "org/base:a", "max_tokens": 2, "temperature": 0, "top_k": 1, "top_p": 0.5}),
            "AB",
            "max_tokens",
            Value::Null,
        ),
    ] {
        let body = ask(&server, more.clone()).json();
        assert_eq!(body["content"][0]["text"], text, "{more}: {body}");
        assert_eq!((&body["stop_reason"], &body["stop_sequence"]), (&json!(reason), &sequence), "{more}");
    }
}

#[test]
fn the_last_message_of_the_assistant_is_continued() {
    let server = start();
    let messages = json!([{"role": "user", "content": "."}, {"role": "assistant", "content": "vw"}]);
    let body = ask(&server, json!({"messages": messages})).json();
    assert_eq!(body["content"][0]["text"], "xyz", "{body}");
    let blocks = json!([{"type": "text", "text": "v"}, {"type": "text", "text": "w"}]);
    let messages = json!([{"role": "user", "content": "."}, {"role": "assistant", "content": blocks}]);
    assert_eq!(ask(&server, json!({"messages": messages})).json()["content"][0]["text"], "xyz");
}

#[test]
fn a_stream() {
    let server = start();
    let events = events_of(&ask(&server, json!({"stream": true, "stop_sequences": ["d"]})));
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(kinds[kinds.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let start = &events[0]["message"];
    assert_eq!(
        (&start["content"], &start["stop_reason"], &start["usage"]["output_tokens"]),
        (&json!([]), &Value::Null, &json!(0))
    );
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(text, "abc");
    let end = &events[events.len() - 2];
    assert_eq!(end["delta"], json!({"stop_reason": "stop_sequence", "stop_sequence": "d"}));
    let usage = &end["usage"];
    assert_eq!(usage["output_tokens"], 4);
    assert_eq!(
        usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap(),
        start["usage"]["input_tokens"].as_u64().unwrap()
    );
}

#[test]
fn a_stream_that_fails() {
    let server = start();
    let messages = json!([{"role": "user", "content": "?"}]);
    let events = events_of(&ask(&server, json!({"stream": true, "messages": messages})));
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("api_error")));
    assert!(last["error"]["message"].as_str().unwrap().contains(last["request_id"].as_str().unwrap()), "{last}");
    assert!(last["request_id"].as_str().is_some_and(|id| !id.is_empty()));
}

#[test]
fn a_forced_call_matches_its_schema() {
    let server = start();
    let schema = json!({"type": "object", "properties": {"n": {"enum": ["a"]}}, "required": ["n"],
                        "additionalProperties": false});
    let tools = json!([{"name": "pick", "description": "Picks.", "input_schema": schema, "cache_control": {"type": "ephemeral"}},
                       {"type": "custom", "name": "other", "input_schema": {"type": "object"}}]);
    let more =
        json!({"tools": tools, "tool_choice": {"type": "tool", "name": "pick"}, "temperature": 0, "max_tokens": 500});
    let body = ask(&server, more.clone()).json();
    let block = &body["content"][0];
    assert_eq!(
        (&block["type"], &block["name"], &block["input"]),
        (&json!("tool_use"), &json!("pick"), &json!({"n": "a"})),
        "{body}"
    );
    assert!(block["id"].as_str().unwrap().starts_with("toolu_"), "{block}");
    assert_eq!(body["stop_reason"], "tool_use");

    let mut streamed = more;
    streamed["stream"] = true.into();
    let events = events_of(&ask(&server, streamed));
    let json: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&json).unwrap(), json!({"n": "a"}));
    assert!(events.iter().any(|event| event["delta"]["stop_reason"] == "tool_use"));
}

#[test]
fn structured_output() {
    let server = start();
    let schema = json!({"type": "object", "properties": {"n": {"enum": ["a"]}}, "required": ["n"],
                        "additionalProperties": false});
    let more = json!({"output_config": {"format": {"type": "json_schema", "schema": schema}}, "temperature": 0, "max_tokens": 300});
    let body = ask(&server, more).json();
    let text = body["content"][0]["text"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(text).unwrap(), json!({"n": "a"}));
    assert_eq!(body["stop_reason"], "end_turn");
}

/// The prompts of conversations, as text between the marks of the fake model's template.
#[test]
fn conversations_become_chats() {
    let server = start();
    let count = |body: Value| server.post("/v1/messages/count_tokens", body).json()["input_tokens"].as_u64().unwrap();
    let chat = |messages: Value| {
        let body = json!({"messages": messages, "max_tokens": 1});
        server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let system = json!([{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]);
    let user =
        json!([{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]);
    assert_eq!(
        count(json!({"system": system, "messages": [{"role": "user", "content": user}]})),
        chat(json!([{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "a\nb"}]))
    );
    let call = json!([{"type": "text", "text": "I look."}, {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": 1}}]);
    let results = json!([
        {"type": "tool_result", "tool_use_id": "t1", "is_error": true, "content": [{"type": "text", "text": "dark"}]},
        {"type": "text", "text": "go on"},
    ]);
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": call},
                          {"role": "user", "content": results}]);
    let function = json!({"id": "t1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": 1}"}});
    assert_eq!(
        count(json!({"messages": messages})),
        chat(json!([
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "I look.", "tool_calls": [function]},
            {"role": "tool", "tool_call_id": "t1", "content": "Error: dark"},
            {"role": "user", "content": "go on"},
        ]))
    );
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let server = start();
    let blocks = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
    let tool = |more: Value| {
        let tool = merged(json!({"name": "f", "input_schema": {"type": "object"}}), &more);
        json!({"tools": [tool]})
    };
    for (more, says) in [
        (json!({"max_tokens": null}), "`max_tokens` is required"),
        (json!({"max_tokens": 0}), "`max_tokens` must be an integer of at least 1"),
        (json!({"temperature": 1.5}), "`temperature` must be a number from 0 to 1"),
        (json!({"stop_sequences": "x"}), "`stop_sequences` must be an array"),
        (json!({"stop_sequences": ["x", ""]}), "`stop_sequences[1]`"),
        (json!({"frequency_penalty": 1}), "unknown field `frequency_penalty`"),
        (json!({"container": "c"}), "`container`: the server runs no code"),
        (json!({"mcp_servers": [{"url": "x"}]}), "`mcp_servers`"),
        (json!({"speed": "fast"}), "`speed`"),
        (json!({"messages": []}), "`messages` must be an array of at least one message"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "`messages[0].role` must be \"user\""),
        (json!({"messages": [{"role": "user", "content": "x", "name": "y"}]}), "`messages[0].name`"),
        (json!({"messages": [{"role": "user"}]}), "`messages[0].content` is required"),
        (blocks(json!({"type": "image", "source": {}})), "`messages[0].content[0].type` must be"),
        (blocks(json!({"type": "document", "source": {}})), "the model reads only text"),
        (
            blocks(json!({"type": "tool_use", "id": "a", "name": "f", "input": {}})),
            "`messages[0].content[0].type` must be",
        ),
        (blocks(json!({"type": "tool_result", "content": "x"})), "`messages[0].content[0].tool_use_id` is required"),
        (blocks(json!({"type": "text"})), "`messages[0].content[0].text` is required"),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}),
            "encrypted",
        ),
        (
            json!({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]}),
            "the results of the last message's calls are missing",
        ),
        (json!({"system": [{"type": "image"}]}), "`system[0].type`"),
        (json!({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}), "\"web_search_20250305\""),
        (json!({"tools": [{"name": "f"}]}), "`tools[0].input_schema` is required"),
        (tool(json!({"input_schema": {"type": "array"}})), "`tools[0].input_schema.type`"),
        (tool(json!({"name": "a b"})), "`tools[0].name` must be"),
        (tool(json!({"defer_loading": true})), "`tools[0].defer_loading`"),
        (json!({"tool_choice": {"type": "any"}}), "`tool_choice` asks for a call, but the request has no `tools`"),
        (json!({"tool_choice": {"type": "required"}}), "`tool_choice.type` must be"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 20}}), "knows no thinking"),
        (json!({"thinking": {"type": "between_tools"}}), "`thinking.type` must be"),
        (json!({"thinking": {"type": "disabled", "budget_tokens": 40}}), "below `max_tokens` (40)"),
        (
            json!({"output_config": {"format": {"type": "json_schema", "schema": {"type": "odd"}}}}),
            "`output_config.format.schema",
        ),
        (json!({"output_config": {"effort": "low"}}), "`output_config.effort`"),
        (json!({"max_tokens": 5000}), "maximum context length is 3000 tokens"),
        (json!({"adapter": "b", "model": "a"}), "`adapter` selects another"),
    ] {
        let (status, kind, message) = error_of(&ask(&server, more.clone()));
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"), "{more}: {message}");
        assert!(message.contains(says), "{more}: {message}");
    }
    let (status, kind, _) = error_of(&ask(&server, json!({"model": "gone"})));
    assert_eq!((status, kind.as_str()), (404, "not_found_error"));
    let (status, kind, _) = error_of(&server.send("POST", "/v1/messages", &[], b"{"));
    assert_eq!((status, kind.as_str()), (400, "invalid_request_error"));
    let (status, _, message) =
        error_of(&server.post("/v1/messages/count_tokens", json!({"max_tokens": 1, "messages": []})));
    assert_eq!(status, 400);
    assert!(message.contains("`max_tokens`"), "{message}");
    assert_eq!(
        ask(&server, json!({"thinking": {"type": "disabled"}, "service_tier": "auto", "metadata": {"user_id": "u"}}))
            .status,
        200
    );
}

#[test]
fn keys_in_either_header() {
    let server = Server::with(Options { api_keys: vec!["one".into()], ..Options::default() });
    let body = json!({"model": BASE, "max_tokens": 1, "messages": [{"role": "user", "content": "."}]}).to_string();
    let post = |headers: &[(&str, &str)]| server.send("POST", "/v1/messages", headers, body.as_bytes());
    let (status, kind, _) = error_of(&post(&[]));
    assert_eq!((status, kind.as_str()), (401, "authentication_error"));
    for key in [("x-api-key", "one"), ("authorization", "Bearer one")] {
        let headers = [key, ("anthropic-version", "2023-06-01"), ("anthropic-beta", "tools-2024-04-04")];
        assert_eq!(post(&headers).status, 200, "{key:?}");
    }
}
