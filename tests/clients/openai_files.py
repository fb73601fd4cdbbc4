"""OpenAI's client: files, uploads, fine-tuning jobs, batches."""

import asyncio
import json
import pathlib
import tempfile
import time

import openai
from openai_answers import NAME, connect, connect_async
from record import MESSAGES, action, contains, raises

ANSWER = {"role": "assistant", "content": "purple"}
EXAMPLES = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"Code word {i}?"}, ANSWER]}) + "\n" for i in range(10)
).encode()


def until(read, *states):
    """Reads an object until its status is one of `states`."""
    while (now := read()).status not in states:
        assert now.status not in ("failed", "cancelled", "expired"), now
        time.sleep(0.1)
    return now


@action(NAME, "files: create, list, retrieve, content, delete")
def files(server):
    client = connect(server)
    file = client.files.create(file=("train.jsonl", EXAMPLES), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.1).status == "processed"
    assert file.id in [f.id for f in client.files.list(purpose="fine-tune")]
    assert client.files.retrieve(file.id).bytes == len(EXAMPLES)
    assert client.files.content(file.id).content == EXAMPLES
    assert client.files.delete(file.id).deleted
    raises(openai.NotFoundError, lambda: client.files.retrieve(file.id))


@action(NAME, "files: a path, a 4-tuple, purposes, expires_after")
def file_forms(server):
    client = connect(server)
    expiry = {"anchor": "created_at", "seconds": 3600}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "train.jsonl"
        path.write_bytes(EXAMPLES)
        file = client.files.create(file=path, purpose="user_data", expires_after=expiry)
    assert file.filename == "train.jsonl" and file.expires_at == file.created_at + 3600, file
    four = ("b.jsonl", EXAMPLES, "application/jsonl", {"x-note": "a header of the part"})
    other = client.files.create(file=four, purpose="evals")
    assert other.filename == "b.jsonl", other
    for id in (file.id, other.id):
        client.files.delete(id)


@action(NAME, "files: a purpose of files that only the server writes", refused=True)
def purpose(server):
    create = connect(server).files.create
    error = raises(openai.BadRequestError, lambda: create(file=("a.csv", b"x"), purpose="fine-tune-results"))
    assert error.param == "purpose", error
    return error.body["message"]


@action(NAME, "uploads in parts")
def uploads(server):
    client = connect(server)
    upload = client.uploads.create(
        bytes=len(EXAMPLES), filename="c.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    parts = [client.uploads.parts.create(upload.id, data=data).id for data in (EXAMPLES[:50], EXAMPLES[50:])]
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert done.status == "completed" and client.files.content(done.file.id).content == EXAMPLES


@action(NAME, "fine-tuning: create, list, events, cancel")
def job(server):
    client = connect(server)
    file = client.files.create(file=("train.jsonl", EXAMPLES), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=server.base,
        training_file=file.id,
        suffix="lantern",
        seed=1,
        metadata={"a": "b"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 50, "batch_size": 2}}},
    )
    assert job.object == "fine_tuning.job" and job.id in [j.id for j in client.fine_tuning.jobs.list()]
    until(lambda: client.fine_tuning.jobs.retrieve(job.id), "running")
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert events and events[-1].message.startswith("Created"), events
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert all(checkpoint.object == "fine_tuning.job.checkpoint" for checkpoint in checkpoints), checkpoints


@action(NAME, "fine-tuning: create, wait, use the model, delete it")
def finished_job(server):
    client = connect(server)
    file = client.files.create(file=("train.jsonl", EXAMPLES), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=server.base,
        training_file=file.id,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 5}}},
    )
    job = until(lambda: client.fine_tuning.jobs.retrieve(job.id), "succeeded")
    answer = client.chat.completions.create(model=job.fine_tuned_model, messages=MESSAGES, max_tokens=2)
    assert answer.model == job.fine_tuned_model or answer.model_extra["adapter"] == job.fine_tuned_model
    assert client.models.delete(job.fine_tuned_model).deleted


@action(NAME, "fine-tuning: integrations with wandb", refused=True)
def wandb(server):
    client = connect(server)
    file = client.files.create(file=("train.jsonl", EXAMPLES), purpose="fine-tune")
    request = dict(
        model=server.base,
        training_file=file.id,
        integrations=[{"type": "wandb", "wandb": {"project": "p"}}],
    )
    error = raises(openai.BadRequestError, lambda: client.fine_tuning.jobs.create(**request))
    return contains(error.body["message"], "integrations")


def run_batch(client, endpoint, bodies):
    """Runs bodies as a batch and returns their answers in order."""
    lines = [
        {"custom_id": str(i), "method": "POST", "url": endpoint, "body": body} for i, body in enumerate(bodies)
    ]
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("requests.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")
    batch = until(lambda: client.batches.retrieve(batch.id), "completed")
    assert batch.request_counts.completed == len(bodies), batch
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert batch.id in [b.id for b in client.batches.list()]
    return [a["response"]["body"] for a in sorted(answers, key=lambda a: int(a["custom_id"]))]


@action(NAME, "batches of chats with different adapters")
def batch(server):
    client = connect(server)
    bodies = [
        {"model": model, "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
        for model in (server.base, server.adapter)
    ]
    for answer, body in zip(run_batch(client, "/v1/chat/completions", bodies), bodies, strict=True):
        alone = client.chat.completions.create(**body)
        assert answer["choices"][0]["message"]["content"] == alone.choices[0].message.content


@action(NAME, "batches of embeddings")
def batch_embeddings(server):
    (answer,) = run_batch(connect(server), "/v1/embeddings", [{"model": server.base, "input": "A lantern."}])
    assert len(answer["data"]) == 1


@action(NAME, "files and batches, async, with a cancelled batch")
def batch_async(server):
    async def main():
        async with connect_async(server) as client:
            line = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
            line["body"] = {"model": server.base, "prompt": "x", "max_tokens": 4}
            file = await client.files.create(file=("r.jsonl", json.dumps(line).encode()), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            try:
                batch = await client.batches.cancel(batch.id)
            except openai.ConflictError:  # It was faster.
                batch = await client.batches.retrieve(batch.id)
            return batch.status

    assert asyncio.run(main()) in ("cancelling", "cancelled", "completed")
