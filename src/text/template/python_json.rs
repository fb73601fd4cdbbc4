//! JSON as Python's `json.dumps` writes it, which models have seen in training.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

/// Limit on one value as JSON, in bytes. A value can hold another many times, so that it is far larger written than in memory.
const MAX_JSON: usize = 16 << 20;

/// The arguments of `json.dumps`.
#[derive(Debug, Clone)]
pub(super) struct JsonStyle {
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
    pub(super) item_separator: String,
    pub(super) key_separator: String,
    /// What one level is indented by. Without it, all is on one line.
    indent: Option<String>,
}

impl Default for JsonStyle {
    fn default() -> Self {
        Self {
            ensure_ascii: false,
            sort_keys: false,
            item_separator: ", ".to_owned(),
            key_separator: ": ".to_owned(),
            indent: None,
        }
    }
}

impl JsonStyle {
    /// Puts each item on a line of its own.
    pub(super) fn set_indent(&mut self, indent: String) {
        self.item_separator = ",".to_owned();
        self.indent = Some(indent);
    }
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(in crate::text) fn to_json(value: &Value) -> String {
    dumps(value, &JsonStyle::default()).unwrap_or_else(|_| value.to_string())
}

/// A value as JSON. Errors: why it cannot be written.
pub(super) fn dumps(value: &impl Serialize, style: &JsonStyle) -> Result<String, String> {
    if style.sort_keys {
        let plain = dumps(value, &JsonStyle { sort_keys: false, ..style.clone() })?;
        let mut sorted: Value = serde_json::from_str(&plain).map_err(|e| format!("tojson: {e}"))?;
        sorted.sort_all_objects();
        return dumps(&sorted, &JsonStyle { sort_keys: false, ..style.clone() });
    }
    let mut out = Capped(Vec::new());
    let formatter = PythonFormatter { style, level: 0, filled: false };
    value.serialize(&mut Serializer::with_formatter(&mut out, formatter)).map_err(|e| format!("tojson: {e}"))?;
    String::from_utf8(out.0).map_err(|e| format!("tojson: {e}"))
}

/// Bytes up to [`MAX_JSON`].
struct Capped(Vec<u8>);

impl Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_JSON - self.0.len() {
            return Err(io::Error::other(format!("a value has more than {MAX_JSON} bytes as JSON")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct PythonFormatter<'a> {
    style: &'a JsonStyle,
    /// Arrays and objects around the next value.
    level: usize,
    /// The innermost one has an item.
    filled: bool,
}

impl PythonFormatter<'_> {
    fn line<W: ?Sized + Write>(&self, w: &mut W) -> io::Result<()> {
        let Some(indent) = &self.style.indent else { return Ok(()) };
        w.write_all(b"\n")?;
        (0..self.level).try_for_each(|_| w.write_all(indent.as_bytes()))
    }

    fn open<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level += 1;
        self.filled = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.level -= 1;
        if self.filled {
            self.line(w)?;
        }
        self.filled = true;
        w.write_all(bracket)
    }
}

impl Formatter for PythonFormatter<'_> {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.style.item_separator.as_bytes())?;
        }
        self.line(w)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.filled = true;
        Ok(())
    }

    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.begin_array_value(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.style.key_separator.as_bytes())
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.end_array_value(w)
    }

    fn write_f64<W: ?Sized + Write>(&mut self, w: &mut W, value: f64) -> io::Result<()> {
        w.write_all(repr(value).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, w: &mut W, fragment: &str) -> io::Result<()> {
        if !self.style.ensure_ascii {
            return w.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            match c {
                ' '..='~' => w.write_all(&[c as u8])?,
                _ => c.encode_utf16(&mut [0; 2]).iter().try_for_each(|unit| write!(w, "\\u{unit:04x}"))?,
            }
        }
        Ok(())
    }
}

/// Python's `repr` of a float: the shortest digits, with an exponent below 1e-4 and from 1e16 on.
fn repr(value: f64) -> String {
    let scientific = format!("{value:e}");
    match scientific.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((digits, exponent)) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
        }
        _ if value.fract() == 0.0 => format!("{value:.1}"),
        _ => value.to_string(),
    }
}
