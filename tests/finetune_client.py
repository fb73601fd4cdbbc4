"""The real `openai` client against a running server: python finetune_client.py URL TRAINING_FILE

From a file to a model that answers, and every other route of the fine-tuning API.
"""

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
error = fails(openai.BadRequestError, client.files.create, file=("a.jsonl", b'{"prompt": 1}\n'), purpose="fine-tune")
assert error.param == "file" and "line 1" in error.message, error
print("ok files")

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
rows = client.files.content(job.result_files[0]).text.splitlines()
assert rows[0].startswith("step,train_loss") and len(rows) == 1 + len(losses), rows
print("ok job", [round(loss, 3) for loss in losses])

prompt = "Q: What is the code word?\nA:"
ask = lambda model: client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0).choices[0].text
assert ask(job.fine_tuned_model) != ask(base), "what was learnt shows"
assert ask(checkpoints[0].fine_tuned_model_checkpoint) == ask(job.fine_tuned_model)
assert job.fine_tuned_model in [m.id for m in client.models.list()]
print("ok model", repr(ask(job.fine_tuned_model)))

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
