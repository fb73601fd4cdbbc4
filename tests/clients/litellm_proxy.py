"""LiteLLM's proxy in front of the server, with two names for two adapters."""

import contextlib
import json
import pathlib
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import openai
from record import MESSAGES, TOOL, WEATHER, Lantern, action, check_forecast, raises

NAME = "litellm"
OTHER = "code"
"""The second adapter: one of the project's own."""
KEY = "sk-" + secrets.token_hex(16)
"""The proxy does not start without a key."""


@contextlib.contextmanager
def proxy(server):
    """A client of a running proxy whose models `first` and `second` are adapters."""
    targets = {"first": server.adapter, "second": OTHER}
    config = {
        "model_list": [
            {
                "model_name": name,
                "litellm_params": {"model": f"openai/{adapter}", "api_base": server.v1, "api_key": server.key},
            }
            for name, adapter in targets.items()
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False, "num_retries": 0},
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "config.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML.
        command = [pathlib.Path(sys.executable).with_name("litellm"), "--config", path, "--port", str(port)]
        with (pathlib.Path(folder) / "log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            until_alive(process, url + "/health/liveliness")
            yield openai.OpenAI(base_url=url + "/v1", api_key=KEY, max_retries=0, timeout=60)
        finally:
            process.terminate()
            process.wait(30)


def until_alive(process, url):
    while True:
        assert process.poll() is None, "the proxy ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.5)


@action(NAME, "the proxy over two adapters: chats, streams, schema, tools, embeddings, errors")
def over_two_adapters(server):
    straight = openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60)
    request = dict(messages=MESSAGES, max_tokens=12, temperature=0)
    with proxy(server) as client:
        assert {model.id for model in client.models.list()} >= {"first", "second"}
        for name, adapter in (("first", server.adapter), ("second", OTHER)):
            want = straight.chat.completions.create(model=adapter, **request).choices[0].message.content
            assert client.chat.completions.create(model=name, **request).choices[0].message.content == want
            chunks = client.chat.completions.create(model=name, stream=True, **request)
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == want
        parsed = client.chat.completions.parse(
            model="first", messages=MESSAGES, max_tokens=100, temperature=0, response_format=Lantern
        )
        assert isinstance(parsed.choices[0].message.parsed, Lantern)
        answer = client.chat.completions.create(
            model="first", messages=WEATHER, tools=[TOOL], tool_choice="required", max_tokens=200, temperature=0
        )
        check_forecast(answer.choices[0].message.tool_calls[0].function.arguments)
        assert client.embeddings.create(model="first", input=["A lantern."]).data[0].embedding
        long = [{"role": "user", "content": "x " * 20000}]
        error = raises(openai.BadRequestError, lambda: client.chat.completions.create(model="first", messages=long))
        assert "maximum context length is" in str(error), error
