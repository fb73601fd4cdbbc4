//! Translates llama.cpp's grammars (GBNF) to llguidance's variant of Lark.
//!
//! Every rule that does not contain itself becomes a terminal, which is one regular expression; the others become rules. llguidance
//! matches terminals greedily, so at the border of two terminals the translation may allow less than the original, and never
//! more. Format: `grammars/README.md` of llama.cpp.

use std::collections::HashMap;
use std::fmt::Write;

use super::lark_string;
use crate::{Error, Result};

/// Limit on nested parentheses.
const MAX_DEPTH: usize = 100;

/// Whether a grammar is GBNF: a line begins with `name ::=`.
pub(super) fn is_gbnf(text: &str) -> bool {
    let name = |name: &str| !name.is_empty() && name.chars().all(is_name);
    text.lines().any(|line| line.split_once("::=").is_some_and(|(before, _)| name(before.trim())))
}

/// The Lark grammar of the same language. Errors: `Invalid`, with the line of the fault.
pub(super) fn to_lark(text: &str) -> Result<String> {
    let mut parser = Parser { text, at: 0 };
    let mut rules: Vec<(&str, Alternatives)> = Vec::new();
    let mut index = HashMap::new();
    parser.skip_space();
    while parser.peek().is_some() {
        let name = parser.rule_head().ok_or_else(|| parser.fault("a rule of the form `name ::= ...` is expected"))?;
        if index.insert(name, rules.len()).is_some() {
            return Err(parser.fault(&format!("rule `{name}` is defined twice")));
        }
        rules.push((name, parser.alternatives(0)?));
    }
    if !index.contains_key("root") {
        return Err(Error::invalid("the grammar has no rule `root`"));
    }
    Writer::new(rules, index)?.write()
}

/// The alternatives of a rule or of a group.
type Alternatives = Vec<Vec<Item>>;

/// A part of a sequence, and how often it comes.
struct Item {
    part: Part,
    /// `+`, `*`, `?` or `{m,n}`; empty for once.
    repeat: String,
}

enum Part {
    /// Text.
    Literal(String),
    /// One character, as a regular expression.
    Class(String),
    /// A rule by its name.
    Rule(String),
    Group(Alternatives),
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '-' || c == '_'
}

struct Parser<'a> {
    text: &'a str,
    /// Byte position.
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn take(&mut self, prefix: &str) -> bool {
        let taken = self.rest().starts_with(prefix);
        self.at += if taken { prefix.len() } else { 0 };
        taken
    }

    fn fault(&self, what: &str) -> Error {
        let line = 1 + self.text[..self.at].matches('\n').count();
        Error::invalid(format!("line {line}: {what}"))
    }

    fn skip_space(&mut self) {
        loop {
            self.at += self.rest().len() - self.rest().trim_start().len();
            if !self.take("#") {
                return;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    fn name(&mut self) -> Option<&'a str> {
        let rest = self.rest();
        let name = &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())];
        self.at += name.len();
        Some(name).filter(|name| !name.is_empty())
    }

    /// `name ::=`, or nothing, and then the position stays.
    fn rule_head(&mut self) -> Option<&'a str> {
        let start = self.at;
        let name = self.name();
        self.skip_space();
        let head = name.filter(|_| self.take("::="));
        match head {
            Some(_) => self.skip_space(),
            None => self.at = start,
        }
        head
    }

    /// Alternatives up to the end of the rule or the group. Line ends are white space: a rule ends where the next one begins.
    fn alternatives(&mut self, depth: usize) -> Result<Alternatives> {
        if depth > MAX_DEPTH {
            return Err(self.fault(&format!("more than {MAX_DEPTH} nested parentheses")));
        }
        let mut alternatives = vec![Vec::new()];
        loop {
            let sequence = alternatives.last_mut().expect("there is a first one");
            let part = match self.peek() {
                None | Some(')') => return Ok(alternatives),
                Some('|') => {
                    self.next();
                    self.skip_space();
                    alternatives.push(Vec::new());
                    continue;
                }
                Some('"') => Part::Literal(self.literal()?),
                Some('[') => Part::Class(self.class()?),
                Some('.') => {
                    self.next();
                    Part::Class("(?s:.)".into())
                }
                Some('(') => {
                    self.next();
                    self.skip_space();
                    let group = self.alternatives(depth + 1)?;
                    if !self.take(")") {
                        return Err(self.fault("`)` is missing"));
                    }
                    Part::Group(group)
                }
                Some(c) if is_name(c) => {
                    let start = self.at;
                    if self.rule_head().is_some() {
                        self.at = start;
                        return Ok(alternatives);
                    }
                    Part::Rule(self.name().unwrap_or_default().to_owned())
                }
                Some(c) => return Err(self.fault(&format!("{c:?} is not supported"))),
            };
            self.skip_space();
            let repeat = self.repeat()?;
            sequence.push(Item { part, repeat });
        }
    }

    fn repeat(&mut self) -> Result<String> {
        let start = self.at;
        match self.peek() {
            Some('+' | '*' | '?') => self.at += 1,
            Some('{') => {
                let end = self.rest().find('}').ok_or_else(|| self.fault("`}` is missing"))?;
                let bounds = &self.rest()[1..end];
                let number = |n: &str| n.trim().parse::<u32>().is_ok();
                let valid = match bounds.split_once(',') {
                    Some((least, most)) => number(least) && (most.trim().is_empty() || number(most)),
                    None => number(bounds),
                };
                if !valid {
                    return Err(self.fault(&format!("`{{{bounds}}}` must be {{m}}, {{m,}} or {{m,n}}")));
                }
                self.at += end + 1;
            }
            _ => {}
        }
        let repeat = self.text[start..self.at].chars().filter(|c| !c.is_whitespace()).collect();
        self.skip_space();
        Ok(repeat)
    }

    fn literal(&mut self) -> Result<String> {
        self.next();
        let mut text = String::new();
        loop {
            match self.peek() {
                None | Some('\n') => return Err(self.fault("a string has no end")),
                Some('"') => {
                    self.next();
                    return Ok(text);
                }
                Some(_) => text.push(self.character()?),
            }
        }
    }

    /// A class such as `[^a-z_]`, as a regular expression.
    fn class(&mut self) -> Result<String> {
        self.next();
        let mut class = String::from(if self.take("^") { "[^" } else { "[" });
        let mut empty = true;
        while !self.take("]") {
            let from = self.character()?;
            let dash = self.rest().starts_with('-') && !self.rest().starts_with("-]");
            let to = if dash && self.take("-") { self.character()? } else { from };
            if from > to {
                return Err(self.fault(&format!("the range from {from:?} to {to:?} is empty")));
            }
            let _ = write!(class, "\\x{{{:x}}}-\\x{{{:x}}}", from as u32, to as u32);
            empty = false;
        }
        if empty {
            return Err(self.fault("a class of characters is empty"));
        }
        class.push(']');
        Ok(class)
    }

    /// A character of a string or of a class.
    fn character(&mut self) -> Result<char> {
        match self.next() {
            None => Err(self.fault("a string or a class has no end")),
            Some('\\') => match self.next() {
                Some('x') => self.hex(2),
                Some('u') => self.hex(4),
                Some('U') => self.hex(8),
                Some('t') => Ok('\t'),
                Some('r') => Ok('\r'),
                Some('n') => Ok('\n'),
                Some(c @ ('\\' | '"' | '[' | ']' | '-' | '^')) => Ok(c),
                _ => Err(self.fault("unknown escape after `\\`")),
            },
            Some(c) => Ok(c),
        }
    }

    fn hex(&mut self, digits: usize) -> Result<char> {
        let code = self.rest().get(..digits).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let c = code.and_then(char::from_u32).ok_or_else(|| self.fault("an escape is not a character's code"))?;
        self.at += digits;
        Ok(c)
    }
}

struct Writer<'a> {
    rules: Vec<(&'a str, Alternatives)>,
    index: HashMap<&'a str, usize>,
    /// Whether each rule is a terminal.
    terminal: Vec<bool>,
}

impl<'a> Writer<'a> {
    /// Errors: a rule that is not defined.
    fn new(rules: Vec<(&'a str, Alternatives)>, index: HashMap<&'a str, usize>) -> Result<Self> {
        let mut uses = Vec::with_capacity(rules.len());
        for (name, alternatives) in &rules {
            let mut used = Vec::new();
            names_of(alternatives, &mut used);
            let find = |used: &str| {
                let undefined = || Error::invalid(format!("rule `{name}` uses `{used}`, which is not defined"));
                index.get(used).copied().ok_or_else(undefined)
            };
            uses.push(used.into_iter().map(find).collect::<Result<Vec<usize>>>()?);
        }
        // A rule is a terminal once all rules that it uses are. Those that remain reach a cycle.
        let mut users = vec![Vec::new(); rules.len()];
        let mut open: Vec<usize> = uses.iter().map(Vec::len).collect();
        uses.iter().enumerate().for_each(|(rule, used)| used.iter().for_each(|u| users[*u].push(rule)));
        let mut terminal = vec![false; rules.len()];
        let mut ready: Vec<usize> = (0..rules.len()).filter(|rule| open[*rule] == 0).collect();
        while let Some(rule) = ready.pop() {
            terminal[rule] = true;
            for &user in &users[rule] {
                open[user] -= 1;
                if open[user] == 0 {
                    ready.push(user);
                }
            }
        }
        Ok(Self { rules, index, terminal })
    }

    fn write(&self) -> Result<String> {
        let mut lark = format!("start: {}\n", self.name("root"));
        for (name, alternatives) in &self.rules {
            let _ = writeln!(lark, "{}: {}", self.name(name), self.alternatives(alternatives));
        }
        Ok(lark)
    }

    /// A rule's name in Lark, where terminals are in capitals.
    fn name(&self, name: &str) -> String {
        let index = self.index[name];
        let name = format!("r{index}_{}", name.to_ascii_lowercase());
        if self.terminal[index] { name.to_ascii_uppercase() } else { name }
    }

    fn alternatives(&self, alternatives: &Alternatives) -> String {
        let sequence = |items: &Vec<Item>| match &items[..] {
            [] => "\"\"".to_owned(),
            items => items.iter().map(|item| self.item(item)).collect::<Vec<_>>().join(" "),
        };
        alternatives.iter().map(sequence).collect::<Vec<_>>().join(" | ")
    }

    fn item(&self, Item { part, repeat }: &Item) -> String {
        match part {
            Part::Literal(text) => format!("{}{repeat}", lark_string(text)),
            Part::Class(class) => format!("/{class}/{repeat}"),
            Part::Rule(name) => format!("{}{repeat}", self.name(name)),
            Part::Group(group) => format!("({}){repeat}", self.alternatives(group)),
        }
    }
}

/// The names of rules that alternatives use.
fn names_of<'a>(alternatives: &'a Alternatives, names: &mut Vec<&'a str>) {
    for item in alternatives.iter().flatten() {
        match &item.part {
            Part::Rule(name) => names.push(name),
            Part::Group(group) => names_of(group, names),
            Part::Literal(_) | Part::Class(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_terminals_unless_they_recur() {
        let lark = to_lark(
            "# a list\nroot ::= list\nlist ::= \"[\" (item (\", \" item)*)? \"]\" # nested\n\nitem ::= word |\n  list\n\
             word ::= [a-z_]+ \"\\n\\x41\\\"\" .{2,3}\n",
        );
        let expected = "start: r0_root\nr0_root: r1_list\nr1_list: \"[\" (r2_item (\", \" r2_item)*)? \"]\"\n\
                        r2_item: R3_WORD | r1_list\n\
                        R3_WORD: /[\\x{61}-\\x{7a}\\x{5f}-\\x{5f}]/+ \"\\nA\\\"\" /(?s:.)/{2,3}\n";
        assert_eq!(lark.unwrap(), expected);
    }

    #[test]
    fn classes_and_empty_alternatives() {
        let lark = to_lark("root ::= [^\\]\\-a-] [0-9-]* | \"\" |").unwrap();
        assert_eq!(
            lark,
            "start: R0_ROOT\nR0_ROOT: /[^\\x{5d}-\\x{5d}\\x{2d}-\\x{2d}\\x{61}-\\x{61}\\x{2d}-\\x{2d}]/ \
             /[\\x{30}-\\x{39}\\x{2d}-\\x{2d}]/* | \"\" | \"\"\n"
        );
    }

    #[test]
    fn faults_name_their_line() {
        let cases = [
            ("a ::= \"x\"", "no rule `root`"),
            ("root ::= \"x\"\n\nroot ::= \"y\"", "line 3: rule `root` is defined twice"),
            ("root ::= other", "rule `root` uses `other`"),
            ("root ::= \"x", "line 1: a string has no end"),
            ("root ::= [a", "no end"),
            ("root ::= []", "empty"),
            ("root ::= [z-a]", "empty"),
            ("root ::= (\"a\"", "`)` is missing"),
            ("root ::= \"a\")", "line 1: a rule of the form"),
            ("root ::= \"a\"{x}", "must be {m}, {m,} or {m,n}"),
            ("root ::= \"\\q\"", "unknown escape"),
            ("root ::= \"\\ud800\"", "not a character's code"),
            ("root ::= <think> \"a\"", "'<' is not supported"),
        ];
        for (text, what) in cases {
            let message = to_lark(text).unwrap_err().to_string();
            assert!(message.contains(what), "{text}: {message}");
        }
        let nested = format!("root ::= {}\"a\"{}", "(".repeat(200), ")".repeat(200));
        assert!(to_lark(&nested).unwrap_err().to_string().contains("nested"));
    }

    #[test]
    fn gbnf_and_lark_are_told_apart() {
        assert!(is_gbnf("# x\n  root  ::= \"a\""));
        assert!(!is_gbnf("start: \"a ::= b\""));
    }
}
