//! Closes the objects of a JSON schema that do not say whether they are open.
//!
//! JSON Schema allows any further property where `additionalProperties` is absent, and most schemas leave it out although their
//! authors want none. A small model would go on inventing properties until `max_tokens`. llama.cpp and vLLM close such objects too.
//! What matches the closed schema matches the open one. For the same reason, a description of properties without a type is one of an
//! object, and one of items that of an array.

use serde_json::{Map, Value};

/// Keywords beside which an object is left as it is: they describe further properties, or another part of the same object.
const LEFT_OPEN: [&str; 14] = [
    "additionalProperties",
    "patternProperties",
    "unevaluatedProperties",
    "propertyNames",
    "minProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "$ref",
    "$dynamicRef",
    "dependentSchemas",
    "dependencies",
];

/// The schema with `additionalProperties: false` in each object that lists properties and says nothing of others. Objects that are
/// only a part of a description, below `allOf`, `if`, `not` or beside `anyOf`, stay open, because a closed part would forbid the
/// properties of the others.
pub(super) fn close_objects(schema: &Value) -> Value {
    let mut schema = schema.clone();
    // A definition may be a part of any description that refers to it.
    let definitions = !has_conjunction(&schema);
    close(&mut schema, true, definitions);
    schema
}

/// Whether some description has parts.
fn has_conjunction(schema: &Value) -> bool {
    match schema {
        Value::Object(object) => {
            let beside_ref = object.contains_key("$ref") && object.contains_key("properties");
            object.contains_key("allOf") || beside_ref || object.values().any(has_conjunction)
        }
        Value::Array(items) => items.iter().any(has_conjunction),
        _ => false,
    }
}

/// `whole`: the value describes its instance alone.
fn close(schema: &mut Value, whole: bool, definitions: bool) {
    let Value::Object(object) = schema else { return };
    // What stands beside a part may describe the same properties and items.
    let inner =
        whole && !["allOf", "anyOf", "oneOf", "$ref", "if", "not"].iter().any(|part| object.contains_key(*part));
    for (keyword, value) in object.iter_mut() {
        match keyword.as_str() {
            "properties" | "patternProperties" => each(value, |value| close(value, inner, definitions)),
            "$defs" | "definitions" if definitions => each(value, |value| close(value, true, definitions)),
            "items" | "prefixItems" | "additionalItems" | "additionalProperties" => {
                close_list(value, inner, definitions);
            }
            _ => {}
        }
    }
    // An alternative describes the instance alone only if nothing stands beside the list.
    let alone = whole && !object.contains_key("properties") && !object.contains_key("allOf");
    for keyword in ["anyOf", "oneOf"] {
        if let Some(value) = object.get_mut(keyword) {
            close_list(value, alone, definitions);
        }
    }
    let bare = |keyword: &&str| *keyword != "additionalProperties" && object.contains_key(*keyword);
    if whole && !object.contains_key("type") && !LEFT_OPEN.iter().any(bare) {
        let is_array = object.contains_key("items") || object.contains_key("prefixItems");
        match (lists_properties(object), is_array) {
            (true, false) => drop(object.insert("type".into(), "object".into())),
            (false, true) => drop(object.insert("type".into(), "array".into())),
            _ => {}
        }
    }
    if whole && lists_properties(object) && !LEFT_OPEN.iter().any(|keyword| object.contains_key(*keyword)) {
        object.insert("additionalProperties".into(), false.into());
    }
}

fn lists_properties(object: &Map<String, Value>) -> bool {
    object.get("properties").is_some_and(Value::is_object)
}

fn each(object: &mut Value, change: impl FnMut(&mut Value)) {
    object.as_object_mut().into_iter().flat_map(Map::values_mut).for_each(change);
}

/// A schema or a list of schemas.
fn close_list(value: &mut Value, whole: bool, definitions: bool) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|value| close(value, whole, definitions)),
        one => close(one, whole, definitions),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn objects_that_say_nothing_are_closed() {
        let part = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let mut closed = part.clone();
        closed["additionalProperties"] = false.into();
        assert_eq!(close_objects(&part), closed);
        for (schema, want) in [
            (json!({"type": "array", "items": part}), json!({"type": "array", "items": closed})),
            (json!({"items": {"type": "string"}}), json!({"items": {"type": "string"}, "type": "array"})),
            // The parameters of a tool without parameters.
            (
                json!({"type": "object", "properties": {}}),
                json!({"type": "object", "properties": {}, "additionalProperties": false}),
            ),
            (
                json!({"properties": {"x": part}}),
                json!({"properties": {"x": closed}, "type": "object", "additionalProperties": false}),
            ),
            (
                json!({"properties": {"a": {}}, "additionalProperties": true}),
                json!({"properties": {"a": {}}, "additionalProperties": true, "type": "object"}),
            ),
            (json!({"anyOf": [part, {"type": "null"}]}), json!({"anyOf": [closed, {"type": "null"}]})),
            (json!({"$ref": "#/$defs/p", "$defs": {"p": part}}), json!({"$ref": "#/$defs/p", "$defs": {"p": closed}})),
        ] {
            assert_eq!(close_objects(&schema), want);
        }
    }

    #[test]
    fn open_objects_and_parts_stay_as_they_are() {
        let part = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        for schema in [
            json!({"type": "object"}),
            json!({"type": "object", "properties": {"a": {}}, "additionalProperties": true}),
            json!({"properties": {"a": {}}, "patternProperties": {"^x": {}}}),
            json!({"properties": {"a": {}}, "minProperties": 2}),
            json!({"allOf": [part, {"properties": {"b": {}}}]}),
            json!({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]}),
            json!({"properties": {"a": part}, "anyOf": [{"properties": {"a": {"required": ["b"], "properties": {"b": {}}}}}]}),
            json!({"allOf": [{"$ref": "#/$defs/p"}, {"properties": {"b": {}}}], "$defs": {"p": part}}),
            json!({"enum": [{"properties": {"a": 1}}]}),
        ] {
            assert_eq!(close_objects(&schema), schema);
        }
    }
}
