//! `/tokenize` and `/detokenize` in vLLM's and llama.cpp's forms, and `/tokenizer_info`.

use serde_json::{Value, json};

use crate::harness::{BASE, EOS, Options, Server};

const E_ACUTE: [u8; 2] = [0xC3, 0xA9];

#[test]
fn vllm_form() {
    let server = Server::start();
    let ask = |body: Value| server.post("/tokenize", body).json();
    let plain = json!({"count": 3, "max_model_len": 256, "tokens": [97, 0xC3, 0xA9], "token_strs": null});
    for model in [BASE, "a", "org/base:b"] {
        assert_eq!(ask(json!({"model": model, "prompt": "aé"})), plain, "{model}");
    }
    assert_eq!(ask(json!({"prompt": "aé", "return_token_strs": false})), plain);
    // The vocabulary's spelling: a space is `Ġ`, and each byte of `é` has a character of its own.
    let strings = ask(json!({"prompt": " é", "return_token_strs": true}));
    assert_eq!((&strings["tokens"], &strings["token_strs"]), (&json!([32, 0xC3, 0xA9]), &json!(["Ġ", "Ã", "©"])));
    assert_eq!(ask(json!({"prompt": "", "add_special_tokens": false}))["count"], 0);
    let chat = ask(json!({"messages": [{"role": "user", "content": "x"}], "return_token_strs": true}));
    let tokens = chat["tokens"].as_array().unwrap();
    assert_eq!((&tokens[0], tokens.iter().filter(|t| **t == json!(EOS)).count()), (&json!(256), 1));
    assert_eq!(chat["token_strs"][0], "<|im_start|>");
    let closed = ask(json!({"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": false}));
    assert!(closed["count"].as_u64() < chat["count"].as_u64());
    let text = server.post("/detokenize", json!({"model": "a", "tokens": [97, 0xC3, 0xA9]})).json();
    assert_eq!(text, json!({"prompt": "aé"}));
}

#[test]
fn chats_are_rendered_as_for_a_completion() {
    let server = Server::start();
    let text = |body: Value| {
        let answer = server.post("/tokenize", body);
        assert_eq!(answer.status, 200, "{}", answer.text);
        let text = server.post("/detokenize", json!({"tokens": answer.json()["tokens"]})).json();
        text["prompt"].as_str().unwrap().to_owned()
    };
    let user = json!({"role": "user", "content": "x"});
    let begun = json!([user, {"role": "assistant", "content": "It is"}]);
    assert!(text(json!({"messages": begun})).ends_with("assistant\n"));
    assert!(text(json!({"messages": begun, "continue_final_message": true})).ends_with("It is"));
    let own = json!({"messages": [user], "chat_template": "{{ messages[0].content }}"});
    assert_eq!(server.post("/tokenize", own).error().2, json!("chat_template"));
    let tool = json!({"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}});
    let with_tool = text(json!({"messages": [user], "tools": [tool], "tool_choice": "auto"}));
    assert!(with_tool.contains("weather") && with_tool.contains("x<|im_end|>"), "{with_tool}");
    let answer = server.post("/tokenize", json!({"prompt": "x", "tools": [tool]}));
    assert_eq!(answer.error().2, json!("tools"));
}

#[test]
fn llama_cpp_form() {
    let server = Server::start();
    let ask = |body: Value| server.post("/tokenize", body).json();
    assert_eq!(ask(json!({"content": "aé"})), json!({"tokens": [97, 0xC3, 0xA9]}));
    let pieces =
        ask(json!({"content": " é<|im_end|>", "with_pieces": true, "add_special": true, "parse_special": true}));
    let [first, second] = E_ACUTE;
    assert_eq!(
        pieces["tokens"],
        json!([{"id": 32, "piece": " "}, {"id": first, "piece": [first]}, {"id": second, "piece": [second]},
               {"id": EOS, "piece": "<|im_end|>"}])
    );
    assert_eq!(ask(json!({"content": ""})), json!({"tokens": []}));
}

#[test]
fn wrong_fields() {
    let server = Server::start();
    let chat = json!([{"role": "user", "content": "x"}]);
    for (path, body, status, param) in [
        ("/tokenize", json!({}), 400, "prompt"),
        ("/tokenize", json!({"prompt": 1}), 400, "prompt"),
        ("/tokenize", json!({"content": 1}), 400, "content"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), 400, "messages"),
        ("/tokenize", json!({"prompt": "a", "content": "a"}), 400, "content"),
        ("/tokenize", json!({"prompt": "a", "with_pieces": true}), 400, "with_pieces"),
        ("/tokenize", json!({"prompt": "a", "add_generation_prompt": true}), 400, "add_generation_prompt"),
        ("/tokenize", json!({"messages": chat, "add_special": true}), 400, "add_special"),
        ("/tokenize", json!({"content": "a", "return_token_strs": true}), 400, "return_token_strs"),
        ("/tokenize", json!({"content": "a", "parse_special": false}), 400, "parse_special"),
        ("/tokenize", json!({"prompt": "a", "return_token_strs": 1}), 400, "return_token_strs"),
        ("/tokenize", json!({"prompt": "a", "returntokens": true}), 400, "returntokens"),
        ("/tokenize", json!({"prompt": "a", "model": "gone"}), 404, "model"),
        ("/tokenize", json!({"prompt": "a", "adapter": "gone"}), 404, "adapter"),
        ("/detokenize", json!({}), 400, "tokens"),
        ("/detokenize", json!({"tokens": [9999]}), 400, "tokens[0]"),
        ("/detokenize", json!({"tokens": [97], "skip_special_tokens": true}), 400, "skip_special_tokens"),
        ("/detokenize", json!({"tokens": [97], "model": "gone"}), 404, "model"),
    ] {
        let (got, message, got_param, _) = server.post(path, body.clone()).error();
        assert_eq!((got, got_param), (status, json!(param)), "{body}: {message}");
    }
}

#[test]
fn tokenizer_info() {
    let server = Server::with(Options { api_keys: vec!["key".into()], ..Options::default() });
    assert_eq!(server.get("/tokenizer_info").error().0, 401);
    let answer = server.send("GET", "/tokenizer_info", &[("authorization", "Bearer key")], b"");
    let info = answer.json();
    assert_eq!((&info["tokenizer_class"], &info["model_max_length"]), (&json!("PreTrainedTokenizerFast"), &json!(256)));
    assert_eq!((&info["eos_token"], &info["add_bos_token"]), (&json!("<|im_end|>"), &json!(false)));
    assert!(info["chat_template"].as_str().unwrap().contains("add_generation_prompt"));
    let added = info["added_tokens_decoder"].as_object().unwrap();
    assert_eq!(added.keys().collect::<Vec<_>>(), ["256", "257"]);
    assert_eq!((&added["257"]["content"], &added["257"]["special"]), (&json!("<|im_end|>"), &json!(true)));
}
