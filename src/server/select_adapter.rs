//! Selects the adapter of a request by `adapter`, by `model`, or by `model: "base:adapter"`. The base never answers a request
//! for an adapter.

use serde_json::{Value, json};

use crate::adapter::Lease;
use crate::adapter::registry::Registry;
use crate::fields::{self, Fields};
use crate::runtime::NAMES_OF_ANY_MODEL;
use crate::{Error, Result};

/// Limit on the adapters of a weighted sum.
const MAX_TERMS: usize = 8;

/// The adapters that a request names. No lease is taken yet.
#[derive(Debug, Clone, PartialEq)]
enum AdapterSelection {
    /// The base model alone.
    Base,
    /// One adapter at weight 1.
    One(String),
    /// A weighted sum of adapters.
    Sum(Vec<(String, f64)>),
}

/// The adapters of a request, with leases that keep their generations alive while it runs.
#[derive(Clone)]
pub(super) struct LeasedAdapters {
    /// The adapters with their weights; empty for the base.
    pub(super) terms: Vec<(Lease, f32)>,
    /// `adapter` in the response: null, a name, or a list of names and weights.
    pub(super) adapter: Value,
    /// `adapter_generation` in the response, in the same form.
    pub(super) generation: Value,
    /// `adapter` label of metrics: empty for the base, names joined by `+` for a sum.
    pub(super) label: String,
}

impl LeasedAdapters {
    /// Reads `adapter` and `model` of a request and takes the leases. An adapter that is not loaded and lies in the adapters
    /// directory is loaded first. Errors: those of [`AdapterSelection::parse`] and [`AdapterSelection::lease`].
    pub(super) async fn select(body: &Fields<'_>, base_names: &[String], registry: &Registry) -> Result<Self> {
        AdapterSelection::parse(body, base_names, |name| registry.offers(name))?.lease(registry).await
    }
}

impl AdapterSelection {
    /// Reads `adapter` and `model`. `base_names` are the names of the base; `exists` tells whether an adapter is loaded or can
    /// be.
    /// Errors: `NotFound` for a `model` that is neither base nor adapter; `Invalid` if the two fields disagree.
    fn parse(body: &Fields, base_names: &[String], exists: impl Fn(&str) -> bool) -> Result<Self> {
        let by_adapter = body.get("adapter").map(parse_adapter).transpose()?;
        let by_model = match body.string("model")? {
            None => None,
            Some(model) => Some((model, parse_model(model, base_names, exists)?)),
        };
        match (by_adapter, by_model) {
            (Some(adapter), None | Some((_, Self::Base))) => Ok(adapter),
            (Some(adapter), Some((_, model))) if adapter == model => Ok(adapter),
            (Some(_), Some((model, _))) => Err(Error::invalid(format!(
                "`model` is {model:?} and selects one adapter, but `adapter` selects another: give one of the fields, or the \
                 same adapter in both"
            ))
            .param("adapter")
            .code("adapter_conflict")),
            (None, Some((_, model))) => Ok(model),
            (None, None) => Ok(Self::Base),
        }
    }

    /// Takes the leases. An adapter that lies in the adapters directory is loaded first. Errors: `NotFound` names an adapter that
    /// is in neither place; those of the load.
    async fn lease(&self, registry: &Registry) -> Result<LeasedAdapters> {
        let one = async |name: &str| registry.lease_or_load(name).await.map_err(|e| e.param("adapter"));
        Ok(match self {
            Self::Base => {
                LeasedAdapters { terms: vec![], adapter: Value::Null, generation: Value::Null, label: String::new() }
            }
            Self::One(name) => {
                let lease = one(name).await?;
                let generation = json!(lease.id);
                LeasedAdapters { terms: vec![(lease, 1.0)], adapter: json!(name), generation, label: name.clone() }
            }
            Self::Sum(terms) => {
                let mut leases = Vec::with_capacity(terms.len());
                for (name, weight) in terms {
                    leases.push((one(name).await?, *weight as f32));
                }
                LeasedAdapters {
                    adapter: terms.iter().map(|(name, weight)| json!({"name": name, "weight": weight})).collect(),
                    generation: leases.iter().map(|(lease, _)| json!(lease.id)).collect(),
                    label: terms.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join("+"),
                    terms: leases,
                }
            }
        })
    }
}

/// The adapter in a name of the form `base:adapter`.
pub(super) fn adapter_of_base<'a>(model: &'a str, base_names: &[String]) -> Option<&'a str> {
    base_names.iter().find_map(|base| model.strip_prefix(base.as_str())?.strip_prefix(':'))
}

fn parse_model(model: &str, base_names: &[String], exists: impl Fn(&str) -> bool) -> Result<AdapterSelection> {
    if base_names.iter().any(|base| base == model) {
        return Ok(AdapterSelection::Base);
    }
    if exists(model) {
        return Ok(AdapterSelection::One(model.to_owned()));
    }
    if let Some(adapter) = adapter_of_base(model, base_names) {
        return if exists(adapter) {
            Ok(AdapterSelection::One(adapter.to_owned()))
        } else {
            Err(Error::not_found(format!("The adapter `{adapter}`, which `model` selects, does not exist."))
                .param("model")
                .code("adapter_not_found"))
        };
    }
    // A client with only a URL has no name to give. No adapter can have one of these.
    if NAMES_OF_ANY_MODEL.contains(&model) {
        return Ok(AdapterSelection::Base);
    }
    Err(Error::not_found(format!(
        "The model `{model}` does not exist. Give the base, `{}`, or one of the adapters that GET /v1/models lists.",
        base_names.first().map_or("", String::as_str)
    ))
    .param("model")
    .code("model_not_found"))
}

fn parse_adapter(value: &Value) -> Result<AdapterSelection> {
    let terms = match value {
        Value::String(name) if !name.is_empty() => return Ok(AdapterSelection::One(name.clone())),
        Value::Array(terms) if (1..=MAX_TERMS).contains(&terms.len()) => terms,
        other => {
            let allowed = format!(
                "an adapter's name or an array of 1 to {MAX_TERMS} objects {{\"name\", \"weight\"}} (omit it for the base)"
            );
            let mut error = fields::wrong("adapter", &allowed, other);
            if let Value::Array(terms) = other
                && !terms.is_empty()
            {
                error.message = format!("{} of {}", error.message, terms.len());
            }
            return Err(error);
        }
    };
    let mut sum: Vec<(String, f64)> = Vec::with_capacity(terms.len());
    for (i, term) in terms.iter().enumerate() {
        let term = Fields::of_value(term, format!("adapter[{i}]"))?;
        fields::check_only(&term, &["name", "weight"])?;
        let name = term.required("name", term.string("name")?, "the adapter's name")?;
        let weight = term.number("weight", -100.0..=100.0)?.unwrap_or(1.0);
        if sum.iter().any(|(other, _)| other == name) {
            return Err(Error::invalid(format!(
                "`adapter` lists {name:?} twice: list it once, with the sum of the weights"
            ))
            .param("adapter"));
        }
        sum.push((name.to_owned(), weight));
    }
    // One term of weight 1 is the same as the adapter itself: same output, same prefix cache, and it may agree with `model`.
    match &sum[..] {
        [(name, 1.0)] => Ok(AdapterSelection::One(name.clone())),
        _ => Ok(AdapterSelection::Sum(sum)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(body: Value) -> Result<AdapterSelection> {
        let bases = ["base".to_owned(), "org/base:1b".to_owned()];
        AdapterSelection::parse(&Fields::of_body(&body)?, &bases, |name| ["a", "b", "x:y"].contains(&name))
    }

    #[test]
    fn table() {
        let one = |name: &str| AdapterSelection::One(name.into());
        for (body, want) in [
            (json!({}), AdapterSelection::Base),
            (json!({"model": null, "adapter": null}), AdapterSelection::Base),
            (json!({"model": "base"}), AdapterSelection::Base),
            (json!({"model": "tgi"}), AdapterSelection::Base),
            (json!({"model": "dummy"}), AdapterSelection::Base),
            (json!({"model": "dummy", "adapter": "a"}), one("a")),
            (json!({"model": "org/base:1b"}), AdapterSelection::Base),
            (json!({"model": "a"}), one("a")),
            (json!({"model": "x:y"}), one("x:y")),
            (json!({"model": "base:a"}), one("a")),
            (json!({"model": "org/base:1b:b"}), one("b")),
            (json!({"adapter": "a"}), one("a")),
            // Whether `adapter` exists is checked when the lease is taken.
            (json!({"adapter": "gone"}), one("gone")),
            (json!({"model": "base", "adapter": "a"}), one("a")),
            (json!({"model": "a", "adapter": "a"}), one("a")),
            (json!({"model": "base:a", "adapter": [{"name": "a", "weight": 1}]}), one("a")),
            (json!({"adapter": [{"name": "a"}]}), one("a")),
            (
                json!({"adapter": [{"name": "a", "weight": 0.5}, {"name": "b", "weight": -2}]}),
                AdapterSelection::Sum(vec![("a".into(), 0.5), ("b".into(), -2.0)]),
            ),
        ] {
            assert_eq!(select(body.clone()).unwrap_or_else(|e| panic!("{body}: {e}")), want, "{body}");
        }
    }

    #[test]
    fn refusals() {
        use crate::error::ErrorKind::{Invalid, NotFound};
        for (body, kind, code) in [
            (json!({"model": "nope"}), NotFound, Some("model_not_found")),
            (json!({"model": ""}), NotFound, Some("model_not_found")),
            (json!({"model": "BASE"}), NotFound, Some("model_not_found")),
            (json!({"model": "nope", "adapter": "a"}), NotFound, Some("model_not_found")),
            (json!({"model": "base:nope"}), NotFound, Some("adapter_not_found")),
            (json!({"model": "base:"}), NotFound, Some("adapter_not_found")),
            (json!({"model": "a", "adapter": "b"}), Invalid, Some("adapter_conflict")),
            (json!({"model": "base:a", "adapter": "b"}), Invalid, Some("adapter_conflict")),
            (json!({"model": "a", "adapter": [{"name": "a", "weight": 0.5}]}), Invalid, Some("adapter_conflict")),
            (json!({"model": 3}), Invalid, Some("invalid_value")),
            (json!({"adapter": ""}), Invalid, Some("invalid_value")),
            (json!({"adapter": 0}), Invalid, Some("invalid_value")),
            (json!({"adapter": []}), Invalid, Some("invalid_value")),
            (json!({"adapter": ["a"]}), Invalid, Some("invalid_value")),
            (json!({"adapter": {"name": "a"}}), Invalid, Some("invalid_value")),
            (json!({"adapter": [{"weight": 1}]}), Invalid, Some("missing_required_parameter")),
            (json!({"adapter": [{"name": "a", "scale": 1}]}), Invalid, Some("unknown_field")),
            (json!({"adapter": [{"name": "a", "weight": "1"}]}), Invalid, Some("invalid_value")),
            (json!({"adapter": [{"name": "a"}, {"name": "a"}]}), Invalid, None),
            (json!({"adapter": vec![json!({"name": "a"}); 9]}), Invalid, Some("invalid_value")),
        ] {
            let error = select(body.clone()).expect_err(&body.to_string());
            assert_eq!((error.kind, error.code), (kind, code), "{body}: {error}");
        }
    }
}
