//! The floors of `docs/DESIGN.md`: a module imports only from the floors below its own.

use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// The top-level modules of `src`, from the ground up. A module may import those before it, and no other.
const FLOORS: &[&str] = &[
    "error", "files", "time", "fields", "plot", "hub", "arch", "gpu", "ops", "lora", "model", "adapter", "engine",
    "text", "train", "config", "runtime", "finetune", "eval", "merge", "server", "bench", "cli",
];

/// Items that `src/lib.rs` re-exports at the root, with their modules.
const ROOT: &[(&str, &str)] = &[("Error", "error"), ("Result", "error")];

#[test]
fn imports_go_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    let (mut files, mut imports) = (0, 0);
    for path in sources(&src) {
        let relative = path.strip_prefix(&src).unwrap();
        let module = module_path(relative);
        // `lib.rs` lists the modules, and `main.rs` calls the command line.
        let Some(top) = module.first() else { continue };
        files += 1;
        for (line, target) in imports_of(&fs::read_to_string(&path).unwrap(), module.len()) {
            imports += 1;
            faults.extend(fault(top, &target).map(|what| format!("src/{}:{line}: {what}", relative.display())));
        }
    }
    assert!(faults.is_empty(), "{} imports do not go down:\n{}", faults.len(), faults.join("\n"));
    assert!(files > 100 && imports > 300, "only {files} files and {imports} imports were read");
}

#[test]
fn every_module_has_one_floor() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut modules: Vec<String> =
        sources(&src).iter().filter_map(|p| module_path(p.strip_prefix(&src).unwrap()).into_iter().next()).collect();
    modules.sort();
    modules.dedup();
    let mut floors = FLOORS.to_vec();
    floors.sort();
    assert_eq!(modules, floors);
}

/// The reader finds what it should: each kind of import in a file of `ops`, two modules deep.
#[test]
fn upward_imports_are_found() {
    let found = |text: &str| -> Vec<(usize, String)> {
        let imports = imports_of(text, 2);
        imports.into_iter().filter(|(_, target)| fault("ops", target).is_some()).collect()
    };
    let at = |line: usize, target: &str| vec![(line, target.to_owned())];
    assert_eq!(found("use crate::model::kv;"), at(1, "model"));
    assert_eq!(found("use crate::gpu;\nuse crate::{gpu::kernels, arch::{Heads, Site}, engine};"), at(2, "engine"));
    assert_eq!(found("use super::super::adapter::Lease;"), at(1, "adapter"));
    assert_eq!(found("use super::super::{gpu, lora::slots};"), at(1, "lora"));
    assert_eq!(found("mod tests {\n    use super::super::super::server;\n}"), at(2, "server"));
    assert_eq!(found("fn f() {\n    g!(\"{}\", crate::cli::run());\n}"), at(2, "cli"));
    assert_eq!(found("use crate::nowhere;"), at(1, "nowhere"));
    assert_eq!(
        found("use super::pool; use crate::ops::pool; use crate::{Error, Result}; use crate::error::Error;"),
        []
    );
    assert_eq!(found("//! See [`crate::engine`].\n/// And [`crate::model`].\nfn f() {}"), []);
    assert_eq!(fault("files", "error"), None);
    assert!(fault("error", "files").is_some(), "floors do not tie");
}

/// The fault of an import of module `target` by module `top`, if it has one.
fn fault(top: &str, target: &str) -> Option<String> {
    let target = ROOT.iter().find(|(name, _)| *name == target).map_or(target, |(_, module)| module);
    let floor = |name: &str| FLOORS.iter().position(|floor| *floor == name);
    match (floor(top), floor(target)) {
        _ if top == target => None,
        (Some(from), Some(to)) if to < from => None,
        (Some(_), Some(_)) => Some(format!("`{top}` imports `{target}`, which is above it")),
        (None, _) => Some(format!("`{top}` has no floor")),
        (_, None) => Some(format!("`{target}` has no floor")),
    }
}

/// All Rust files under a directory.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] });
    files.filter(|path| path.extension().is_some_and(|e| e == "rs")).collect()
}

/// The names of a file's module: `ops/norm/cuda.rs` is `ops::norm::cuda`; none for `lib.rs` and `main.rs`.
fn module_path(file: &Path) -> Vec<String> {
    let names = file.with_extension("").iter().map(|part| part.to_string_lossy().into_owned()).collect::<Vec<_>>();
    names.into_iter().filter(|name| !["mod", "lib", "main"].contains(&name.as_str())).collect()
}

/// Lines and top-level modules of all paths that start with `crate` or climb by `super` to the crate's root, in a file whose
/// module is `depth` below it. Comments are none of the tokens that are read.
fn imports_of(text: &str, depth: usize) -> Vec<(usize, String)> {
    let tokens: TokenStream = text.parse().expect("Rust tokens");
    let mut found = Vec::new();
    scan(tokens, depth, &mut found);
    found
}

fn scan(tokens: TokenStream, depth: usize, found: &mut Vec<(usize, String)>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let word = |i: usize| match tokens.get(i) {
        Some(TokenTree::Ident(ident)) => ident.to_string(),
        _ => String::new(),
    };
    let separator = |i: usize| {
        let colon = |i: usize| matches!(tokens.get(i), Some(TokenTree::Punct(p)) if p.as_char() == ':');
        colon(i) && colon(i + 1)
    };
    let mut i = 0;
    while i < tokens.len() {
        let start = i;
        // How far below the root the path has come; `None` while it has no start.
        let mut at = None;
        while separator(i + 1) {
            at = match word(i).as_str() {
                "crate" => Some(0),
                "super" => Some(at.unwrap_or(depth) - 1),
                _ => break,
            };
            i += 3;
        }
        if at == Some(0) {
            match &tokens[i] {
                TokenTree::Group(group) => tops(group.stream(), found),
                TokenTree::Ident(ident) => found.push((ident.span().start().line, ident.to_string())),
                other => panic!("line {}: a path ends in {other}", other.span().start().line),
            }
        } else if let TokenTree::Group(group) = &tokens[i] {
            let module = start >= 2 && word(start - 2) == "mod" && group.delimiter() == Delimiter::Brace;
            scan(group.stream(), depth + usize::from(module), found);
        }
        i += 1;
    }
}

/// The first names of the paths of a group after `crate::`.
fn tops(group: TokenStream, found: &mut Vec<(usize, String)>) {
    let mut first = true;
    for token in group {
        match token {
            TokenTree::Punct(p) if p.as_char() == ',' => first = true,
            TokenTree::Ident(ident) if first => {
                found.push((ident.span().start().line, ident.to_string()));
                first = false;
            }
            _ => {}
        }
    }
}
