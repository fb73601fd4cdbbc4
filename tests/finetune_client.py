"""The real `openai` client against a running server: python finetune_client.py URL TRAINING_FILE

From a file to a model that answers, and every other route of the fine-tuning API.
"""

import base64
import csv
import hashlib
import io
import json
import pathlib
import sys
import time

import openai

URL, FILE = sys.argv[1] + "/v1", sys.argv[2]
client = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0, timeout=120)
jobs = client.fine_tuning.jobs
base = client.models.list().data[0].id


def wait(job, *status):
    for _ in range(1200):
        job = jobs.retrieve(job.id)
        if job.status in status:
            return job
        assert job.status not in ("failed", "cancelled"), job
        time.sleep(0.1)
    raise AssertionError(f"{job} does not become {status}")


def failed(file):
    """The error of a job over a file that cannot be trained on."""
    job = jobs.create(model=base, training_file=file.id)
    while (job := jobs.retrieve(job.id)).status != "failed":
        assert job.status == "validating_files", job
        time.sleep(0.05)
    return job.error


def fails(kind, call, **request):
    try:
        call(**request)
    except kind as error:
        return error
    raise AssertionError(f"{request} was accepted")


with open(FILE, "rb") as content:
    file = client.files.create(file=content, purpose="fine-tune")
assert client.files.wait_for_processing(file.id).status == "processed"
assert [f.id for f in client.files.list(purpose="fine-tune")] == [file.id]
with open(FILE, "rb") as content:
    assert client.files.content(file.id).content == content.read()
path = pathlib.Path(FILE)
expiring = client.files.create(
    file=path, purpose="user_data", expires_after={"anchor": "created_at", "seconds": 3600}
)
assert expiring.expires_at == expiring.created_at + 3600 and expiring.filename == path.name, expiring
four = ("b.jsonl", path.read_bytes(), "application/jsonl", {"x-note": "a header of the part"})
assert client.files.create(file=four, purpose="evals").filename == "b.jsonl"
assert [f.id for f in client.files.list(purpose="user_data")] == [expiring.id]
error = fails(openai.BadRequestError, client.files.create, file=path, purpose="fine-tune-results")
assert error.param == "purpose", error
bad = client.files.create(file=("a.jsonl", b'{"prompt": 1}\n'), purpose="fine-tune")
assert client.files.wait_for_processing(bad.id).status == "error" and "line 1" in bad.status_details, bad
print("ok files")

whole = path.read_bytes()
upload = client.uploads.create(bytes=len(whole), filename="c.jsonl", mime_type="text/jsonl", purpose="fine-tune")
parts = [client.uploads.parts.create(upload.id, data=data).id for data in (whole[:50], whole[50:])]
error = fails(openai.BadRequestError, client.uploads.complete, upload_id=upload.id, part_ids=parts[:1])
assert error.param == "part_ids", error
done = client.uploads.complete(upload.id, part_ids=parts, md5=hashlib.md5(whole).hexdigest())
assert done.status == "completed" and client.files.content(done.file.id).content == whole, done
chunked = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="batch", part_size=64)
assert client.files.content(chunked.file.id).content == whole, chunked
begun = client.uploads.create(bytes=10, filename="d", mime_type="text/plain", purpose="user_data")
assert client.uploads.cancel(begun.id).status == "cancelled"
print("ok uploads")

job = jobs.create(
    model=base,
    training_file=file.id,
    validation_file=file.id,
    suffix="capitals",
    seed=1,
    metadata={"who": "test"},
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3, "batch_size": 4}}},
    extra_body={"lora": {"r": 8}, "training": {"lr": 2e-3, "checkpoint_every": 3}},
)
assert job.object == "fine_tuning.job" and job.fine_tuned_model is None, job
assert [j.id for j in jobs.list(extra_query={"metadata[who]": "test"})] == [job.id]
job = wait(job, "succeeded")
assert job.fine_tuned_model.startswith(f"ft:{base}:quiver:capitals:"), job
assert job.trained_tokens > 0 and job.finished_at >= job.created_at and job.error is None, job
assert job.method.supervised.hyperparameters.batch_size == 4 and job.model_extra["lora"]["r"] == 8, job
events = list(jobs.list_events(job.id, limit=5))
assert events[0].message == "The job has successfully completed" and "Created" in events[-1].message
losses = [e.data["train_loss"] for e in reversed(events) if e.type == "metrics" and "train_loss" in e.data]
assert len(losses) > 4 and losses[-1] < losses[0], losses
checkpoints = list(jobs.checkpoints.list(job.id))
assert len(checkpoints) > 1 and checkpoints[0].step_number == len(losses), checkpoints
assert checkpoints[0].metrics.full_valid_loss < checkpoints[-1].metrics.full_valid_loss, checkpoints
table = base64.b64decode(client.files.content(job.result_files[0]).read()).decode()
rows = list(csv.DictReader(io.StringIO(table)))
assert list(rows[0])[:5] == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"], rows[0]
assert [int(row["step"]) for row in rows] == list(range(1, len(losses) + 1)), rows
raw = client.files.with_raw_response.content(job.result_files[0], extra_query={"format": "csv"})
assert raw.text == table
permissions = client.fine_tuning.checkpoints.permissions
assert list(permissions.list(checkpoints[0].fine_tuned_model_checkpoint)) == []
error = fails(openai.BadRequestError, permissions.create, fine_tuned_model_checkpoint="a", project_ids=["p"])
assert "permissions" in error.message, error
error = failed(bad)
assert error.code == "invalid_training_file" and error.param == "training_file" and "line 1" in error.message, error
print("ok job", [round(loss, 3) for loss in losses])

prompt = "Q: What is the code word?\nA:"
ask = lambda model: client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
assert ask(job.fine_tuned_model) != ask(base), "what was learnt shows"
assert ask(checkpoints[0].fine_tuned_model_checkpoint) == ask(job.fine_tuned_model)
assert job.fine_tuned_model in [m.id for m in client.models.list()]
print("ok model", repr(ask(job.fine_tuned_model)))

lines = [
    {
        "custom_id": f"r{i}",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0},
    }
    for i, model in enumerate([base, job.fine_tuned_model, "none"])
]
content = "".join(json.dumps(line) + "\n" for line in lines).encode()
requests = client.files.create(file=("requests.jsonl", content), purpose="batch")
batch = client.batches.create(
    input_file_id=requests.id,
    endpoint="/v1/completions",
    completion_window="24h",
    metadata={"who": "test"},
    output_expires_after={"anchor": "created_at", "seconds": 3600},
)
while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
    time.sleep(0.1)
assert batch.status == "completed" and batch.request_counts.completed == 2 and batch.request_counts.failed == 1, batch
answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
texts = {answer["custom_id"]: answer["response"]["body"]["choices"][0]["text"] for answer in answers}
assert texts == {"r0": ask(base), "r1": ask(job.fine_tuned_model)}, texts
refused = json.loads(client.files.content(batch.error_file_id).text)
assert refused["custom_id"] == "r2" and refused["response"]["status_code"] == 404, refused
assert [b.id for b in client.batches.list(limit=1)] == [batch.id]
fails(openai.BadRequestError, client.batches.cancel, batch_id=batch.id)
print("ok batches")

long = jobs.create(model=base, training_file=file.id, extra_body={"training": {"max_steps": 5000}})
wait(long, "running")
assert jobs.pause(long.id).status == "paused"
assert jobs.resume(long.id).status == "queued"
wait(long, "running")
assert jobs.cancel(long.id).status == "cancelled"
fails(openai.BadRequestError, jobs.cancel, fine_tuning_job_id=long.id)
error = fails(openai.BadRequestError, jobs.create, model=base, training_file="file-none")
assert error.param == "training_file", error
error = fails(openai.BadRequestError, jobs.create, model=base, training_file=file.id, extra_body={"lora": {"rank": 1}})
assert error.param == "lora.rank", error
fails(openai.NotFoundError, jobs.retrieve, fine_tuning_job_id="ftjob-none")
print("ok pause, resume, cancel, errors")

assert client.models.delete(job.fine_tuned_model).deleted
fails(openai.NotFoundError, client.models.retrieve, model=job.fine_tuned_model)
assert client.files.delete(file.id).deleted
print("ok delete")
