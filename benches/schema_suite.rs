//! How much of JSON Schema is enforced: `cargo bench --bench schema_suite -- DIRECTORY`.
//!
//! DIRECTORY is one draft of the JSON-Schema-Test-Suite, such as `tests/draft2020-12`: files with lists of schemas, each with
//! instances that are valid or not. A schema either compiles or is refused by name. Of a schema that compiles, every valid instance
//! must be writable, and no invalid one. Instances are written with their properties in the schema's order, as outputs have them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use quiver::hub;
use quiver::text::codec::TextCodec;
use quiver::text::grammar::{CompiledGrammar, Grammar, GrammarCompiler};
use serde_json::{Map, Value, json};

/// Whether the masks let a model write `text` and end there.
fn can_write(grammar: &Arc<CompiledGrammar>, codec: &TextCodec, text: &str) -> bool {
    let (mut constraint, mut rest) = (grammar.constraint(), text.as_bytes());
    loop {
        let Ok(mask) = constraint.compute_mask() else { return false };
        if rest.is_empty() {
            return codec.eos_token_ids().iter().any(|id| mask.allows(*id));
        }
        let fits = |id: &u32| {
            mask.allows(*id) && !codec.token_bytes(*id).is_empty() && rest.starts_with(codec.token_bytes(*id))
        };
        let Some(best) = (0..codec.vocab_size() as u32).filter(fits).max_by_key(|id| codec.token_bytes(*id).len())
        else {
            return false;
        };
        rest = &rest[codec.token_bytes(best).len()..];
        match constraint.accept(best) {
            Ok(true) => return rest.is_empty(),
            Ok(false) => {}
            Err(_) => return false,
        }
    }
}

/// The instance with the properties of each object in the order of the schema that describes it.
fn in_schema_order(instance: &Value, schema: &Value) -> Value {
    match instance {
        Value::Object(object) => {
            let known = schema["properties"].as_object().cloned().unwrap_or_default();
            let mut ordered = Map::new();
            for (name, part) in &known {
                object.get(name).map(|value| ordered.insert(name.clone(), in_schema_order(value, part)));
            }
            for (name, value) in object.iter().filter(|(name, _)| !known.contains_key(*name)) {
                ordered.insert(name.clone(), value.clone());
            }
            ordered.into()
        }
        Value::Array(items) => items.iter().map(|item| in_schema_order(item, &schema["items"])).collect(),
        other => other.clone(),
    }
}

fn main() {
    let Some(dir) = std::env::args().skip(1).find(|argument| !argument.starts_with('-')) else {
        // `cargo bench` without an argument runs every bench.
        return println!("schema_suite: give a directory of the JSON-Schema-Test-Suite");
    };
    let files = hub::resolve(hub::DEFAULT_MODEL, &hub::default_cache(), false).expect("the default model");
    let codec = Arc::new(TextCodec::load(&files).expect("its tokenizer"));
    let compiler = GrammarCompiler::new(codec.clone());
    let mut totals = [0_usize; 6];
    let mut faults = Vec::new();
    let mut paths: Vec<_> =
        fs::read_dir(Path::new(&dir)).expect("a directory").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "json")) {
        let cases: Value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
        for case in cases.as_array().expect("a list of schemas") {
            let schema = &case["schema"];
            totals[0] += 1;
            let Ok(grammar) = compiler.compile_now(&Grammar::json(schema.clone())).map(Arc::new) else { continue };
            totals[1] += 1;
            for test in case["tests"].as_array().expect("instances") {
                let text = in_schema_order(&test["data"], schema).to_string();
                let valid = test["valid"] == true;
                let written = can_write(&grammar, &codec, &text);
                totals[if valid { 2 } else { 4 }] += 1;
                totals[if valid { 3 } else { 5 }] += usize::from(written == valid);
                if written != valid {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    faults.push(json!({"file": name, "schema": case["description"], "test": test["description"],
                                       "fault": if valid { "valid, not writable" } else { "invalid, writable" }}));
                }
            }
        }
    }
    let [schemas, compiled, valid, writable, invalid, held] = totals;
    let report = json!({"schemas": schemas, "compiled": compiled, "valid": valid, "valid_writable": writable,
                        "invalid": invalid, "invalid_refused": held, "faults": faults});
    println!("{report:#}");
}
