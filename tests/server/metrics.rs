//! The metrics page.

use serde_json::json;

use crate::harness::{Server, eventually};

/// The value of a series, by its full name with labels.
fn value(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[test]
fn counts_by_adapter_and_under_vllms_names() {
    let server = Server::start();
    server.complete(json!({"prompt": "..", "max_tokens": 3}));
    server.complete(json!({"prompt": "...", "max_tokens": 4, "adapter": "a"}));
    server.complete(json!({"prompt": ".", "max_tokens": 40, "adapter": [{"name": "a"}, {"name": "b"}]}));
    server.post("/v1/completions", json!({"prompt": ".", "temperature": 9, "adapter": "a"}));
    server.post("/v1/completions", json!({"prompt": ".", "model": "gone"}));
    let page = server.get("/metrics");
    assert!(page.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    let page = page.text;
    let engine = "{engine=\"0\",model_name=\"org/base\"}";
    for (series, want) in [
        ("quiver_requests_total{adapter=\"\",finished_reason=\"length\"}".to_owned(), 1.0),
        ("quiver_requests_total{adapter=\"a\",finished_reason=\"length\"}".to_owned(), 1.0),
        ("quiver_requests_total{adapter=\"a+b\",finished_reason=\"stop\"}".to_owned(), 1.0),
        ("quiver_prompt_tokens_total{adapter=\"a\"}".to_owned(), 3.0),
        ("quiver_generated_tokens_total{adapter=\"a+b\"}".to_owned(), 11.0),
        ("quiver_time_to_first_token_seconds_count{adapter=\"a\"}".to_owned(), 1.0),
        ("quiver_inter_token_seconds_count{adapter=\"a\"}".to_owned(), 3.0),
        ("quiver_request_seconds_count{adapter=\"\"}".to_owned(), 1.0),
        ("quiver_queue_seconds_count{adapter=\"a\"}".to_owned(), 1.0),
        ("quiver_errors_total{adapter=\"a\",kind=\"invalid\"}".to_owned(), 1.0),
        ("quiver_errors_total{adapter=\"\",kind=\"not_found\"}".to_owned(), 1.0),
        ("quiver_adapter_loads_total{result=\"ok\"}".to_owned(), 2.0),
        ("vllm:num_requests_running".to_owned() + engine, 0.0),
        ("vllm:num_requests_waiting".to_owned() + engine, 0.0),
        ("vllm:kv_cache_usage_perc".to_owned() + engine, 0.0),
        ("vllm:prompt_tokens_total".to_owned() + engine, 6.0),
        ("vllm:generation_tokens_total".to_owned() + engine, 18.0),
        ("vllm:time_to_first_token_seconds_count".to_owned() + engine, 3.0),
        ("vllm:inter_token_latency_seconds_count".to_owned() + engine, 14.0),
        ("vllm:e2e_request_latency_seconds_count".to_owned() + engine, 3.0),
        ("vllm:request_queue_time_seconds_count".to_owned() + engine, 3.0),
        ("vllm:request_prompt_tokens_sum".to_owned() + engine, 6.0),
        ("vllm:request_generation_tokens_sum".to_owned() + engine, 18.0),
        ("vllm:request_prefill_time_seconds_count".to_owned() + engine, 3.0),
        ("vllm:request_decode_time_seconds_count".to_owned() + engine, 3.0),
        ("vllm:request_time_per_output_token_seconds_count".to_owned() + engine, 3.0),
        ("vllm:num_preemptions_total".to_owned() + engine, 0.0),
        (
            "vllm:cache_config_info{block_size=\"16\",engine=\"0\",model_name=\"org/base\",num_gpu_blocks=\"256\"}"
                .to_owned(),
            1.0,
        ),
        ("vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"org/base\"}".to_owned(), 2.0),
    ] {
        assert_eq!(value(&page, &series), Some(want), "{series}\n{page}");
    }
    assert!(value(&page, &("vllm:prefix_cache_queries_total".to_owned() + engine)).is_some());
    // The fake runner keeps its own slots, so none is resident; still there is exactly one such series.
    let lora: Vec<&str> = page.lines().filter(|l| l.starts_with("vllm:lora_requests_info{")).collect();
    assert_eq!(lora.len(), 1);
    assert!(lora[0].contains("running_lora_adapters=\"\",waiting_lora_adapters=\"\""), "{}", lora[0]);
    assert!(lora[0].rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 1.6e9);
}

#[test]
fn waiting_adapters_show_while_they_wait() {
    let server = Server::start();
    server.gate.set(true);
    let body = json!({"prompt": ".", "adapter": "b", "max_tokens": 1}).to_string();
    let _stream = server.begin("POST", "/v1/completions", &[], body.as_bytes());
    eventually("b waits", || server.get("/metrics").text.contains("waiting_lora_adapters=\"b\""));
    server.gate.set(false);
    eventually("b is done", || server.get("/metrics").text.contains("waiting_lora_adapters=\"\""));
}

#[test]
fn every_line_parses() {
    let server = Server::start();
    server.complete(json!({"prompt": ".", "max_tokens": 2, "adapter": "a"}));
    for line in server.get("/metrics").text.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        assert!(value == "+Inf" || value.parse::<f64>().is_ok(), "{line}");
        let name = series.split('{').next().unwrap();
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c)), "{line}");
        assert!(!series.contains('{') || series.ends_with('}'), "{line}");
    }
}
