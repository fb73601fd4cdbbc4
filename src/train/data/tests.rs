use std::path::PathBuf;
use std::sync::LazyLock;

use serde_json::json;

use super::*;
use crate::hub::{self, ModelFiles, ModelFormat};
use crate::text::messages::ChatPrompt;

static SMOLLM2: LazyLock<TextCodec> = LazyLock::new(|| {
    let files = hub::resolve(hub::DEFAULT_MODEL, &hub::default_cache(), false).unwrap();
    TextCodec::load(&files).unwrap()
});

/// A tiny tokenizer with another chat template.
fn with_template(template: &str) -> TextCodec {
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/hf");
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(from.join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    let format = ModelFormat::HuggingFace(dir.path().to_owned());
    TextCodec::load(&ModelFiles { name: "hf".into(), format }).unwrap()
}

fn options() -> DataOptions {
    DataOptions { max_length: 512, train_on_inputs: false, alpaca_ending: AlpacaEnding::Colon }
}

fn read(records: &[Value], codec: &TextCodec) -> Dataset {
    let lines: Vec<String> = records.iter().map(Value::to_string).collect();
    parse(lines.join("\n").as_bytes(), codec, &options()).unwrap()
}

fn refused(file: &str) -> String {
    let error = parse(file.as_bytes(), &SMOLLM2, &options()).unwrap_err();
    assert_eq!((error.kind, error.code), (crate::error::ErrorKind::Invalid, Some("invalid_training_file")));
    error.message
}

/// Ranges of trained tokens, as `(start, end)`.
fn spans(example: &Example) -> Vec<(usize, usize)> {
    let mut spans: Vec<(usize, usize)> = Vec::new();
    for i in (0..example.tokens.len()).filter(|&i| example.trained[i]) {
        match spans.last_mut() {
            Some(span) if span.1 == i => span.1 += 1,
            _ => spans.push((i, i + 1)),
        }
    }
    spans
}

fn trained_text(example: &Example, codec: &TextCodec) -> Vec<String> {
    spans(example).iter().map(|&(from, to)| codec.decode(&example.tokens[from..to], false).unwrap()).collect()
}

/// The server's tokens for a prompt of these messages.
fn served(messages: &[Value], codec: &TextCodec) -> Vec<u32> {
    let mut body = json!({"messages": messages});
    for message in body["messages"].as_array_mut().unwrap() {
        message.as_object_mut().unwrap().remove("weight");
    }
    let prompt = codec.render_chat(&ChatPrompt::from_body(&body).unwrap()).unwrap();
    codec.encode_prompt(&prompt, false).unwrap()
}

#[test]
fn every_answer_follows_the_servers_tokens_of_its_prompt() {
    let messages = [
        json!({"role": "developer", "content": "Be brief."}),
        json!({"role": "user", "content": [{"type": "text", "text": "One?"}, {"type": "text", "text": "Now."}]}),
        // The tokeniser merges these newlines with the template's newline before them, once the turn is in the past.
        json!({"role": "assistant", "content": "\n\n1", "weight": 1}),
        json!({"role": "user", "content": "Two?"}),
        json!({"role": "assistant", "content": "not this", "weight": 0}),
        json!({"role": "user", "content": "Three?"}),
        json!({"role": "assistant", "content": "3"}),
        json!({"role": "user", "content": "Bye."}),
    ];
    let data = read(&[json!({"messages": messages})], &SMOLLM2);
    let codec: &TextCodec = &SMOLLM2;
    let [first, second] = &data.examples[..] else { panic!("the seam splits the conversation in two: {data:?}") };
    assert_eq!(trained_text(first, codec), ["\n\n1<|im_end|>\n"]);
    assert_eq!(trained_text(second, codec), ["3<|im_end|>\n"]);
    assert_eq!(first.tokens[..spans(first)[0].0], served(&messages[..2], codec));
    assert_eq!(second.tokens[..spans(second)[0].0], served(&messages[..6], codec));
}

#[test]
fn a_conversation_is_one_example_with_every_answer_trained() {
    let messages = [
        json!({"role": "user", "content": "One?"}),
        json!({"role": "assistant", "content": "1"}),
        json!({"role": "user", "content": "Two?"}),
        json!({"role": "assistant", "content": "2"}),
    ];
    let codec: &TextCodec = &SMOLLM2;
    let data = read(&[json!({"messages": messages, "parallel_tool_calls": false, "tools": []})], codec);
    let [example] = &data.examples[..] else { panic!("{data:?}") };
    assert_eq!(trained_text(example, codec), ["1<|im_end|>\n", "2<|im_end|>\n"]);
    for (span, turn) in spans(example).iter().zip([1, 3]) {
        assert_eq!(example.tokens[..span.0], served(&messages[..turn], codec));
    }
    // In this model, the end token also pads and separates turns. Only those of answers are trained on.
    let ends = example.tokens.iter().filter(|id| codec.eos_token_ids().contains(id)).count();
    assert!(ends > 2, "prompts have end tokens too");

    let turns = [("human", "One?"), ("gpt", "1"), ("human", "Two?"), ("gpt", "2")];
    let turns: Vec<Value> = turns.iter().map(|(from, value)| json!({"from": from, "value": value})).collect();
    let mut same = json!({"id": 7, "conversations": turns});
    let read_as = read(&[same.clone()], codec);
    assert_eq!((read_as.examples, read_as.format), (data.examples, DataFormat::ShareGpt));
    same["conversations"][1]["weight"] = 0.into();
    assert_eq!(trained_text(&read(&[same], codec).examples[0], codec), ["2<|im_end|>\n"]);
}

#[test]
fn templates_that_change_earlier_turns_give_an_example_for_each_answer() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' or loop.last %}{{ m.content }}\
                    {% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let codec = with_template(template);
    let messages = [
        json!({"role": "user", "content": "a"}),
        json!({"role": "assistant", "content": "b"}),
        json!({"role": "user", "content": "c"}),
        json!({"role": "assistant", "content": "d"}),
    ];
    let data = read(&[json!({"messages": messages})], &codec);
    assert_eq!(data.examples.len(), 2);
    for (example, turn) in data.examples.iter().zip([1, 3]) {
        assert_eq!(example.tokens[..spans(example)[0].0], served(&messages[..turn], &codec));
    }
    assert_eq!(trained_text(&data.examples[1], &codec), ["d<|im_end|>"]);

    // If the template writes no end token, an answer gets the model's.
    let codec = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    );
    let data = read(&[json!({"messages": messages})], &codec);
    let end = codec.token_string(codec.eos_token_ids()[0]);
    assert_eq!(trained_text(data.examples.last().unwrap(), &codec), [format!(" d\n{end}")]);

    let codec = with_template("{{ messages[-1].content }}{% if add_generation_prompt %}<think>{% endif %}");
    let error = parse(json!({"messages": messages}).to_string().as_bytes(), &codec, &options()).unwrap_err();
    assert!(error.message.contains("line 1: `messages[1]`: the model's chat template opens"), "{error}");
}

#[test]
fn completions_follow_the_prompts_own_tokens_and_end() {
    let codec: &TextCodec = &SMOLLM2;
    // The second prompt ends inside a token of the whole text.
    for (prompt, completion) in [("Q: 2 + 2\nA:", " 4"), ("The quick ", "brown fox"), ("", "x"), ("a", "")] {
        let data = read(&[json!({"prompt": prompt, "completion": completion})], codec);
        let [example] = &data.examples[..] else { panic!("{data:?}") };
        let start = spans(example)[0].0;
        assert_eq!(example.tokens[..start], codec.encode_prompt(prompt, true).unwrap(), "{prompt:?}");
        assert_eq!(trained_text(example, codec), [format!("{completion}<|im_end|>")]);
    }
    let data = read(&[json!({"text": "Once upon a time"})], codec);
    assert_eq!(trained_text(&data.examples[0], codec), [" upon a time<|im_end|>"]);
    assert_eq!(data.format, DataFormat::Text);
}

#[test]
fn alpaca_prompts_are_the_published_ones() {
    let codec: &TextCodec = &SMOLLM2;
    let file = json!([
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Greet.", "input": "", "output": "Hi", "text": "ignored"},
    ]);
    let expected = [
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
         that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
         ### Instruction:\nGreet.\n\n### Response:",
    ];
    for (alpaca_ending, end) in [(AlpacaEnding::Colon, ""), (AlpacaEnding::Newline, "\n")] {
        let options = DataOptions { alpaca_ending, ..options() };
        let data = parse(format!("{file:#}").as_bytes(), codec, &options).unwrap();
        assert_eq!((data.format, data.alpaca_ending), (DataFormat::Alpaca, Some(alpaca_ending)));
        for (example, prompt) in data.examples.iter().zip(expected) {
            let start = spans(example)[0].0;
            assert_eq!(codec.decode(&example.tokens[..start], false).unwrap(), format!("{prompt}{end}"));
        }
    }
}

#[test]
fn inputs_are_trained_when_asked_for() {
    let record = json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]});
    let options = DataOptions { train_on_inputs: true, ..options() };
    let data = parse(record.to_string().as_bytes(), &SMOLLM2, &options).unwrap();
    let trained = &data.examples[0].trained;
    assert!(!trained[0] && trained[1..].iter().all(|&t| t));
    assert_eq!(data.statistics.trained_tokens, data.statistics.tokens - 1);
}

#[test]
fn long_examples_are_cut_and_those_without_tokens_to_train_on_dropped() {
    let record = |prompt: &str, completion: &str| json!({"prompt": prompt, "completion": completion}).to_string();
    let long = "word ".repeat(50);
    let file = [record("a", "b"), record("a", &long), record(&long, "b")].join("\n\n");
    let options = DataOptions { max_length: 20, ..options() };
    let data = parse(file.as_bytes(), &SMOLLM2, &options).unwrap();
    let tokens = data.examples.iter().map(|e| e.tokens.len()).sum();
    let expected =
        DatasetStatistics { records: 3, examples: 2, tokens, trained_tokens: tokens - 2, truncated: 2, dropped: 1 };
    assert_eq!(data.statistics, expected);
    assert_eq!(data.examples[1].tokens.len(), 20);

    let only = parse(record(&long, "b").as_bytes(), &SMOLLM2, &options).unwrap_err();
    assert!(only.message.starts_with("nothing to train on"), "{only}");
    let unweighted =
        r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}"#;
    assert!(refused(unweighted).ends_with("give at least one answer the `weight` 1"), "{}", refused(unweighted));
}

#[test]
fn errors_name_the_line_the_key_and_what_is_allowed() {
    let good = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    for (bad, why) in [
        (r#"{"messages": "x"}"#, "`messages` must be an array, not the string \"x\""),
        (r#"{"messages": []}"#, "`messages` must be an array of at least one message"),
        (r#"{"messages": [{"role": "", "content": "a"}]}"#, "`messages[0].role` must be a name such as system"),
        (r#"{"messages": [{"role": "user"}]}"#, "`messages[0].content` is required"),
        (
            r#"{"messages": [{"role": "user", "content": "a", "weight": 1}]}"#,
            "`messages[0].weight` must be 0 or absent",
        ),
        (r#"{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}"#, "an integer from 0 to 1, not 2"),
        (r#"{"messages": [{"role": "assistant", "content": "a", "wieght": 0}]}"#, "did you mean `messages[0].weight`"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}"#, "`tools[0].type` is required"),
        (
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "no answer to train on: it has no message of the role assistant",
        ),
        (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "which answers nothing"),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "function_call": {"name": "f", "arguments": "x"}}]}"#,
            "`messages[1].function_call.arguments` must be a JSON object",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a", "colour": 1}, {"role": "assistant", "content": "b"}]}"#,
            "`messages[0].colour` is not supported: the model's chat template has no place for it",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "chat_template": "x"}"#,
            "`chat_template` is not supported",
        ),
        (r#"{"prompt": "a", "completion": "b"}"#, "`messages` is required"),
        ("[1]", "a record must be an object, not an array"),
        ("{", "not valid JSON: EOF while parsing an object at column 1"),
    ] {
        let message = refused(&format!("{good}\n\n{bad}\n"));
        assert!(message.starts_with("1 of 2 records are wrong (read as OpenAI chat"), "{message}");
        assert!(message.contains("\nline 3: ") && message.contains(why), "{bad}: {message}");
    }
    for (file, why) in [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("{\"question\": 1}", "line 1: not a training record: a record is an object with `messages` (OpenAI chat)"),
        ("[{\"text\": \"a\"}, {\"text\": 1}]", "record 2: `text` must be a string, not 1"),
        ("[{\"text\": \"a\"},", "the file is not valid JSON"),
        ("question,answer\n1,2", "this is a table (CSV), not JSON: a training file is one JSON object a line"),
        ("question\tanswer", "a table with tabs (TSV)"),
        ("<!DOCTYPE html>", "HTML"),
        ("{\"text\": \"a\", \"tools\": [{\"type\": \"function\"}]}", "`tools` is not supported"),
        ("text", "1 of 1 records are wrong:\nline 1: not valid JSON"),
        ("{\"instruction\": \"a\", \"output\": \"b\", \"imput\": \"c\"}", "did you mean `input`"),
        (
            "{\"conversations\": [{\"from\": \"bot\", \"value\": \"a\"}]}",
            "`conversations[0].from` must be human, gpt or system",
        ),
    ] {
        assert!(refused(file).contains(why), "{file}: {}", refused(file));
    }
    let message = refused(&format!("{}{good}", "{\"messages\": 1}\n".repeat(12)));
    assert_eq!(message.matches("\nline ").count(), 10);
    assert!(message.starts_with("12 of 13") && message.ends_with("and 2 more"), "{message}");
    let error = parse(b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}", &SMOLLM2, &options()).unwrap_err();
    assert_eq!(error.message, "line 2: not UTF-8");
}

#[test]
fn a_preview_shows_what_is_trained_and_an_estimate_what_it_takes() {
    let record = json!({"prompt": "Say é:", "completion": " é"});
    let data = read(&vec![record; 10], &SMOLLM2);
    let preview = data.preview(2, &SMOLLM2).unwrap();
    assert_eq!(preview.len(), 2);
    assert_eq!(preview[0].text, "Say é:⟦ é<|im_end|>⟧");
    assert_eq!(preview[0].token_ids, data.examples[0].tokens);

    let mut spec = JobSpec { epochs: 2, batch_size: 4, gradient_accumulation: 2, max_length: 16, ..JobSpec::default() };
    let tokens = data.statistics.tokens;
    let estimate = data.estimate(&spec, Some(tokens as f64));
    assert_eq!(estimate, Estimate { steps: 4, tokens: 2 * tokens, seconds: Some(2.0) });
    assert_eq!(estimate.to_string(), format!("4 steps over {} tokens, about 2 s", 2 * tokens));
    spec.max_steps = Some(1);
    assert_eq!(data.estimate(&spec, None), Estimate { steps: 1, tokens: tokens / 2, seconds: None });
    // Ten examples of five tokens fit in four rows of sixteen.
    (spec.max_steps, spec.packing, spec.gradient_accumulation) = (None, true, 1);
    assert_eq!((tokens, data.estimate(&spec, None).steps), (50, 2));
}

#[test]
fn reasoning_and_tools_are_trained_as_the_server_renders_them() {
    let own = with_template(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n\
         {% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\
         {% for call in m.tool_calls or [] %}CALL {{ call.function | tojson }}{% endfor %}<|im_end|>{% endfor %}\
         {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    );
    let plain: &TextCodec = &SMOLLM2;
    let tool = json!({"type": "function", "function": {"name": "add"}});
    let call = json!({"role": "assistant", "function_call": {"name": "add", "arguments": "{\"a\": 1}"}});
    let record = |answer: Value| json!({"messages": [{"role": "user", "content": "2+2"}, answer], "tools": [tool]});
    let thought = record(json!({"role": "assistant", "content": "4", "reasoning_content": "two and two"}));
    for (codec, answer, expected) in [
        (&own, thought.clone(), "<think>two and two</think>4<|im_end|>"),
        (&own, record(call.clone()), "CALL {\"name\": \"add\", \"arguments\": {\"a\": 1}}<|im_end|>"),
        (plain, thought, "<think>\ntwo and two\n</think>\n\n4<|im_end|>\n"),
        (plain, record(call), "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call><|im_end|>\n"),
    ] {
        let data = read(&[answer], codec);
        assert_eq!(trained_text(&data.examples[0], codec), [expected]);
        let text = codec.decode(&data.examples[0].tokens, false).unwrap();
        assert!(text.contains("\"function\": {\"name\": \"add\"}"), "{text}");
    }
    let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let unread = json!({"messages": turns, "chat_template_kwargs": {"style": "x"}});
    assert!(refused(&unread.to_string()).contains("line 1: `chat_template_kwargs.style` has no effect"));
}
