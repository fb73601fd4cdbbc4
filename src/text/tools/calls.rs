//! Finds tool calls in an output that comes in pieces.
//!
//! The state changes with each character, so cutting the text elsewhere changes nothing. Text that may become a call is held; if it
//! becomes none, its first marker is content, and the rest is read again.

use super::json::{CallObject, Scan, ValueScanner, is_space};
use super::output::Parts;
use super::qwen_xml::XmlCall;
use super::{ToolDefinition, ToolFormat, Tools};
use crate::text::reasoning::overlap;

/// Limit on the bytes of a call that are held until it is told. Held text may be read again once for each marker in it.
const MAX_HELD: usize = 16 << 10;

/// Limit on the bytes of white space and of a tool's name around a call.
pub(super) const MAX_GAP: usize = 1 << 10;

/// The fence of a Markdown block of code.
const FENCE: &str = "```";

/// Begins the name of a call in Qwen3-Coder's form.
const FUNCTION: &str = "<function=";

/// A tool that may be called.
struct KnownTool {
    name: String,
    /// The parameters whose schema says `string`.
    strings: Vec<String>,
}

impl KnownTool {
    fn of(tool: &ToolDefinition) -> Self {
        let properties = tool.parameters["properties"].as_object();
        let strings = properties.into_iter().flatten().filter(|(_, schema)| schema["type"] == "string");
        Self { name: tool.name.clone(), strings: strings.map(|(key, _)| key.clone()).collect() }
    }
}

/// The calls of one output.
pub(super) struct Calls {
    tools: Vec<KnownTool>,
    /// Calls found so far.
    count: usize,
    /// Calls that are told. Further ones are dropped.
    most: usize,
    /// The parts that are certain.
    parts: Parts,
}

impl Calls {
    pub(super) fn knows(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name)
    }

    /// Begins the next call. Returns its number.
    pub(super) fn tell(&mut self, name: &str) -> usize {
        let index = self.count;
        self.count += 1;
        if index < self.most {
            self.parts.call(index, name);
        }
        index
    }

    pub(super) fn arguments(&mut self, index: usize, text: &str) {
        if index < self.most {
            self.parts.arguments(index, text);
        }
    }
}

/// See the module.
pub(super) struct CallParser {
    format: ToolFormat,
    calls: Calls,
    at: Place,
    /// Text that is not decided yet.
    held: String,
    /// The bytes of `held` that begin the call: white space and the marker.
    opener: usize,
    /// The call is in a fence.
    fenced: bool,
    /// The call is in an array.
    listed: bool,
}

enum Place {
    /// In text, of which some is out (`begun`), or only white space has come since the beginning or the last call.
    Text { begun: bool },
    /// After the marker of a call.
    Opened,
    /// In the name of Mistral's newer form.
    Name,
    /// In an array, before an object.
    Item,
    /// In an array, after an object.
    Between,
    /// In the object of a call.
    Object(CallObject),
    /// In the arguments of a call whose name is told.
    Arguments { index: usize, scanner: ValueScanner },
    /// In a call of Qwen3-Coder's form whose name is told.
    Xml(XmlCall),
    /// After a call, before its closing marker.
    Closing,
}

impl CallParser {
    pub(super) fn new(format: ToolFormat, tools: &Tools) -> Self {
        let known = tools.definitions.iter().map(KnownTool::of).collect();
        let most = if tools.parallel { usize::MAX } else { 1 };
        Self {
            format,
            calls: Calls { tools: known, count: 0, most, parts: Parts::default() },
            at: Place::Text { begun: false },
            held: String::new(),
            opener: 0,
            fenced: false,
            listed: false,
        }
    }

    /// Takes the next text, and adds the parts that are now certain.
    pub(super) fn push(&mut self, text: &str, parts: &mut Parts) {
        std::mem::swap(&mut self.calls.parts, parts);
        text.chars().for_each(|c| self.read(c));
        std::mem::swap(&mut self.calls.parts, parts);
    }

    /// Adds the parts held back, when the output ends.
    pub(super) fn finish(&mut self, parts: &mut Parts) {
        std::mem::swap(&mut self.calls.parts, parts);
        if let Place::Xml(call) = &mut self.at {
            call.finish(&mut self.calls);
        }
        while !self.held.is_empty() {
            match self.at {
                Place::Text { begun } => {
                    let held = std::mem::take(&mut self.held);
                    if begun || self.calls.count == 0 || !self.is_gap(&held) {
                        self.calls.parts.content(&held);
                    }
                }
                Place::Closing => self.held.clear(),
                _ => {
                    let again = self.refuse();
                    again.chars().for_each(|c| self.read(c));
                }
            }
        }
        std::mem::swap(&mut self.calls.parts, parts);
    }

    fn read(&mut self, c: char) {
        let (mut next, mut pending) = (Some(c), Vec::new());
        while let Some(c) = next {
            if let Some(again) = self.step(c) {
                pending.extend(again.chars().rev());
            }
            next = pending.pop();
        }
    }

    /// Takes one character. Returns text that must be read again.
    fn step(&mut self, c: char) -> Option<String> {
        match &mut self.at {
            Place::Text { begun } => {
                let begun = *begun;
                self.text(c, begun)
            }
            Place::Object(object) => match object.push(c, &mut self.calls) {
                Scan::End => {
                    self.end_call();
                    None
                }
                Scan::More if object.is_told() => {
                    self.held.clear();
                    None
                }
                Scan::More => {
                    self.held.push(c);
                    (self.held.len() > MAX_HELD).then(|| self.refuse())
                }
                _ if object.is_told() => self.close(Some(c)),
                _ => {
                    self.held.push(c);
                    Some(self.refuse())
                }
            },
            Place::Arguments { index, scanner } => match scanner.push(c) {
                scan @ (Scan::More | Scan::End) => {
                    self.calls.arguments(*index, c.encode_utf8(&mut [0; 4]));
                    if scan == Scan::End { self.close(None) } else { None }
                }
                _ => self.close(Some(c)),
            },
            Place::Xml(call) => match call.push(c, &mut self.calls) {
                Scan::More => None,
                Scan::End => self.close(None),
                _ => {
                    let Place::Xml(call) = std::mem::replace(&mut self.at, Place::Closing) else { return None };
                    Some(call.into_held())
                }
            },
            _ => {
                self.held.push(c);
                if self.held.len() - self.opener > MAX_GAP { Some(self.refuse()) } else { self.around(c) }
            }
        }
    }

    /// Takes a character of text.
    fn text(&mut self, c: char, begun: bool) -> Option<String> {
        let before = self.held.len();
        self.held.push(c);
        let bare = !begun && self.format.has_bare_calls();
        if bare && matches!(c, '{' | '[') && self.is_gap(&self.held[..before]) {
            self.held.truncate(before);
            self.open(before, false);
            return Some(c.into());
        }
        let openers = || self.format.opener().into_iter().chain(bare.then_some(FENCE));
        if let Some(opener) = openers().find(|opener| self.held.ends_with(opener)) {
            let text = self.held.len() - opener.len();
            if begun {
                self.calls.parts.content(&self.held[..text]);
                self.held.drain(..text);
            }
            self.open(self.held.len(), opener == FENCE);
            return None;
        }
        let end = self.held.len() - openers().map(|opener| overlap(&self.held, opener)).max().unwrap_or(0);
        let waits = !begun && self.held.len() <= MAX_GAP && self.is_gap(&self.held[..end]);
        if !waits {
            self.calls.parts.content(&self.held[..end]);
            self.held.drain(..end);
            self.at = Place::Text { begun: true };
        }
        None
    }

    /// Takes a character outside of text and of JSON values, which is the last one held.
    fn around(&mut self, c: char) -> Option<String> {
        let mut rest = self.held[self.opener..].trim_start();
        match self.at {
            Place::Opened => {
                if self.fenced {
                    if "json".starts_with(rest) {
                        return None;
                    }
                    rest = rest.strip_prefix("json").unwrap_or(rest).trim_start();
                }
                match rest {
                    "" => {}
                    "{" => self.at = Place::Object(CallObject::default()),
                    "[" => {
                        self.listed = true;
                        self.at = Place::Item;
                    }
                    _ if self.format == ToolFormat::Hermes && FUNCTION.starts_with(rest) => {}
                    _ if self.format == ToolFormat::Hermes && rest.starts_with(FUNCTION) => {
                        if c == '>' {
                            return self.function_named();
                        }
                    }
                    _ if self.is_mistral() && is_name(c) => self.at = Place::Name,
                    _ => return Some(self.refuse()),
                }
                None
            }
            Place::Name if c == '{' => self.name_done(),
            Place::Name if is_name(c) || is_space(c) || matches!(c, '[' | ']') => None,
            Place::Item if c == '{' => {
                self.at = Place::Object(CallObject::default());
                None
            }
            Place::Between if c == ',' => {
                self.at = Place::Item;
                None
            }
            Place::Between if c == ']' => self.close(None),
            Place::Item | Place::Between if is_space(c) => None,
            Place::Closing => match self.closer() {
                Some(closer) if rest == closer => {
                    self.held.clear();
                    self.at = Place::Text { begun: false };
                    None
                }
                Some(closer) if closer.starts_with(rest) => None,
                _ => {
                    self.at = Place::Text { begun: false };
                    Some(std::mem::take(&mut self.held))
                }
            },
            _ => Some(self.refuse()),
        }
    }

    /// A call may begin: the first `opener` bytes of the held text are white space and its marker.
    fn open(&mut self, opener: usize, fenced: bool) {
        (self.opener, self.fenced, self.listed) = (opener, fenced, false);
        self.at = Place::Opened;
    }

    /// The name of Mistral's newer form has ended: `name`, `name[ARGS]` or `name[CALL_ID]id[ARGS]` before `{`.
    fn name_done(&mut self) -> Option<String> {
        let head = self.held[self.opener..].trim_start().trim_end_matches('{').trim_end();
        let (name, tail) = head.split_at(head.find('[').unwrap_or(head.len()));
        if !self.calls.knows(name) || !(tail.is_empty() || tail.starts_with("[CALL_ID]") || tail.starts_with("[ARGS]"))
        {
            return Some(self.refuse());
        }
        let index = self.calls.tell(name);
        self.at = Place::Arguments { index, scanner: ValueScanner::default() };
        self.held.clear();
        Some("{".into())
    }

    /// The name of Qwen3-Coder's form has ended.
    fn function_named(&mut self) -> Option<String> {
        let name = self.held[self.opener..].trim_start().trim_start_matches(FUNCTION).trim_end_matches('>').trim();
        let Some(tool) = self.calls.tools.iter().find(|tool| tool.name == name) else { return Some(self.refuse()) };
        let (name, strings) = (tool.name.clone(), tool.strings.clone());
        self.at = Place::Xml(XmlCall::new(self.calls.tell(&name), strings));
        self.held.clear();
        self.opener = 0;
        None
    }

    /// The object of a call has ended.
    fn end_call(&mut self) {
        if self.listed {
            self.held.clear();
            self.opener = 0;
            self.at = Place::Between;
        } else {
            self.close(None);
        }
    }

    /// The calls of this marker have ended. `again` is the character after them.
    fn close(&mut self, again: Option<char>) -> Option<String> {
        self.held.clear();
        self.opener = 0;
        self.at = if self.closer().is_some() { Place::Closing } else { Place::Text { begun: false } };
        again.map(String::from)
    }

    fn closer(&self) -> Option<&'static str> {
        if self.fenced { Some(FENCE) } else { self.format.closer() }
    }

    /// The held text is no call: its marker is content. Returns the rest, which may hold another marker.
    fn refuse(&mut self) -> String {
        let mut held = std::mem::take(&mut self.held);
        let rest = held.split_off(self.opener);
        self.calls.parts.content(&held);
        self.opener = 0;
        self.at = Place::Text { begun: true };
        rest
    }

    fn is_mistral(&self) -> bool {
        matches!(self.format, ToolFormat::Mistral | ToolFormat::MistralNamed)
    }

    /// Whether a text between calls is no content. Llama 3 separates calls by semicolons.
    fn is_gap(&self, text: &str) -> bool {
        let separators = self.calls.count > 0 && self.format == ToolFormat::Llama3;
        text.chars().all(|c| c.is_whitespace() || separators && c == ';')
    }
}

/// A character of a tool's name.
pub(super) fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.')
}
