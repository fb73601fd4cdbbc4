#!/usr/bin/env python3
"""Two servers of one model, such as a GPU and a CPU, answer alike: python3 benches/agreement.py URL URL ADAPTER

Compares embeddings by their cosine and log-probabilities of chosen ids, and checks that required tool calls of the first server match
their schema. Standard library only.
"""
import json
import sys
import urllib.error
import urllib.request

FIRST, SECOND, ADAPTER = sys.argv[1].rstrip("/"), sys.argv[2].rstrip("/"), sys.argv[3]
TEXTS = ["A lantern gives light.", "Rust is a language.", "x", "The quick brown fox jumps over the lazy dog. " * 20]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
          "required": ["city", "unit"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def call(url, path, **body):
    data = json.dumps({name: value for name, value in body.items() if value is not None}).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, data, {"content-type": "application/json"})) as reply:
        return json.load(reply)


def vectors(url, adapter, pooling):
    reply = call(url, "/v1/embeddings", input=TEXTS, adapter=adapter, pooling=pooling)
    return [entry["embedding"] for entry in reply["data"]]


def is_right(seed):
    messages = [{"role": "user", "content": f"Weather in Rome {seed}?"}]
    adapter = ADAPTER if seed % 2 else None
    reply = call(FIRST, "/v1/chat/completions", messages=messages, tools=TOOLS, tool_choice="required", adapter=adapter,
                 parallel_tool_calls=False, seed=seed, max_tokens=200)
    arguments = json.loads(reply["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"])
    return set(arguments) == {"city", "unit"} and arguments["unit"] in ("c", "f") and len(arguments["city"]) <= 12


for adapter in (None, ADAPTER):
    for pooling in ("last", "mean"):
        pairs = zip(vectors(FIRST, adapter, pooling), vectors(SECOND, adapter, pooling))
        cosines = [round(sum(a * b for a, b in zip(x, y)), 5) for x, y in pairs]
        print(f"embeddings, adapter {adapter}, {pooling}: cosines {cosines}")
print("required calls:", sum(is_right(seed) for seed in range(20)), "of 20 match the schema")
for url in (FIRST, SECOND):
    reply = call(url, "/v1/completions", prompt="One two", max_tokens=1, temperature=0, logprobs=3, logprob_token_ids=[0, 5, 100])
    print("chosen ids:", reply["choices"][0]["logprobs"]["top_logprobs"])
