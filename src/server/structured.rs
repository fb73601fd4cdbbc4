//! The fields that constrain the text of an output: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`, and
//! llama.cpp's `grammar` and `json_schema`. A request gives at most one constraint.

use std::sync::Arc;

use serde_json::{Map, Value};

use crate::fields::{self, Fields};
use crate::text::grammar::{CompiledGrammar, Grammar, GrammarCompiler, JsonWhitespace};
use crate::text::reasoning::ReasoningFormat;
use crate::{Error, Result};

/// The fields of `structured_outputs`.
const VLLM_FIELDS: &[&str] =
    &["json", "regex", "choice", "grammar", "json_object", "whitespace_pattern", "disable_any_whitespace"];

/// A request's grammar.
#[derive(Debug, Clone)]
pub(super) struct RequestedGrammar {
    /// The field that gives it, for errors.
    pub(super) field: String,
    /// The grammar.
    pub(super) grammar: Grammar,
}

impl RequestedGrammar {
    /// Reads the grammar of a request, if it has one.
    pub(super) fn parse(body: &Fields) -> Result<Option<Self>> {
        let mut found: Vec<Self> = Vec::new();
        let mut add = |path: String, grammar: Option<Grammar>| {
            found.extend(grammar.map(|grammar| Self { field: path, grammar }));
        };
        response_format(body)?.into_iter().for_each(|(path, grammar)| add(path, Some(grammar)));
        let guided_whitespace = whitespace(body, "guided_whitespace_pattern")?;
        if body.get("guided_whitespace_pattern").is_some() && body.get("guided_json").is_none() {
            let message = "`guided_whitespace_pattern` is only allowed with `guided_json`";
            return Err(Error::invalid(message).param("guided_whitespace_pattern").code("invalid_value"));
        }
        add("guided_json".into(), json(body, "guided_json", guided_whitespace)?);
        add("guided_regex".into(), body.string("guided_regex")?.map(|regex| Grammar::Regex(regex.into())));
        add("guided_choice".into(), choice(body, "guided_choice")?);
        add("guided_grammar".into(), text(body, "guided_grammar")?);
        add("grammar".into(), text(body, "grammar")?);
        add("json_schema".into(), json(body, "json_schema", JsonWhitespace::Any)?);
        if let Some(options) = body.object("structured_outputs")? {
            fields::check_only(&options, VLLM_FIELDS)?;
            let whitespace = match options.boolean("disable_any_whitespace")? {
                Some(true) => JsonWhitespace::None,
                _ => whitespace(&options, "whitespace_pattern")?,
            };
            add(options.path_of("json"), json(&options, "json", whitespace)?);
            add(options.path_of("regex"), options.string("regex")?.map(|regex| Grammar::Regex(regex.into())));
            add(options.path_of("choice"), choice(&options, "choice")?);
            add(options.path_of("grammar"), text(&options, "grammar")?);
            let object = options.boolean("json_object")?.filter(|on| *on);
            add(options.path_of("json_object"), object.map(|_| Grammar::json_object()));
        }
        match &found[..] {
            [first, second, ..] => {
                let message =
                    format!("`{}` and `{}` both constrain the output: give one of them", first.field, second.field);
                Err(Error::invalid(message).param(&second.field).code("invalid_value"))
            }
            [_] if body.boolean("ignore_eos")? == Some(true) => {
                let message =
                    format!("`ignore_eos` has no meaning with `{}`, which says where the output ends", found[0].field);
                Err(Error::invalid(message).param("ignore_eos").code("invalid_value"))
            }
            _ => Ok(found.pop()),
        }
    }

    /// The grammar for the text after the thinking.
    pub(super) fn after_reasoning(self, format: ReasoningFormat, starts_in_reasoning: bool) -> Self {
        Self { grammar: self.grammar.after_reasoning(format, starts_in_reasoning), ..self }
    }

    /// Compiles it. Errors: `Invalid`, naming the field.
    pub(super) async fn compile(self, compiler: &Arc<GrammarCompiler>) -> Result<Arc<CompiledGrammar>> {
        let Self { field, grammar } = self;
        compiler.compile(grammar).await.map_err(|mut error| {
            // A part of the grammar may have a field of its own.
            if error.param.is_some() {
                return error;
            }
            error.message = format!("`{field}`: {}", error.message);
            error.param(field).code("invalid_value")
        })
    }
}

/// OpenAI's `response_format`, and llama.cpp's `schema` of the type `json_object`.
fn response_format(body: &Fields) -> Result<Option<(String, Grammar)>> {
    const TYPES: &str = "\"text\", \"json_object\" or \"json_schema\"";
    let Some(format) = body.object("response_format")? else { return Ok(None) };
    let name = format.required("type", format.string("type")?, TYPES)?;
    match name {
        "text" => fields::check_only(&format, &["type"]).map(|()| None),
        "json_object" => {
            // TGI's clients call the schema `value`.
            let name = if format.get("value").is_some() { "value" } else { "schema" };
            fields::check_only(&format, &["type", name])?;
            let schema = json(&format, name, JsonWhitespace::Any)?;
            let path = if schema.is_some() { format.path_of(name) } else { "response_format".into() };
            Ok(Some((path, schema.unwrap_or_else(Grammar::json_object))))
        }
        "json_schema" => {
            fields::check_only(&format, &["type", "json_schema"])?;
            let what = "an object with the field `schema`";
            let wrapper = format.required("json_schema", format.object("json_schema")?, what)?;
            fields::check_only(&wrapper, &["name", "description", "schema", "strict"])?;
            wrapper.string("name")?;
            wrapper.string("description")?;
            // A schema is always enforced, strict or not.
            wrapper.boolean("strict")?;
            let schema = json(&wrapper, "schema", JsonWhitespace::Any)?;
            let schema = wrapper.required("schema", schema, "a JSON schema")?;
            Ok(Some((wrapper.path_of("schema"), schema)))
        }
        _ => Err(fields::wrong(&format.path_of("type"), TYPES, &name.into())),
    }
}

/// Whether an object has a keyword by which schemas describe something.
fn describes(schema: &Map<String, Value>) -> bool {
    ["type", "properties", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "items"]
        .iter()
        .any(|k| schema.contains_key(*k))
}

/// A JSON schema: an object, or a string that contains one.
fn json(fields: &Fields, name: &str, whitespace: JsonWhitespace) -> Result<Option<Grammar>> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    let path = fields.path_of(name);
    let schema = match value {
        // OpenAI's wrapper is no schema: it would constrain nothing.
        Value::Object(wrapper) if wrapper.get("schema").is_some_and(Value::is_object) && !describes(wrapper) => {
            return Err(Error::invalid(format!(
                "`{path}` must be the schema itself, not an object with the field `schema`"
            ))
            .param(&path)
            .code("invalid_value"));
        }
        Value::Object(_) => value.clone(),
        Value::String(text) => serde_json::from_str(text).map_err(|e| {
            Error::invalid(format!("`{path}` must be a JSON schema, but this string is not JSON: {e}"))
                .param(&path)
                .code("invalid_value")
        })?,
        other => return Err(fields::wrong(&path, "a JSON schema", other)),
    };
    Ok(Some(Grammar::Json { schema, whitespace }))
}

fn choice(fields: &Fields, name: &str) -> Result<Option<Grammar>> {
    let Some(values) = fields.array(name)? else { return Ok(None) };
    let path = fields.path_of(name);
    let string = |(i, value): (usize, &Value)| match value {
        Value::String(text) if !text.is_empty() => Ok(text.clone()),
        other => Err(fields::wrong(&format!("{path}[{i}]"), "a string of at least one character", other)),
    };
    Ok(Some(Grammar::Choice(values.iter().enumerate().map(string).collect::<Result<_>>()?)))
}

/// A grammar in GBNF or Lark. llama.cpp's clients send an empty one for none.
fn text(fields: &Fields, name: &str) -> Result<Option<Grammar>> {
    Ok(fields.string(name)?.filter(|text| !text.is_empty()).map(|text| Grammar::Text(text.into())))
}

fn whitespace(fields: &Fields, name: &str) -> Result<JsonWhitespace> {
    let pattern = fields.string(name)?.map(|pattern| JsonWhitespace::Pattern(pattern.into()));
    Ok(pattern.unwrap_or_default())
}
