//! What each route does with each field of a request body: honours it, accepts it because it has no effect here, or refuses it by
//! name. A field in no table is refused too, so no field that changes an answer is ever ignored.
//!
//! `docs/fields.md` is generated from these tables.

mod messages;
mod page;
mod responses;
mod tables;
mod tgi;

use serde_json::Value;

pub(super) use messages::{COUNT_TOKENS, MESSAGES};
pub use page::fields_page;
pub(super) use responses::RESPONSES;
pub(super) use tables::{CHAT_COMPLETIONS, COMPLETIONS, EMBEDDINGS};
pub(super) use tgi::{GENERATE, GENERATE_PARAMETERS};

use crate::fields::{self, Fields};
use crate::{Error, Result};

/// A field of a request body.
pub(super) struct RequestField {
    name: &'static str,
    treatment: Treatment,
}

/// What a route does with a field.
enum Treatment {
    /// The route reads it. The text says what it means, or is empty for a field of OpenAI's API.
    Honoured(&'static str),
    /// It is accepted and has no effect on the answer. The text says why.
    NoEffect(&'static str),
    /// It is refused, unless its value asks for nothing.
    Refused {
        /// The value that asks for nothing, as JSON. So do `null`, `false` and empty strings, arrays and objects.
        neutral: Option<&'static str>,
        /// Why, and what to do.
        instead: &'static str,
    },
}

/// The route reads the field, which is OpenAI's.
const fn honoured(name: &'static str) -> RequestField {
    means(name, "")
}

/// The route reads the field.
const fn means(name: &'static str, meaning: &'static str) -> RequestField {
    RequestField { name, treatment: Treatment::Honoured(meaning) }
}

/// The field has no effect, and why.
const fn no_effect(name: &'static str, why: &'static str) -> RequestField {
    RequestField { name, treatment: Treatment::NoEffect(why) }
}

/// The field is refused, and what to do.
const fn refused(name: &'static str, instead: &'static str) -> RequestField {
    RequestField { name, treatment: Treatment::Refused { neutral: None, instead } }
}

/// The field is refused unless its value is `neutral`.
const fn refused_unless(name: &'static str, neutral: &'static str, instead: &'static str) -> RequestField {
    RequestField { name, treatment: Treatment::Refused { neutral: Some(neutral), instead } }
}

/// The fields of a route.
pub(super) struct FieldTable {
    /// The routes that take them, for messages and the docs.
    pub(super) routes: &'static str,
    /// Lists of fields, some of which several routes share.
    parts: &'static [&'static [RequestField]],
}

impl FieldTable {
    /// Checks that each field of a body is known and not refused.
    ///
    /// # Errors
    /// `Invalid`, naming the field: `unsupported_parameter` for a refused one, `unknown_field` for one in no table.
    pub(super) fn check(&self, body: &Fields) -> Result<()> {
        for name in body.names() {
            let Some(field) = self.fields().find(|field| field.name == name) else {
                return Err(self.unknown(body, name));
            };
            let Treatment::Refused { neutral, instead } = &field.treatment else { continue };
            let value = body.get(name).unwrap_or(&Value::Null);
            if !asks_for_nothing(value, *neutral) {
                let path = body.path_of(name);
                return Err(Error::invalid(format!("`{path}`: {instead}")).param(path).code("unsupported_parameter"));
            }
        }
        Ok(())
    }

    fn fields(&self) -> impl Iterator<Item = &RequestField> {
        self.parts.iter().flat_map(|part| part.iter())
    }

    fn unknown(&self, body: &Fields, name: &str) -> Error {
        let known: Vec<&str> =
            self.fields().filter(|f| !matches!(f.treatment, Treatment::Refused { .. })).map(|f| f.name).collect();
        if let Some(meant) = fields::meant(name, &known) {
            return fields::misspelt_field(body, name, meant);
        }
        let shown = body.path_of(&name.chars().take(64).collect::<String>());
        Error::invalid(format!("unknown field `{shown}`: {} has no such field; remove it", self.routes))
            .param(shown)
            .code("unknown_field")
    }
}

fn asks_for_nothing(value: &Value, neutral: Option<&str>) -> bool {
    let neutral = neutral.and_then(|json| serde_json::from_str::<Value>(json).ok());
    match value {
        // Even an empty value asks for something.
        value if neutral == Some(Value::Null) => value.is_null(),
        Value::Null => true,
        Value::Bool(on) => !on || neutral == Some(Value::Bool(true)),
        Value::String(s) => s.is_empty() || neutral.as_ref() == Some(value),
        Value::Array(a) => a.is_empty() || neutral.as_ref() == Some(value),
        Value::Object(o) => o.is_empty() || neutral.as_ref() == Some(value),
        // 1 and 1.0 are the same number.
        Value::Number(n) => neutral.as_ref().and_then(Value::as_f64).is_some_and(|other| n.as_f64() == Some(other)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::page::{TABLES, fields_page};
    use super::*;

    fn check(body: Value) -> Result<()> {
        COMPLETIONS.check(&Fields::of_body(&body)?)
    }

    #[test]
    fn no_field_is_in_a_table_twice() {
        for table in TABLES {
            let mut names: Vec<&str> = table.fields().map(|field| field.name).collect();
            names.sort_unstable();
            let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
            assert_eq!(twice, None, "{}", table.routes);
        }
    }

    #[test]
    fn refused_fields_may_ask_for_nothing() {
        for body in [
            json!({"prompt": "a", "mirostat": 0, "typical_p": 1.0, "dry_multiplier": 0}),
            json!({"use_beam_search": false, "samplers": [], "prompt_embeds": null, "messages": []}),
        ] {
            check(body.clone()).unwrap_or_else(|e| panic!("{body}: {e}"));
        }
        for (body, param) in [
            (json!({"mirostat": 2}), "mirostat"),
            (json!({"typical_p": 0.9}), "typical_p"),
            (json!({"use_beam_search": true}), "use_beam_search"),
            (json!({"samplers": ["top_k"]}), "samplers"),
            (json!({"messages": [1]}), "messages"),
        ] {
            let error = check(body).unwrap_err();
            assert_eq!((error.code, error.param.as_deref()), (Some("unsupported_parameter"), Some(param)));
        }
    }

    #[test]
    fn unknown_fields_are_refused() {
        let of = |name: &str| check(json!({name: 1})).unwrap_err();
        assert!(of("frobnicate").message.contains("/v1/completions"));
        assert!(of("tempurature").message.contains("did you mean `temperature`?"));
        assert!(of("lora_path").message.contains("did you mean `adapter`?"));
        let long = of(&"x".repeat(1 << 20));
        assert!(long.message.len() < 300 && long.param.as_ref().is_some_and(|param| param.len() == 64));
    }

    /// With QUIVER_WRITE_DOCS set, the page is written instead.
    #[test]
    fn the_docs_list_every_field() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/fields.md");
        if std::env::var_os("QUIVER_WRITE_DOCS").is_some() {
            std::fs::write(&path, fields_page()).unwrap();
        }
        assert!(
            std::fs::read_to_string(&path).unwrap_or_default() == fields_page(),
            "docs/fields.md is not current: run QUIVER_WRITE_DOCS=1 cargo test --lib the_docs_list_every_field"
        );
    }
}
