//! A thousand tenants on one SmolLM2 with slots for fifty adapters: every reply comes from the tenant's own adapter.

#[path = "common/smollm2.rs"]
mod smollm2;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use quiver::engine::request::SamplingParams;
use smollm2::SmolLm2;

const TENANTS: usize = 1000;
const HIDDEN: usize = 576;
const RANK: usize = 8;

/// Writes a rank-8 adapter for one layer's output projection. It differs for each tenant and is strong enough to change the text.
fn write_tenant(dir: &Path, tenant: usize) {
    let layer = tenant % 30;
    let values = |count: usize, salt: usize| -> Vec<f32> {
        (0..count).map(|i| (((i + 1) * (2 * tenant + salt)) % 2003) as f32 / 1001.0 - 1.0).map(|v| v / 10.0).collect()
    };
    let name = |part: &str| format!("base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{part}.weight");
    let tensor = |count, shape: (usize, usize), salt| {
        Tensor::from_vec(values(count, salt), shape, &Device::Cpu).expect("a tensor")
    };
    let tensors = HashMap::from([
        (name("A"), tensor(RANK * HIDDEN, (RANK, HIDDEN), 7)),
        (name("B"), tensor(HIDDEN * RANK, (HIDDEN, RANK), 11)),
    ]);
    std::fs::create_dir_all(dir).expect("a folder");
    candle_core::safetensors::save(&tensors, dir.join("adapter_model.safetensors")).expect("tensors are written");
    let config = serde_json::json!({
        "peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": ["o_proj"], "layers_to_transform": [layer],
    });
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).expect("the config is written");
}

#[test]
fn a_thousand_adapters_share_slots_for_fifty() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let slot_bytes = 2 * RANK * HIDDEN * size_of::<f32>();
    let server = SmolLm2::start(&candle_core::Device::Cpu, 50 * slot_bytes);
    for tenant in 0..TENANTS {
        let source = dir.path().join(tenant.to_string());
        write_tenant(&source, tenant);
        server.load(&format!("tenant-{tenant}"), &source);
    }
    let prompt = [504, 2601, 28, 957];
    let params =
        SamplingParams { temperature: 0.0, max_tokens: 4, ignore_eos: true, logprobs: Some(0), ..Default::default() };
    let submit = |tenant: usize| {
        let name = format!("tenant-{tenant}");
        server.submit(&prompt, params.clone(), &[(&name, 1.0)])
    };
    let mixed: Vec<_> = (0..TENANTS).map(submit).collect();
    let mixed: Vec<_> = mixed.into_iter().map(|reply| reply.collect()).collect();
    // A sample of the requests, one by one and in another order, gives the same bits.
    for tenant in (0..TENANTS).rev().step_by(37) {
        assert_eq!(submit(tenant).collect(), mixed[tenant], "tenant {tenant}");
    }
    // The log-probabilities of the same prompt differ between tenants.
    let mut seen: Vec<u32> =
        mixed.iter().map(|m| m.logprobs[0].as_ref().expect("asked for").logprob.to_bits()).collect();
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > TENANTS * 9 / 10, "only {} different answers", seen.len());
}
