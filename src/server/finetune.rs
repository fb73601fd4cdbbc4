//! `/v1/fine_tuning`: OpenAI's API of jobs, with two more objects of settings: `lora` and `training`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use super::error_response::ErrorResponse;
use super::extract::{JsonBody, PathParam, QueryParams};
use super::{Serving, SharedApp};
use crate::error::{AtPath, Error, ErrorKind, Result};
use crate::fields::{self, Fields};
use crate::finetune::jobs::JobAction;
use crate::finetune::record::{FINE_TUNE, JobRecord, JobStatus, new_id, now};
use crate::finetune::settings;
use crate::finetune::store::{ObjectKind, PageQuery};

/// Fields of a new job, in addition to those of [`settings`].
const FIELDS: [&str; 7] =
    ["model", "training_file", "validation_file", "suffix", "metadata", "integrations", "dry_run"];

/// Limits on `metadata`, as in OpenAI's API: pairs, and characters of a key and of a value.
const MAX_METADATA_PAIRS: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;

/// Limit on the characters of a suffix.
const MAX_SUFFIX: usize = 64;

/// Limit on the objects of a page.
const MAX_PAGE: usize = 100;

/// Examples that a dry run shows.
const SHOWN: usize = 3;

/// `POST /v1/fine_tuning/jobs`. With `dry_run`, describes the job and creates nothing.
pub(super) async fn create(
    State(app): State<SharedApp>,
    JsonBody(body): JsonBody,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let (record, dry_run) = read(serving, &body)?;
    let files =
        [(Some(record.training_file.clone()), "training_file"), (record.validation_file.clone(), "validation_file")];
    serving
        .jobs
        .store()
        .run(move |store| {
            for (id, param) in files.iter().filter_map(|(id, param)| Some((id.as_ref()?, *param))) {
                store.file_for(id, param, FINE_TUNE)?;
            }
            Ok(())
        })
        .await?;
    if dry_run {
        return Ok(Json(preview(serving, record).await?));
    }
    Ok(Json(object(&serving.jobs.create(record).await?)))
}

/// Reads a job from a request, and whether it is a dry run.
fn read(serving: &Serving, body: &Value) -> Result<(JobRecord, bool)> {
    let fields = Fields::of_body(body)?;
    let known: Vec<&str> = FIELDS.iter().chain(&settings::FIELDS).copied().collect();
    fields::check_only(&fields, &known)?;
    let mut chosen: Map<String, Value> =
        settings::FIELDS.iter().filter_map(|name| Some(((*name).to_owned(), fields.get(name)?.clone()))).collect();
    let model = fields.required("model", fields.string("model")?, "the base to fine-tune")?;
    if !serving.base.names.iter().any(|name| name == model) {
        continue_from(serving, model, &mut chosen)?;
    }
    if fields.array("integrations")?.is_some_and(|list| !list.is_empty()) {
        let message = "`integrations` are not supported: this server sends no data to other services";
        return Err(Error::invalid(message).param("integrations").code("unsupported_parameter"));
    }
    let chosen = Value::Object(chosen);
    let spec = settings::spec(&Fields::of_body(&chosen)?, serving.limits().max_model_len, None)?;
    let file = fields.required("training_file", fields.string("training_file")?, "the id of an uploaded file")?;
    let record = JobRecord {
        id: new_id("ftjob-"),
        created_at: now(),
        finished_at: None,
        status: JobStatus::ValidatingFiles,
        base: serving.base.name().to_owned(),
        training_file: file.to_owned(),
        validation_file: fields.string("validation_file")?.map(str::to_owned),
        suffix: suffix(&fields)?,
        metadata: metadata(&fields)?,
        settings: chosen,
        seed: spec.seed,
        spec: None,
        steps: 0,
        done: 0,
        trained_tokens: 0,
        estimated_finish: None,
        fine_tuned_model: None,
        result_files: Vec::new(),
        error: None,
    };
    Ok((record, fields.boolean("dry_run")?.unwrap_or(false)))
}

/// Makes `model`, an adapter, the checkpoint that training continues from.
fn continue_from(serving: &Serving, model: &str, settings: &mut Map<String, Value>) -> Result<()> {
    serving.registry.get(model).map_err(|_| {
        Error::not_found(format!(
            "The model `{model}` does not exist: give the base, or a fine-tuned model to continue from"
        ))
        .param("model")
        .code("model_not_found")
    })?;
    let training = settings.entry("training").or_insert_with(|| json!({}));
    match training.as_object_mut() {
        Some(training) if training.get("from_checkpoint").is_none_or(|from| from == model) => {
            training.insert("from_checkpoint".into(), model.into());
            Ok(())
        }
        // `settings` reports that it is not an object.
        None => Ok(()),
        Some(_) => Err(Error::invalid(
            "`model` and `training.from_checkpoint` name two adapters to continue from: give one of them",
        )
        .param("training.from_checkpoint")),
    }
}

fn suffix(fields: &Fields) -> Result<Option<String>> {
    let Some(suffix) = fields.string("suffix")? else { return Ok(None) };
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if (1..=MAX_SUFFIX).contains(&suffix.len()) && suffix.chars().all(fits) {
        return Ok(Some(suffix.to_owned()));
    }
    let allowed = format!("1 to {MAX_SUFFIX} characters of A-Z a-z 0-9 . _ -");
    Err(fields::wrong("suffix", &allowed, &suffix.into()))
}

/// Reads `metadata`: key-value pairs of the client.
pub(super) fn metadata(fields: &Fields) -> Result<Map<String, Value>> {
    let Some(metadata) = fields.object("metadata")? else { return Ok(Map::new()) };
    let mut map = Map::new();
    for name in metadata.names() {
        let value = metadata.string(name)?.unwrap_or_default();
        let too_long = name.chars().count() > MAX_METADATA_KEY || value.chars().count() > MAX_METADATA_VALUE;
        if too_long || map.len() == MAX_METADATA_PAIRS {
            let message = format!(
                "`metadata` may have up to {MAX_METADATA_PAIRS} pairs, with keys of up to {MAX_METADATA_KEY} and values of up \
                 to {MAX_METADATA_VALUE} characters"
            );
            return Err(Error::invalid(message).param("metadata").code("invalid_value"));
        }
        map.insert(name.to_owned(), value.into());
    }
    Ok(map)
}

/// The answer to a dry run: settings, statistics, examples and an estimate of the time.
async fn preview(serving: &Arc<Serving>, record: JobRecord) -> Result<Value> {
    let context = serving.jobs.context().clone();
    let speed = serving.jobs.gauges().iter().rev().find_map(|gauge| gauge.tokens_per_second);
    serving
        .jobs
        .store()
        .run(move |_| {
            let prepared = context.read(&record)?;
            let (hyperparameters, lora, training) = settings::describe(&prepared.spec);
            let data = &prepared.train;
            Ok(json!({
                "object": "fine_tuning.dry_run",
                "model": record.base,
                "hyperparameters": hyperparameters,
                "lora": lora,
                "training": training,
                "statistics": data.statistics,
                "validation_statistics": prepared.valid.as_ref().map(|valid| &valid.statistics),
                "notes": prepared.remarks(),
                "examples": data.preview(SHOWN, &context.runtime.codec)?,
                "estimate": data.estimate(&prepared.spec, speed),
            }))
        })
        .await
}

/// A job in the form of OpenAI's API, with its settings.
fn object(record: &JobRecord) -> Value {
    let auto = || json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
    let (hyperparameters, lora, training) = match &record.spec {
        Some(spec) => settings::describe(spec),
        None => (auto(), record.settings["lora"].clone(), record.settings["training"].clone()),
    };
    json!({
        "id": record.id,
        "object": "fine_tuning.job",
        "model": record.base,
        "created_at": record.created_at,
        "finished_at": record.finished_at,
        "fine_tuned_model": record.fine_tuned_model,
        "organization_id": "quiver",
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "result_files": record.result_files,
        "status": record.status,
        "trained_tokens": (record.trained_tokens > 0).then_some(record.trained_tokens),
        "training_file": record.training_file,
        "validation_file": record.validation_file,
        "error": record.error,
        "seed": record.seed,
        "estimated_finish": record.estimated_finish,
        "integrations": [],
        "metadata": record.metadata,
        "user_provided_suffix": record.suffix,
        "lora": lora,
        "training": training,
    })
}

/// `GET /v1/fine_tuning/jobs`, newest first. `metadata[key]=value` filters by metadata.
pub(super) async fn list(State(app): State<SharedApp>, query: QueryParams) -> Result<Json<Value>, ErrorResponse> {
    let page = query.page(20, MAX_PAGE)?;
    let wanted: Vec<(String, String)> = query
        .iter()
        .filter_map(|(name, value)| {
            Some((name.strip_prefix("metadata[")?.strip_suffix(']')?.to_owned(), value.to_owned()))
        })
        .collect();
    let keep =
        move |record: &JobRecord| wanted.iter().all(|(key, value)| record.metadata.get(key) == Some(&json!(value)));
    let store = app.serving()?.jobs.store();
    let (jobs, more) = store.run(move |store| store.page(ObjectKind::Job, "", &page, keep)).await?;
    Ok(Json(list_object(jobs.iter().map(object).collect(), more)))
}

/// `GET /v1/fine_tuning/jobs/{id}`.
pub(super) async fn get(State(app): State<SharedApp>, PathParam(id): PathParam) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&job(app.serving()?, id).await?)))
}

/// `POST /v1/fine_tuning/jobs/{id}/cancel`.
pub(super) async fn cancel(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.jobs.change(&id, JobAction::Cancel).await?)))
}

/// `POST /v1/fine_tuning/jobs/{id}/pause`.
pub(super) async fn pause(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.jobs.change(&id, JobAction::Pause).await?)))
}

/// `POST /v1/fine_tuning/jobs/{id}/resume`.
pub(super) async fn resume(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    Ok(Json(object(&app.serving()?.jobs.change(&id, JobAction::Resume).await?)))
}

/// `GET /v1/fine_tuning/jobs/{id}/events`, newest first.
pub(super) async fn events(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    query: QueryParams,
) -> Result<Json<Value>, ErrorResponse> {
    of_job(app.serving()?, id, ObjectKind::Event, query.page(20, MAX_PAGE)?).await
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`, newest first.
pub(super) async fn checkpoints(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
    query: QueryParams,
) -> Result<Json<Value>, ErrorResponse> {
    of_job(app.serving()?, id, ObjectKind::Checkpoint, query.page(10, MAX_PAGE)?).await
}

/// `GET /v1/fine_tuning/checkpoints/{id}/permissions`: an empty list. Errors: there is no such checkpoint.
pub(super) async fn permissions(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    if serving.registry.get(&id).is_err() {
        let message = format!("there is no checkpoint {id:?}");
        return Err(Error::not_found(message).param("fine_tuned_model_checkpoint").into());
    }
    Ok(Json(list_object(Vec::new(), false)))
}

/// `POST` and `DELETE` of permissions, which this server does not have.
pub(super) async fn refuse_permission() -> ErrorResponse {
    let message =
        "permissions of checkpoints are not supported: this server has no projects, and every key may use every model";
    Error::invalid(message).code("unsupported_route").into()
}

async fn of_job(
    serving: &Serving,
    id: String,
    kind: ObjectKind,
    page: PageQuery,
) -> Result<Json<Value>, ErrorResponse> {
    let read = move |store: &crate::finetune::store::Store| {
        let _: JobRecord = store.get(ObjectKind::Job, &id, "fine_tuning_job_id")?;
        store.page::<Value>(kind, &id, &page, |_| true)
    };
    let (objects, more) = serving.jobs.store().run(read).await?;
    Ok(Json(list_object(objects, more)))
}

async fn job(serving: &Serving, id: String) -> Result<JobRecord> {
    serving.jobs.store().run(move |store| store.get(ObjectKind::Job, &id, "fine_tuning_job_id")).await
}

/// A page of a list, in the form of OpenAI's API.
pub(super) fn list_object(data: Vec<Value>, more: bool) -> Value {
    let id = |object: Option<&Value>| object.map_or(Value::Null, |object| object["id"].clone());
    json!({"object": "list", "first_id": id(data.first()), "last_id": id(data.last()), "data": data, "has_more": more})
}

/// `DELETE /v1/models/{id}`: unloads a model that was fine-tuned here and deletes it from the disk.
pub(super) async fn delete_model(
    State(app): State<SharedApp>,
    PathParam(id): PathParam,
) -> Result<Json<Value>, ErrorResponse> {
    let serving = app.serving()?;
    let forbidden =
        |message: String| Error::new(ErrorKind::Forbidden, message).param("model").code("model_not_deletable");
    if serving.base.names.contains(&id) {
        return Err(forbidden(format!("`{id}` is the base model, which cannot be deleted")).into());
    }
    let info = serving.registry.get(&id).map_err(|_| super::info::no_model(&id))?;
    if !info.source.starts_with(serving.jobs.store().jobs_dir()) {
        let message =
            format!("`{id}` was not fine-tuned here: an operator can unload it with DELETE /admin/adapters/{id}");
        return Err(forbidden(message).into());
    }
    serving.registry.unload(&id)?;
    // The final model and its last checkpoint are two names of one directory.
    if !serving.registry.list().iter().any(|other| other.source == info.source) {
        serving.jobs.store().run(move |_| std::fs::remove_dir_all(&info.source).at(&info.source)).await?;
    }
    Ok(Json(json!({"id": id, "object": "model", "deleted": true})))
}
