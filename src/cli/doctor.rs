//! `quiver doctor`: describes this machine and lists which models fit.

use bytesize::ByteSize;

use crate::runtime::memory::HostMemory;
use crate::{Result, gpu};

/// Bits of memory per weight, including scales and tensors that are not quantised to 4 bits.
const BITS_PER_WEIGHT: f64 = 5.0;

/// Share of memory for a model. The KV cache, adapters and the system need the rest.
const MODEL_SHARE: f64 = 0.7;

/// Prints the report.
pub fn run() -> Result<()> {
    let system = sysinfo::System::new_with_specifics(
        sysinfo::RefreshKind::nothing().with_cpu(sysinfo::CpuRefreshKind::nothing()),
    );
    let brand = system.cpus().first().map_or("unknown", |cpu| cpu.brand().trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = sysinfo::System::physical_core_count();
    let memory = HostMemory::read();

    println!("quiver   {}", env!("CARGO_PKG_VERSION"));
    println!("cpu      {brand}");
    println!(
        "cores    {threads} threads usable{}",
        cores.map_or(String::new(), |cores| format!(", {cores} physical in the machine"))
    );
    println!("simd     {}", simd().join(" "));
    println!("memory   {} in total, {} free", ByteSize(memory.total), ByteSize(memory.free));
    println!("gpu      {}", gpu::describe());
    println!();
    println!("4-bit models that fit in {:.0}% of memory:", MODEL_SHARE * 100.0);
    for (name, billions) in [
        ("SmolLM2-135M", 0.135),
        ("SmolLM2-1.7B", 1.7),
        ("Llama-3.2-3B", 3.2),
        ("Llama-3.1-8B", 8.0),
        ("Llama-2-13B", 13.0),
        ("Llama-3.1-70B", 70.6),
        ("Llama-3.1-405B", 405.9),
    ] {
        let bytes = billions * 1e9 * BITS_PER_WEIGHT / 8.0;
        let fits = if bytes <= memory.total as f64 * MODEL_SHARE { "fits" } else { "too large" };
        println!("  {name:<16} {:>10}  {fits}", ByteSize(bytes as u64).to_string());
    }
    Ok(())
}

/// The instruction sets of this CPU that the kernels use.
fn simd() -> Vec<&'static str> {
    let mut found = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
            ("avx512bw", is_x86_feature_detected!("avx512bw")),
            ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
        ];
        found.extend(all.iter().filter(|(_, has)| *has).map(|(name, _)| *name));
    }
    #[cfg(target_arch = "aarch64")]
    {
        let all = [
            ("neon", std::arch::is_aarch64_feature_detected!("neon")),
            ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
            ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
        ];
        found.extend(all.iter().filter(|(_, has)| *has).map(|(name, _)| *name));
    }
    if found.is_empty() {
        found.push("none: portable kernels");
    }
    found
}
