//! Reads JSON one character at a time: any value, and the object of a call.

use super::calls::Calls;

/// Limit on nested objects and arrays.
const MAX_DEPTH: usize = 100;

/// Limit on the characters of a number or word.
const MAX_BARE: usize = 400;

/// What one more character did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scan {
    /// The value goes on.
    More,
    /// This character ends the value.
    End,
    /// The value, a number or a word, ended before this character.
    EndBefore,
    /// This is not JSON, or not a call.
    Broken,
}

/// Finds the end of a JSON value. Inside strings everything is accepted, as models write it.
#[derive(Default)]
pub(super) struct ValueScanner {
    /// The closing brackets that must come.
    open: Vec<char>,
    at: ValuePlace,
    /// A number or word.
    bare: String,
}

#[derive(Clone, Copy, Default)]
enum ValuePlace {
    #[default]
    Value,
    ValueOrClose,
    Key,
    KeyOrClose,
    Colon,
    After,
    Text {
        key: bool,
        escaped: bool,
    },
    Bare,
}

impl ValueScanner {
    pub(super) fn push(&mut self, c: char) -> Scan {
        use ValuePlace::*;
        match self.at {
            Text { key, escaped: true } => self.go(Text { key, escaped: false }),
            Text { key, .. } if c == '\\' => self.go(Text { key, escaped: true }),
            Text { key: true, .. } if c == '"' => self.go(Colon),
            Text { .. } if c == '"' => self.closed(),
            Text { .. } => Scan::More,
            Bare if is_bare(c) && self.bare.len() < MAX_BARE => {
                self.bare.push(c);
                Scan::More
            }
            Bare => match serde_json::from_str::<serde_json::Value>(&self.bare) {
                Err(_) => Scan::Broken,
                Ok(_) if self.open.is_empty() => Scan::EndBefore,
                Ok(_) => {
                    self.at = After;
                    self.push(c)
                }
            },
            _ if is_space(c) => Scan::More,
            Colon if c == ':' => self.go(Value),
            After if c == ',' => self.go(if self.open.last() == Some(&'}') { Key } else { Value }),
            After | KeyOrClose | ValueOrClose if self.open.last() == Some(&c) => {
                self.open.pop();
                self.closed()
            }
            Key | KeyOrClose if c == '"' => self.go(Text { key: true, escaped: false }),
            Value | ValueOrClose => self.begin(c),
            _ => Scan::Broken,
        }
    }

    fn begin(&mut self, c: char) -> Scan {
        match c {
            '{' | '[' if self.open.len() == MAX_DEPTH => Scan::Broken,
            '{' => {
                self.open.push('}');
                self.go(ValuePlace::KeyOrClose)
            }
            '[' => {
                self.open.push(']');
                self.go(ValuePlace::ValueOrClose)
            }
            '"' => self.go(ValuePlace::Text { key: false, escaped: false }),
            c if is_bare(c) => {
                self.bare.clear();
                self.bare.push(c);
                self.go(ValuePlace::Bare)
            }
            _ => Scan::Broken,
        }
    }

    fn go(&mut self, at: ValuePlace) -> Scan {
        self.at = at;
        Scan::More
    }

    fn closed(&mut self) -> Scan {
        self.at = ValuePlace::After;
        if self.open.is_empty() { Scan::End } else { Scan::More }
    }
}

/// Reads the object of a call, `{"name": ..., "arguments": {...}}`, after its opening brace. `parameters` is another name for
/// `arguments`, and `function` is another name for `name` or an object around both.
#[derive(Default)]
pub(super) struct CallObject {
    at: ObjectPlace,
    /// Objects around the present key: 0 for the call's own, 1 in `function`.
    depth: usize,
    /// The present key as it is written.
    key: String,
    /// The present value as it is written, unless it streams.
    value: String,
    name: Option<String>,
    /// Arguments that came before the name.
    arguments: Option<String>,
    /// The call's number, once it is told.
    index: Option<usize>,
}

#[derive(Default)]
enum ObjectPlace {
    #[default]
    FirstKey,
    NextKey,
    Key {
        escaped: bool,
    },
    Colon,
    ValueStart,
    Value {
        scanner: ValueScanner,
        streams: bool,
    },
    After,
}

impl CallObject {
    /// Whether the call is told.
    pub(super) fn is_told(&self) -> bool {
        self.index.is_some()
    }

    /// Takes the next character. `Broken` before the call is told: it is no call.
    pub(super) fn push(&mut self, c: char, calls: &mut Calls) -> Scan {
        use ObjectPlace::*;
        match &mut self.at {
            Key { escaped } => {
                if c == '"' && !*escaped {
                    return self.go(Colon);
                }
                *escaped = c == '\\' && !*escaped;
                self.key.push(c);
                Scan::More
            }
            Value { scanner, streams } => {
                let streams = *streams;
                let scan = scanner.push(c);
                match (scan, self.index) {
                    (Scan::More | Scan::End, Some(index)) if streams => {
                        calls.arguments(index, c.encode_utf8(&mut [0; 4]))
                    }
                    (Scan::More | Scan::End, None) => self.value.push(c),
                    _ => {}
                }
                match scan {
                    Scan::More | Scan::Broken => scan,
                    Scan::End if self.value_done(calls) => self.go(After),
                    Scan::EndBefore if self.value_done(calls) => {
                        self.at = After;
                        self.push(c, calls)
                    }
                    _ => Scan::Broken,
                }
            }
            _ if is_space(c) => Scan::More,
            FirstKey | NextKey if c == '"' => {
                self.key.clear();
                self.go(Key { escaped: false })
            }
            Colon if c == ':' => self.go(ValueStart),
            ValueStart if self.key == "function" && c == '{' && self.depth == 0 => {
                self.depth = 1;
                self.go(FirstKey)
            }
            ValueStart => self.begin_value(c, calls),
            After if c == ',' => self.go(NextKey),
            FirstKey | After if c == '}' && self.depth == 1 => {
                self.depth = 0;
                self.go(After)
            }
            FirstKey | After if c == '}' => self.end(calls),
            _ => Scan::Broken,
        }
    }

    fn go(&mut self, at: ObjectPlace) -> Scan {
        self.at = at;
        Scan::More
    }

    fn begin_value(&mut self, c: char, calls: &mut Calls) -> Scan {
        self.value.clear();
        let mut streams = false;
        if let (Some(name), None, true, '{') = (&self.name, self.index, self.is_arguments(), c) {
            self.index = Some(calls.tell(name));
            streams = true;
        }
        self.at = ObjectPlace::Value { scanner: ValueScanner::default(), streams };
        self.push(c, calls)
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    /// Uses the value that has ended. False: this is no call.
    fn value_done(&mut self, calls: &mut Calls) -> bool {
        if self.index.is_some() {
            return true;
        }
        let value = std::mem::take(&mut self.value);
        match self.key.as_str() {
            "name" | "function" => {
                let name = serde_json::from_str::<String>(&value).ok().filter(|name| calls.knows(name));
                self.name = name;
                self.name.is_some() && self.tell(calls)
            }
            "arguments" | "parameters" => {
                self.arguments = arguments(value);
                self.arguments.is_some() && self.tell(calls)
            }
            _ => true,
        }
    }

    /// Tells the call if its name and arguments are there.
    fn tell(&mut self, calls: &mut Calls) -> bool {
        if let (Some(name), Some(arguments)) = (&self.name, &self.arguments) {
            let index = calls.tell(name);
            calls.arguments(index, arguments);
            self.index = Some(index);
        }
        true
    }

    fn end(&mut self, calls: &mut Calls) -> Scan {
        if self.index.is_none() {
            // Models leave out the arguments of tools that have none.
            self.arguments.get_or_insert_with(|| "{}".into());
            self.tell(calls);
        }
        if self.index.is_some() { Scan::End } else { Scan::Broken }
    }
}

/// The arguments that a whole value gives: an object, or a string that contains one. Null means none.
fn arguments(value: String) -> Option<String> {
    match value.chars().next()? {
        '{' => Some(value),
        '"' => {
            let inner: String = serde_json::from_str(&value).ok()?;
            serde_json::from_str::<serde_json::Map<_, _>>(&inner).ok()?;
            Some(inner)
        }
        _ => (value == "null").then(|| "{}".into()),
    }
}

fn is_bare(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.')
}

/// White space between JSON's tokens.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}
