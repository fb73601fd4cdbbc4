//! The sampling that a model was published with: `generation_config.json`, as in transformers and vLLM.

use std::fs;
use std::io::ErrorKind;

use serde_json::Value;

use crate::engine::request::SamplingParams;
use crate::fields::Fields;
use crate::hub::{ModelFiles, ModelFormat};
use crate::{Error, Result};

/// The sampling parameters of requests that do not give them: those of `generation_config.json`, or else OpenAI's defaults.
///
/// Reads `temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`. Logs what it found.
///
/// # Errors
/// `Invalid`, naming the file and the field: a value outside the range that requests may use.
pub(super) fn read(files: &ModelFiles) -> Result<SamplingParams> {
    let mut params = SamplingParams::default();
    let ModelFormat::HuggingFace(dir) = &files.format else { return Ok(params) };
    let path = dir.join("generation_config.json");
    let text = match fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(params),
        Err(e) => return Err(Error::invalid(e.to_string()).caused_by(e).in_file(&path)),
        Ok(text) => text,
    };
    let json: Value = serde_json::from_slice(&text).map_err(|e| Error::invalid(e.to_string()).in_file(&path))?;
    apply(&json, &mut params).map_err(|e| e.in_file(&path))?;
    if params != SamplingParams::default() {
        let SamplingParams { temperature, top_p, top_k, min_p, repetition_penalty, .. } = params;
        tracing::info!(
            temperature,
            top_p,
            top_k,
            min_p,
            repetition_penalty,
            "generation_config.json sets the sampling of requests that do not (--generation-config none turns it off)"
        );
    }
    Ok(params)
}

fn apply(json: &Value, params: &mut SamplingParams) -> Result<()> {
    let json = Fields::of_value(json, "generation_config.json")?;
    let set = |name, range, value: &mut f32| {
        let found = json.number(name, range)?;
        found.into_iter().for_each(|found| *value = found as f32);
        Ok::<(), Error>(())
    };
    set("temperature", 0.0..=2.0, &mut params.temperature)?;
    set("top_p", 0.0..=1.0, &mut params.top_p)?;
    set("min_p", 0.0..=1.0, &mut params.min_p)?;
    set("repetition_penalty", f64::from(f32::MIN_POSITIVE)..=10.0, &mut params.repetition_penalty)?;
    if let Some(top_k) = json.integer("top_k", -1..=i64::MAX)? {
        params.top_k = top_k.max(0) as usize;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(json: Value) -> Result<SamplingParams> {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("generation_config.json"), json.to_string()).expect("written");
        read(&ModelFiles { name: "m".into(), format: ModelFormat::HuggingFace(dir.path().to_owned()) })
    }

    #[test]
    fn published_sampling_is_read() {
        let params =
            of(json!({"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": true, "eos_token_id": [1, 2]}));
        let want = SamplingParams { temperature: 0.6, top_p: 0.95, top_k: 20, ..SamplingParams::default() };
        assert_eq!(params.expect("valid"), want);
        assert_eq!(of(json!({"top_k": null})).expect("valid"), SamplingParams::default());
    }

    #[test]
    fn values_that_no_request_could_have_are_refused() {
        for bad in [json!({"temperature": -1}), json!({"top_p": "x"}), json!({"repetition_penalty": 0})] {
            let error = of(bad.clone()).expect_err(&bad.to_string());
            assert!(error.to_string().contains("generation_config.json"), "{error}");
        }
    }
}
