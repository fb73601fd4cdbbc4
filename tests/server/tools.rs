//! Tool calls over HTTP. The fake model writes letters of its own accord; a grammar makes it write a call.

use serde_json::{Value, json};

use crate::harness::{Options, Server, merged};

/// A server whose context takes the instructions for tools, of a token a byte.
fn server() -> Server {
    Server::with(Options { max_model_len: 2048, ..Options::default() })
}

fn chat(server: &Server, more: Value) -> Value {
    let body =
        merged(json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 0}), &more);
    let answer = server.post("/v1/chat/completions", body);
    assert_eq!(answer.status, 200, "{more}: {}", answer.text);
    answer.json()
}

/// A tool whose arguments can only be one text.
fn tools() -> Value {
    let city = json!({"type": "object", "properties": {"city": {"const": "rome"}}, "required": ["city"],
                      "additionalProperties": false});
    let function = json!({"name": "weather", "description": "Tells the weather.", "parameters": city});
    json!([{"type": "function", "function": function}])
}

#[test]
fn a_required_call() {
    let server = server();
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, reason) in [(json!("required"), "tool_calls"), (named, "stop")] {
        let more = json!({"tools": tools(), "tool_choice": choice, "parallel_tool_calls": false});
        let body = chat(&server, more);
        let choice = &body["choices"][0];
        assert_eq!(choice["finish_reason"], reason, "{body}");
        let message = &choice["message"];
        assert_eq!(message["content"], Value::Null, "{body}");
        assert_eq!(message["tool_calls"].as_array().map(Vec::len), Some(1), "{body}");
        let call = &message["tool_calls"][0];
        assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("weather")));
        assert!(call["id"].as_str().unwrap().starts_with("call_"));
        let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        assert_eq!(arguments, json!({"city": "rome"}));
    }
}

#[test]
fn a_call_that_a_stop_string_cuts_is_not_made() {
    let server = server();
    let body = chat(&server, json!({"tools": tools(), "tool_choice": "required", "stop": "rom"}));
    let choice = &body["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!("rom")), "{body}");
}

#[test]
fn streamed_calls_are_the_whole_ones() {
    let server = server();
    let mut body =
        json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 200, "temperature": 0, "stream": true});
    body["tools"] = tools();
    body["tool_choice"] = "required".into();
    body["parallel_tool_calls"] = false.into();
    let chunks = server.post("/v1/chat/completions", body).events();
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let changes: Vec<&Value> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].get(0)).collect();
    assert_eq!((&changes[0]["index"], &changes[0]["function"]["name"]), (&json!(0), &json!("weather")));
    assert!(changes[0]["id"].as_str().unwrap().starts_with("call_"));
    assert!(changes[1..].iter().all(|change| change.get("id").is_none()));
    let arguments: String = changes.iter().map(|change| change["function"]["arguments"].as_str().unwrap()).collect();
    assert_eq!(serde_json::from_str::<Value>(&arguments).unwrap(), json!({"city": "rome"}));
    assert!(changes.len() > 2, "the arguments come in pieces");
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn the_older_form_of_functions() {
    let server = server();
    let function = tools()[0]["function"].clone();
    let body = chat(&server, json!({"functions": [function], "function_call": {"name": "weather"}}));
    let call = &body["choices"][0]["message"]["function_call"];
    assert_eq!(call["name"], "weather", "{body}");
    assert_eq!(serde_json::from_str::<Value>(call["arguments"].as_str().unwrap()).unwrap(), json!({"city": "rome"}));
}

#[test]
fn without_a_call_the_answer_is_content() {
    let server = server();
    for choice in ["auto", "none"] {
        let body = chat(&server, json!({"tools": tools(), "tool_choice": choice, "max_tokens": 3}));
        assert_eq!(body["choices"][0]["message"]["content"], "abc", "{body}");
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert_eq!(body["choices"][0]["message"].get("tool_calls"), None);
    }
    // A result of a call goes back to the model.
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"rome\"}"}});
    let messages = json!([{"role": "user", "content": "x"}, {"role": "assistant", "content": null, "tool_calls": [call]},
                          {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]);
    let body = chat(&server, json!({"messages": messages, "tools": tools(), "max_tokens": 3}));
    assert_eq!(body["choices"][0]["message"]["content"], "abc");
}

#[test]
fn refusals_name_the_field() {
    let server = server();
    let refuse = |more: Value| {
        let body = merged(json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}), &more);
        let (status, message, param, _) = server.post("/v1/chat/completions", body).error();
        assert_eq!(status, 400, "{more}: {message}");
        param
    };
    assert_eq!(refuse(json!({"tool_choice": "required"})), "tool_choice");
    assert_eq!(refuse(json!({"tools": tools(), "grammar": "root ::= \"a\""})), "grammar");
    assert_eq!(refuse(json!({"tools": tools(), "structured_outputs": {"regex": "a"}})), "structured_outputs.regex");
    let named = json!({"type": "function", "function": {"name": "other"}});
    assert_eq!(refuse(json!({"tools": tools(), "tool_choice": named})), "tool_choice.function.name");
    let mut broken = tools();
    broken[0]["function"]["parameters"]["properties"] = json!({"a": {"type": "nonsense"}});
    let param = refuse(json!({"tools": broken, "tool_choice": "required"}));
    assert!(param.as_str().is_some_and(|param| param.starts_with("tools[0]")), "{param}");
}
