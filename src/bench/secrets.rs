//! Keeps keys out of reports, tables and error messages.

use std::sync::LazyLock;

use fancy_regex::Regex;
use serde_json::Value;

/// Stands for a key.
const HIDDEN: &str = "***";

/// A known key that is shorter is hidden only where it is a whole argument: it may be a part of other words.
const SHORTEST_PART: usize = 4;

/// Where texts show keys, each with the part before the key as its first group.
static KEYS: LazyLock<Vec<Regex>> = LazyLock::new(|| {
    const NAMES: &str = "(?:key|token|secret|password)";
    let patterns = [
        // --api-key KEY, --api-key=KEY, in quotes or not
        format!(r#"(--?[\w-]*{NAMES}[ =]+["']?)[^\s"']+"#),
        // API_KEY=KEY, x-api-key: KEY, "api_key": "KEY"
        format!(r#"(\b[\w-]*{NAMES}["']?\s*[:=]\s*["']?)[^\s"',}}]+"#),
        r#"(\b(?:bearer|basic)\s+)[^\s"']+"#.to_owned(),
        // http://user:KEY@host
        r"(://)[^/@\s]+(?=@)".to_owned(),
    ];
    patterns.iter().filter_map(|pattern| Regex::new(&format!("(?i){pattern}")).ok()).collect()
});

/// The keys of an invocation.
#[derive(Debug, Clone, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Secrets with these known keys.
    pub fn new(keys: impl IntoIterator<Item = Option<String>>) -> Self {
        Self(keys.into_iter().flatten().filter(|key| !key.is_empty()).collect())
    }

    /// A text without the known keys, and without what stands where keys stand.
    pub fn hide(&self, text: &str) -> String {
        let known = self.0.iter().filter(|key| key.len() >= SHORTEST_PART || *key == text);
        let text = known.fold(text.to_owned(), |text, key| text.replace(key.as_str(), HIDDEN));
        KEYS.iter().fold(text, |text, pattern| pattern.replace_all(&text, format!("${{1}}{HIDDEN}")).into_owned())
    }

    /// The arguments of a command line without keys.
    pub fn hide_arguments(&self, arguments: impl IntoIterator<Item = String>) -> Vec<String> {
        let mut after_key_flag = false;
        let hide = |argument: String| {
            let is_key = std::mem::replace(&mut after_key_flag, false);
            if is_key {
                return HIDDEN.to_owned();
            }
            after_key_flag = argument.starts_with("--") && argument.ends_with("-key");
            self.hide(&argument)
        };
        arguments.into_iter().map(hide).collect()
    }

    /// Hides keys in every text of a JSON value.
    pub fn hide_in(&self, value: &mut Value) {
        match value {
            Value::String(text) => *text = self.hide(text),
            Value::Array(list) => list.iter_mut().for_each(|value| self.hide_in(value)),
            Value::Object(map) => map.values_mut().for_each(|value| self.hide_in(value)),
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_form_of_a_key_is_left() {
        let secrets = Secrets::new([Some("sk-1234".into()), Some("k".into()), None]);
        let arguments = [
            "quiver",
            "bench",
            "serve",
            "--api-key",
            "sk-1234",
            "--admin-key=boss-77",
            "--admin-key",
            "x",
            "k",
            "--url",
            "http://me:pass-9@host:8000",
            "--url=http://sk-1234@host",
            "--start",
            "QUIVER_API_KEY=env-5 quiver serve --api-key 'quoted-6' --max-running 8 -H \"authorization: Bearer tok-8\"",
            "--body",
            r#"{"max_tokens": 5, "api_key": "body-3", "x-api-key":"body-4"}"#,
            "--model",
            "keynote-1",
        ];
        let shown = secrets.hide_arguments(arguments.map(str::to_owned));
        let line = shown.join(" ");
        for key in ["1234", "boss", "pass-9", "env-5", "quoted-6", "tok-8", "body-3", "body-4", " x ", " k "] {
            assert!(!line.contains(key), "{key} in {line}");
        }
        for kept in
            ["quiver bench serve --api-key ***", "@host:8000", "--max-running 8", "\"max_tokens\": 5", "keynote-1"]
        {
            assert!(line.contains(kept), "{kept} not in {line}");
        }
        assert_eq!(secrets.hide("bad key sk-1234, http://sk-1234@host"), "bad key ***, http://***@host");
        let mut value = json!({"server": ["v sk-1234", {"k": 7}]});
        secrets.hide_in(&mut value);
        assert_eq!(value, json!({"server": ["v ***", {"k": 7}]}));
    }
}
