//! Writes the constants of `kernels/constants.cuh` for Rust (see `src/gpu/constants.rs`). With the feature `cuda`, also compiles
//! `kernels/*.cu` to fatbins that the program embeds (see `src/gpu/kernels.rs`). That needs `nvcc` on the path;
//! `kernels/toolchain.sh` brings one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Machine code for data-centre Ampere and Hopper, and PTX that the driver compiles for other GPUs.
const TARGETS: [&str; 3] =
    ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"];

fn main() {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=QUIVER_CUDA_TARGETS");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let header = fs::read_to_string("kernels/constants.cuh").expect("kernels/constants.cuh");
    fs::write(out.join("constants.rs"), constants(&header)).expect("OUT_DIR is writable");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        fatbins(&out);
    }
}

/// The constants of the header in Rust: `constexpr int NAME = VALUE;` as `usize`, and `constexpr int NAME[] = {VALUE, ...};` as
/// an array of them. Expressions of integers are the same in both languages.
fn constants(header: &str) -> String {
    let mut rust = String::new();
    for line in header.lines().filter_map(|line| line.strip_prefix("constexpr int ")) {
        let (definition, comment) = line.split_once("//").unwrap_or((line, ""));
        let parts = definition.trim_end().strip_suffix(';').and_then(|text| text.split_once(" = "));
        let (name, value) = parts.unwrap_or_else(|| panic!("no constant of kernels/constants.cuh: {line}"));
        if !comment.is_empty() {
            rust += &format!("///{comment}\n");
        }
        rust += &match name.strip_suffix("[]") {
            None => format!("pub const {name}: usize = {value};\n"),
            Some(name) => {
                let values = value.trim_matches(['{', '}']);
                format!("pub const {name}: [usize; {}] = [{values}];\n", values.split(',').count())
            }
        };
    }
    rust
}

/// Compiles all kernels, and writes the table of fatbins.
fn fatbins(out: &Path) {
    // The linker drops libraries that seem unused, and only candle needs the driver's symbols.
    println!("cargo:rustc-link-arg=-Wl,--no-as-needed,-lcuda,--as-needed");
    let mut sources: Vec<PathBuf> = fs::read_dir("kernels")
        .expect("the folder kernels")
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.extension().is_some_and(|e| e == "cu"))
        .collect();
    sources.sort();
    let targets = env::var("QUIVER_CUDA_TARGETS").unwrap_or_else(|_| TARGETS.join(" "));
    thread::scope(|scope| {
        for source in &sources {
            scope.spawn(|| compile(source, out, &targets));
        }
    });
    let names: Vec<String> = sources.iter().map(|s| stem(s)).collect();
    let entries: String = names
        .iter()
        .map(|name| format!("    (\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),\n"))
        .collect();
    let table = format!("pub const FATBINS: [(&str, &[u8]); {}] = [\n{entries}];\n", names.len());
    fs::write(out.join("fatbins.rs"), table).expect("OUT_DIR is writable");
}

fn stem(source: &Path) -> String {
    source.file_stem().expect("a file").to_string_lossy().into_owned()
}

fn compile(source: &Path, out: &Path, targets: &str) {
    let mut nvcc = Command::new(env::var_os("NVCC").unwrap_or_else(|| "nvcc".into()));
    nvcc.args(["-fatbin", "-O3", "-std=c++17", "-lineinfo"]);
    for target in targets.split_whitespace() {
        nvcc.args(["-gencode", target]);
    }
    let output = nvcc.arg("-o").arg(out.join(format!("{}.fatbin", stem(source)))).arg(source).output();
    match output {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{}: {}", source.display(), String::from_utf8_lossy(&output.stderr)),
        Err(error) => panic!("nvcc does not start ({error}): put it on the path, see kernels/toolchain.sh"),
    }
}
