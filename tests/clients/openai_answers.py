"""OpenAI's client: models, completions, chats, streams, structured output, embeddings, errors."""

import asyncio
import base64
import json
import struct

import openai
from record import MESSAGES, QUESTION, Lantern, Server, action, contains, raises

NAME = "openai"
STRICT = {
    "name": "lantern",
    "strict": True,
    "schema": {**Lantern.model_json_schema(), "additionalProperties": False},
}


def connect(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60)


def connect_async(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60)


def ask(server: Server, **fields):
    """A short greedy chat."""
    request = {"model": server.adapter, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **fields}
    return connect(server).chat.completions.create(**request)


def refused(server: Server, *words: str, **fields) -> str:
    """The message of the refusal of a chat with `fields`, whose first field is the parameter in question."""
    error = raises(openai.BadRequestError, lambda: ask(server, **fields))
    param = next(iter(fields.get("extra_body") or fields))
    assert error.param and error.param.startswith(param), f"param is {error.param}: {error}"
    return contains(error.body["message"], *words)


@action(NAME, "list and retrieve models")
def models(server):
    client = connect(server)
    ids = [card.id for card in client.models.list()]
    assert server.base in ids and server.adapter in ids, ids
    assert client.models.retrieve(server.adapter).id == server.adapter


@action(NAME, "completion, sync")
def completion(server):
    answer = connect(server).completions.create(model=server.base, prompt="One, two,", max_tokens=6, temperature=0)
    assert answer.object == "text_completion" and answer.choices[0].text and answer.system_fingerprint
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


@action(NAME, "completions of several prompts, with n and seed")
def many_completions(server):
    request = dict(model=server.adapter, prompt=["One", "Two"], n=2, max_tokens=4, seed=7)
    first, second = (connect(server).completions.create(**request) for _ in range(2))
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [c.text for c in first.choices] == [c.text for c in second.choices], "the seed fixes the answer"


@action(NAME, "completion with echo and logprobs, no new tokens")
def echo(server):
    answer = connect(server).completions.create(
        model=server.base, prompt="One two three", max_tokens=0, echo=True, logprobs=2
    )
    scores = answer.choices[0].logprobs
    assert answer.choices[0].text == "One two three" == "".join(scores.tokens)
    assert scores.token_logprobs[0] is None and all(p <= 0 for p in scores.token_logprobs[1:])


@action(NAME, "completion, stream")
def completion_stream(server):
    request = dict(model=server.adapter, prompt="One", max_tokens=8, temperature=0)
    whole = connect(server).completions.create(**request).choices[0].text
    assert "".join(c.choices[0].text for c in connect(server).completions.create(stream=True, **request)) == whole


@action(NAME, "completion with suffix", refused=True)
def suffix(server):
    create = connect(server).completions.create
    error = raises(openai.BadRequestError, lambda: create(model=server.base, prompt="a", suffix="b"))
    assert error.param == "suffix", error
    return error.body["message"]


@action(NAME, "chat, sync")
def chat(server):
    answer = ask(server)
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content and message.refusal is None
    assert answer.choices[0].finish_reason in ("stop", "length") and answer.system_fingerprint
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer._request_id, "the header x-request-id"


@action(NAME, "chat, async, eight at once with different adapters")
def chat_async(server):
    async def main():
        async with connect_async(server) as client:
            request = dict(messages=MESSAGES, max_tokens=12, temperature=0)
            create = client.chat.completions.create
            return await asyncio.gather(*(create(model=m, **request) for m in [server.base, server.adapter] * 4))

    texts = [answer.choices[0].message.content for answer in asyncio.run(main())]
    assert set(texts[::2]) == {texts[0]} and set(texts[1::2]) == {texts[1]} and texts[0] != texts[1], texts


@action(NAME, "chat, stream with usage")
def chat_stream(server):
    whole = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    first = chunks[0].choices[0].delta
    assert first.role == "assistant" and first.content == "", first
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


@action(NAME, "chat, async stream")
def chat_async_stream(server):
    async def main():
        async with connect_async(server) as client:
            stream = await client.chat.completions.create(
                model=server.adapter, messages=MESSAGES, max_tokens=12, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main()) == ask(server).choices[0].message.content


@action(NAME, "stream helper, finish reason length")
def stream_helper(server):
    request = dict(model=server.adapter, messages=MESSAGES, max_tokens=4, temperature=0)
    with connect(server).chat.completions.stream(**request) as stream:
        kinds = [event.type for event in stream]
        final = stream.current_completion_snapshot
    assert "content.delta" in kinds and "content.done" in kinds, kinds
    assert final.choices[0].finish_reason == "length"
    assert final.choices[0].message.content == ask(server, max_tokens=4).choices[0].message.content
    with connect(server).chat.completions.stream(**{**request, "max_tokens": 60}) as stream:
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


@action(NAME, "stream helper with a schema, cut by max_tokens")
def stream_helper_cut(server):
    def consume():
        with connect(server).chat.completions.stream(
            model=server.adapter, messages=MESSAGES, max_tokens=3, response_format=Lantern
        ) as stream:
            list(stream)

    raises(openai.LengthFinishReasonError, consume)


@action(NAME, "chat with n, stop, penalties, logit_bias and logprobs")
def chat_options(server):
    answer = ask(
        server,
        n=2,
        stop=["zzz"],
        temperature=1,
        top_p=0.9,
        seed=2**62,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"5": -100},
        logprobs=True,
        top_logprobs=3,
    )
    assert len(answer.choices) == 2
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.token.startswith("bytes:") or bytes(token.bytes).decode() == token.token, token


@action(NAME, "chat with metadata, store, user, service_tier, prompt_cache_key")
def chat_account_fields(server):
    answer = ask(
        server,
        metadata={"a": "b"},
        store=False,
        user="u",
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
    )
    assert answer.service_tier == "default" and answer.choices[0].message.content


@action(NAME, "chat with developer and system roles, content parts and names")
def chat_roles(server):
    parts = [{"type": "text", "text": 'Define the noun '}, {"type": "text", "text": '"lantern".'}]
    plain = ask(server, messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}])
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "Be brief."}, {"role": "user", "content": parts}]
        answer = ask(server, messages=messages)
        assert answer.usage.prompt_tokens >= plain.usage.prompt_tokens and answer.choices[0].message.content


@action(NAME, "weighted adapters and tokens of vLLM through extra_body")
def extra_body(server):
    answer = ask(
        server,
        model=server.base,
        extra_body={"adapter": [{"name": server.adapter, "weight": 0.5}], "return_token_ids": True, "min_tokens": 2},
    )
    assert answer.model_extra["adapter"] == [{"name": server.adapter, "weight": 0.5}]
    assert len(answer.choices[0].model_extra["token_ids"]) >= 2


@action(NAME, "raw response and headers")
def raw(server):
    reply = connect(server).chat.completions.with_raw_response.create(
        model=server.base, messages=MESSAGES, max_tokens=2, extra_headers={"x-request-id": "mine"}
    )
    assert reply.headers["x-request-id"] == "mine" and reply.parse().choices


@action(NAME, "response_format json_object")
def json_object(server):
    schema = {"type": "json_object"}
    messages = [{"role": "user", "content": "Describe a lantern in JSON, with its colour."}]
    answer = ask(server, messages=messages, response_format=schema, max_tokens=100)
    text = answer.choices[0].message.content
    # A weak model may not come to the end; what it wrote must still be the beginning of an object.
    assert text.lstrip().startswith("{"), text
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@action(NAME, "response_format json_schema, strict")
def json_schema(server):
    answer = ask(server, response_format={"type": "json_schema", "json_schema": STRICT}, max_tokens=100)
    Lantern.model_validate_json(answer.choices[0].message.content)


@action(NAME, "response_format json_schema, stream")
def json_schema_stream(server):
    request = dict(response_format={"type": "json_schema", "json_schema": STRICT}, max_tokens=100)
    whole = ask(server, **request).choices[0].message.content
    text = "".join(c.choices[0].delta.content or "" for c in ask(server, stream=True, **request))
    assert text == whole and Lantern.model_validate_json(text)


@action(NAME, "parse into a pydantic model")
def parse(server):
    parsed = connect(server).chat.completions.parse(
        model=server.adapter, messages=MESSAGES, max_tokens=100, temperature=0, response_format=Lantern
    )
    assert isinstance(parsed.choices[0].message.parsed, Lantern)


@action(NAME, "a schema that cannot be enforced", refused=True)
def schema_refused(server):
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    return refused(
        server, "uniqueItems", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    )


@action(NAME, "embeddings, float and base64")
def embeddings(server):
    client = connect(server)
    request = dict(model=server.base, input=["A lantern.", "A lamp."])
    floats = client.embeddings.create(encoding_format="float", **request)
    packed = client.embeddings.create(encoding_format="base64", **request)
    default = client.embeddings.create(**request)
    for a, b, c in zip(floats.data, packed.data, default.data, strict=True):
        data = base64.b64decode(b.embedding)
        values = struct.unpack(f"<{len(data) // 4}f", data)
        assert all(abs(x - y) < 1e-6 for x, y in zip(a.embedding, values, strict=True))
        assert all(abs(x - y) < 1e-6 for x, y in zip(c.embedding, values, strict=True))
    assert floats.usage.prompt_tokens > 0


@action(NAME, "embeddings with dimensions", refused=True)
def embeddings_dimensions(server):
    create = connect(server).embeddings.create
    error = raises(openai.BadRequestError, lambda: create(model=server.base, input="x", dimensions=7))
    assert error.param == "dimensions", error
    return error.body["message"]


@action(NAME, "an image in a message", refused=True)
def image(server):
    url = {"url": "data:image/png;base64,AAAA"}
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": url}]}]
    return refused(server, "image_url", messages=messages)


@action(NAME, "audio output", refused=True)
def audio(server):
    return refused(server, "text", modalities=["text", "audio"])


@action(NAME, "reasoning_effort for a model that does not think", refused=True)
def effort(server):
    return refused(server, "reasoning_effort", reasoning_effort="high")


@action(NAME, "verbosity", refused=True)
def verbosity(server):
    return refused(server, "max_tokens", verbosity="low")


@action(NAME, "web_search_options", refused=True)
def web_search(server):
    return refused(server, "tool", web_search_options={})


@action(NAME, "a misspelt field", refused=True)
def misspelt(server):
    return refused(server, "temperature", extra_body={"temprature": 1})


@action(NAME, "a model that does not exist", refused=True)
def unknown_model(server):
    error = raises(openai.NotFoundError, lambda: ask(server, model="nope"))
    assert error.code == "model_not_found", error
    return contains(error.body["message"], "nope")


@action(NAME, "a prompt beyond the context length", refused=True)
def too_long(server):
    error = raises(openai.BadRequestError, lambda: ask(server, messages=[{"role": "user", "content": "x " * 20000}]))
    return contains(error.body["message"], "maximum context length is")


@action(NAME, "images, speech and moderations", refused=True)
def other_routes(server):
    calls = {
        "/v1/images/generations": lambda client: client.images.generate(prompt="x", model=server.base),
        "/v1/audio/speech": lambda client: client.audio.speech.create(input="x", model=server.base, voice="alloy"),
        "/v1/moderations": lambda client: client.moderations.create(input="x"),
    }
    for path, call in calls.items():
        error = raises(openai.NotFoundError, lambda: call(connect(server)))
        message = contains(error.body["message"], path)
    return message
