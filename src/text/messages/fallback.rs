//! Tools for models whose chat template does not know them.

use serde_json::{Value, json};

use super::ChatPrompt;
use crate::text::template::to_json;

/// The prompt for a template that does not know tools, in the form that Hermes models use: the system message lists the tools, a
/// call is JSON between `<tool_call>` and `</tool_call>`, and a result is JSON or text between `<tool_response>` and
/// `</tool_response>` in a message of the user.
pub fn with_tools_in_system_message(prompt: ChatPrompt) -> ChatPrompt {
    let mut messages: Vec<Value> = Vec::with_capacity(prompt.messages.len() + 1);
    let mut after_result = false;
    for mut message in prompt.messages {
        let is_result = message["role"] == "tool";
        if is_result {
            let result = format!("<tool_response>\n{}\n</tool_response>", text(&message));
            match messages.last_mut() {
                // The results of one answer's calls are one message: many templates insist on alternating roles.
                Some(last) if after_result => last["content"] = format!("{}\n{result}", text(last)).into(),
                _ => messages.push(json!({"role": "user", "content": result})),
            }
        } else {
            if let Some(calls) = message.as_object_mut().and_then(|message| message.remove("tool_calls")) {
                message["content"] = with_calls(text(&message), &calls).into();
            }
            messages.push(message);
        }
        after_result = is_result;
    }
    if let Some(list) = prompt.tools.filter(|tools| !tools.is_empty()) {
        let listed = instructions(&list);
        match messages.first_mut().filter(|first| first["role"] == "system" || first["role"] == "developer") {
            Some(system) => system["content"] = format!("{}\n\n{listed}", text(system)).into(),
            None => messages.insert(0, json!({"role": "system", "content": listed})),
        }
    }
    ChatPrompt { messages, tools: None, ..prompt }
}

fn text(message: &Value) -> &str {
    message["content"].as_str().unwrap_or_default()
}

fn with_calls(said: &str, calls: &Value) -> String {
    let calls = calls.as_array().into_iter().flatten().map(|call| {
        let call = json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]});
        format!("<tool_call>\n{}\n</tool_call>", to_json(&call))
    });
    let said = Some(said.to_owned()).filter(|said| !said.is_empty());
    said.into_iter().chain(calls).collect::<Vec<_>>().join("\n")
}

fn instructions(tools: &[Value]) -> String {
    let listed = tools.iter().map(to_json).collect::<Vec<_>>().join("\n");
    format!(
        "# Tools\n\nYou may call one or more functions to help with the user's request. Their signatures are within <tools></tools> \
         tags:\n<tools>\n{listed}\n</tools>\n\nFor each function call, return a JSON object with the function's name and \
         arguments within <tool_call></tool_call> tags:\n<tool_call>\n{{\"name\": <function-name>, \"arguments\": \
         <arguments-object>}}\n</tool_call>"
    )
}
