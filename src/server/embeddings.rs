//! `POST /v1/embeddings`: the pooled hidden states of texts, as OpenAI's embedding objects.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, StreamExt, TryStreamExt};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::error_response::ErrorResponse;
use super::extract::JsonBody;
use super::field_table::EMBEDDINGS;
use super::openai::{PromptInput, prompts};
use super::params::{cache_salt, truncation};
use super::select_adapter::LeasedAdapters;
use super::{Serving, SharedApp};
use crate::engine::context_length_exceeded;
use crate::engine::request::{Event, FinishReason, Pooling, Request, SamplingParams};
use crate::error::blocking;
use crate::fields::Fields;
use crate::text::truncation::Truncation;
use crate::time::unix_seconds;
use crate::{Error, Result};

/// The fields of a request.
struct EmbeddingParams {
    inputs: Vec<PromptInput>,
    pooling: Pooling,
    /// Scale the vectors to length 1.
    normalize: bool,
    /// Write the vectors as base64 of little-endian f32.
    base64: bool,
    truncation: Option<Truncation>,
    /// See [`Request::priority`].
    priority: i64,
    /// See [`Request::cache_salt`].
    cache_salt: Option<String>,
}

/// The response.
#[derive(Serialize)]
struct EmbeddingList {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    adapter: Value,
    adapter_generation: Value,
    data: Vec<EmbeddingObject>,
    usage: EmbeddingUsage,
}

/// The embedding of one input.
#[derive(Serialize)]
struct EmbeddingObject {
    object: &'static str,
    index: usize,
    embedding: EncodedVector,
}

/// A vector in the requested encoding.
#[derive(Serialize)]
#[serde(untagged)]
enum EncodedVector {
    Float(Vec<f32>),
    Base64(String),
}

/// Token counts of a response.
#[derive(Serialize)]
struct EmbeddingUsage {
    prompt_tokens: usize,
    total_tokens: usize,
}

/// `POST /v1/embeddings`.
pub(super) async fn embeddings(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Response, ErrorResponse> {
    let arrived = Instant::now();
    let serving = app.serving()?.clone();
    let body = Fields::of_body(&body)?;
    EMBEDDINGS.check(&body)?;
    let adapters = LeasedAdapters::select(&body, &serving.base.names, &serving.registry).await?;
    let label = adapters.label.clone();
    let answer = async {
        let params = EmbeddingParams::parse(&body, &serving)?;
        let model = body.string("model")?.unwrap_or(serving.base.name()).to_owned();
        embed(&app, &serving, params, adapters, model, arrived).await
    };
    answer.await.map_err(|error| ErrorResponse { error: Box::new(error), adapter: label })
}

impl EmbeddingParams {
    fn parse(body: &Fields, serving: &Serving) -> Result<Self> {
        check_constants(body, serving.base.shape.hidden_size)?;
        let add_special_tokens = body.boolean("add_special_tokens")?.unwrap_or(true);
        Ok(Self {
            inputs: prompts(body, "input", serving.codec.vocab_size(), add_special_tokens)?,
            pooling: body.one_of("pooling", &[("last", Pooling::Last), ("mean", Pooling::Mean)])?,
            normalize: normalize(body)?,
            base64: body.one_of("encoding_format", &[("float", false), ("base64", true)])?,
            truncation: truncation(body, serving.limits().max_model_len)?,
            priority: body.integer("priority", i64::MIN..=i64::MAX)?.unwrap_or(0),
            cache_salt: cache_salt(body)?,
        })
    }
}

/// Fields of which one value only can be honoured.
fn check_constants(body: &Fields, width: usize) -> Result<()> {
    let dimensions = body.integer("dimensions", 1..=i64::MAX)?;
    if dimensions.is_some_and(|dimensions| dimensions != width as i64) {
        let message = format!(
            "`dimensions` must be {width}, the width of this model's hidden states: the model is not trained for shorter embeddings"
        );
        return Err(Error::invalid(message).param("dimensions").code("unsupported_parameter"));
    }
    body.one_of("embed_dtype", &[("float32", ())])?;
    body.one_of("endianness", &[("native", ()), ("little", ())])?;
    body.string("user").map(|_| ())
}

/// `normalize`, which vLLM now calls `use_activation`.
fn normalize(body: &Fields) -> Result<bool> {
    match (body.boolean("normalize")?, body.boolean("use_activation")?) {
        (Some(a), Some(b)) if a != b => Err(Error::invalid(
            "`normalize` and `use_activation` mean the same and have different values: give one of them",
        )
        .param("use_activation")),
        (a, b) => Ok(a.or(b).unwrap_or(true)),
    }
}

/// Runs all inputs and answers with their embeddings. At most as many run at once as the engine runs sequences, so that a long list
/// does not fill the queue.
async fn embed(
    app: &SharedApp,
    serving: &Arc<Serving>,
    mut params: EmbeddingParams,
    adapters: LeasedAdapters,
    model: String,
    arrived: Instant,
) -> Result<Response> {
    let prompts = encode(serving, std::mem::take(&mut params.inputs), params.truncation).await?;
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let id = format!("embd-{}", uuid::Uuid::new_v4().simple());
    let source = EmbeddingSource { app, serving, id: &id, adapters: &adapters, params: &params, arrived };
    let vectors = stream::iter(prompts).map(|prompt| source.pooled(prompt)).buffered(serving.limits().max_running);
    let objects = vectors.enumerate().map(|(index, vector): (usize, Result<Vec<f32>>)| {
        let mut vector = vector?;
        if params.normalize {
            scale_to_unit(&mut vector);
        }
        let embedding = if params.base64 { EncodedVector::base64(&vector) } else { EncodedVector::Float(vector) };
        Ok::<_, Error>(EmbeddingObject { object: "embedding", index, embedding })
    });
    let data = objects.try_collect().await?;
    let list = EmbeddingList {
        id: id.clone(),
        object: "list",
        created: unix_seconds(SystemTime::now()),
        model,
        adapter: adapters.adapter.clone(),
        adapter_generation: adapters.generation.clone(),
        data,
        usage: EmbeddingUsage { prompt_tokens, total_tokens: prompt_tokens },
    };
    Ok(Json(list).into_response())
}

/// Tokenizes on a blocking thread. Errors: an input without tokens, or with more than the context length.
async fn encode(serving: &Serving, inputs: Vec<PromptInput>, truncation: Option<Truncation>) -> Result<Vec<Vec<u32>>> {
    let (codec, limit) = (serving.codec.clone(), serving.limits().max_model_len);
    let several = inputs.len() > 1;
    let path = move |index: usize| if several { format!("input[{index}]") } else { "input".to_owned() };
    let work = move || {
        let encode = |(index, input): (usize, PromptInput)| {
            let (ids, _) = input.encode(&codec, truncation).map_err(|error| match error.param.as_deref() {
                Some("prompt") => error.param(path(index)),
                _ => error,
            })?;
            match ids.len() > limit {
                true => Err(context_length_exceeded(limit, ids.len(), None, &path(index))),
                false => Ok(ids),
            }
        };
        inputs.into_iter().enumerate().map(encode).collect()
    };
    blocking(work).await
}

/// What all sequences of a request have in common.
struct EmbeddingSource<'a> {
    app: &'a SharedApp,
    serving: &'a Serving,
    id: &'a str,
    adapters: &'a LeasedAdapters,
    params: &'a EmbeddingParams,
    arrived: Instant,
}

impl EmbeddingSource<'_> {
    /// The pooled hidden states of one prompt `[hidden]`.
    async fn pooled(&self, prompt: Vec<u32>) -> Result<Vec<f32>> {
        let (events, mut receiver) = mpsc::unbounded_channel();
        let tokens = prompt.len();
        let pooling = Some(self.params.pooling);
        let params = SamplingParams { max_tokens: 0, pooling, ..SamplingParams::default() };
        self.serving.engine.submit(Request {
            adapters: self.adapters.terms.clone(),
            arrived: self.arrived,
            priority: self.params.priority,
            cache_salt: self.params.cache_salt.clone(),
            ..Request::new(self.id, prompt, params, events)
        })?;
        let (model, adapter) = (self.serving.base.name(), &self.adapters.label);
        let mut metrics = self.app.metrics.track(model, adapter, tokens, self.arrived);
        let mut pooled = None;
        loop {
            let stopped = || Event::Failed(Error::internal("the engine stopped"));
            match receiver.recv().await.unwrap_or_else(stopped) {
                Event::Scheduled { .. } => metrics.scheduled(),
                Event::Pooled(vector) => pooled = Some(vector),
                Event::Prompt(_) | Event::Token { .. } => {}
                Event::Finished { .. } => {
                    metrics.finish(FinishReason::Stop);
                    // The channel closes once the sequence has left the engine, so the next input finds its place free.
                    while receiver.recv().await.is_some() {}
                    return pooled.ok_or_else(|| Error::internal("the engine gave no pooled hidden states"));
                }
                Event::Failed(error) => {
                    metrics.fail(error.kind);
                    return Err(error);
                }
            }
        }
    }
}

/// Divides a vector by its length. A vector of zeros stays as it is.
fn scale_to_unit(vector: &mut [f32]) {
    let length = vector.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
}

impl EncodedVector {
    /// OpenAI's `base64`: little-endian f32.
    fn base64(vector: &[f32]) -> Self {
        let bytes: Vec<u8> = vector.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self::Base64(STANDARD.encode(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_vector_has_length_one_and_zeros_stay() {
        let mut vector = [3.0, -4.0];
        scale_to_unit(&mut vector);
        assert_eq!(vector, [0.6, -0.8]);
        let mut zeros = [0.0; 2];
        scale_to_unit(&mut zeros);
        assert_eq!(zeros, [0.0; 2]);
    }

    #[test]
    fn encodings() {
        let text = |vector| serde_json::to_string(&vector).expect("a vector is valid JSON");
        assert_eq!(text(EncodedVector::Float(vec![0.1, -2.0])), "[0.1,-2.0]");
        assert_eq!(text(EncodedVector::base64(&[1.0, -2.0])), "\"AACAPwAAAMA=\"");
    }
}
