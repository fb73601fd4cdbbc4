use std::path::Path;

use super::*;
use crate::engine::request::Logprobs;
use crate::fields::Fields;
use crate::hub::{ModelFiles, ModelFormat};
use crate::server::params::{ReplyOptions, StreamUsage};
use crate::server::response::Endpoint;
use crate::server::stream::FinishDetails;
use crate::text::codec::TextCodec;

fn context(logprobs: Option<usize>) -> ReplyContext {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/hf");
    let codec = TextCodec::load(&ModelFiles { name: "hf".into(), format: ModelFormat::HuggingFace(dir) }).unwrap();
    ReplyContext {
        endpoint: Endpoint::Chat,
        id: "resp_1".into(),
        model: "base".into(),
        adapter: Value::Null,
        generation: Value::Null,
        system_fingerprint: String::new(),
        created: 1,
        temperature: 0.1,
        top_p: 1.0,
        logprobs,
        prompt_logprobs: None,
        options: ReplyOptions::default(),
        stream_usage: StreamUsage::default(),
        include_reasoning: true,
        tools: None,
        echo: Vec::new(),
        prompts: vec![vec![1, 2]],
        n: 1,
        codec: Arc::new(codec),
    }
}

fn format(logprobs: Option<usize>, store: &Arc<ResponseStore>) -> ResponsesFormat {
    let body = json!({"input": "hi"});
    let conversation = Conversation::parse(&Fields::of_body(&body).unwrap(), store).unwrap();
    ResponsesFormat::new(context(logprobs), Map::new(), conversation, Some(store.clone()))
}

fn content(text: &str) -> OutputPart {
    OutputPart::Content(text.into())
}

fn thought(text: &str) -> OutputPart {
    OutputPart::Reasoning(text.into())
}

fn call(index: usize) -> OutputPart {
    OutputPart::ToolCall { index, name: "f".into() }
}

fn arguments(index: usize, text: &str) -> OutputPart {
    OutputPart::Arguments { index, text: text.into() }
}

fn finish(reason: FinishReason) -> FinishDetails {
    FinishDetails {
        reason,
        stop: None,
        end_token: None,
        end_logprobs: None,
        completion_tokens: 9,
        reasoning_tokens: 2,
        cached_tokens: 1,
    }
}

/// The events of a stream, and the response of the last one.
fn stream(parts: &[OutputPart], reason: FinishReason) -> (Vec<Value>, Value) {
    let mut format = format(None, &Arc::default());
    let mut events = Vec::new();
    let mut collect = |format: &mut ResponsesFormat| events.append(&mut format.events.as_mut().unwrap().pending);
    format.events = Some(EventLog::default());
    for part in parts {
        format.push("", vec![], vec![part.clone()]);
        collect(&mut format);
    }
    format.end(reason);
    collect(&mut format);
    let response = format.ended(&UsageInfo::default());
    (events, response)
}

/// The values of a response whose ids are random.
fn without_ids(mut response: Value) -> Value {
    for item in response["output"].as_array_mut().unwrap() {
        item.as_object_mut().unwrap().remove("id");
        item.as_object_mut().unwrap().remove("call_id");
    }
    response["completed_at"] = Value::Null;
    response
}

#[test]
fn a_stream_has_an_event_for_each_step_of_each_item() {
    let parts = [
        thought("h"),
        thought("m"),
        content("o"),
        content("k"),
        call(0),
        arguments(0, "{}"),
        call(1),
        arguments(1, "{}"),
    ];
    let (events, response) = stream(&parts, FinishReason::Stop);
    let names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let call = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ];
    let text = |kind: &str| -> Vec<String> {
        let delta = format!("response.{kind}.delta");
        [
            "response.output_item.added",
            "response.content_part.added",
            &delta,
            &delta,
            &format!("response.{kind}.done"),
            "response.content_part.done",
            "response.output_item.done",
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let wanted = [
        text("reasoning_text"),
        text("output_text"),
        call.map(str::to_owned).to_vec(),
        call.map(str::to_owned).to_vec(),
    ];
    assert_eq!(names, wanted.concat());
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());

    let output = response["output"].as_array().unwrap();
    let kinds: Vec<&str> = output.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
    for (index, item) in output.iter().enumerate() {
        assert_eq!(item["status"], "completed");
        let of: Vec<&Value> = events.iter().filter(|event| event["output_index"] == index).collect();
        assert_eq!(of[0]["item"]["id"], item["id"]);
        assert_eq!(of[0]["item"]["status"], "in_progress");
        assert!(of[1..of.len() - 1].iter().all(|event| event["item_id"] == item["id"]), "{of:?}");
        assert_eq!(of.last().unwrap()["item"], *item);
    }
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "hm"}]));
    assert_eq!(output[1]["content"], json!([{"type": "output_text", "text": "ok", "annotations": [], "logprobs": []}]));
    assert_eq!((&output[2]["name"], &output[2]["arguments"]), (&json!("f"), &json!("{}")));
    assert_ne!(output[2]["call_id"], output[3]["call_id"]);
    assert_eq!(response["status"], "completed");
}

#[test]
fn the_whole_reply_is_the_last_response_of_the_stream() {
    for (parts, reason) in [
        (vec![thought("a"), thought("b"), content("c"), content("d")], FinishReason::Stop),
        (vec![content("c"), call(0), arguments(0, "{\"a\""), arguments(0, ": 1}"), content("e")], FinishReason::Stop),
        (vec![thought("a")], FinishReason::Length),
        (vec![thought("a")], FinishReason::Stop),
        (vec![call(0), arguments(0, "{")], FinishReason::Length),
        (vec![], FinishReason::Stop),
    ] {
        let (_, streamed) = stream(&parts, reason);
        let output = CompletionOutput { parts, finish: Some(finish(reason)), ..CompletionOutput::default() };
        let whole = format(None, &Arc::default()).whole(vec![output], &UsageInfo::default()).unwrap();
        let cut = reason == FinishReason::Length;
        let status = if cut { "incomplete" } else { "completed" };
        assert_eq!(
            (whole["status"].as_str(), whole["output"].as_array().unwrap().last().unwrap()["status"].as_str()),
            (Some(status), Some(status))
        );
        assert_eq!(whole["incomplete_details"].is_object(), cut);
        assert_eq!(without_ids(whole), without_ids(streamed));
    }
}

#[test]
fn an_empty_answer_is_a_message() {
    for parts in [vec![], vec![thought("a")]] {
        let (_, response) = stream(&parts, FinishReason::Stop);
        let last = response["output"].as_array().unwrap().last().unwrap().clone();
        assert_eq!((&last["type"], &last["content"][0]["text"]), (&json!("message"), &json!("")));
    }
}

#[test]
fn log_probabilities_are_those_of_the_message() {
    let text = "<think>hm</think>\n\nok go";
    // The markers and the line ends belong to no part.
    let pieces = ["<think>", "h", "m", "</think>", "\n\n", "ok", " go"];
    let mut offset = 0;
    let tokens: Vec<OutputToken> = pieces
        .iter()
        .enumerate()
        .map(|(id, piece)| {
            let logprobs = Logprobs { logprob: -(id as f32), rank: 1, top: vec![], chosen: vec![] };
            let token = OutputToken { id: id as u32, offset, logprobs: Some(logprobs) };
            offset += piece.chars().count();
            token
        })
        .collect();
    let parts =
        [vec![], vec![thought("h")], vec![thought("m")], vec![], vec![], vec![content("ok")], vec![content(" go")]];
    let mut streamed = format(Some(0), &Arc::default());
    streamed.events = Some(EventLog::default());
    for ((piece, token), parts) in pieces.iter().zip(&tokens).zip(parts.clone()) {
        streamed.push(piece, vec![token.clone()], parts);
    }
    streamed.end(FinishReason::Stop);
    let deltas: Vec<Value> = streamed
        .events
        .as_ref()
        .unwrap()
        .pending
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["logprobs"][0]["logprob"].clone())
        .collect();
    assert_eq!(deltas, [json!(-5.0), json!(-6.0)]);

    let output = CompletionOutput {
        text: text.into(),
        tokens,
        parts: parts.concat(),
        finish: Some(finish(FinishReason::Stop)),
        ..CompletionOutput::default()
    };
    let whole = format(Some(0), &Arc::default()).whole(vec![output], &UsageInfo::default()).unwrap();
    let logprobs = &whole["output"][1]["content"][0]["logprobs"];
    assert_eq!(logprobs.as_array().unwrap().len(), 2);
    assert_eq!(*logprobs, streamed.output[1]["content"][0]["logprobs"]);
}

#[test]
fn a_failed_stream_says_so_and_is_not_kept() {
    let store = Arc::default();
    let mut format = format(None, &store);
    format.opening(1);
    format.push("", vec![], vec![content("a")]);
    format.pending();
    assert_eq!(format.failure(&Error::internal("broken"), "id").len(), 2);
    format.ending(&UsageInfo::default());
    assert!(!store.contains("resp_1"));
}

#[test]
fn a_reply_is_kept_with_its_conversation() {
    let store = Arc::default();
    let output = CompletionOutput {
        parts: vec![content("ok")],
        finish: Some(finish(FinishReason::Stop)),
        ..CompletionOutput::default()
    };
    let usage = UsageInfo { prompt: 3, completion: 4, reasoning: 2, cached: 1 };
    let whole = format(None, &store).whole(vec![output], &usage).unwrap();
    assert_eq!(
        whole["usage"],
        json!({
            "input_tokens": 3, "input_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 0},
            "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 7,
        })
    );
    assert_eq!(whole["temperature"], 0.1);
    let stored = store.get("resp_1").unwrap();
    assert_eq!(serde_json::from_str::<Value>(&stored.response).unwrap(), whole);
    let items = stored.items().unwrap();
    assert_eq!((&items[0]["content"][0]["text"], &items[1]), (&json!("hi"), &whole["output"][0]));
    let id = items[1]["id"].as_str().unwrap();
    assert_eq!(store.item(id).unwrap(), Some(items[1].clone()));
}
