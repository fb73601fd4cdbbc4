"""lm-eval against the server, compared with what transformers and PEFT answer (tests/fixtures/smollm2-peft)."""

import json
import os
import pathlib
import tempfile
import urllib.request

# Tasks and tokenizers are local.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from record import action

NAME = "lm_eval"
EXPECTED = pathlib.Path(__file__).parents[1] / "fixtures/smollm2-peft/expected.json"
TAIL = 12
"""How many tokens of each prompt are the continuation that is scored."""


def detokenize(server, ids):
    body = json.dumps({"tokens": ids}).encode()
    request = urllib.request.Request(server.url + "/detokenize", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["prompt"]


def evaluate(server, kind, adapter, route, output_type, docs, **fields):
    """Runs a task over `docs` with fields `context` and `target`, and returns the model's answers."""
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder) / "docs.jsonl"
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        task = {
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "output_type": output_type,
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{target}}",
            "target_delimiter": "",
            **fields,
        }
        model = {
            "model": adapter,
            "base_url": server.v1 + route,
            "tokenizer_backend": "remote" if kind == "local-completions" else None,
            "tokenized_requests": kind == "local-completions",
            "num_concurrent": 1,
            "max_retries": 1,
        }
        results = lm_eval.simple_evaluate(
            model=kind,
            model_args=model,
            tasks=[task],
            apply_chat_template=kind == "local-chat-completions",
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def expected(server):
    return list(json.loads(EXPECTED.read_text())[server.adapter].values())


@action(NAME, "local-completions: loglikelihood, as transformers and PEFT have it")
def loglikelihood(server):
    prompts = expected(server)
    docs = [
        {"context": detokenize(server, p["prompt_ids"][:-TAIL]), "target": detokenize(server, p["prompt_ids"][-TAIL:])}
        for p in prompts
    ]
    metrics = {"metric_list": [{"metric": "acc"}]}
    answers = evaluate(server, "local-completions", server.adapter, "/completions", "loglikelihood", docs, **metrics)
    worst = 0
    for (score, _greedy), prompt in zip(answers, prompts, strict=True):
        want = sum(prompt["token_logprobs"][-TAIL:])
        worst = max(worst, abs(score - want) / TAIL)
        assert worst < 0.005, f"{score} instead of {want}"
    return f"differs by at most {worst:.4f} per token"


UNTIL = {
    "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 24, "temperature": 0, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def check_text(answers, prompts):
    """Equal text, up to a near tie that another order of additions decides: of the first words none may differ."""
    for answer, prompt in zip(answers, prompts, strict=True):
        want = prompt["greedy_text"].strip().split()
        assert answer.strip().split()[:5] == want[:5], f"{answer!r} instead of {prompt['greedy_text']!r}"


@action(NAME, "local-completions: generate_until, as transformers and PEFT have it")
def generate_until(server):
    prompts = expected(server)
    docs = [{"context": detokenize(server, p["prompt_ids"]), "target": "x"} for p in prompts]
    check_text(
        evaluate(server, "local-completions", server.adapter, "/completions", "generate_until", docs, **UNTIL), prompts
    )


@action(NAME, "local-chat-completions: generate_until, as transformers and PEFT have it")
def chat_generate_until(server):
    prompts = expected(server)
    docs = [{"context": prompt["user"], "target": "x"} for prompt in prompts]
    route = "/chat/completions"
    check_text(
        evaluate(server, "local-chat-completions", server.adapter, route, "generate_until", docs, **UNTIL), prompts
    )
