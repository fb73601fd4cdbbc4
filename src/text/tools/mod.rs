//! Tools: the functions that a request lets the model call, the form in which the model calls them, and the calls in its output.
//!
//! [`Tools`] reads the fields of a request. [`ToolFormat`] is the form of a model's calls, and [`OutputParser`] finds them, and the
//! thinking before them, in the output.

mod calls;
mod format;
mod grammar;
mod json;
mod output;
mod qwen_xml;

use std::collections::HashSet;

use serde_json::{Value, json};

pub use self::format::ToolFormat;
pub use self::output::{OutputParser, OutputPart};
use crate::fields::{self, Fields};
use crate::{Error, Result};

/// Limit on the tools of a request, which is OpenAI's.
const MAX_TOOLS: usize = 128;

/// Limit on the characters of a tool's name, which is OpenAI's.
const MAX_NAME: usize = 64;

/// The tools of a request: at least one.
#[derive(Debug, Clone, PartialEq)]
pub struct Tools {
    /// The tools that may be called.
    pub definitions: Vec<ToolDefinition>,
    /// Whether the model must call one.
    pub choice: ToolChoice,
    /// Whether one output may have several calls. If not, calls after the first are dropped.
    pub parallel: bool,
    /// The request has the older fields `functions` and `function_call`, so the reply has a `function_call`.
    pub legacy: bool,
}

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolDefinition {
    /// Its name, unique among the tools: 1 to 64 letters, digits, `_`, `-` and `.`.
    pub name: String,
    /// Its purpose.
    pub description: Option<String>,
    /// The JSON schema of its arguments, of the type `object`.
    pub parameters: Value,
    /// The arguments must match the schema, so the output is constrained to it.
    ///
    /// OpenAI also refuses a strict schema unless every property is required and `additionalProperties` is false everywhere. Those
    /// rules belong to its compiler; here any schema that compiles is enforced as it is, so none is refused for them.
    pub strict: bool,
    /// The function as the request has it, for templates.
    raw: Value,
    /// The function's path in the request.
    path: String,
}

impl ToolDefinition {
    /// The path of the schema in the request.
    fn parameters_path(&self) -> String {
        format!("{}.parameters", self.path)
    }
}

/// Whether the model calls tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    /// The model decides.
    Auto,
    /// It sees the tools and does not call them: its output is content.
    None,
    /// It calls at least one.
    Required,
    /// It calls this one, once.
    Named(String),
}

impl Tools {
    /// Reads the tools of a request. No tools, or an empty array, are `None`.
    ///
    /// # Errors
    /// `Invalid`, naming the field: a malformed tool, two tools of one name, or a choice that the tools cannot meet.
    pub(crate) fn parse(body: &Fields) -> Result<Option<Self>> {
        let old = ["functions", "function_call"].into_iter().find(|name| body.get(name).is_some());
        let new = ["tools", "tool_choice"].into_iter().find(|name| body.get(name).is_some());
        if let (Some(old), Some(new)) = (old, new) {
            let message = format!("`{old}` is the older form of `{new}`: give only `tools` and `tool_choice`");
            return Err(Error::invalid(message).param(old).code("invalid_value"));
        }
        let legacy = old.is_some();
        let parallel = body.boolean("parallel_tool_calls")?.unwrap_or(true) && !legacy;
        let mut definitions = if legacy { functions(body)? } else { tools(body)? };
        let choice = if legacy { function_call(body)? } else { tool_choice(body)? };
        if let Some(allowed) = &choice.allowed {
            for (path, name) in allowed {
                if !definitions.iter().any(|tool| tool.name == *name) {
                    return Err(Error::invalid(format!(
                        "`{path}` names the tool {name:?}, which is not in `{}`",
                        choice.list
                    ))
                    .param(path)
                    .code("invalid_value"));
                }
            }
            // The model only sees the tools that it may call.
            let restricts = !matches!(choice.choice, ToolChoice::Named(_));
            definitions.retain(|tool| !restricts || allowed.iter().any(|(_, name)| tool.name == *name));
        }
        if definitions.is_empty() {
            if matches!(choice.choice, ToolChoice::Auto | ToolChoice::None) {
                return Ok(None);
            }
            let message = format!("`{}` asks for a call, but the request has no `{}`", choice.field, choice.list);
            return Err(Error::invalid(message).param(choice.field).code("invalid_value"));
        }
        Ok(Some(Self { definitions, choice: choice.choice, parallel, legacy }))
    }

    /// The tools as templates read them: `{"type": "function", "function": {...}}`, with the function as the request has it.
    pub fn raw(&self) -> Vec<Value> {
        self.definitions.iter().map(|tool| json!({"type": "function", "function": tool.raw})).collect()
    }

    /// Whether the output may have calls.
    pub fn may_call(&self) -> bool {
        self.choice != ToolChoice::None
    }
}

/// A request's choice among its tools.
struct Choice {
    choice: ToolChoice,
    /// The names that it gives, with the field that gives each.
    allowed: Option<Vec<(String, String)>>,
    /// The field of the choice, and the one of the tools.
    field: &'static str,
    list: &'static str,
}

fn tools(body: &Fields) -> Result<Vec<ToolDefinition>> {
    let list = body.array("tools")?.unwrap_or_default();
    let tool = |(i, value): (usize, &Value)| {
        let tool = Fields::of_value(value, format!("tools[{i}]"))?;
        let kind = tool.required("type", tool.string("type")?, "\"function\"")?;
        check_type(&tool, kind)?;
        fields::check_only(&tool, &["type", "function"])?;
        let function = tool.required("function", tool.get("function"), "an object with the field `name`")?;
        definition(function, tool.path_of("function"))
    };
    checked(list.iter().enumerate().map(tool).collect::<Result<_>>()?, "tools")
}

fn functions(body: &Fields) -> Result<Vec<ToolDefinition>> {
    let list = body.array("functions")?.unwrap_or_default();
    let function = |(i, value): (usize, &Value)| definition(value, format!("functions[{i}]"));
    checked(list.iter().enumerate().map(function).collect::<Result<_>>()?, "functions")
}

/// Refuses too many tools, and two tools of one name.
fn checked(definitions: Vec<ToolDefinition>, field: &str) -> Result<Vec<ToolDefinition>> {
    if definitions.len() > MAX_TOOLS {
        let message = format!("`{field}` has {} tools: at most {MAX_TOOLS} are allowed", definitions.len());
        return Err(Error::invalid(message).param(field).code("invalid_value"));
    }
    let mut names = HashSet::new();
    match definitions.iter().find(|tool| !names.insert(&tool.name)) {
        Some(tool) => Err(Error::invalid(format!("`{field}` has two tools of the name {:?}", tool.name))
            .param(field)
            .code("invalid_value")),
        None => Ok(definitions),
    }
}

fn definition(value: &Value, path: String) -> Result<ToolDefinition> {
    let function = Fields::of_value(value, path.as_str())?;
    // Templates read the whole object, so other fields have an effect of their own.
    fields::check_unknown(&function, &["name", "description", "parameters", "strict"])?;
    let name = name(&function)?;
    let schema = json!({"type": "object", "properties": {}});
    let parameters = match function.object("parameters")? {
        None => schema,
        Some(schema) => match schema.get("type") {
            None => function.get("parameters").cloned().unwrap_or_default(),
            Some(kind) if kind == "object" => function.get("parameters").cloned().unwrap_or_default(),
            Some(other) => {
                return Err(fields::wrong(&schema.path_of("type"), "\"object\": arguments have names", other));
            }
        },
    };
    Ok(ToolDefinition {
        name: name.to_owned(),
        description: function.string("description")?.map(str::to_owned),
        parameters,
        strict: function.boolean("strict")?.unwrap_or(false),
        raw: value.clone(),
        path,
    })
}

/// The field `name` of a function.
fn name<'a>(function: &Fields<'a>) -> Result<&'a str> {
    let name = function.required("name", function.string("name")?, "the name of the function")?;
    if !(1..=MAX_NAME).contains(&name.len()) || !name.chars().all(calls::is_name) {
        let allowed = format!("1 to {MAX_NAME} letters, digits, `_`, `-` and `.`");
        return Err(fields::wrong(&function.path_of("name"), &allowed, &name.into()));
    }
    Ok(name)
}

fn tool_choice(body: &Fields) -> Result<Choice> {
    const ALLOWED: &str = "\"auto\", \"none\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": ...}}";
    let choice = |choice, allowed| Ok(Choice { choice, allowed, field: "tool_choice", list: "tools" });
    match body.get("tool_choice") {
        None => choice(ToolChoice::Auto, None),
        Some(Value::String(word)) => {
            choice(mode(word).ok_or_else(|| fields::wrong("tool_choice", ALLOWED, &word.as_str().into()))?, None)
        }
        Some(value @ Value::Object(_)) => {
            let object = Fields::of_value(value, "tool_choice")?;
            let kind = object.required("type", object.string("type")?, "\"function\" or \"allowed_tools\"")?;
            if kind == "allowed_tools" {
                fields::check_only(&object, &["type", "allowed_tools"])?;
                let what = "an object with the fields `mode` and `tools`";
                let inner = object.required("allowed_tools", object.object("allowed_tools")?, what)?;
                let (mode, allowed) = allowed_tools(&inner)?;
                return choice(mode, Some(allowed));
            }
            let (path, name) = chosen_function(&object)?;
            choice(ToolChoice::Named(name.clone()), Some(vec![(path, name)]))
        }
        Some(other) => Err(fields::wrong("tool_choice", ALLOWED, other)),
    }
}

fn mode(word: &str) -> Option<ToolChoice> {
    match word {
        "auto" => Some(ToolChoice::Auto),
        "none" => Some(ToolChoice::None),
        "required" => Some(ToolChoice::Required),
        _ => None,
    }
}

/// OpenAI's `allowed_tools`: a mode and a part of the tools.
fn allowed_tools(object: &Fields) -> Result<(ToolChoice, Vec<(String, String)>)> {
    const MODES: &str = "\"auto\" or \"required\"";
    fields::check_only(object, &["mode", "tools"])?;
    let word = object.required("mode", object.string("mode")?, MODES)?;
    let mode = mode(word).filter(|mode| *mode != ToolChoice::None);
    let mode = mode.ok_or_else(|| fields::wrong(&object.path_of("mode"), MODES, &word.into()))?;
    let list = object.required("tools", object.array("tools")?, "an array of at least one tool")?;
    let path = object.path_of("tools");
    if list.is_empty() {
        return Err(fields::wrong(&path, "an array of at least one tool", &json!([])));
    }
    let tool = |(i, value)| chosen_function(&Fields::of_value(value, format!("{path}[{i}]"))?);
    Ok((mode, list.iter().enumerate().map(tool).collect::<Result<_>>()?))
}

/// The name in `{"type": "function", "function": {"name": ...}}`, with its path.
fn chosen_function(object: &Fields) -> Result<(String, String)> {
    let kind = object.required("type", object.string("type")?, "\"function\"")?;
    check_type(object, kind)?;
    fields::check_only(object, &["type", "function"])?;
    let what = "an object with the field `name`";
    let function = object.required("function", object.object("function")?, what)?;
    fields::check_only(&function, &["name"])?;
    Ok((function.path_of("name"), name(&function)?.to_owned()))
}

fn check_type(object: &Fields, kind: &str) -> Result<()> {
    if kind == "function" {
        return Ok(());
    }
    let path = object.path_of("type");
    let message =
        format!("`{path}`: tools of the type {kind:?} are not supported; give tools of the type \"function\"");
    Err(Error::invalid(message).param(path).code("unsupported_value"))
}

/// The older form of `tool_choice`.
fn function_call(body: &Fields) -> Result<Choice> {
    const ALLOWED: &str = "\"auto\", \"none\" or {\"name\": ...}";
    let choice = |choice, allowed| Ok(Choice { choice, allowed, field: "function_call", list: "functions" });
    match body.get("function_call") {
        None => choice(ToolChoice::Auto, None),
        Some(Value::String(word)) => {
            let mode = mode(word).filter(|mode| *mode != ToolChoice::Required);
            choice(mode.ok_or_else(|| fields::wrong("function_call", ALLOWED, &word.as_str().into()))?, None)
        }
        Some(value @ Value::Object(_)) => {
            let object = Fields::of_value(value, "function_call")?;
            fields::check_only(&object, &["name"])?;
            let name = name(&object)?.to_owned();
            choice(ToolChoice::Named(name.clone()), Some(vec![(object.path_of("name"), name)]))
        }
        Some(other) => Err(fields::wrong("function_call", ALLOWED, other)),
    }
}

#[cfg(test)]
mod grammar_tests;
#[cfg(test)]
mod tests;
