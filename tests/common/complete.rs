//! Completions from a running `quiver serve`.

use serde_json::json;

use crate::process::Server;

impl Server {
    /// Greedy completion of `prompt` with an adapter, or with the base alone.
    pub fn complete(&self, adapter: Option<&str>, prompt: &str, tokens: usize) -> String {
        let mut body = json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0});
        if let Some(adapter) = adapter {
            body["adapter"] = json!(adapter);
        }
        let (status, reply) = self.call("POST", "/v1/completions", body);
        assert_eq!(status, 200, "{reply}");
        reply["choices"][0]["text"].as_str().expect("text").to_owned()
    }
}
