//! Checks a request of TGI or LoRAX and makes the body of a completion of it.

use serde_json::{Value, json};

use super::Route;
use crate::fields::{self, Fields};
use crate::server::field_table::{GENERATE, GENERATE_PARAMETERS};
use crate::server::params::MAX_TOP_LOGPROBS;
use crate::{Error, Result};

/// LoRAX's name of the base where an adapter is expected.
const LORAX_BASE: &str = "__base__";

/// A request as a completion.
pub(super) struct GenerateRequest {
    /// The body of a completion.
    pub(super) completion: Value,
    /// What the reply has.
    pub(super) options: GenerateOptions,
}

/// What a reply in TGI's form has.
#[derive(Debug, Default)]
pub(super) struct GenerateOptions {
    /// The reply is an array of one object.
    pub(super) in_array: bool,
    /// Text before the generated text.
    pub(super) full_text_of: Option<String>,
    /// Tokens and counts.
    pub(super) details: bool,
    /// The prompt's tokens.
    pub(super) prefill: bool,
    /// Alternatives of each token in `top_tokens` (TGI).
    pub(super) top_tokens: Option<usize>,
    /// Alternatives of each token in `alternative_tokens` (LoRAX).
    pub(super) alternatives: Option<usize>,
    /// The seed of the request.
    pub(super) seed: Value,
}

/// Reads a request. `base_names` are the names of the base.
///
/// # Errors
/// `Invalid`, naming the field.
pub(super) fn completion(body: &Value, route: Route, base_names: &[String]) -> Result<GenerateRequest> {
    let body = Fields::of_body(body)?;
    GENERATE.check(&body)?;
    let inputs = body.required("inputs", body.string("inputs")?, "the prompt, a string")?;
    if inputs.is_empty() {
        return Err(fields::wrong("inputs", "a string of at least one character", &inputs.into()));
    }
    let stream = stream(&body, route)?;
    let empty = json!({});
    let parameters = match body.object("parameters")? {
        Some(parameters) => parameters,
        None => Fields::of_value(&empty, "parameters")?,
    };
    GENERATE_PARAMETERS.check(&parameters)?;

    let mut completion = json!({"prompt": inputs, "stream": stream, "include_stop_str_in_output": true});
    for (name, completion_name) in [
        ("repetition_penalty", "repetition_penalty"),
        ("frequency_penalty", "frequency_penalty"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("seed", "seed"),
        ("stop", "stop"),
        ("ignore_eos_token", "ignore_eos"),
        ("response_format", "response_format"),
        ("truncate", "truncate_prompt_tokens"),
    ] {
        if let Some(value) = parameters.get(name) {
            completion[completion_name] = value.clone();
        }
    }
    parameters.array("stop")?;
    // Negative numbers mean other things in completions.
    parameters.integer("truncate", 1..=i64::MAX)?;
    parameters.integer("top_k", 0..=i64::MAX)?;
    match parameters.integer("max_new_tokens", 1..=i64::MAX)? {
        Some(most) => completion["max_tokens"] = most.into(),
        None => completion["n_predict"] = (-1).into(),
    }
    let sampling = sampling(&parameters, &mut completion)?;
    if let Some(adapter) = adapter(&parameters, base_names)? {
        completion["adapter"] = adapter;
    }
    if let Some(grammar) = parameters.object("grammar")? {
        completion["structured_outputs"] = constraint(&grammar)?;
    }
    let best_of = best_of(&parameters, stream, sampling)?;
    completion["n"] = best_of.into();

    let flag = |name| Ok::<bool, Error>(parameters.boolean(name)?.unwrap_or(false));
    let prefill = flag("decoder_input_details")?;
    if prefill && stream {
        return refuse(&parameters, "decoder_input_details", "it cannot be streamed: use POST /generate");
    }
    let count = |name, least| Ok::<_, Error>(parameters.integer(name, least..=MAX_TOP_LOGPROBS)?.map(|n| n as usize));
    let options = GenerateOptions {
        in_array: route == Route::Root,
        full_text_of: flag("return_full_text")?.then(|| inputs.to_owned()),
        details: flag("details")? || prefill,
        prefill,
        top_tokens: count("top_n_tokens", 0)?.filter(|n| *n > 0),
        alternatives: count("return_k_alternatives", 1)?,
        seed: parameters.get("seed").cloned().unwrap_or_default(),
    };
    if stream || options.details || best_of > 1 {
        completion["logprobs"] = options.top_tokens.max(options.alternatives).unwrap_or(0).into();
    }
    if prefill {
        completion["prompt_logprobs"] = 0.into();
    }
    Ok(GenerateRequest { completion, options })
}

fn refuse<T>(parameters: &Fields, name: &str, why: &str) -> Result<T> {
    let path = parameters.path_of(name);
    Err(Error::invalid(format!("`{path}`: {why}")).param(path).code("invalid_value"))
}

/// Whether the answer is a stream.
fn stream(body: &Fields, route: Route) -> Result<bool> {
    match (route, body.boolean("stream")?) {
        (Route::Generate, Some(true)) => refuse(body, "stream", "use POST /generate_stream for a stream"),
        (Route::Stream, Some(false)) => refuse(body, "stream", "use POST /generate for an answer that is no stream"),
        (Route::Stream, _) => Ok(true),
        (_, stream) => Ok(stream.unwrap_or(false)),
    }
}

/// Sets the temperature. TGI is greedy unless the request has a parameter that matters only in sampling.
fn sampling(parameters: &Fields, completion: &mut Value) -> Result<bool> {
    let temperature = parameters.number("temperature", 0.0..=2.0)?;
    let narrows = |name| Ok::<bool, Error>(parameters.number(name, 0.0..=1.0)?.is_some_and(|p| p < 1.0));
    let sampling = parameters.boolean("do_sample")?.unwrap_or(false)
        || temperature.is_some_and(|temperature| temperature != 1.0)
        || parameters.integer("top_k", 0..=i64::MAX)?.is_some_and(|k| k > 0)
        || narrows("top_p")?;
    let temperature = if sampling { temperature.unwrap_or(1.0) } else { 0.0 };
    completion["temperature"] = temperature.into();
    Ok(temperature > 0.0)
}

/// The adapter as a completion's field has it.
fn adapter(parameters: &Fields, base_names: &[String]) -> Result<Option<Value>> {
    let id = parameters.string("adapter_id")?;
    let Some(merged) = parameters.object("merged_adapters")? else {
        let is_base = |id: &str| id.is_empty() || id == LORAX_BASE || base_names.iter().any(|name| name == id);
        return Ok(id.filter(|id| !is_base(id)).map(Value::from));
    };
    if id.is_some_and(|id| !id.is_empty()) {
        return refuse(parameters, "merged_adapters", "the request has `parameters.adapter_id` too: give one of them");
    }
    fields::check_only(&merged, &["ids", "weights", "merge_strategy", "density", "majority_sign_method"])?;
    match merged.string("merge_strategy")? {
        // The other two fields belong to the other strategies.
        None | Some("linear") => {}
        Some(other) => {
            let allowed = "\"linear\": the deltas are added with their weights";
            return Err(fields::wrong(&merged.path_of("merge_strategy"), allowed, &other.into()));
        }
    }
    let ids = merged.required("ids", merged.array("ids")?, "an array of names of adapters")?;
    let weights = merged.required("weights", merged.array("weights")?, "an array of numbers")?;
    if ids.len() != weights.len() {
        let message = format!(
            "`parameters.merged_adapters` has {} ids and {} weights: give a weight for each id",
            ids.len(),
            weights.len()
        );
        return Err(Error::invalid(message).param(merged.path_of("weights")).code("invalid_value"));
    }
    let mut terms = Vec::with_capacity(ids.len());
    for (i, (id, weight)) in ids.iter().zip(weights).enumerate() {
        let path = |list: &str| format!("{}[{i}]", merged.path_of(list));
        let name = id.as_str().ok_or_else(|| fields::wrong(&path("ids"), "the name of an adapter", id))?;
        let weight = fields::number(weight, &path("weights"), -100.0..=100.0)?;
        terms.push(json!({"name": name, "weight": weight}));
    }
    Ok(Some(terms.into()))
}

/// TGI's `grammar` as vLLM's `structured_outputs`.
fn constraint(grammar: &Fields) -> Result<Value> {
    const TYPES: &str = "\"json\", \"json_schema\" or \"regex\"";
    fields::check_only(grammar, &["type", "value"])?;
    let kind = grammar.required("type", grammar.string("type")?, TYPES)?;
    let value = grammar.required("value", grammar.get("value"), "a JSON schema or a regular expression")?;
    match kind {
        "json" => Ok(json!({"json": value})),
        "json_schema" => {
            let wrapper = Fields::of_value(value, grammar.path_of("value"))?;
            fields::check_only(&wrapper, &["name", "description", "schema", "strict"])?;
            let schema = wrapper.required("schema", wrapper.get("schema"), "a JSON schema")?;
            Ok(json!({"json": schema}))
        }
        "regex" => Ok(json!({"regex": value})),
        other => Err(fields::wrong(&grammar.path_of("type"), TYPES, &other.into())),
    }
}

fn best_of(parameters: &Fields, stream: bool, sampling: bool) -> Result<i64> {
    let best_of = parameters.integer("best_of", 1..=super::MAX_BEST_OF)?.unwrap_or(1);
    if best_of > 1 && stream {
        return refuse(parameters, "best_of", "it cannot be streamed: the best output is known only at the end");
    }
    if best_of > 1 && !sampling {
        return refuse(parameters, "best_of", "outputs differ only in sampling: set `parameters.do_sample`");
    }
    Ok(best_of)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion_of(parameters: Value) -> Result<Value> {
        let body = json!({"inputs": "x", "parameters": parameters});
        Ok(completion(&body, Route::Generate, &["base".to_owned()])?.completion)
    }

    #[test]
    fn what_samples() {
        for (parameters, temperature) in [
            (json!({}), 0.0),
            (json!({"temperature": 1.0, "top_p": 1.0}), 0.0),
            (json!({"do_sample": false, "temperature": 0.7}), 0.7),
            (json!({"do_sample": true}), 1.0),
            (json!({"top_k": 5}), 1.0),
            (json!({"top_p": 0.9}), 1.0),
            (json!({"do_sample": true, "temperature": 0}), 0.0),
        ] {
            assert_eq!(completion_of(parameters.clone()).unwrap()["temperature"], temperature, "{parameters}");
        }
    }

    #[test]
    fn adapters() {
        for (parameters, adapter) in [
            (json!({}), Value::Null),
            (json!({"adapter_id": ""}), Value::Null),
            (json!({"adapter_id": "__base__"}), Value::Null),
            (json!({"adapter_id": "base"}), Value::Null),
            (json!({"adapter_id": "a", "adapter_source": "local"}), json!("a")),
            (
                json!({"merged_adapters": {"ids": ["a", "b"], "weights": [0.5, 1], "density": 0.0, "merge_strategy": "linear"}}),
                json!([{"name": "a", "weight": 0.5}, {"name": "b", "weight": 1.0}]),
            ),
        ] {
            assert_eq!(completion_of(parameters.clone()).unwrap()["adapter"], adapter, "{parameters}");
        }
    }
}
