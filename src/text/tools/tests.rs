use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::text::reasoning::ReasoningFormat;

fn tools(body: &Value) -> Result<Option<Tools>> {
    Tools::parse(&Fields::of_body(body)?)
}

fn weather() -> Tools {
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}});
    tools(&json!({"tools": [tool("get_weather"), tool("add")]})).expect("tools").expect("some")
}

/// The parts of an output that comes in these pieces, joined.
fn run(format: ToolFormat, tools: &Tools, reasoning: Option<(&str, bool)>, pieces: &[&str]) -> Vec<OutputPart> {
    let starts = reasoning.is_some_and(|(_, starts)| starts);
    let reasoning = reasoning.and_then(|(template, _)| ReasoningFormat::of(template));
    let mut parser = OutputParser::new(Some((format, tools)), reasoning, starts);
    let mut parts = output::Parts::default();
    let mut add = |part| match part {
        OutputPart::Content(text) => parts.content(&text),
        OutputPart::Reasoning(text) => parts.reasoning(&text),
        OutputPart::ToolCall { index, name } => parts.call(index, &name),
        OutputPart::Arguments { index, text } => parts.arguments(index, &text),
    };
    for piece in pieces {
        parser.push(piece).into_iter().for_each(&mut add);
    }
    parser.finish().into_iter().for_each(&mut add);
    parts.into_vec()
}

/// A short form of parts: content in quotes, reasoning in parentheses, calls as `name{...}`.
fn show(parts: &[OutputPart]) -> String {
    let show = |part: &OutputPart| match part {
        OutputPart::Content(text) => format!("{text:?}"),
        OutputPart::Reasoning(text) => format!("({text:?})"),
        OutputPart::ToolCall { index, name } => format!(" {index}:{name} "),
        OutputPart::Arguments { text, .. } => text.clone(),
    };
    parts.iter().map(show).collect::<String>().trim().to_owned()
}

fn parsed(format: ToolFormat, text: &str) -> String {
    show(&run(format, &weather(), None, &[text]))
}

#[test]
fn hermes_and_qwen() {
    let of = |text: &str| parsed(ToolFormat::Hermes, text);
    assert_eq!(
        of("<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>"),
        "0:get_weather {\"city\": \"Paris\"}"
    );
    // Several calls after text, arguments before the name, and a call without arguments.
    assert_eq!(
        of(
            "Let me see.\n<tool_call>\n{\"arguments\": {\"a\": [1, {\"b\": \"}\"}]}, \"name\": \"add\"}\n</tool_call>\n\
            <tool_call>{\"name\": \"get_weather\"}</tool_call>\n"
        ),
        "\"Let me see.\\n\" 0:add {\"a\": [1, {\"b\": \"}\"}]} 1:get_weather {}"
    );
    // Arguments as a string, as null, and with a line end and escapes in a string.
    assert_eq!(
        of("<tool_call>{\"name\": \"add\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>\
            <tool_call>{\"name\": \"add\", \"arguments\": null, \"id\": 7}</tool_call>\
            <tool_call>{\"name\": \"add\", \"arguments\": {\"t\": \"\\\"<\n/tool_call>\"}}</tool_call> bye"),
        "0:add {\"a\": 1} 1:add {} 2:add {\"t\": \"\\\"<\n/tool_call>\"}\" bye\""
    );
    // The output ends inside the arguments, or a brace is missing.
    assert_eq!(of("<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1"), "0:add {\"a\": 1");
    assert_eq!(of("<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 1</tool_call>x"), "0:add {\"a\": 1\"x\"");
}

#[test]
fn text_that_is_no_call_is_content() {
    for (format, text) in [
        (ToolFormat::Hermes, "a < b <tool <tool_call>"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"unknown\", \"arguments\": {}}</tool_call>"),
        (ToolFormat::Hermes, "<tool_call>{\"name\": \"add\", \"arguments\": [1]}</tool_call>"),
        (ToolFormat::Hermes, "<tool_call>{\"arguments\": {\"a\": 1}}</tool_call>"),
        (ToolFormat::Hermes, " \n{\"name\": \"add\", \"arguments\": {}}"),
        (ToolFormat::Llama3, "{\"name\": \"Bob\", \"parameters\": {}} is JSON"),
        (ToolFormat::Llama3, "Call {\"name\": \"add\", \"parameters\": {}}"),
        (ToolFormat::Llama3, "<|python_tag|>brave_search.call(query=\"x\")"),
        (ToolFormat::Mistral, "[TOOL_CALLS] []"),
        (ToolFormat::MistralNamed, "[TOOL_CALLS]unknown[ARGS]{}"),
        (ToolFormat::MistralNamed, "[TOOL_CALLS]add[OTHER]{}"),
        (ToolFormat::Json, "```python\nprint({})\n```"),
        (ToolFormat::Json, "```json\n{\"a\": 1}\n```"),
        (ToolFormat::Json, "[1, 2]"),
        (ToolFormat::Json, "  "),
    ] {
        assert_eq!(parsed(format, text), format!("{text:?}"), "{format:?}");
    }
    let deep = format!("<tool_call>{{\"x\": {}", "[".repeat(200));
    assert_eq!(parsed(ToolFormat::Hermes, &deep), format!("{deep:?}"));
    let call = "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    assert_eq!(parsed(ToolFormat::Hermes, &format!("<tool_call>\n{call}")), "\"<tool_call>\\n\" 0:add {}");
}

#[test]
fn llama() {
    let of = |text: &str| parsed(ToolFormat::Llama3, text);
    let call = "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}";
    assert_eq!(of(call), "0:get_weather {\"city\": \"Paris\"}");
    assert_eq!(
        of(&format!("<|python_tag|>{call}; {call}")),
        "0:get_weather {\"city\": \"Paris\"} 1:get_weather {\"city\": \"Paris\"}"
    );
    assert_eq!(
        of(&format!("\n\n{{\"type\": \"function\", {} Done", &call[1..])),
        "0:get_weather {\"city\": \"Paris\"}\" Done\""
    );
}

#[test]
fn mistral() {
    assert_eq!(
        parsed(
            ToolFormat::Mistral,
            "[TOOL_CALLS] [{\"name\": \"add\", \"arguments\": {\"a\": 1}, \"id\": \"0UAqFzWsD\"}, {\"name\": \"add\", \"arguments\": {}}]"
        ),
        "0:add {\"a\": 1} 1:add {}"
    );
    assert_eq!(
        parsed(
            ToolFormat::MistralNamed,
            "Sure[TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{\"a\": 1}[TOOL_CALLS]add{}"
        ),
        "\"Sure\" 0:get_weather {\"city\": \"Paris\"} 1:add {\"a\": 1} 2:add {}"
    );
}

#[test]
fn qwen_coder() {
    let properties = json!({"text": {"type": "string"}, "at": {"type": "integer"}, "on": {"type": "boolean"}});
    let function = json!({"name": "write", "parameters": {"type": "object", "properties": properties}});
    let tools = tools(&json!({"tools": [{"type": "function", "function": function}]})).expect("tools").expect("some");
    let of = |text: &str| show(&run(ToolFormat::Hermes, &tools, None, &[text]));
    assert_eq!(
        of(
            "Ok.\n<tool_call>\n<function=write>\n<parameter=text>\nif a < \"b\":\n    </p\n\n</parameter>\n<parameter=at>\n12\n\
            </parameter>\n<parameter=on>True</parameter><parameter=more>\nx y\n</parameter>\n</function>\n</tool_call>\n"
        ),
        "\"Ok.\\n\" 0:write {\"text\": \"if a < \\\"b\\\":\\n    </p\\n\", \"at\": 12, \"on\": true, \"more\": \"x y\"}"
    );
    let call = "<tool_call><function=write></function></tool_call>";
    assert_eq!(of(&format!("{call}{call}")), "0:write {} 1:write {}");
    assert_eq!(of("<tool_call><function=read></function>"), "\"<tool_call><function=read></function>\"");
    assert_eq!(of("<tool_call><function=write><parameter=text>a\n"), "0:write {\"text\": \"a\\n");
    assert_eq!(of("<tool_call><function=write>\n<b></tool_call>"), "0:write {}\"\\n<b></tool_call>\"");
}

#[test]
fn plain_json() {
    let of = |text: &str| parsed(ToolFormat::Json, text);
    assert_eq!(of("{\"name\": \"add\", \"arguments\": {\"a\": 1}}"), "0:add {\"a\": 1}");
    assert_eq!(of("```json\n[{\"name\": \"add\", \"parameters\": {}}]\n```\n"), "0:add {}");
    assert_eq!(
        of("```\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"arguments\": {}}}\n```"),
        "0:add {}"
    );
    assert_eq!(
        of("[{\"name\": \"add\", \"arguments\": {}}, {\"name\": \"no\"}]"),
        "0:add {}\", {\\\"name\\\": \\\"no\\\"}]\""
    );
}

#[test]
fn one_call_where_parallel_is_off() {
    let mut tools = weather();
    tools.parallel = false;
    let call = "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    let parts = run(ToolFormat::Hermes, &tools, None, &[&format!("{call}\n{call}\nok")]);
    assert_eq!(show(&parts), "0:add {}\"\\nok\"");
    tools.choice = ToolChoice::None;
    assert_eq!(show(&run(ToolFormat::Hermes, &tools, None, &[call])), format!("{call:?}"));
}

#[test]
fn a_call_is_told_before_its_arguments_end() {
    let tools = weather();
    let mut parser = OutputParser::new(Some((ToolFormat::Hermes, &tools)), None, false);
    assert_eq!(parser.markers(), ["<tool_call>", "</tool_call>"]);
    assert_eq!(parser.push("Hi <tool_call>{\"name\": \"add\", \"arguments\": "), [OutputPart::Content("Hi ".into())]);
    let call = OutputPart::ToolCall { index: 0, name: "add".into() };
    let text = |text: &str| OutputPart::Arguments { index: 0, text: text.into() };
    assert_eq!(parser.push("{\"a\""), [call, text("{\"a\"")]);
    assert_eq!(parser.push(": 1}"), [text(": 1}")]);
    assert_eq!(parser.push("}</tool_call>"), []);
}

#[test]
fn thinking() {
    let tools = weather();
    let of = |starts: bool, text: &str| show(&run(ToolFormat::Hermes, &tools, Some(("<think>", starts)), &[text]));
    let call = "<tool_call>{\"name\": \"add\", \"arguments\": {}}</tool_call>";
    assert_eq!(of(false, "<think>\nLet me\n\nsee.\n</think>\n\nYes"), "(\"Let me\\n\\nsee.\")\"Yes\"");
    assert_eq!(of(true, "Hm.</think>Yes</think>"), "(\"Hm.\")\"Yes</think>\"");
    assert_eq!(of(true, "<think>\nHm.</think>"), "(\"Hm.\")");
    assert_eq!(
        of(true, &format!("{call} <think></think>\n{call}")),
        format!("({:?}) 0:add {{}}", format!("{call} <think>"))
    );
    assert_eq!(of(false, "<think>\n\n</think>\n\nYes"), "\"Yes\"");
    assert_eq!(of(false, "Yes <think>no</think>"), "\"Yes <think>no</think>\"");
    assert_eq!(of(true, "not done </thin"), "(\"not done </thin\")");
    assert_eq!(of(false, "<thi"), "\"<thi\"");
    assert_eq!(ReasoningFormat::of("{{ content }}"), None);
    let format = ReasoningFormat::of("{% if '[THINK]' %}").expect("a format");
    assert!(format.opened_by("x[THINK]\n") && !format.opened_by("[THINK]\n\n[/THINK]\n"));
}

#[test]
fn templates_name_their_format() {
    for (source, format) in [
        ("<tools></tools> <tool_call>\\n", ToolFormat::Hermes),
        ("{{- \"<|python_tag|>\" + tool_call.name }}", ToolFormat::Llama3),
        ("<|start_header_id|> '{\"name\": \"' + tool_call.name + '\", \"parameters\": '", ToolFormat::Llama3),
        ("\"[TOOL_CALLS] [\"", ToolFormat::Mistral),
        ("'[TOOL_CALLS]' + name + '[ARGS]'", ToolFormat::MistralNamed),
        ("<|im_start|>", ToolFormat::Json),
    ] {
        assert_eq!(ToolFormat::of(source), format, "{source}");
    }
}

proptest! {
    #[test]
    fn cutting_changes_nothing(
        pieces in proptest::collection::vec(prop_oneof![
            Just("<think>"), Just("</think>"), Just("\n"), Just(" "), Just("é<"), Just("<tool_call>"), Just("</tool_call>"),
            Just("[TOOL_CALLS]"), Just("[ARGS]"), Just("add"), Just("<|python_tag|>"), Just("; "), Just("```"), Just("json"),
            Just("{"), Just("}"), Just("["), Just("]"), Just(","), Just("\"name\": \"add\""), Just("\"arguments\": "),
            Just("{\"name\": \"add\", \"arguments\": {\"a\": \"\\\"}\"}}"), Just("{\"arguments\": \"{}\", \"name\": \"add\"}"),
            Just("<function=add>"), Just("<parameter=a>"), Just("</parameter>"), Just("</function>"), Just("12"),
        ], 0..14),
        cuts in proptest::collection::vec(0..200usize, 0..12),
        format in prop_oneof![
            Just(ToolFormat::Hermes), Just(ToolFormat::Llama3), Just(ToolFormat::Mistral), Just(ToolFormat::MistralNamed),
            Just(ToolFormat::Json),
        ],
        starts: bool,
    ) {
        let text = pieces.concat();
        let mut cuts: Vec<usize> = cuts.into_iter().filter(|&at| at <= text.len() && text.is_char_boundary(at)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|at| &text[at[0]..at[1]]).collect();
        let tools = weather();
        let whole = run(format, &tools, Some(("<think>", starts)), &[&text]);
        prop_assert_eq!(run(format, &tools, Some(("<think>", starts)), &pieces), whole);
    }
}

#[test]
fn requests() {
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let body = json!({"tools": [{"type": "function", "function": {
        "name": "a.b-c", "description": "d", "parameters": {"type": "object"}, "strict": true, "return": {"type": "string"},
    }}, function("g")], "parallel_tool_calls": false});
    let read = tools(&body).expect("tools").expect("some");
    assert_eq!((read.choice.clone(), read.parallel, read.legacy), (ToolChoice::Auto, false, false));
    assert!(read.definitions[0].strict && !read.definitions[1].strict);
    assert_eq!(read.definitions[1].parameters, json!({"type": "object", "properties": {}}));
    assert_eq!(read.raw(), *body["tools"].as_array().expect("an array"));

    let choose = |choice: Value| tools(&json!({"tools": [function("f"), function("g")], "tool_choice": choice}));
    let named = choose(function("g")).expect("a choice").expect("some");
    assert_eq!((named.choice, named.definitions.len()), (ToolChoice::Named("g".into()), 2));
    let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [function("g")]}});
    let allowed = choose(allowed).expect("a choice").expect("some");
    assert_eq!((allowed.choice, allowed.definitions.len()), (ToolChoice::Required, 1));

    let old = json!({"functions": [{"name": "f"}], "function_call": {"name": "f"}});
    let old = tools(&old).expect("functions").expect("some");
    assert!(old.legacy && !old.parallel && old.choice == ToolChoice::Named("f".into()));
    for none in
        [json!({}), json!({"tools": []}), json!({"tools": null, "tool_choice": "auto"}), json!({"tool_choice": "none"})]
    {
        assert_eq!(tools(&none).expect("no tools"), None);
    }
}

#[test]
fn refused_requests_name_the_field() {
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let with = |choice: Value| json!({"tools": [function("f")], "tool_choice": choice});
    let one = |tool: Value| json!({"tools": [tool]});
    for (body, param) in [
        (json!({"tools": {}}), "tools"),
        (one(json!({"type": "web_search"})), "tools[0].type"),
        (one(json!({"type": "custom", "custom": {"name": "f"}})), "tools[0].type"),
        (one(json!({"type": "function"})), "tools[0].function"),
        (one(json!({"type": "function", "name": "f"})), "tools[0].name"),
        (one(function("a b")), "tools[0].function.name"),
        (one(function(&"x".repeat(65))), "tools[0].function.name"),
        (
            one(json!({"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}})),
            "tools[0].function.parameters.type",
        ),
        (one(json!({"type": "function", "function": {"name": "f", "parameter": {}}})), "tools[0].function.parameter"),
        (json!({"tools": [function("f"), function("f")]}), "tools"),
        (json!({"tools": (0..129).map(|i| function(&format!("f{i}"))).collect::<Vec<_>>()}), "tools"),
        (with(json!("any")), "tool_choice"),
        (with(function("g")), "tool_choice.function.name"),
        (with(json!({"type": "custom", "custom": {}})), "tool_choice.type"),
        (
            with(json!({"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [function("f")]}})),
            "tool_choice.allowed_tools.mode",
        ),
        (
            with(json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}})),
            "tool_choice.allowed_tools.tools",
        ),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": function("f")}), "tool_choice.function.name"),
        (json!({"tools": [], "functions": [{"name": "f"}]}), "functions"),
        (json!({"functions": [{"name": "f"}], "function_call": "required"}), "function_call"),
        (json!({"parallel_tool_calls": "no"}), "parallel_tool_calls"),
    ] {
        let error = tools(&body).expect_err(param);
        assert_eq!(error.param.as_deref(), Some(param), "{error}");
    }
}
