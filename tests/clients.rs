//! Real clients against the binary with the default model: everything that `tests/clients/run.py` does must end as
//! `docs/compatibility.md` says.

#[path = "common/process.rs"]
mod process;
#[path = "common/python.rs"]
mod python;

use std::path::Path;
use std::process::Command;

use process::Server;
use serde_json::Value;

/// What `tests/clients/requirements.txt` installs, without `litellm`, whose import looks for a list of prices on the network.
const PACKAGES: &str = "openai, anthropic, huggingface_hub, instructor, langchain, langchain_openai, \
    llama_index.llms.openai_like, lorax, mcp, pydantic_ai";

#[test]
fn clients_get_what_the_table_says() {
    let Some(python) = python::python_with(PACKAGES) else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
    let results = folder.join("results.json");
    let server = Server::start(&[]);
    let run = Command::new(python)
        .arg(folder.join("run.py"))
        .args([&server.url, "qa", "--against"])
        .arg(&results)
        .status()
        .expect("Python runs");
    assert!(run.success());
    assert_eq!(server.call("GET", "/health", Value::Null).0, 200, "the clients leave a healthy server");
}

#[test]
fn the_page_is_the_table_of_the_results() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("tests/clients");
    let check = Command::new("python3")
        .arg(folder.join("table.py"))
        .args(["results.json", "results-heavy.json"].map(|name| folder.join(name)))
        .arg("--check")
        .arg(root.join("docs/compatibility.md"))
        .status()
        .expect("python3, which fetches the default model too");
    assert!(check.success());
}
