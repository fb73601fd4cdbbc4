use super::*;

fn parsed(message: Value) -> Result<Value> {
    Ok(ChatPrompt::from_body(&json!({"messages": [message]}))?.messages.remove(0))
}

#[test]
fn messages_are_read_in_the_form_that_templates_expect() {
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{\"b\": 1, \"a\": 2}"}});
    for (given, read) in [
        (
            json!({"role": "critic", "content": ["a", {"type": "input_text", "text": "b"}], "name": "ann"}),
            json!({"role": "critic", "content": "a\nb", "name": "ann"}),
        ),
        (
            json!({"role": "assistant", "content": null, "tool_calls": [call], "refusal": null, "audio": null,
                   "annotations": [], "function_call": null}),
            json!({"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function",
                   "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}]}),
        ),
        (
            json!({"role": "assistant", "function_call": {"name": "now", "arguments": ""}}),
            json!({"role": "assistant", "content": "", "tool_calls": [{"id": "call00000", "type": "function",
                   "function": {"name": "now", "arguments": {}}}]}),
        ),
        (
            json!({"role": "tool", "content": "3", "tool_call_id": "c1"}),
            json!({"role": "tool", "content": "3", "tool_call_id": "c1"}),
        ),
        (
            json!({"role": "assistant", "content": "4", "reasoning": "2+2", "tool_calls": []}),
            json!({"role": "assistant", "content": "4", "reasoning_content": "2+2"}),
        ),
        (json!({"role": "assistant", "refusal": "no"}), json!({"role": "assistant", "content": "no"})),
        (
            json!({"role": "assistant", "content": "x", "tool_plan": "p"}),
            json!({"role": "assistant", "content": "x", "tool_plan": "p"}),
        ),
    ] {
        assert_eq!(parsed(given.clone()).unwrap(), read, "{given}");
    }
    let legacy = json!([{"role": "assistant", "function_call": {"name": "f"}}, {"role": "function", "name": "f", "content": "1"}]);
    let read = read_messages(legacy.as_array().unwrap(), &[]).unwrap();
    assert_eq!(read[1], json!({"role": "tool", "content": "1", "name": "f", "tool_call_id": "call00000"}));
    assert_eq!(read[0]["tool_calls"][0]["id"], "call00000");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let call = |function: Value| json!({"role": "assistant", "tool_calls": [{"function": function}]});
    for (message, param) in [
        (json!({"role": " ", "content": "x"}), "messages[0].role"),
        (json!({"role": "assistant"}), "messages[0].content"),
        (json!({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}), "messages[0].content[0].type"),
        (json!({"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}), "messages[0].content[0].b"),
        (json!({"role": "user", "content": "x", "audio": {"id": "a"}}), "messages[0].audio"),
        (json!({"role": "user", "contents": "x"}), "messages[0].contents"),
        (json!({"role": "assistant", "content": "x", "refusal": "y"}), "messages[0].refusal"),
        (
            json!({"role": "assistant", "content": "x", "reasoning": "a", "reasoning_content": "b"}),
            "messages[0].reasoning",
        ),
        (json!({"role": "user", "content": "x", "prefix": true}), "messages[0].prefix"),
        (
            json!({"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}),
            "messages[0].tool_calls",
        ),
        (call(json!({"name": "f", "arguments": "{"})), "messages[0].tool_calls[0].function.arguments"),
        (call(json!({"name": "f", "arguments": "[1]"})), "messages[0].tool_calls[0].function.arguments"),
        (call(json!({"arguments": "{}"})), "messages[0].tool_calls[0].function.name"),
        (
            json!({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}),
            "messages[0].tool_calls[0].custom",
        ),
    ] {
        let error = parsed(message.clone()).expect_err(&message.to_string());
        assert_eq!(error.param.as_deref(), Some(param), "{message}: {error}");
    }
}

#[test]
fn tools_go_into_the_system_message_of_models_that_do_not_know_them() {
    let body = json!({"messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+2, and the time?"},
        {"role": "assistant", "content": "Yes.", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}},
            {"id": "b", "type": "function", "function": {"name": "now"}},
        ]},
        {"role": "tool", "tool_call_id": "a", "content": "3"},
        {"role": "tool", "tool_call_id": "b", "content": "noon"},
    ]});
    let mut prompt = ChatPrompt::from_body(&body).unwrap();
    prompt.tools = Some(vec![json!({"type": "function", "function": {"name": "add"}})]);
    let ChatPrompt { messages, tools, .. } = with_tools_in_system_message(prompt);
    assert_eq!((messages.len(), tools), (4, None));
    let system = messages[0]["content"].as_str().unwrap();
    assert!(system.starts_with("Be brief.\n\n# Tools"), "{system}");
    assert!(system.contains("\n{\"type\": \"function\", \"function\": {\"name\": \"add\"}}\n</tools>"), "{system}");
    assert_eq!(
        messages[2],
        json!({"role": "assistant", "content": "Yes.\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n\
               </tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>"})
    );
    assert_eq!(
        messages[3],
        json!({"role": "user", "content": "<tool_response>\n3\n</tool_response>\n<tool_response>\nnoon\n</tool_response>"})
    );
}
