use serde_json::json;

use super::*;
use crate::hub::{ModelFiles, ModelFormat};

/// A compiler for a tokenizer of the fixtures.
pub(in crate::text) fn compiler(path: &str) -> GrammarCompiler {
    let path = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer").join(path);
    GrammarCompiler::new(Arc::new(codec(path)))
}

/// The fixtures' Llama 3 tokenizer with further special tokens.
pub(in crate::text) fn codec_with_tokens(tokens: &[&str]) -> TextCodec {
    let from = std::path::PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer/hf");
    let dir = tempfile::tempdir().expect("a directory");
    for file in ["tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(from.join(file), dir.path().join(file)).expect("a copy");
    }
    let text = std::fs::read_to_string(from.join("tokenizer.json")).expect("a tokenizer");
    let mut tokenizer: Value = serde_json::from_str(&text).expect("JSON");
    let added = tokenizer["added_tokens"].as_array_mut().expect("added tokens");
    for (id, token) in (604..).zip(tokens) {
        added.push(json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}));
    }
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).expect("a file");
    codec(dir.path().to_owned())
}

fn codec(path: std::path::PathBuf) -> TextCodec {
    let format = if path.is_dir() { ModelFormat::HuggingFace(path) } else { ModelFormat::Gguf(path) };
    TextCodec::load(&ModelFiles { name: "test".into(), format }).expect("a tokenizer")
}

/// Whether a grammar accepts a whole text, token by token.
pub(in crate::text) fn accepts(compiler: &GrammarCompiler, grammar: &Grammar, text: &str) -> bool {
    let compiled = Arc::new(compiler.compile_now(grammar).unwrap_or_else(|e| panic!("{grammar:?}: {e}")));
    let mut constraint = compiled.constraint();
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        let mask = constraint.compute_mask().expect("a mask");
        // The longest allowed token of the text.
        let fits = |id: &u32| mask.allows(*id) && rest.starts_with(compiler.codec.token_bytes(*id));
        let ids = (0..compiler.codec.vocab_size() as u32).filter(fits);
        let Some(id) = ids.max_by_key(|id| compiler.codec.token_bytes(*id).len()) else { return false };
        rest = &rest[compiler.codec.token_bytes(id).len()..];
        if constraint.accept(id).expect("an allowed token") {
            return rest.is_empty();
        }
    }
    let mask = constraint.compute_mask().expect("a mask");
    compiler.codec.eos_token_ids().iter().any(|id| mask.allows(*id))
}

#[test]
fn grammars_accept_their_language() {
    let object = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]+$"},
            "size": {"anyOf": [{"type": "integer", "minimum": 3, "maximum": 40}, {"$ref": "#/$defs/unit"}]},
            "tags": {"type": "array", "items": {"enum": ["é", 2, null]}, "minItems": 1, "maxItems": 2},
        },
        "required": ["name", "tags"],
        "additionalProperties": false,
        "$defs": {"unit": {"const": "km"}},
    });
    let expression = "root ::= sum\nsum ::= term (\"+\" term)*\nterm ::= [0-9]+ | \"(\" sum \")\"";
    let long = "{\n\n\n\"a\":1}";
    let cases: [(Grammar, &[&str], &[&str]); 8] = [
        (
            Grammar::json(object),
            &[
                "{\"name\": \"Bo\", \"size\": 40, \"tags\": [\"é\",2]}",
                "{\"name\":\"Bo\",\"size\":\"km\",\"tags\":[null]}",
            ],
            &[
                "{\"name\":\"bo\",\"tags\":[2]}",
                "{\"name\":\"Bo\",\"tags\":[]}",
                "{\"name\":\"Bo\",\"size\":41,\"tags\":[2]}",
                "{\"name\":\"Bo\",\"tags\":[2],\"x\":1}",
            ],
        ),
        (Grammar::json_object(), &["{}", "{\"a\": [1.5e3, {\"b\": true}]}"], &["[]", "{\"a\":}", long]),
        (Grammar::Regex("^\\d{2}|x+/y$".into()), &["42", "xx/y"], &["4", "x/"]),
        (Grammar::Choice(vec!["yes".into(), "yes\n\"no\"".into()]), &["yes", "yes\n\"no\""], &["no", "ye", "yesno"]),
        (Grammar::Text(expression.into()), &["1+(2+30)+4", "((7))"], &["1+", "(1", "1a"]),
        (Grammar::Text("start: a b\na: \"x\"\nb: /[yz]/ | a".into()), &["xy", "xx"], &["x", "xyz"]),
        (Grammar::Text("root ::= \"a\"? [^b-c]{2} .".into()), &["axyz", "xy\n"], &["abcd", "xb."]),
        (Grammar::Json { schema: json!({"const": [1, 2]}), whitespace: JsonWhitespace::None }, &["[1,2]"], &["[1, 2]"]),
    ];
    for path in ["hf", "qwen2.gguf", "spm.gguf"] {
        let compiler = compiler(path);
        for (grammar, good, bad) in &cases {
            good.iter()
                .for_each(|text| assert!(accepts(&compiler, grammar, text), "{path}: {grammar:?} refuses {text:?}"));
            bad.iter()
                .for_each(|text| assert!(!accepts(&compiler, grammar, text), "{path}: {grammar:?} accepts {text:?}"));
        }
    }
}

#[test]
fn special_tokens_are_no_text() {
    let compiler = compiler("hf");
    let compiled = Arc::new(compiler.compile_now(&Grammar::Regex("(.|\\n)*".into())).expect("a regular expression"));
    let mask = compiled.constraint().compute_mask().expect("a mask");
    let control = compiler.codec.control_token_ids();
    assert!(!control.is_empty());
    for id in control.iter().filter(|id| !compiler.codec.eos_token_ids().contains(id)) {
        assert!(!mask.allows(*id), "{id}");
    }
    let text = compiler.codec.token_string(*control.iter().next().expect("a special token"));
    assert!(accepts(&compiler, &Grammar::Choice(vec![text.clone()]), &text), "{text} can be spelt");
}

#[test]
fn anchors_at_the_ends_are_dropped() {
    for (regex, plain) in [("^a$", "a"), ("a\\$", "a\\$"), ("a\\\\$", "a\\\\"), ("[^a]", "[^a]"), ("$", ""), ("", "")] {
        assert_eq!(without_anchors(regex), plain);
    }
}

#[tokio::test]
async fn grammars_are_compiled_once() {
    let compiler = Arc::new(compiler("hf"));
    let number = |i: usize| Grammar::Regex(format!("[0-9]{{{i}}}"));
    let first = compiler.compile(number(1)).await.expect("a grammar");
    assert!(Arc::ptr_eq(&first, &compiler.compile(number(1)).await.expect("the same")));
    for i in 2..2 + CACHED_GRAMMARS {
        compiler.compile(number(i)).await.expect("another");
    }
    assert!(!Arc::ptr_eq(&first, &compiler.compile(number(1)).await.expect("compiled again")));
    let error = compiler.compile(Grammar::Regex("(".into())).await.err().expect("no regular expression");
    assert_eq!(error.kind, crate::error::ErrorKind::Invalid);
}
