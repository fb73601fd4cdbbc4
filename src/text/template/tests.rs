use serde_json::json;

use super::*;
use crate::text::messages::RESERVED;

fn template(source: &str) -> Result<ChatTemplate> {
    ChatTemplate::new(source, SpecialTokens::from([("bos_token".to_string(), "<s>".to_string())]))
}

/// The prompt of these messages, which are in the form that templates expect.
fn render(source: &str, messages: Value) -> Result<String> {
    template(source)?.render(&ChatPrompt::of(messages.as_array().unwrap().clone(), true))
}

/// The prompt of a request body.
fn ask(source: &str, body: Value) -> Result<String> {
    template(source)?.render(&ChatPrompt::from_body(&body)?)
}

const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                      {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

#[test]
fn python_habits_work() {
    let messages = json!([{"role": "user", "content": " a\nb "}]);
    let source = "{{ bos_token }}{% for m in messages %}{{ m['content'].strip() + '!' }}{% endfor %}\n{%- if tools is not none %}T{% endif %}{{ messages[0].name is defined }}{{ none }}";
    assert_eq!(render(source, messages).unwrap(), "<s>a\nb!FalseNone");
}

#[test]
fn json_as_python_writes_it() {
    // The right sides are what json.dumps of Python 3.12 returns.
    for (options, text) in [
        ("", r#"{"b": "é<'\"\n", "a": [1, {"x": null}, [], {}], "f": [1.0, 1e-05, 1.5e+16, 0.0001, -2.25, 1e+100]}"#),
        (
            "separators=(',', ':')",
            r#"{"b":"é<'\"\n","a":[1,{"x":null},[],{}],"f":[1.0,1e-05,1.5e+16,0.0001,-2.25,1e+100]}"#,
        ),
        (
            "ensure_ascii=true, sort_keys=true",
            r#"{"a": [1, {"x": null}, [], {}], "b": "\u00e9<'\"\n", "f": [1.0, 1e-05, 1.5e+16, 0.0001, -2.25, 1e+100]}"#,
        ),
    ] {
        let value =
            json!({"b": "é<'\"\n", "a": [1, {"x": null}, [], {}], "f": [1.0, 1e-5, 1.5e16, 1e-4, -2.25, 1e100]});
        let source = format!("{{{{ messages[0].content.v | tojson({options}) }}}}");
        assert_eq!(render(&source, json!([{"content": {"v": value}}])).unwrap(), text);
    }
    let value = json!([{"content": {"v": [1, {"a": [], "b": 2}]}}]);
    for (options, text) in [
        ("indent=1", "[\n 1,\n {\n  \"a\": [],\n  \"b\": 2\n }\n]"),
        ("indent='>', separators=('; ', '=')", "[\n>1; \n>{\n>>\"a\"=[]; \n>>\"b\"=2\n>}\n]"),
        ("indent=none", "[1, {\"a\": [], \"b\": 2}]"),
    ] {
        assert_eq!(
            render(&format!("{{{{ messages[0].content.v | tojson({options}) }}}}"), value.clone()).unwrap(),
            text
        );
    }
    assert_eq!(render("{{ '😀' | tojson(ensure_ascii=true) }}", json!([])).unwrap(), r#""\ud83d\ude00""#);
    assert!(render("{{ 1 | tojson(colour=1) }}", json!([])).is_err());
    assert_eq!(render("{{ ('{\"a\": [1]}' | from_json).a[0] }}", json!([])).unwrap(), "1");
}

#[test]
fn methods_and_tests_of_python() {
    for (source, text) in [
        ("{{ 'a.b.c'.rsplit('.', 1) }}", "['a.b', 'c']"),
        ("{{ ' a  b '.rsplit() }}", "['a', 'b']"),
        ("{{ 'x</think>y</think>z'.rpartition('</think>')[0] }}", "x</think>y"),
        ("{{ 'a=b=c'.partition('=') }}", "['a', '=', 'b=c']"),
        ("{{ 'xay'.removeprefix('x').removesuffix('y') }}", "a"),
        ("{{ '-7'.zfill(4) }} {{ 'abc'.index('c') }} {{ [4, 5].index(5) }}", "-007 2 1"),
        ("{{ 'a' is sequence }} {{ {} is sequence }} {{ 1 is sequence }}", "True True False"),
        ("{% for k, v in {'items': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "items1"),
        ("{{ '  a\n'.strip().title() }} {{ 'ab'.startswith(('x', 'a')) }} {{ 'abcb'.rstrip('cb') }}", "A True a"),
        (
            "{% set n = namespace(x=1) %}{% for i in [1, 2, 3] %}{% if i == 3 %}{% break %}{% endif %}{% set n.x = i %}{% endfor %}{{ n.x }}",
            "2",
        ),
    ] {
        assert_eq!(render(source, json!([])).unwrap(), text, "{source}");
    }
}

#[test]
fn what_a_template_needs_and_is_missing_is_named_at_the_start() {
    let rare = "{% if messages | length > 99 %}{{ messages | pluck('a') }}{{ 'a' is vowel }}{{ now() }}{{ 'a'.swap() }}{% endif %}";
    let error = template(rare).err().unwrap();
    for name in ["the filter `pluck`", "the test `vowel`", "the function `now`", "the method `swap`"] {
        assert!(error.message.contains(name), "{error}");
    }
    assert!(error.message.starts_with("the model's chat template: it needs"), "{error}");
    let own = "{% macro f(x, y=none) %}{{ caller() if caller else x }}{% endmacro %}{{ f(1) }}{% for m in [1] recursive %}{{ loop.cycle(1) }}\
               {% endfor %}{{ raise_exception('no') }}{{ strftime_now('%Y') }}{{ range(3) }}{{ namespace().x }}{{ {}.get('a') }}";
    template(own).unwrap();
}

#[test]
fn arguments_of_calls_are_text_for_templates_that_add_them_to_text() {
    let body = json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\":1}"}}]}]});
    let source = |write: &str| {
        format!(
            "{{% for m in messages %}}{{% for c in m.tool_calls or [] %}}{{{{ {write} }}}}{{% endfor %}}{{% endfor %}}"
        )
    };
    assert_eq!(ask(&source("'A' + c.function.arguments"), body.clone()).unwrap(), "A{\"a\": 1}");
    assert_eq!(ask(&source("c.function.arguments.a"), body).unwrap(), "1");
}

#[test]
fn refusals_reach_the_client() {
    let error = render("{{ raise_exception('roles must alternate') }}", json!([])).unwrap_err();
    assert_eq!(error.kind, crate::error::ErrorKind::Invalid);
    assert!(error.message.contains("roles must alternate"), "{error}");
    assert!(template("{% if %}").is_err());
    assert!(render("{{ strftime_now('%Q%') }}", json!([])).is_err());
    assert_eq!(render("{{ strftime_now('%Y') | length }}", json!([])).unwrap(), "4");
}

#[test]
fn generation_marks_have_no_effect_in_any_spelling() {
    for (source, text) in [
        ("a{%- generation -%} b {% endgeneration %}c", "ab c"),
        ("a{%generation%}b{%endgeneration%}c", "abc"),
        ("a {%-\n generation\n-%} b {%-endgeneration-%} c", "abc"),
        ("{% set generation = 'x' %}{{ generation }}", "x"),
    ] {
        assert_eq!(render(source, json!([])).unwrap(), text, "{source:?}");
    }
}

#[test]
fn a_begun_answer_ends_the_prompt() {
    let begun = |answer: &str, more: Value| {
        let mut body =
            json!({"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": answer}]});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let start = "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n";
    for more in [json!({}), json!({"add_generation_prompt": false})] {
        let mut body = begun("one, ", more);
        body["continue_final_message"] = true.into();
        assert_eq!(ask(CHATML, body.clone()).unwrap(), format!("{start}one, "));
        // As transformers: spaces that the template removes at the end of a message are not left over.
        let trims = CHATML.replace("m.content", "m.content | trim");
        assert_eq!(ask(&trims, body).unwrap(), format!("{start}one,"));
    }
    let mut body = begun("one", json!({}));
    body["messages"][1]["prefix"] = true.into();
    assert_eq!(ask(CHATML, body).unwrap(), format!("{start}one"));
    assert_eq!(ask(CHATML, begun("one", json!({}))).unwrap(), format!("{start}one<|im_end|>\n<|im_start|>assistant\n"));

    let both = begun("one", json!({"continue_final_message": true, "add_generation_prompt": true}));
    assert!(ask(CHATML, both).unwrap_err().message.contains("`add_generation_prompt` cannot both"));
    let lost = ask("{{ messages[0].content }}", begun("one", json!({"continue_final_message": true}))).unwrap_err();
    assert!(lost.message.contains("does not write the last message"), "{lost}");
    let early =
        json!({"messages": [{"role": "assistant", "content": "a", "prefix": true}, {"role": "user", "content": "b"}]});
    assert_eq!(ask(CHATML, early).unwrap_err().param.as_deref(), Some("messages[0].prefix"));
}

#[test]
fn requests_set_variables_that_the_template_reads() {
    let source =
        "{{ enable_thinking is defined and enable_thinking is false }} {{ reasoning_effort }} {{ documents | tojson }}";
    let mut body = json!({"messages": [{"role": "user", "content": "1"}], "reasoning_effort": "low"});
    body["chat_template_kwargs"] = json!({"enable_thinking": false});
    body["documents"] = json!([{"text": "d"}]);
    assert_eq!(ask(source, body.clone()).unwrap(), r#"True low [{"text": "d"}]"#);
    assert_eq!(ask(CHATML, body.clone()).unwrap_err().param.as_deref(), Some("documents"));
    body["documents"] = json!([]);
    assert!(ask(CHATML, body.clone()).is_ok(), "a false variable is an unset one");
    body["chat_template_kwargs"]["colour"] = "red".into();
    assert_eq!(ask(CHATML, body.clone()).unwrap_err().param.as_deref(), Some("chat_template_kwargs.colour"));
    body["chat_template_kwargs"] = json!({"reasoning_effort": "high"});
    assert_eq!(ask(source, body).unwrap_err().param.as_deref(), Some("reasoning_effort"));
    for name in RESERVED {
        let body = json!({"messages": [{"role": "user", "content": "1"}], "chat_template_kwargs": {name: 1}});
        assert_eq!(ask(source, body).unwrap_err().param, Some(format!("chat_template_kwargs.{name}")));
    }
    let none = json!({"messages": [{"role": "user", "content": "1"}], "reasoning_effort": "none"});
    assert_eq!(ask("{{ enable_thinking }}", none).unwrap(), "False");
}

#[test]
fn a_template_gets_what_it_reads_and_the_rest_is_refused_or_put_into_the_text() {
    let body = |message: Value| json!({"messages": [message]});
    let reasoned = body(json!({"role": "assistant", "content": "4", "reasoning_content": "2+2"}));
    assert_eq!(ask("{{ messages[0].reasoning_content }}", reasoned.clone()).unwrap(), "2+2");
    assert_eq!(ask("{{ messages[0].thinking }}", reasoned.clone()).unwrap(), "2+2");
    assert_eq!(ask("{{ messages[0].content }}", reasoned).unwrap(), "<think>\n2+2\n</think>\n\n4");

    let developer = body(json!({"role": "developer", "content": "x"}));
    assert_eq!(ask("{{ messages[0].role }}", developer.clone()).unwrap(), "system");
    assert_eq!(ask("{{ messages[0].role == 'developer' }}", developer).unwrap(), "True");

    let plan = body(json!({"role": "user", "content": "x", "tool_plan": "y"}));
    assert_eq!(ask("{{ messages[0].tool_plan }}", plan.clone()).unwrap(), "y");
    assert_eq!(ask(CHATML, plan).unwrap_err().param.as_deref(), Some("messages[0].tool_plan"));

    let call = body(json!({"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}));
    assert_eq!(
        ask("{{ messages[0].tool_calls | tojson }}", call.clone()).unwrap(),
        r#"[{"type": "function", "function": {"name": "f", "arguments": {}}}]"#
    );
    assert_eq!(ask(CHATML, call).unwrap_err().param.as_deref(), Some("messages[0].tool_calls"));
    let result = body(json!({"role": "tool", "content": "1"}));
    assert_eq!(ask(CHATML, result).unwrap_err().param.as_deref(), Some("messages[0].role"));
    let mut tools = ChatPrompt::of(vec![], true);
    tools.tools = Some(vec![json!({})]);
    assert_eq!(template(CHATML).unwrap().render(&tools).unwrap_err().param.as_deref(), Some("tools"));
}
