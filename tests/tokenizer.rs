//! Compares ids, text and chat prompts with Hugging Face's tokenizers, and streamed with whole decoding.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use proptest::prelude::*;
use quiver::error::ErrorKind;
use quiver::hub::{self, ModelFiles, ModelFormat};
use quiver::text::codec::TextCodec;
use quiver::text::messages::ChatPrompt;
use serde_json::{Value, json};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(path)
}

fn gguf(name: &str) -> TextCodec {
    let format = ModelFormat::Gguf(fixture(&format!("tokenizer/{name}.gguf")));
    TextCodec::load(&ModelFiles { name: name.to_string(), format }).unwrap()
}

fn codec_of(dir: &Path) -> TextCodec {
    let format = ModelFormat::HuggingFace(dir.to_owned());
    TextCodec::load(&ModelFiles { name: "hf".to_string(), format }).unwrap()
}

fn directory() -> TextCodec {
    codec_of(&fixture("tokenizer/hf"))
}

static SMOLLM2: LazyLock<TextCodec> = LazyLock::new(|| {
    let files = hub::resolve(hub::DEFAULT_MODEL, &hub::default_cache(), true).unwrap();
    TextCodec::load(&files).unwrap()
});

fn golden(name: &str) -> Vec<Value> {
    let all: Value = serde_json::from_slice(&std::fs::read(fixture("tokenizer/ids.json")).unwrap()).unwrap();
    all[name].as_array().unwrap().clone()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn check(name: &str, codec: &TextCodec) {
    let rows = golden(name);
    assert!(rows.len() > 70);
    for row in rows {
        let text = row["text"].as_str().unwrap();
        let expected = ids(&row["ids"]);
        assert_eq!(codec.encode(text, true).unwrap(), expected, "{name} {text:?}");
        if let Some(decoded) = row["decoded"].as_str() {
            assert_eq!(codec.decode(&expected, true).unwrap(), decoded, "{name} {text:?}");
        }
        let mut stream = codec.stream(true);
        let mut streamed = String::new();
        for &id in &expected {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "{name} {text:?}: half a character at {id}");
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().unwrap());
        assert_eq!(streamed, codec.decode(&expected, true).unwrap(), "{name} {text:?}");
    }
}

#[test]
fn smollm2_ids_are_hugging_faces() {
    check("smollm2", &SMOLLM2);
    for row in golden("smollm2") {
        // Byte-level BPE loses nothing.
        assert_eq!(SMOLLM2.decode(&ids(&row["ids"]), false).unwrap(), row["text"].as_str().unwrap());
    }
}

#[test]
fn sentencepiece_ids_are_hugging_faces() {
    check("spm", &gguf("spm"));
}

#[test]
fn llama3_ids_are_hugging_faces() {
    check("llama3", &gguf("llama3"));
    check("llama3", &directory());
}

#[test]
fn qwen2_ids_are_hugging_faces() {
    check("qwen2", &gguf("qwen2"));
}

#[test]
fn special_tokens_and_vocabulary() {
    let c = &*SMOLLM2;
    assert_eq!(c.vocab_size(), 49152);
    assert_eq!((c.bos_token_id(), c.eos_token_ids()), (Some(1), &[2][..]));
    assert_eq!(c.id_of("<|im_end|>"), Some(2));
    assert_eq!(c.id_of("<|nothing|>"), None);
    assert_eq!(c.decode(&[1, 2], true).unwrap(), "");
    assert_eq!(c.decode(&[1, 2], false).unwrap(), "<|im_start|><|im_end|>");
    assert_eq!(c.decode(&[9_999_999], false).unwrap(), "");
    assert_eq!(c.token_bytes(9_999_999), b"");
    let id = c.encode(" world", false).unwrap();
    assert_eq!((id.len(), c.token_bytes(id[0]), c.token_string(id[0]).as_str()), (1, &b" world"[..], " world"));
    // A token may be one byte of an emoji, which is no text.
    let emoji = c.encode("😀", false).unwrap();
    assert_eq!(emoji.iter().flat_map(|&id| c.token_bytes(id).to_vec()).collect::<Vec<_>>(), "😀".as_bytes());

    let spm = gguf("spm");
    assert_eq!(spm.encode("", true).unwrap(), [1]);
    assert_eq!(spm.encode("", false).unwrap(), Vec::<u32>::new());
    assert_eq!((spm.bos_token_id(), spm.eos_token_ids()), (Some(1), &[2][..]));
    assert_eq!(spm.token_bytes(spm.id_of("<0x0A>").unwrap()), b"\n");
    assert_eq!(directory().eos_token_ids(), &[602, 600], "generation_config.json's list");
}

#[test]
fn a_shape_alone_has_bytes_and_an_id_for_everything_else() {
    let codec = |dir: PathBuf| {
        let format = ModelFormat::Shape(dir.join("config.json"));
        TextCodec::load(&ModelFiles { name: "shape".to_string(), format })
    };
    let shapes = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/shapes");
    let c = codec(shapes.join("llama-3.1-8b")).unwrap();
    assert_eq!((c.vocab_size(), c.bos_token_id()), (128256, Some(128000)));
    assert_eq!(c.eos_token_ids(), &[128001, 128008, 128009]);
    let text = "The lantern,\n é 中 😀";
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    assert_eq!(c.encode(text, true).unwrap(), ids);
    assert_eq!(c.decode(&ids, true).unwrap(), text);
    assert_eq!(c.decode(&[72, 105, 256, 128255], true).unwrap(), "Hi 256 128255");
    assert_eq!(codec(shapes.join("llama-2-7b")).unwrap().eos_token_ids(), &[2]);
    // A tokenizer.json in the same directory is used instead.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("tokenizer/hf/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    assert_eq!(codec(dir.path().to_path_buf()).unwrap().vocab_size(), directory().vocab_size());
    let small = codec(fixture("peft-tiny/base")).err().unwrap();
    assert!(small.message.contains("tokenizer.json"), "{small}");
}

fn rendered(codec: &TextCodec, messages: &[Value], add_generation_prompt: bool) -> quiver::Result<String> {
    let body = json!({"messages": messages, "add_generation_prompt": add_generation_prompt});
    codec.render_chat(&ChatPrompt::from_body(&body)?)
}

#[test]
fn chat_prompts_are_transformers() {
    let expected: Value =
        serde_json::from_slice(&std::fs::read(fixture("smollm2-peft/expected.json")).unwrap()).unwrap();
    let mut prompts = 0;
    for case in expected.as_object().unwrap().values().flat_map(|cases| cases.as_object().unwrap().values()) {
        let messages = [json!({"role": "user", "content": case["user"]})];
        let prompt = rendered(&SMOLLM2, &messages, true).unwrap();
        assert_eq!(SMOLLM2.encode(&prompt, false).unwrap(), ids(&case["prompt_ids"]));
        let greedy = ids(&case["greedy_ids"]);
        assert_eq!(SMOLLM2.decode(&greedy, true).unwrap(), case["greedy_text"].as_str().unwrap());
        prompts += 1;
    }
    assert_eq!(prompts, 12);

    let own_system = [json!({"role": "system", "content": "Be brief."}), json!({"role": "user", "content": "hi"})];
    assert_eq!(
        rendered(&SMOLLM2, &own_system, false).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    );
    let parts = [json!({"role": "user", "content": [{"type": "text", "text": " a"}, {"type": "text", "text": "b "}]})];
    assert_eq!(
        rendered(&directory(), &parts, true).unwrap(),
        "<|begin|><|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    );
    let error = rendered(&gguf("spm"), &own_system, true).unwrap_err();
    assert!(error.message.contains("no chat template"), "{error}");
    assert_eq!(rendered(&SMOLLM2, &[json!({"role": "user"})], true).unwrap_err().kind, ErrorKind::Invalid);
}

#[test]
fn refusals_name_what_is_wrong() {
    let load = |format| TextCodec::load(&ModelFiles { name: "x".to_string(), format }).map(|_| ()).unwrap_err();
    let none = load(ModelFormat::HuggingFace(fixture("peft-tiny/base")));
    assert!(none.message.contains("tokenizer.json"), "{none}");
    let dir = tempfile::tempdir().unwrap();
    // An unknown pre-tokenizer in GGUF, and an unsupported decoder in tokenizer.json.
    let bytes = std::fs::read(fixture("tokenizer/qwen2.gguf")).unwrap();
    let at = bytes.windows(5).position(|w| w == b"qwen2").unwrap();
    let unknown = [&bytes[..at], b"qwenX", &bytes[at + 5..]].concat();
    let path = dir.path().join("unknown.gguf");
    std::fs::write(&path, unknown).unwrap();
    let error = load(ModelFormat::Gguf(path));
    assert!(error.message.contains("qwenX") && error.message.contains("llama-bpe"), "{error}");
    let text = std::fs::read_to_string(fixture("tokenizer/hf/tokenizer.json")).unwrap();
    let mut form: Value = serde_json::from_str(&text).unwrap();
    form["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    std::fs::write(dir.path().join("tokenizer.json"), form.to_string()).unwrap();
    let error = load(ModelFormat::HuggingFace(dir.path().to_path_buf()));
    assert!(error.message.contains("WordPiece"), "{error}");
}

fn streamed(codec: &TextCodec, ids: &[u32], skip: bool) -> String {
    let mut stream = codec.stream(skip);
    let mut text: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    text.push_str(&stream.finish().unwrap());
    text
}

proptest! {
    #[test]
    fn streams_of_any_ids_add_up(ids in proptest::collection::vec(0u32..49_160, 0..60)) {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| SMOLLM2.token_bytes(id).to_vec()).collect();
        prop_assert_eq!(streamed(&SMOLLM2, &ids, false), String::from_utf8_lossy(&bytes));
        prop_assert_eq!(streamed(&SMOLLM2, &ids, true), SMOLLM2.decode(&ids, true).unwrap());
    }

    /// Small ids are single bytes here: most sequences are broken UTF-8.
    #[test]
    fn decoding_is_the_tokenizers_crates(ids in proptest::collection::vec(0u32..610, 0..40), skip: bool) {
        static THEIRS: LazyLock<tokenizers::Tokenizer> =
            LazyLock::new(|| tokenizers::Tokenizer::from_file(fixture("tokenizer/hf/tokenizer.json")).unwrap());
        static OURS: LazyLock<TextCodec> = LazyLock::new(|| gguf("llama3"));
        let theirs = THEIRS.decode(&ids, skip).unwrap();
        prop_assert_eq!(streamed(&OURS, &ids, skip), theirs.as_str());
    }

    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}|[ \\t\\r\\n0-9a-zé中😀]{0,40}") {
        let ids = SMOLLM2.encode(&text, false).unwrap();
        prop_assert_eq!(SMOLLM2.decode(&ids, false).unwrap(), text);
    }
}

#[test]
fn a_special_token_after_an_answer_ends_it() {
    // The file declares another end token than the one that its template writes.
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("tokenizer/hf/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let template = |source: &str| {
        let config = json!({"eos_token": "<|begin|>", "chat_template": source});
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        codec_of(dir.path())
    };
    let messages = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}";
    let declared = template("x").eos_token_ids().to_vec();
    let ends = template(&format!("{messages}\n<|im_end|>\n{{% endfor %}}"));
    assert_eq!(ends.eos_token_ids(), [declared[0], ends.id_of("<|im_end|>").unwrap()]);
    for other in
        ["{% endfor %}", " end{% endfor %}", "{{ raise_exception('no') }}{% endfor %}", "<|begin|>{% endfor %}"]
    {
        assert_eq!(template(&format!("{messages}{other}")).eos_token_ids(), declared, "{other}");
    }
}
