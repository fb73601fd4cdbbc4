//! The input file of a batch: a JSON line for each request.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use super::record::BatchError;
use crate::error::{AtPath, Error, Result};
use crate::fields::{self, Fields};

/// Limit on the requests of a batch, as in OpenAI's API.
const MAX_REQUESTS: usize = 50_000;

/// Limit on the bytes of a line, in addition to those of a request's body.
const FRAME: usize = 16 << 10;

/// Limit on the characters of a `custom_id`.
const MAX_ID: usize = 512;

/// Faults that are listed.
const MAX_LISTED: usize = 100;

/// A request of a batch: where its line lies in the file, and its id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchLine {
    offset: u64,
    bytes: usize,
    pub(super) custom_id: String,
}

impl BatchLine {
    /// Reads the body of the request.
    pub(super) fn body(&self, file: &File) -> Result<Value> {
        let mut text = vec![0; self.bytes];
        file.read_exact_at(&mut text, self.offset)?;
        let mut line: Value = serde_json::from_slice(&text).map_err(|e| Error::internal(e.to_string()))?;
        Ok(line["body"].take())
    }
}

/// The requests of a file, or its faults. `max_body` is the server's limit on the body of a request. Errors: the file cannot be
/// read.
pub(super) fn read(path: &Path, endpoint: &str, max_body: usize) -> Result<Result<Vec<BatchLine>, Vec<BatchError>>> {
    let mut reader = BufReader::new(File::open(path).at(path)?);
    let (mut lines, mut faults) = (Vec::new(), Vec::new());
    let mut places: HashMap<String, usize> = HashMap::new();
    let (mut offset, mut number, mut text) = (0, 0, Vec::new());
    let most = max_body.saturating_add(FRAME);
    while faults.len() < MAX_LISTED {
        text.clear();
        let bytes = reader.by_ref().take(most as u64 + 1).read_until(b'\n', &mut text).at(path)?;
        if bytes == 0 {
            break;
        }
        number += 1;
        let mut fault = |error: Error| {
            faults.push(BatchError {
                code: error.code.unwrap_or("invalid_value").to_owned(),
                line: Some(number),
                message: error.message,
                param: error.param,
            });
        };
        let (start, whole) = (offset, bytes <= most);
        offset += bytes as u64;
        if !whole {
            offset += skip_line(&mut reader).at(path)?;
            fault(Error::invalid(format!("the line has more than {most} bytes")).code("line_too_long"));
            continue;
        }
        // A byte order mark is no part of the first line's JSON.
        let mark = if number == 1 && text.starts_with(b"\xEF\xBB\xBF") { 3 } else { 0 };
        let line = text[mark..].trim_ascii_end();
        if line.trim_ascii_start().is_empty() {
            continue;
        }
        match custom_id(line, endpoint) {
            Ok(id) => match places.get(&id) {
                Some(first) => {
                    let message = format!("the custom_id {id:?} is that of line {first} too");
                    fault(Error::invalid(message).param("custom_id").code("duplicate_custom_id"));
                }
                None => {
                    places.insert(id.clone(), number);
                    lines.push(BatchLine { offset: start + mark as u64, bytes: line.len(), custom_id: id });
                }
            },
            Err(error) => fault(error),
        }
        if lines.len() > MAX_REQUESTS {
            let message = format!("the file has more than {MAX_REQUESTS} requests");
            return Ok(Err(vec![of_file("too_many_requests", message)]));
        }
    }
    if lines.is_empty() && faults.is_empty() {
        faults.push(of_file("empty_file", "the file has no requests".into()));
    }
    Ok(if faults.is_empty() { Ok(lines) } else { Err(faults) })
}

/// A fault of the whole file.
pub(super) fn of_file(code: &str, message: String) -> BatchError {
    BatchError { code: code.to_owned(), line: None, message, param: None }
}

/// Reads to the end of the line. Returns the number of bytes.
fn skip_line(reader: &mut impl BufRead) -> std::io::Result<u64> {
    let mut skipped = 0;
    loop {
        let buffer = reader.fill_buf()?;
        let end = buffer.iter().position(|&byte| byte == b'\n');
        let count = end.map_or(buffer.len(), |end| end + 1);
        skipped += count as u64;
        reader.consume(count);
        if end.is_some() || count == 0 {
            return Ok(skipped);
        }
    }
}

/// Checks a line, and returns its `custom_id`.
fn custom_id(line: &[u8], endpoint: &str) -> Result<String> {
    let invalid = |message: String| Error::invalid(message).code("invalid_json_line");
    let line: Value = serde_json::from_slice(line).map_err(|e| invalid(format!("the line is not valid JSON: {e}")))?;
    if !line.is_object() {
        return Err(invalid(format!("the line must be a JSON object, not {}", fields::describe(&line))));
    }
    let fields = Fields::of_body(&line)?;
    fields::check_only(&fields, &["custom_id", "method", "url", "body"])?;
    let id = fields.required("custom_id", fields.string("custom_id")?, "an id of its own for each request")?;
    if !(1..=MAX_ID).contains(&id.chars().count()) {
        let allowed = format!("a string of 1 to {MAX_ID} characters");
        return Err(fields::wrong("custom_id", &allowed, &id.into()));
    }
    let expect = |name: &str, want: &str, code| {
        let value = fields.required(name, fields.string(name)?, &format!("\"{want}\""))?;
        if value == want {
            return Ok(());
        }
        Err(fields::wrong(name, &format!("\"{want}\""), &value.into()).code(code))
    };
    expect("method", "POST", "invalid_method")?;
    expect("url", endpoint, "invalid_url")?;
    fields.required("body", fields.object("body")?, "the body of the request")?;
    Ok(id.to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ENDPOINT: &str = "/v1/completions";

    fn line(id: &str, url: &str) -> String {
        json!({"custom_id": id, "method": "POST", "url": url, "body": {"prompt": id}}).to_string()
    }

    fn read_text(text: &str, max_body: usize) -> Result<Vec<Value>, Vec<BatchError>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("input");
        std::fs::write(&path, text).unwrap();
        let file = File::open(&path).unwrap();
        let lines = read(&path, ENDPOINT, max_body).unwrap()?;
        Ok(lines.iter().map(|line| json!([line.custom_id, line.body(&file).unwrap()])).collect())
    }

    #[test]
    fn each_line_is_found_again() {
        let text = format!("\u{feff}{}\r\n\n  {}", line("ä", ENDPOINT), line("b", ENDPOINT));
        assert_eq!(read_text(&text, 1000).unwrap(), [json!(["ä", {"prompt": "ä"}]), json!(["b", {"prompt": "b"}])]);
    }

    #[test]
    fn faults_name_the_line_and_the_field() {
        let long = line(&"x".repeat(20_000), ENDPOINT);
        let text = [
            &line("a", ENDPOINT),
            "",
            "{",
            &line("a", ENDPOINT),
            &line("b", "/v1/embeddings"),
            &long,
            "[1]",
            r#"{"custom_id": "c", "method": "GET", "url": "/v1/completions", "body": {}}"#,
            r#"{"custom_id": "d", "method": "POST", "url": "/v1/completions"}"#,
            r#"{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}"#,
            r#"{"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {}, "priority": 1}"#,
        ]
        .join("\n");
        let faults = read_text(&text, 1000).unwrap_err();
        let found: Vec<_> =
            faults.iter().map(|f| (f.line.unwrap(), f.code.as_str(), f.param.as_deref().unwrap_or(""))).collect();
        assert_eq!(
            found,
            [
                (3, "invalid_json_line", ""),
                (4, "duplicate_custom_id", "custom_id"),
                (5, "invalid_url", "url"),
                (6, "line_too_long", ""),
                (7, "invalid_json_line", ""),
                (8, "invalid_method", "method"),
                (9, "missing_required_parameter", "body"),
                (10, "invalid_value", "custom_id"),
                (11, "unknown_field", "priority"),
            ]
        );
        assert_eq!(read_text("\n \n", 1000).unwrap_err()[0].code, "empty_file");
        assert_eq!(read_text(&"{\n".repeat(1000), 1000).unwrap_err().len(), MAX_LISTED);
        let many: String = (0..=MAX_REQUESTS).map(|i| line(&i.to_string(), ENDPOINT) + "\n").collect();
        assert_eq!(read_text(&many, 1000).unwrap_err()[0].code, "too_many_requests");
    }
}
