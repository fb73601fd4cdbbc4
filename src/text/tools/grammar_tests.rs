use std::sync::Arc;

use serde_json::{Value, json};

use super::{OutputParser, OutputPart, ToolChoice, ToolFormat, Tools};
use crate::fields::Fields;
use crate::text::grammar::tests::{accepts, codec_with_tokens, compiler};
use crate::text::grammar::{Grammar, GrammarCompiler};
use crate::text::reasoning::ReasoningFormat;

const MARKERS: &[&str] =
    &["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "</think>", "[THINK]", "[/THINK]"];

const FORMATS: [ToolFormat; 5] =
    [ToolFormat::Hermes, ToolFormat::Llama3, ToolFormat::Mistral, ToolFormat::MistralNamed, ToolFormat::Json];

/// A tool with one string, and one with one number.
fn tools(choice: ToolChoice, parallel: bool) -> Tools {
    let tool = |name: &str, properties: Value| {
        let required: Vec<String> = properties.as_object().expect("an object").keys().cloned().collect();
        let parameters =
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": true}})
    };
    let list = [tool("say", json!({"text": {"type": "string"}})), tool("half", json!({"of": {"type": "integer"}}))];
    let body = json!({"tools": list, "parallel_tool_calls": parallel});
    let mut tools = Tools::parse(&Fields::of_body(&body).expect("an object")).expect("tools").expect("some");
    tools.choice = choice;
    tools
}

/// Calls in a format's own form, together.
fn written(format: ToolFormat, calls: &[(&str, &str)]) -> String {
    let object =
        |key: &str| calls.iter().map(|(name, args)| format!("{{\"name\": \"{name}\", \"{key}\": {args}}}")).collect();
    let objects: Vec<String> = object(if format == ToolFormat::Llama3 { "parameters" } else { "arguments" });
    match format {
        ToolFormat::Hermes => {
            objects.iter().map(|call| format!("<tool_call>\n{call}\n</tool_call>")).collect::<Vec<_>>().join("\n")
        }
        ToolFormat::Llama3 => objects.join("; "),
        ToolFormat::Mistral => format!("[TOOL_CALLS] [{}]", objects.join(", ")),
        ToolFormat::MistralNamed => {
            calls.iter().map(|(name, args)| format!("[TOOL_CALLS]{name}[ARGS]{args}")).collect()
        }
        ToolFormat::Json if calls.len() == 1 => objects[0].clone(),
        ToolFormat::Json => format!("[{}]", objects.join(", ")),
    }
}

const SAY: (&str, &str) = ("say", "{\"text\": \"a<b>\\\"}\"}");
const HALF: (&str, &str) = ("half", "{\"of\": 12}");
const WRONG: [(&str, &str); 3] = [("half", "{\"of\": \"12\"}"), ("other", "{\"of\": 12}"), ("half", "{}")];

/// One compiler whose markers are text, and one whose markers are special tokens.
fn compilers() -> [GrammarCompiler; 2] {
    [compiler("hf"), GrammarCompiler::new(Arc::new(codec_with_tokens(MARKERS)))]
}

#[test]
fn a_required_call_is_one_of_the_tools() {
    for (compiler, format) in compilers().iter().flat_map(|c| FORMATS.map(|f| (c, f))) {
        let check = |tools: &Tools, good: &[&[(&str, &str)]], bad: &[&[(&str, &str)]]| {
            let grammar = tools.grammar(format, None).expect("a grammar");
            for calls in good {
                let text = written(format, calls);
                assert!(accepts(compiler, &grammar, &text), "{format:?} refuses {text}");
                assert_eq!(called(format, tools, &text), calls.len(), "{text}");
            }
            for calls in bad {
                let text = written(format, calls);
                assert!(!accepts(compiler, &grammar, &text), "{format:?} accepts {text}");
            }
            assert!(!accepts(compiler, &grammar, "Hello"), "{format:?}");
        };
        let wrong: Vec<_> = WRONG.iter().map(std::slice::from_ref).collect();
        check(&tools(ToolChoice::Required, true), &[&[SAY], &[HALF, SAY, HALF]], &wrong);
        check(&tools(ToolChoice::Required, false), &[&[SAY], &[HALF]], &[&[HALF, SAY]]);
        check(&tools(ToolChoice::Named("half".into()), true), &[&[HALF]], &[&[SAY], &[HALF, HALF]]);
    }
}

/// The calls that the parser finds in a text without content.
fn called(format: ToolFormat, tools: &Tools, text: &str) -> usize {
    let mut parser = OutputParser::new(Some((format, tools)), None, false);
    let mut parts = parser.push(text);
    parts.extend(parser.finish());
    assert!(!parts.iter().any(|part| matches!(part, OutputPart::Content(_))), "{parts:?}");
    parts.iter().filter(|part| matches!(part, OutputPart::ToolCall { .. })).count()
}

#[test]
fn text_is_free_until_a_strict_call_begins() {
    for (compiler, format) in compilers().iter().flat_map(|c| FORMATS.map(|f| (c, f))) {
        let grammar = tools(ToolChoice::Auto, true).grammar(format, None).expect("a grammar");
        let calls = written(format, &[HALF, SAY]);
        for text in ["", "Hello, <b>{you}</b> [1]\n", &calls] {
            assert!(accepts(compiler, &grammar, text), "{format:?} refuses {text:?}");
        }
        if !format.has_bare_calls() {
            assert!(accepts(compiler, &grammar, &format!("Let me see.\n{calls}")), "{format:?}");
        }
        for wrong in &WRONG {
            let text = written(format, std::slice::from_ref(wrong));
            assert!(!accepts(compiler, &grammar, &text), "{format:?} accepts {text:?}");
        }
        let one = tools(ToolChoice::Auto, false).grammar(format, None).expect("a grammar");
        assert!(accepts(compiler, &one, &written(format, &[SAY])), "{format:?}");
        assert!(!accepts(compiler, &one, &calls), "{format:?}");

        let content = Grammar::Choice(vec!["yes".into(), "no".into()]);
        let either = tools(ToolChoice::Auto, true).grammar(format, Some(content)).expect("a grammar");
        assert!(accepts(compiler, &either, "yes") && accepts(compiler, &either, &calls), "{format:?}");
        assert!(!accepts(compiler, &either, "maybe"), "{format:?}");
    }
}

#[test]
fn thinking_comes_before_what_is_constrained() {
    for compiler in &compilers() {
        for think in ["<think>", "[THINK]"].map(|marker| ReasoningFormat::of(marker).expect("a format")) {
            let (open, close) = (think.open, think.close);
            let call = written(ToolFormat::Hermes, &[HALF]);
            let wrong = written(ToolFormat::Hermes, &[WRONG[0]]);
            let grammar = tools(ToolChoice::Required, true).grammar(ToolFormat::Hermes, None).expect("a grammar");
            let opened = grammar.clone().after_reasoning(think, true);
            let may_open = grammar.after_reasoning(think, false);
            for thought in [format!("Hm, half(12)?\n{close}\n\n"), format!("\n{close}")] {
                assert!(accepts(compiler, &opened, &format!("{thought}{call}")), "{open}");
                assert!(!accepts(compiler, &opened, &format!("{thought}{wrong}")), "{open}");
                assert!(accepts(compiler, &may_open, &format!("{open}{thought}{call}")), "{open}");
            }
            assert!(accepts(compiler, &may_open, &call), "{open}");
            assert!(!accepts(compiler, &opened, &call) && !accepts(compiler, &may_open, "Hm"), "{open}");
            let json = Grammar::json(json!({"const": 1})).after_reasoning(think, true);
            assert!(
                accepts(compiler, &json, &format!("2?{close}1")) && !accepts(compiler, &json, &format!("1{close}2"))
            );
        }
    }
}

#[test]
fn a_schema_that_cannot_be_compiled_is_named() {
    let mut tools = tools(ToolChoice::Required, true);
    tools.definitions[1].parameters = json!({"type": "object", "properties": {"a": {"type": "nothing"}}});
    let grammar = tools.grammar(ToolFormat::Hermes, None).expect("a grammar");
    let error = compiler("hf").compile_now(&grammar).err().expect("a fault");
    assert_eq!(error.param.as_deref(), Some("tools[1].function.parameters"), "{error}");
}

#[test]
fn outputs_are_free_without_strict_tools() {
    let mut tools = tools(ToolChoice::Auto, true);
    tools.definitions.iter_mut().for_each(|tool| tool.strict = false);
    assert!(tools.grammar(ToolFormat::Hermes, None).is_none());
    tools.choice = ToolChoice::None;
    assert!(tools.grammar(ToolFormat::Hermes, None).is_none());
    assert!(matches!(tools.grammar(ToolFormat::Hermes, Some(Grammar::AnyText)), Some(Grammar::AnyText)));
}

/// Markers that are special tokens survive decoding, which leaves out the others.
#[test]
fn decoding_keeps_markers() {
    let codec = codec_with_tokens(MARKERS);
    let ids = codec.encode("<|im_start|><tool_call>a</tool_call><|im_end|>", false).expect("ids");
    let decode = |markers: &[&str]| {
        let mut stream = codec.stream_keeping(true, markers);
        ids.iter().map(|&id| stream.push(id).expect("text")).collect::<String>()
    };
    assert_eq!(decode(&[]), "a");
    assert_eq!(decode(ToolFormat::Hermes.markers()), "<tool_call>a</tool_call>");
}
