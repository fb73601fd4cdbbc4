//! A request of `/v1/responses` as one of `/v1/chat/completions`.

use serde_json::{Map, Value, json};

use super::input::{Conversation, MessageSource};
use super::store::ResponseStore;
use crate::error::ErrorKind;
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// Fields that mean the same in a chat.
const PASSED: &[&str] = &[
    "model",
    "adapter",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "service_tier",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
    "include_stop_str_in_output",
    "include_reasoning",
    "structured_outputs",
    "chat_template_kwargs",
    "priority",
    "cache_salt",
    "request_id",
];

/// Fields that the reply repeats as they are, or as `null`.
const REPEATED: &[&str] = &[
    "instructions",
    "previous_response_id",
    "max_output_tokens",
    "max_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "user",
];

/// What `include` may ask for. All but the log-probabilities are parts of items that no reply has: those of built-in tools,
/// images, and encrypted reasoning, whose text stands in the item itself.
const INCLUDABLE: &[&str] = &[
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
];

const LOGPROBS: &str = "message.output_text.logprobs";

/// Limits of `metadata`, which are OpenAI's: pairs, characters of a key, characters of a value.
const MAX_METADATA: (usize, usize, usize) = (16, 64, 512);

/// A request whose own fields are checked. The chat checks the rest.
pub(super) struct ResponseRequest {
    /// The body of the chat.
    pub(super) chat: Value,
    /// Fields of the request that the reply repeats.
    pub(super) repeated: Map<String, Value>,
    /// The conversation, without its messages.
    pub(super) conversation: Conversation,
    /// The reply is to be stored.
    pub(super) store: bool,
    /// The names of the chat's fields.
    pub(super) names: FieldNames,
}

impl ResponseRequest {
    /// Reads a request whose fields are all known.
    ///
    /// # Errors
    /// `Invalid`, naming the field; `NotFound` if an earlier response or item is not in `store`.
    pub(super) fn parse(body: &Fields, store: &ResponseStore) -> Result<Self> {
        let mut conversation = Conversation::parse(body, store)?;
        let names = FieldNames(std::mem::take(&mut conversation.sources));
        let mut chat = Map::new();
        chat.insert("messages".into(), std::mem::take(&mut conversation.messages).into());
        let mut add = |name: &str, value: Option<Value>| {
            value.and_then(|value| chat.insert(name.to_owned(), value));
        };
        PASSED.iter().for_each(|name| add(name, body.get(name).cloned()));
        add("max_completion_tokens", body.integer("max_output_tokens", 1..=i64::MAX)?.map(Value::from));
        add("logprobs", includes_logprobs(body)?.then_some(true.into()));
        add("top_logprobs", body.get("top_logprobs").cloned());
        add("response_format", response_format(body)?);
        add("reasoning_effort", reasoning_effort(body)?.map(Value::from));
        add("tools", tools(body)?);
        add("tool_choice", tool_choice(body)?);
        let store_reply = body.boolean("store")?.unwrap_or(true);
        if let Some(id) = body.string("request_id")?.filter(|id| store.contains(&super::response_id(id))) {
            let message =
                format!("`request_id`: there is a stored response of the id {id:?}: give another one, or none");
            return Err(Error::new(ErrorKind::Conflict, message).param("request_id").code("request_id_in_use"));
        }
        Ok(Self { chat: chat.into(), repeated: repeated(body)?, conversation, store: store_reply, names })
    }
}

/// The fields of the reply that come from the request.
fn repeated(body: &Fields) -> Result<Map<String, Value>> {
    let mut repeated = Map::new();
    let given = |name: &str| body.get(name).cloned();
    for name in REPEATED {
        repeated.insert((*name).to_owned(), given(name).unwrap_or(Value::Null));
    }
    let mut text = body.object("text")?.map_or(json!({}), |_| given("text").unwrap_or_default());
    if text["format"].is_null() {
        text["format"] = json!({"type": "text"});
    }
    let reasoning = body.object("reasoning")?;
    let part = |name: &str| reasoning.as_ref().and_then(|r| r.get(name)).cloned().unwrap_or(Value::Null);
    for (name, value) in [
        ("metadata", metadata(body)?),
        ("parallel_tool_calls", given("parallel_tool_calls").unwrap_or(true.into())),
        ("reasoning", json!({"effort": part("effort"), "summary": part("summary")})),
        ("text", text),
        ("tool_choice", given("tool_choice").unwrap_or("auto".into())),
        ("tools", given("tools").unwrap_or(json!([]))),
        ("top_logprobs", given("top_logprobs").unwrap_or(0.into())),
        ("truncation", "disabled".into()),
    ] {
        repeated.insert(name.to_owned(), value);
    }
    Ok(repeated)
}

fn metadata(body: &Fields) -> Result<Value> {
    let (pairs, key, value) = MAX_METADATA;
    let allowed =
        format!("at most {pairs} strings of at most {value} characters, with keys of at most {key} characters");
    let Some(metadata) = body.object("metadata")? else { return Ok(json!({})) };
    let fits = |name: &str, text: &str| name.chars().count() <= key && text.chars().count() <= value;
    for name in metadata.names() {
        if metadata.string(name)?.is_none_or(|text| !fits(name, text)) {
            return Err(fields::wrong("metadata", &allowed, body.get("metadata").unwrap_or(&Value::Null)));
        }
    }
    if metadata.names().count() > pairs {
        return Err(fields::wrong("metadata", &allowed, &metadata.names().count().into()));
    }
    Ok(body.get("metadata").cloned().unwrap_or_default())
}

/// Whether `include` asks for log-probabilities.
fn includes_logprobs(body: &Fields) -> Result<bool> {
    let mut wanted = false;
    for (i, value) in body.array("include")?.unwrap_or_default().iter().enumerate() {
        let name = value.as_str().filter(|name| INCLUDABLE.contains(name));
        let allowed = || format!("one of {}", INCLUDABLE.join(", "));
        wanted |= name.ok_or_else(|| fields::wrong(&format!("include[{i}]"), &allowed(), value))? == LOGPROBS;
    }
    if !wanted && body.integer("top_logprobs", 0..=i64::MAX)?.is_some_and(|top| top > 0) {
        let message = format!("`top_logprobs` is only allowed with `include`: [\"{LOGPROBS}\"]");
        return Err(Error::invalid(message).param("top_logprobs").code("invalid_value"));
    }
    Ok(wanted)
}

/// The chat's `response_format`, from `text.format`.
fn response_format(body: &Fields) -> Result<Option<Value>> {
    const TYPES: &str = "\"text\", \"json_object\" or \"json_schema\"";
    let Some(text) = body.object("text")? else { return Ok(None) };
    fields::check_only(&text, &["format", "verbosity"])?;
    match text.string("verbosity")? {
        None | Some("medium") => {}
        Some(_) => {
            let message =
                "`text.verbosity`: say in `instructions` how long the answer should be, or set `max_output_tokens`";
            return Err(Error::invalid(message).param("text.verbosity").code("unsupported_parameter"));
        }
    }
    let Some(format) = text.object("format")? else { return Ok(None) };
    match format.required("type", format.string("type")?, TYPES)? {
        kind @ ("text" | "json_object") => {
            fields::check_only(&format, &["type"])?;
            Ok(Some(json!({"type": kind})))
        }
        kind @ "json_schema" => {
            fields::check_only(&format, &["type", "name", "description", "schema", "strict"])?;
            let mut schema = Map::new();
            for name in ["name", "description", "schema", "strict"] {
                format.get(name).and_then(|value| schema.insert(name.to_owned(), value.clone()));
            }
            Ok(Some(json!({"type": kind, "json_schema": schema})))
        }
        other => Err(fields::wrong("text.format.type", TYPES, &other.into())),
    }
}

/// The chat's `reasoning_effort`. A summary is not made: the reply has the thinking itself.
fn reasoning_effort<'a>(body: &Fields<'a>) -> Result<Option<&'a str>> {
    const SUMMARIES: &str = "\"auto\", \"concise\" or \"detailed\"";
    let Some(reasoning) = body.object("reasoning")? else { return Ok(None) };
    fields::check_only(&reasoning, &["effort", "summary", "generate_summary", "context", "mode"])?;
    for name in ["summary", "generate_summary"] {
        if let Some(word) = reasoning.string(name)?.filter(|word| !["auto", "concise", "detailed"].contains(word)) {
            return Err(fields::wrong(&reasoning.path_of(name), SUMMARIES, &word.into()));
        }
    }
    for (name, only) in [("context", "auto"), ("mode", "standard")] {
        if reasoning.string(name)?.is_some_and(|word| word != only) {
            let path = reasoning.path_of(name);
            let message = format!("`{path}`: only {only:?} is supported, because the model's chat template decides");
            return Err(Error::invalid(message).param(path).code("unsupported_parameter"));
        }
    }
    reasoning.string("effort")
}

/// The chat's `tools`: a function is an object of its own there.
fn tools(body: &Fields) -> Result<Option<Value>> {
    let Some(tools) = body.array("tools")? else { return Ok(None) };
    let tool = |(i, value): (usize, &Value)| {
        let tool = Fields::of_value(value, format!("tools[{i}]"))?;
        check_function(&tool)?;
        const NAMES: [&str; 4] = ["name", "description", "parameters", "strict"];
        // Fields for OpenAI's own tools: only a value that asks for nothing is allowed.
        let neutral = [
            ("allowed_callers", json!(["direct"])),
            ("defer_loading", false.into()),
            ("async", false.into()),
            ("output_schema", json!({})),
        ];
        let known: Vec<&str> = ["type"].into_iter().chain(NAMES).chain(neutral.iter().map(|(name, _)| *name)).collect();
        fields::check_only(&tool, &known)?;
        for (name, neutral) in neutral {
            if tool.get(name).is_some_and(|value| *value != neutral) {
                let path = tool.path_of(name);
                let message = format!("`{path}` is not supported: remove it");
                return Err(Error::invalid(message).param(path).code("unsupported_parameter"));
            }
        }
        let function: Map<String, Value> =
            NAMES.iter().filter_map(|name| Some(((*name).to_owned(), tool.get(name)?.clone()))).collect();
        Ok(json!({"type": "function", "function": function}))
    };
    Ok(Some(tools.iter().enumerate().map(tool).collect::<Result<Vec<_>>>()?.into()))
}

/// The chat's `tool_choice`.
fn tool_choice(body: &Fields) -> Result<Option<Value>> {
    let Some(value @ Value::Object(_)) = body.get("tool_choice") else { return Ok(body.get("tool_choice").cloned()) };
    let choice = Fields::of_value(value, "tool_choice")?;
    if choice.string("type")? != Some("allowed_tools") {
        return chosen(&choice).map(Some);
    }
    fields::check_only(&choice, &["type", "mode", "tools"])?;
    let tools = choice.required("tools", choice.array("tools")?, "an array of at least one tool")?;
    let tool = |(i, value)| chosen(&Fields::of_value(value, format!("tool_choice.tools[{i}]"))?);
    let tools = tools.iter().enumerate().map(tool).collect::<Result<Vec<_>>>()?;
    let allowed = json!({"mode": choice.get("mode"), "tools": tools});
    Ok(Some(json!({"type": "allowed_tools", "allowed_tools": allowed})))
}

/// `{"type": "function", "name": ...}` in the chat's form.
fn chosen(choice: &Fields) -> Result<Value> {
    check_function(choice)?;
    fields::check_only(choice, &["type", "name"])?;
    let name = choice.required("name", choice.get("name"), "the name of the function")?;
    Ok(json!({"type": "function", "function": {"name": name}}))
}

fn check_function(object: &Fields) -> Result<()> {
    let kind = object.required("type", object.string("type")?, "\"function\"")?;
    if kind == "function" {
        return Ok(());
    }
    let path = object.path_of("type");
    let message = format!(
        "`{path}`: tools of the type {kind:?} are not supported, because the server has no tools of its own; give tools of the \
         type \"function\""
    );
    Err(Error::invalid(message).param(path).code("unsupported_value"))
}

/// What the fields of the chat are called in the request, for errors.
pub(super) struct FieldNames(Vec<MessageSource>);

impl FieldNames {
    /// An error of the chat, with the names of the request.
    pub(super) fn rename(&self, mut error: Error) -> Error {
        let Some(param) = error.param.take() else { return error };
        // Every second part stands between backticks.
        let parts = error.message.split('`').enumerate();
        let parts = parts.map(|(i, part)| if i % 2 == 1 { self.name(part) } else { part.to_owned() });
        error.message = parts.collect::<Vec<_>>().join("`");
        error.param(self.name(&param))
    }

    fn name(&self, param: &str) -> String {
        if let Some(name) = param.strip_prefix("messages").and_then(|rest| self.message(rest)) {
            return name;
        }
        for (chat, ours) in [
            ("max_completion_tokens", "max_output_tokens"),
            ("max_tokens", "max_output_tokens"),
            ("response_format.json_schema", "text.format"),
            ("response_format", "text.format"),
            ("reasoning_effort", "reasoning.effort"),
            ("logprobs", "include"),
            ("tool_choice.allowed_tools", "tool_choice"),
        ] {
            if let Some(rest) = param.strip_prefix(chat).filter(|rest| rest.is_empty() || rest.starts_with('.')) {
                return format!("{ours}{rest}").replace(".function", "");
            }
        }
        if param.starts_with("tool") { param.replace(".function", "") } else { param.to_owned() }
    }

    /// The name of `messages` with `rest` behind it, such as `[2].content`.
    fn message(&self, rest: &str) -> Option<String> {
        if rest.is_empty() {
            return Some("input".to_owned());
        }
        let (index, rest) = rest.strip_prefix('[')?.split_once(']')?;
        let source = self.0.get(index.parse::<usize>().ok()?)?;
        let call = || {
            let (index, rest) = rest.strip_prefix(".tool_calls[")?.split_once(']')?;
            let item = source.calls.get(index.parse::<usize>().ok()?)?;
            Some(format!("{item}{}", rest.strip_prefix(".function").unwrap_or(rest)))
        };
        let within =
            || if source.item.starts_with("input[") { format!("{}{rest}", source.item) } else { source.item.clone() };
        Some(call().unwrap_or_else(within))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::field_table::{CHAT_COMPLETIONS, RESPONSES};

    fn parse(more: Value) -> Result<ResponseRequest> {
        let mut body = json!({"input": "x"});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let body = Fields::of_body(&body)?;
        RESPONSES.check(&body)?;
        ResponseRequest::parse(&body, &ResponseStore::default())
    }

    #[test]
    fn passed_fields_are_in_both_tables() {
        for name in PASSED {
            let body = json!({*name: 1});
            let body = Fields::of_body(&body).unwrap();
            RESPONSES.check(&body).unwrap();
            CHAT_COMPLETIONS.check(&body).unwrap();
        }
    }

    #[test]
    fn a_request_becomes_a_chat() {
        let schema = json!({"type": "object"});
        let more = json!({
            "instructions": "Be brief.", "max_output_tokens": 5, "seed": 1, "top_logprobs": 2,
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
            "text": {"format": {"type": "json_schema", "name": "n", "strict": true, "schema": schema}, "verbosity": "medium"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "tools": [{"type": "function", "name": "f", "parameters": schema, "strict": null, "defer_loading": false}],
            "tool_choice": {"type": "function", "name": "f"}, "metadata": {"a": "b"},
        });
        let request = parse(more).unwrap();
        assert_eq!(
            request.chat,
            json!({
                "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}],
                "seed": 1, "max_completion_tokens": 5, "logprobs": true, "top_logprobs": 2,
                "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": true}},
                "reasoning_effort": "low",
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            })
        );
        assert_eq!(request.repeated["metadata"], json!({"a": "b"}));
        assert_eq!(request.repeated["text"]["format"]["name"], "n");
        let allowed = json!({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}});
        assert_eq!(
            parse(allowed).unwrap().chat["tool_choice"]["allowed_tools"],
            json!({"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]})
        );
    }

    #[test]
    fn what_is_not_done_is_refused_by_name() {
        for (more, param) in [
            (json!({"background": true}), "background"),
            (json!({"conversation": "conv_1"}), "conversation"),
            (json!({"prompt": {"id": "pmpt_1"}}), "prompt"),
            (json!({"truncation": "auto"}), "truncation"),
            (json!({"max_tokens": 5}), "max_tokens"),
            (json!({"messages": [{}]}), "messages"),
            (json!({"n": 2}), "n"),
            (json!({"include": ["everything"]}), "include[0]"),
            (json!({"top_logprobs": 1}), "top_logprobs"),
            (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
            (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
            (json!({"text": {"format": {"type": "json_schema", "json_schema": {}}}}), "text.format.json_schema"),
            (json!({"reasoning": {"summary": "long"}}), "reasoning.summary"),
            (json!({"reasoning": {"context": "all_turns"}}), "reasoning.context"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (json!({"tools": [{"type": "function", "function": {"name": "f"}}]}), "tools[0].function"),
            (json!({"tools": [{"type": "function", "name": "f", "async": true}]}), "tools[0].async"),
            (json!({"tool_choice": {"type": "file_search"}}), "tool_choice.type"),
            (json!({"metadata": {"a": "b".repeat(513)}}), "metadata"),
            (json!({"metadata": {"a": 1}}), "metadata.a"),
            (json!({"max_output_tokens": 0}), "max_output_tokens"),
            (json!({"store": 1}), "store"),
            (json!({"previous_response_id": "resp_none"}), "previous_response_id"),
        ] {
            let error = parse(more.clone()).err().unwrap_or_else(|| panic!("{more} was accepted"));
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
    }

    #[test]
    fn errors_of_the_chat_name_the_fields_of_the_request() {
        let source = |item: &str, calls: &[&str]| MessageSource {
            item: item.to_owned(),
            calls: calls.iter().map(|call| (*call).to_owned()).collect(),
        };
        let names =
            FieldNames(vec![source("instructions", &[]), source("input", &[]), source("input[2]", &["input[3]"])]);
        for (chat, ours) in [
            ("messages", "input"),
            ("messages[0].content", "instructions"),
            ("messages[1].content", "input"),
            ("messages[2].content", "input[2].content"),
            ("messages[2].tool_calls[0].function.arguments", "input[3].arguments"),
            ("messages[9]", "messages[9]"),
            ("max_completion_tokens", "max_output_tokens"),
            ("max_tokens", "max_output_tokens"),
            ("response_format.json_schema.schema", "text.format.schema"),
            ("reasoning_effort", "reasoning.effort"),
            ("tools[1].function.parameters", "tools[1].parameters"),
            ("tool_choice.allowed_tools.tools[0].function.name", "tool_choice.tools[0].name"),
            ("tool_choice.function.name", "tool_choice.name"),
            ("logprobs", "include"),
            ("logprob_token_ids", "logprob_token_ids"),
            ("top_p", "top_p"),
        ] {
            let error = names.rename(Error::invalid(format!("`{chat}` is wrong")).param(chat));
            assert_eq!((error.message, error.param.as_deref()), (format!("`{ours}` is wrong"), Some(ours)));
        }
    }
}
