//! Reads Qwen3-Coder's form of a call, `<function=name><parameter=key>value</parameter></function>`, after its name.

use super::calls::{Calls, MAX_GAP};
use super::json::Scan;
use crate::text::reasoning::overlap;

/// Limit on the bytes of a value that may be JSON. A longer one is a string.
const MAX_VALUE: usize = 256 << 10;

const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";
const FUNCTION_END: &str = "</function>";

/// A call whose name is told. Its arguments become JSON: a value is JSON where it reads as JSON and the schema does not say `string`,
/// and otherwise a string.
pub(super) struct XmlCall {
    index: usize,
    /// The parameters whose schema says `string`.
    strings: Vec<String>,
    at: Place,
    /// Text that is not decided yet.
    held: String,
    /// A parameter has come.
    begun: bool,
}

#[derive(Clone, Copy)]
enum Place {
    /// Between parameters.
    Between,
    /// In a parameter's key.
    Key,
    /// In a value that is a string, which streams.
    Text { begun: bool },
    /// In a value that may be JSON, which is held to its end.
    Value,
}

impl XmlCall {
    pub(super) fn new(index: usize, strings: Vec<String>) -> Self {
        Self { index, strings, at: Place::Between, held: String::new(), begun: false }
    }

    /// Takes the next character. `Broken`: the call ended before the text in [`XmlCall::into_held`].
    pub(super) fn push(&mut self, c: char, calls: &mut Calls) -> Scan {
        self.held.push(c);
        match self.at {
            Place::Between => self.between(calls),
            Place::Key => {
                if c == '>' {
                    self.key_done(calls);
                } else if self.held.len() > MAX_GAP {
                    self.held.insert_str(0, PARAMETER);
                    return self.end(Scan::Broken, calls);
                }
                Scan::More
            }
            Place::Text { begun } => self.text(begun, calls),
            Place::Value => {
                if let Some(value) = self.held.strip_suffix(PARAMETER_END) {
                    calls.arguments(self.index, &json_of(value));
                    self.go(Place::Between);
                } else if self.held.len() > MAX_VALUE {
                    calls.arguments(self.index, "\"");
                    self.at = Place::Text { begun: false };
                    return self.text(false, calls);
                }
                Scan::More
            }
        }
    }

    /// Adds the text held back, when the output ends.
    pub(super) fn finish(&mut self, calls: &mut Calls) {
        let held = std::mem::take(&mut self.held);
        match self.at {
            Place::Text { .. } => calls.arguments(self.index, &escaped(&held)),
            Place::Value => calls.arguments(self.index, held[..held.len() - overlap(&held, PARAMETER_END)].trim()),
            Place::Between | Place::Key => {}
        }
    }

    /// The text that no longer belongs to the call.
    pub(super) fn into_held(self) -> String {
        self.held
    }

    fn go(&mut self, at: Place) {
        self.held.clear();
        self.at = at;
    }

    /// Completes the JSON of the arguments.
    fn end(&mut self, scan: Scan, calls: &mut Calls) -> Scan {
        calls.arguments(self.index, if self.begun { "}" } else { "{}" });
        scan
    }

    fn between(&mut self, calls: &mut Calls) -> Scan {
        let rest = self.held.trim_start();
        if rest == PARAMETER {
            self.go(Place::Key);
        } else if rest == FUNCTION_END {
            return self.end(Scan::End, calls);
        } else if !(PARAMETER.starts_with(rest) || FUNCTION_END.starts_with(rest)) || self.held.len() > MAX_GAP {
            return self.end(Scan::Broken, calls);
        }
        Scan::More
    }

    fn key_done(&mut self, calls: &mut Calls) {
        let key = self.held.trim_end_matches('>').trim().to_owned();
        let begin = if std::mem::replace(&mut self.begun, true) { ", " } else { "{" };
        calls.arguments(self.index, &format!("{begin}\"{}\": ", escaped(&key)));
        if self.strings.contains(&key) {
            calls.arguments(self.index, "\"");
            self.go(Place::Text { begun: false });
        } else {
            self.go(Place::Value);
        }
    }

    fn text(&mut self, begun: bool, calls: &mut Calls) -> Scan {
        if !begun && self.held.starts_with('\n') {
            self.held.remove(0);
            self.at = Place::Text { begun: true };
        }
        if let Some(text) = self.held.strip_suffix(PARAMETER_END) {
            let text = text.strip_suffix('\n').unwrap_or(text);
            calls.arguments(self.index, &format!("{}\"", escaped(text)));
            self.go(Place::Between);
            return Scan::More;
        }
        let end = self.held.len() - overlap(&self.held, PARAMETER_END);
        let end = end - usize::from(self.held[..end].ends_with('\n'));
        if end > 0 {
            calls.arguments(self.index, &escaped(&self.held[..end]));
            self.held.drain(..end);
            self.at = Place::Text { begun: true };
        }
        Scan::More
    }
}

/// A value that may be JSON, as JSON.
fn json_of(text: &str) -> String {
    let value = text.trim();
    match value {
        "True" => "true".into(),
        "False" => "false".into(),
        "None" => "null".into(),
        _ if serde_json::from_str::<serde_json::Value>(value).is_ok() => value.into(),
        _ => {
            let text = text.strip_prefix('\n').unwrap_or(text);
            format!("\"{}\"", escaped(text.strip_suffix('\n').unwrap_or(text)))
        }
    }
}

/// The inside of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = serde_json::Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}
