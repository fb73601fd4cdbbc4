//! The cost of structured output per token, over the default model's tokenizer: `cargo bench --bench grammar`.
//!
//! `compile` is the time of a schema of 149 lines, `mask and accept` that of one token of a document that matches it, and `worst
//! token` that of the document's slowest token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use quiver::hub;
use quiver::text::codec::TextCodec;
use quiver::text::grammar::{CompiledGrammar, Grammar, GrammarCompiler};
use serde_json::{Value, json};

/// A schema of 149 lines: an order with nested objects, arrays, enumerations, patterns, bounds, `anyOf` and `$ref`.
fn schema() -> Value {
    let bounded = |most: u32| json!({"type": "string", "minLength": 1, "maxLength": most});
    let object = |properties: Value| {
        let required: Vec<String> = properties.as_object().expect("an object").keys().cloned().collect();
        json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
    };
    let address = object(json!({
        "street": bounded(60), "city": bounded(40), "postcode": {"type": "string", "pattern": "^[A-Z0-9]{4,8}$"},
        "country": {"enum": ["DE", "FR", "GB", "US", "JP"]},
    }));
    let item = object(json!({
        "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}, "title": bounded(80),
        "quantity": {"type": "integer", "minimum": 1, "maximum": 999},
        "price": {"type": "number", "minimum": 0}, "gift": {"type": "boolean"},
    }));
    let mut order = object(json!({
        "id": {"type": "string", "format": "uuid"}, "placed": {"type": "string", "format": "date-time"},
        "customer": object(json!({"name": bounded(60), "email": {"type": "string", "format": "email"}})),
        "shipping": {"$ref": "#/$defs/address"}, "billing": {"anyOf": [{"$ref": "#/$defs/address"}, {"type": "null"}]},
        "items": {"type": "array", "items": {"$ref": "#/$defs/item"}, "minItems": 1, "maxItems": 20},
        "notes": {"type": ["string", "null"]}, "status": {"enum": ["open", "paid", "sent", "returned"]},
    }));
    order["$defs"] = json!({"address": address, "item": item});
    order
}

/// A document that matches the schema, as a model would write it.
fn document() -> String {
    let address = json!({"street": "12 Rue de la République", "city": "Lyon", "postcode": "69001", "country": "FR"});
    let item = |i: u32| {
        json!({"sku": format!("ABC-{:04}", 17 * i), "title": format!("A lantern of brass, number {i}"),
                               "quantity": i, "price": 12.5, "gift": i == 2})
    };
    let order = json!({
        "id": "9b2f1c04-5d3e-4a7b-8c6d-0123456789ab", "placed": "2026-03-01T12:30:00Z",
        "customer": {"name": "Zoë Martin", "email": "zoe@example.org"}, "shipping": address, "billing": null,
        "items": (1..6).map(item).collect::<Vec<_>>(), "notes": "Please ring twice; the dog is friendly.", "status": "paid",
    });
    serde_json::to_string_pretty(&order).expect("JSON")
}

/// Drives a constraint over tokens; the time of the slowest one.
fn drive(grammar: &Arc<CompiledGrammar>, tokens: &[u32]) -> Duration {
    let mut constraint = grammar.constraint();
    let mut worst = Duration::ZERO;
    let mut mask = constraint.compute_mask().expect("a mask");
    for &token in tokens {
        assert!(mask.allows(token), "token {token} is allowed");
        let began = Instant::now();
        if constraint.accept(token).expect("an allowed token") {
            break;
        }
        mask = constraint.compute_mask().expect("a mask");
        worst = worst.max(began.elapsed());
    }
    worst
}

/// The document in tokens that the masks allow: the longest ones that fit.
fn tokens(grammar: &Arc<CompiledGrammar>, codec: &TextCodec, text: &str) -> Vec<u32> {
    let (mut constraint, mut tokens, mut rest) = (grammar.constraint(), Vec::new(), text.as_bytes());
    while !rest.is_empty() {
        let mask = constraint.compute_mask().expect("a mask");
        let fits = |id: &u32| mask.allows(*id) && rest.starts_with(codec.token_bytes(*id));
        let best = (0..codec.vocab_size() as u32).filter(fits).max_by_key(|id| codec.token_bytes(*id).len());
        let id = best.unwrap_or_else(|| panic!("the schema refuses {:?}", String::from_utf8_lossy(rest)));
        rest = &rest[codec.token_bytes(id).len()..];
        tokens.push(id);
        if constraint.accept(id).expect("an allowed token") {
            break;
        }
    }
    tokens
}

fn grammar(c: &mut Criterion) {
    let files =
        hub::resolve(hub::DEFAULT_MODEL, &hub::default_cache(), false).expect("the default model can be fetched");
    let codec = Arc::new(TextCodec::load(&files).expect("a tokenizer"));
    let began = Instant::now();
    let compiler = GrammarCompiler::new(codec.clone());
    let compile = |grammar: &Grammar| Arc::new(compiler.compile_now(grammar).expect("a valid grammar"));
    compile(&Grammar::json_object());
    println!("trie of {} tokens: {:?}", codec.vocab_size(), began.elapsed());
    let lines = serde_json::to_string_pretty(&schema()).expect("JSON").lines().count();
    println!("schema of {lines} lines");
    let mut group = c.benchmark_group("grammar");
    group.bench_function("compile", |b| b.iter(|| compile(&Grammar::json(schema()))));
    for (name, grammar) in [("schema", Grammar::json(schema())), ("json object", Grammar::json_object())] {
        let compiled = compile(&grammar);
        let tokens = tokens(&compiled, &codec, &document());
        println!("{name}: {} tokens, worst token {:?}", tokens.len(), drive(&compiled, &tokens));
        group.throughput(Throughput::Elements(tokens.len() as u64));
        group.bench_function(format!("{name}: mask and accept"), |b| b.iter(|| drive(&compiled, &tokens)));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = grammar
}
criterion_main!(benches);
