//! `/v1/responses`: replies, streams, stored responses, tools, refusals.

use serde_json::{Value, json};

use crate::harness::{Answer, Options, Server, merged};

/// A request over a valid base.
fn post(server: &Server, more: &Value) -> Answer {
    let body = merged(json!({"input": "x", "temperature": 0}), more);
    server.post("/v1/responses", body)
}

fn create(server: &Server, more: Value) -> Value {
    let answer = post(server, &more);
    assert_eq!(answer.status, 200, "{more}: {}", answer.text);
    answer.json()
}

/// All text of a response.
fn text(response: &Value) -> String {
    let items = response["output"].as_array().unwrap().iter();
    let parts = items.flat_map(|item| item["content"].as_array().cloned().unwrap_or_default());
    parts.map(|part| part["text"].as_str().unwrap().to_owned()).collect()
}

/// The events of a stream as `(name, data)`.
fn events(answer: &Answer) -> Vec<(String, Value)> {
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let event = |text: &str| {
        let (name, data) = text.strip_prefix("event: ").and_then(|text| text.split_once("\ndata: ")).expect("an event");
        (name.to_owned(), serde_json::from_str(data).expect("JSON"))
    };
    answer.text.split("\n\n").filter(|text| !text.is_empty()).map(event).collect()
}

/// The tokens of the prompt that a chat of these messages has.
fn prompt_tokens(server: &Server, messages: Value) -> Value {
    let answer = server.post("/v1/chat/completions", json!({"messages": messages, "max_tokens": 1}));
    answer.json()["usage"]["prompt_tokens"].clone()
}

/// A tool whose arguments can only be one text.
fn tools() -> Value {
    let city = json!({"type": "object", "properties": {"city": {"const": "rome"}}, "required": ["city"],
                      "additionalProperties": false});
    json!([{"type": "function", "name": "weather", "description": "Tells the weather.", "parameters": city}])
}

#[test]
fn a_whole_response() {
    let server = Server::start();
    let response = create(&server, json!({"model": "a", "max_output_tokens": 3, "metadata": {"k": "v"}, "user": "u"}));
    assert_eq!(text(&response), "ABC");
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("incomplete")),
        ("incomplete_details", json!({"reason": "max_output_tokens"})),
        ("error", Value::Null),
        ("model", json!("a")),
        ("adapter", json!("a")),
        ("metadata", json!({"k": "v"})),
        ("user", json!("u")),
        ("temperature", json!(0.0)),
        ("top_p", json!(1.0)),
        ("max_output_tokens", json!(3)),
        ("parallel_tool_calls", json!(true)),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("text", json!({"format": {"type": "text"}})),
        ("truncation", json!("disabled")),
        ("store", json!(true)),
        ("instructions", Value::Null),
        ("previous_response_id", Value::Null),
    ] {
        assert_eq!(response[field], value, "{field}");
    }
    assert!(response["adapter_generation"].is_string());
    let item = &response["output"][0];
    assert_eq!(
        (&item["type"], &item["role"], &item["status"]),
        (&json!("message"), &json!("assistant"), &json!("incomplete"))
    );
    let usage = &response["usage"];
    assert_eq!(usage["input_tokens"], prompt_tokens(&server, json!([{"role": "user", "content": "x"}])));
    assert_eq!((&usage["output_tokens"], &usage["output_tokens_details"]["reasoning_tokens"]), (&json!(3), &json!(0)));

    let response = create(&server, json!({}));
    assert_eq!((text(&response).as_str(), &response["status"]), ("abcdefghijklmnopqrstuvwxyz", &json!("completed")));
    assert!(response["completed_at"].as_u64() >= response["created_at"].as_u64());
}

#[test]
fn the_events_of_a_stream() {
    let server = Server::start();
    let answer = post(&server, &json!({"max_output_tokens": 2, "stream": true}));
    let events = events(&answer);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
    );
    for (number, (name, event)) in events.iter().enumerate() {
        assert_eq!((&event["type"], &event["sequence_number"]), (&json!(name), &json!(number)));
    }
    let deltas: String = events.iter().filter_map(|(_, event)| event["delta"].as_str()).collect();
    assert_eq!(deltas, "ab");
    let first = &events[0].1["response"];
    assert_eq!(
        (&first["status"], &first["output"], &first["usage"]),
        (&json!("in_progress"), &json!([]), &Value::Null)
    );
    let last = &events.last().unwrap().1["response"];
    assert_eq!((text(last), &last["id"], &last["usage"]["output_tokens"]), ("ab".into(), &first["id"], &json!(2)));
    assert_eq!(server.get(&format!("/v1/responses/{}", last["id"].as_str().unwrap())).json(), *last);

    let complete = post(&server, &json!({"input": "w", "instructions": "x", "stream": true, "stop": "d"}));
    assert!(complete.text.contains("event: response.completed\n"));
}

#[test]
fn a_broken_stream_ends_in_a_failed_response() {
    let server = Server::start();
    let answer = post(&server, &json!({"input": "?", "stream": true}));
    let events = events(&answer);
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["response.created", "response.in_progress", "error", "response.failed"]);
    assert!(events[2].1["message"].as_str().unwrap().contains("request id"));
    let failed = &events[3].1["response"];
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert_eq!(server.get(&format!("/v1/responses/{}", failed["id"].as_str().unwrap())).status, 404);
    assert_eq!(post(&server, &json!({"input": "?"})).error().0, 500);
}

#[test]
fn a_response_continues_another() {
    let server = Server::start();
    let first = create(&server, json!({"instructions": "Be brief.", "max_output_tokens": 2}));
    let second = create(&server, json!({"input": "y", "previous_response_id": first["id"], "max_output_tokens": 1}));
    assert_eq!(second["previous_response_id"], first["id"]);
    // Without the instructions of the first.
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab"},
                          {"role": "user", "content": "y"}]);
    assert_eq!(second["usage"]["input_tokens"], prompt_tokens(&server, messages));
    let third = create(
        &server,
        json!({"input": "z", "previous_response_id": second["id"], "instructions": "Be.", "max_output_tokens": 1, "store": false}),
    );
    let messages = json!([{"role": "system", "content": "Be."}, {"role": "user", "content": "x"},
                          {"role": "assistant", "content": "ab"}, {"role": "user", "content": "y"},
                          {"role": "assistant", "content": "a"}, {"role": "user", "content": "z"}]);
    assert_eq!(third["usage"]["input_tokens"], prompt_tokens(&server, messages));
    // A later response does not need the one before it.
    let id = |response: &Value| response["id"].as_str().unwrap().to_owned();
    assert_eq!(server.send("DELETE", &format!("/v1/responses/{}", id(&first)), &[], b"").status, 200);
    create(&server, json!({"previous_response_id": second["id"], "max_output_tokens": 1}));
    for gone in [&first, &third] {
        let (status, message, param, code) = post(&server, &json!({"previous_response_id": id(gone)})).error();
        assert_eq!((status, param, code), (404, json!("previous_response_id"), json!("previous_response_not_found")));
        assert!(message.contains("evicted"), "{message}");
    }
}

#[test]
fn references_to_stored_items() {
    let server = Server::start();
    let first = create(&server, json!({"max_output_tokens": 2}));
    let said = &first["output"][0]["id"];
    let asked = server.get(&format!("/v1/responses/{}/input_items", first["id"].as_str().unwrap())).json();
    let input = json!([{"type": "item_reference", "id": asked["data"][0]["id"]}, {"id": said}, {"role": "user", "content": "y"}]);
    let second = create(&server, json!({"input": input, "max_output_tokens": 1}));
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "ab"},
                          {"role": "user", "content": "y"}]);
    assert_eq!(second["usage"]["input_tokens"], prompt_tokens(&server, messages));
    let (status, _, param, code) =
        post(&server, &json!({"input": [{"type": "item_reference", "id": "msg_0"}]})).error();
    assert_eq!((status, param, code), (404, json!("input[0]"), json!("item_not_found")));
}

#[test]
fn stored_responses() {
    let server = Server::start();
    let input = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"},
                       {"role": "user", "content": [{"type": "input_text", "text": "z"}]}]);
    let response = create(&server, json!({"input": input, "max_output_tokens": 1}));
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(server.get(&path).json(), response);
    assert_eq!(server.get(&format!("{path}?include[]=message.output_text.logprobs")).status, 200);
    let list = |query: &str| server.get(&format!("{path}/input_items{query}")).json();
    let texts = |list: &Value| -> Vec<String> {
        list["data"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["content"][0]["text"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(texts(&list("")), ["z", "y", "x"]);
    let page = list("?order=asc&limit=2");
    assert_eq!((texts(&page), &page["has_more"]), (vec!["x".to_owned(), "y".to_owned()], &json!(true)));
    let rest = list(&format!("?order=asc&after={}", page["last_id"].as_str().unwrap()));
    assert_eq!((texts(&rest), &rest["has_more"]), (vec!["z".to_owned()], &json!(false)));
    assert_eq!(rest["data"][0]["type"], "message");

    let (status, message, _, _) = server.send("POST", &format!("{path}/cancel"), &[], b"").error();
    assert_eq!(status, 400);
    assert!(message.contains("background"), "{message}");
    for (query, param) in [("?stream=true", "stream"), ("?starting_after=1", "starting_after"), ("?shape=1", "shape")] {
        assert_eq!(server.get(&format!("{path}{query}")).error().2, param);
    }
    assert_eq!(server.get(&format!("{path}/input_items?after=msg_0")).error().2, "after");
    let deleted = server.send("DELETE", &path, &[], b"").json();
    assert_eq!(deleted, json!({"id": response["id"], "object": "response", "deleted": true}));
    for (method, path) in [
        ("GET", path.clone()),
        ("DELETE", path.clone()),
        ("GET", format!("{path}/input_items")),
        ("POST", format!("{path}/cancel")),
    ] {
        let (status, _, _, code) = server.send(method, &path, &[], b"").error();
        assert_eq!((status, code), (404, json!("response_not_found")), "{method} {path}");
    }
    // A client's id is not taken from another response.
    let mine = json!({"request_id": "mine", "max_output_tokens": 1});
    assert_eq!(create(&server, mine.clone())["id"], "resp_mine");
    let (status, _, param, _) = post(&server, &mine).error();
    assert_eq!((status, param), (409, json!("request_id")));
}

#[test]
fn stored_responses_need_a_key() {
    let server = Server::with(Options { api_keys: vec!["one".into()], ..Options::default() });
    for (method, path) in
        [("GET", "/v1/responses/resp_1"), ("DELETE", "/v1/responses/resp_1"), ("POST", "/v1/responses")]
    {
        assert_eq!(server.send(method, path, &[], b"{}").status, 401, "{method} {path}");
    }
}

#[test]
fn a_tool_is_called_and_answered() {
    // The tools stand in the prompt.
    let server = Server::with(Options { max_model_len: 2048, ..Options::default() });
    for choice in [json!("required"), json!({"type": "function", "name": "weather"})] {
        let more = json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false});
        let response = create(&server, more.clone());
        assert_eq!(
            (&response["status"], &response["tools"], &response["tool_choice"]),
            (&json!("completed"), &tools(), &choice)
        );
        let output = response["output"].as_array().unwrap();
        assert_eq!(output.len(), 1, "{response}");
        let call = &output[0];
        assert_eq!(
            (&call["type"], &call["name"], &call["status"]),
            (&json!("function_call"), &json!("weather"), &json!("completed"))
        );
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "rome"}));
        assert!(call["call_id"].as_str().unwrap().starts_with("call_"));

        let result = json!({"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"});
        let next = json!({"input": [result], "previous_response_id": response["id"], "tools": tools(), "max_output_tokens": 3});
        let answer = create(&server, next);
        assert_eq!(text(&answer), "abc");
        // The same, without a stored response.
        let input = json!([{"role": "user", "content": "x"}, call, result]);
        let again = create(&server, json!({"input": input, "tools": tools(), "max_output_tokens": 3, "store": false}));
        assert_eq!(again["usage"]["input_tokens"], answer["usage"]["input_tokens"]);

        let mut streamed = more;
        streamed["stream"] = true.into();
        let events = events(&post(&server, &streamed));
        let of =
            |name: &str| events.iter().filter(|(n, _)| n == name).map(|(_, event)| event.clone()).collect::<Vec<_>>();
        let deltas = of("response.function_call_arguments.delta");
        assert!(deltas.len() > 2, "the arguments come in pieces");
        let joined: String = deltas.iter().map(|event| event["delta"].as_str().unwrap()).collect();
        let done = &of("response.function_call_arguments.done")[0];
        assert_eq!((done["arguments"].as_str(), &done["name"]), (Some(joined.as_str()), &json!("weather")));
        assert_eq!(of("response.completed")[0]["response"]["output"][0], of("response.output_item.done")[0]["item"]);
    }
}

#[test]
fn structured_output_and_log_probabilities() {
    let server = Server::start();
    let format = json!({"type": "json_schema", "name": "n", "schema": {"const": "rome"}, "strict": true});
    let response = create(&server, json!({"text": {"format": format}}));
    assert_eq!(text(&response), "\"rome\"");
    assert_eq!(response["text"]["format"]["name"], "n");
    assert_eq!(text(&create(&server, json!({"structured_outputs": {"choice": ["yes"]}}))), "yes");

    let include = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 2});
    let response = create(&server, include.clone());
    let logprobs = &response["output"][0]["content"][0]["logprobs"];
    assert_eq!((&logprobs[0]["token"], &logprobs[1]["token"]), (&json!("a"), &json!("b")));
    assert_eq!((&logprobs[0]["bytes"], logprobs[0]["top_logprobs"].as_array().map(Vec::len)), (&json!([97]), Some(2)));
    let mut streamed = include;
    streamed["stream"] = true.into();
    let events = events(&post(&server, &streamed));
    let deltas: Vec<Value> = events
        .iter()
        .filter(|(_, event)| event["delta"].is_string())
        .map(|(_, event)| event["logprobs"][0].clone())
        .collect();
    assert_eq!(Value::from(deltas), *logprobs);
}

#[test]
fn errors_name_the_fields_of_the_request() {
    let server = Server::start();
    let strict = json!({"type": "json_schema", "name": "n", "schema": {"type": "nonsense"}});
    let broken = json!({"type": "function", "name": "f", "parameters": {"type": "nonsense"}});
    let call = json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "not JSON"});
    for (more, param, what) in [
        (json!({"input": null}), "input", "is required"),
        (json!({"input": "x".repeat(300)}), "input", "maximum context length"),
        (json!({"max_output_tokens": 300}), "max_output_tokens", "maximum context length"),
        (json!({"max_output_tokens": 3, "min_tokens": 4}), "min_tokens", "`max_output_tokens` (3)"),
        (json!({"temperature": 3}), "temperature", "from 0 to 2"),
        (json!({"text": {"format": strict}}), "text.format.schema", "nonsense"),
        (json!({"tools": [broken]}), "tools[0].parameters.type", "\"object\""),
        (json!({"tool_choice": "required"}), "tool_choice", "no `tools`"),
        (json!({"tools": tools(), "tool_choice": {"type": "function", "name": "g"}}), "tool_choice.name", "g"),
        (json!({"input": [{"role": "user", "content": "x"}, call]}), "input[1].arguments", "a JSON object"),
        (json!({"reasoning": {"effort": "high"}}), "reasoning.effort", "template"),
        (json!({"top_logprobs": 30, "include": ["message.output_text.logprobs"]}), "top_logprobs", "from 0 to 20"),
        (json!({"background": true}), "background", "stream"),
        (json!({"frobnicate": true}), "frobnicate", "/v1/responses"),
        (json!({"max_output_token": 3}), "max_output_token", "did you mean `max_output_tokens`?"),
        (json!({"stream_options": {"include_obfuscation": true}}), "stream_options", "stream"),
    ] {
        let (status, message, got, _) = post(&server, &more).error();
        assert_eq!((status, &got), (400, &json!(param)), "{more}: {message}");
        assert!(message.contains(what), "{more}: {message}");
    }
    let (status, _, _, code) = post(&server, &json!({"model": "nope"})).error();
    assert_eq!((status, code), (404, json!("model_not_found")));
}
