//! The base that an adapter was trained on, as its files name it.

use serde_json::{Map, Value};

/// The base that an adapter says it was trained on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BaseClaim {
    /// `base_model_name_or_path`: a repository, a name or a path.
    pub name: Option<String>,
    /// `quiver.base_fingerprint`, which our trainer writes: the hash of the base's tensors.
    pub fingerprint: Option<String>,
}

impl BaseClaim {
    /// The claim in a PEFT config.
    pub(super) fn of(config: &Map<String, Value>) -> Self {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).filter(|s| !s.is_empty()).map(str::to_owned);
        Self {
            name: text(config.get("base_model_name_or_path")),
            fingerprint: text(config.get("quiver").and_then(|quiver| quiver.get("base_fingerprint"))),
        }
    }
}
