//! The Python of the tests that drive the server with real clients.

use std::process::{Command, Stdio};

/// A Python that can import `modules`, such as "openai, anthropic": `QUIVER_TEST_PYTHON`, which must have them, or `python3`. If that
/// lacks one, prints that the test is skipped.
pub fn python_with(modules: &str) -> Option<String> {
    let python = std::env::var("QUIVER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let has_them = Command::new(&python).args(["-c", &format!("import {modules}")]).stderr(Stdio::null()).status();
    if has_them.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    assert!(std::env::var_os("QUIVER_TEST_PYTHON").is_none(), "QUIVER_TEST_PYTHON cannot import {modules}");
    eprintln!("skipped: set QUIVER_TEST_PYTHON to a Python with tests/clients/requirements.txt");
    None
}
