"""Drives a running server with OpenAI's own Python client: sync, async, streaming, errors.

Usage: openai_client.py URL ADAPTER API_KEY     (URL such as http://127.0.0.1:8000)
Exits 0 when everything is as the client expects it.
"""

import asyncio
import json
import math
import sys
import typing

import openai
import pydantic

URL, ADAPTER = sys.argv[1] + "/v1", sys.argv[2]
KEY = sys.argv[3]
MESSAGES = [{"role": "user", "content": "Define the noun \"lantern\"."}]

client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)
base = client.models.list().data[0].id


def generation(response):
    return response.model_extra["adapter_generation"]


def models():
    cards = {card.id: card for card in client.models.list()}
    assert cards[base].model_extra["parent"] is None
    assert cards[ADAPTER].model_extra["parent"] == base
    assert client.models.retrieve(ADAPTER).id == ADAPTER


def completions():
    answer = client.completions.create(model=base, prompt="Once upon a time", max_tokens=8, temperature=0)
    assert answer.object == "text_completion" and answer.model == base
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert generation(answer) is None
    again = client.completions.create(model=base, prompt="Once upon a time", max_tokens=8, temperature=0)
    assert again.choices[0].text == answer.choices[0].text

    many = client.completions.create(model=base, prompt=["One", "Two"], n=2, max_tokens=4, seed=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]

    scored = client.completions.create(model=base, prompt="One two three", max_tokens=0, echo=True, logprobs=2)
    logprobs = scored.choices[0].logprobs
    assert scored.choices[0].text == "One two three"
    assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == len(logprobs.text_offset) == scored.usage.prompt_tokens


def chat():
    answer = client.chat.completions.create(
        model=base, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].message.role == "assistant" and answer.choices[0].message.content
    for token in answer.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob


def adapters():
    ask = dict(messages=MESSAGES, max_tokens=12, temperature=0)
    plain = client.chat.completions.create(model=base, **ask)
    answers = [
        client.chat.completions.create(model=base, extra_body={"adapter": ADAPTER}, **ask),
        client.chat.completions.create(model=ADAPTER, **ask),
        client.chat.completions.create(model=f"{base}:{ADAPTER}", **ask),
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert len({generation(answer) for answer in answers}) == 1 and generation(answers[0])
    assert all(answer.model_extra["adapter"] == ADAPTER for answer in answers)
    assert answers[0].choices[0].message.content != plain.choices[0].message.content
    half = client.chat.completions.create(
        model=base, extra_body={"adapter": [{"name": ADAPTER, "weight": 0.5}]}, **ask
    )
    assert half.model_extra["adapter"] == [{"name": ADAPTER, "weight": 0.5}]
    assert generation(half) == [generation(answers[0])]


def streaming():
    ask = dict(model=ADAPTER, messages=MESSAGES, max_tokens=12, temperature=0)
    whole = client.chat.completions.create(**ask)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **ask))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(generation(chunk) == generation(whole) for chunk in chunks)

    text = client.completions.create(model=ADAPTER, prompt="One", max_tokens=8, temperature=0).choices[0].text
    with client.completions.create(model=ADAPTER, prompt="One", max_tokens=8, temperature=0, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == text


def embeddings():
    texts = ["A lantern lights the way.", "The lamp shows the path.", "Taxes are due in April."]
    ask = dict(model=base, input=texts, extra_body={"pooling": "mean"})
    # The client asks for base64 and decodes it, unless the caller names a format.
    answer = client.embeddings.create(**ask)
    floats = client.embeddings.create(encoding_format="float", **ask)
    assert answer.object == "list" and answer.model == base
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 12
    vectors = [item.embedding for item in answer.data]
    for vector, item in zip(vectors, floats.data):
        assert all(abs(a - b) < 1e-6 for a, b in zip(vector, item.embedding, strict=True))
        assert abs(math.hypot(*vector) - 1) < 1e-5

    def likeness(a, b):
        return sum(x * y for x, y in zip(a, b))

    assert likeness(vectors[0], vectors[1]) > likeness(vectors[0], vectors[2])
    adapted = client.embeddings.create(model=ADAPTER, input=texts[0], extra_body={"pooling": "mean"})
    assert generation(adapted) and adapted.data[0].embedding != vectors[0]
    try:
        client.embeddings.create(model=base, input="x", dimensions=7)
    except openai.BadRequestError as error:
        assert error.param == "dimensions", error
    else:
        raise AssertionError("7 dimensions were accepted")


def responses():
    ask = dict(model=ADAPTER, input=MESSAGES, max_output_tokens=8, temperature=0)
    answer = client.responses.create(instructions="Be brief.", metadata={"a": "b"}, **ask)
    assert answer.object == "response" and answer.status in ("completed", "incomplete") and answer.output_text
    assert answer.metadata == {"a": "b"} and answer.instructions == "Be brief." and generation(answer)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert client.responses.retrieve(answer.id) == answer
    items = client.responses.input_items.list(answer.id).data
    assert items[0].content[0].text == MESSAGES[0]["content"]
    more = client.responses.create(**{**ask, "input": "And \"door\"?"}, previous_response_id=answer.id)
    assert more.usage.input_tokens > answer.usage.input_tokens
    client.responses.delete(answer.id)
    try:
        client.responses.retrieve(answer.id)
    except openai.NotFoundError as error:
        assert error.code == "response_not_found"
    else:
        raise AssertionError("a deleted response is still there")

    whole = client.responses.create(**ask)
    events = list(client.responses.create(stream=True, **ask))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text

    class Thing(pydantic.BaseModel):
        name: typing.Literal["lantern", "door"]

    parse = dict(model=base, input=MESSAGES, text_format=Thing, temperature=0, max_output_tokens=60)
    thing = client.responses.parse(**parse).output_parsed
    assert thing.name in ("lantern", "door")
    with client.responses.stream(**parse) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_parsed == thing and final.output_text == deltas

    class Define(pydantic.BaseModel):
        """Defines a noun."""

        noun: typing.Literal["lantern"]

    tools = [openai.pydantic_function_tool(Define)["function"] | {"type": "function"}]
    call = dict(model=base, input=MESSAGES, tools=tools, tool_choice="required", parallel_tool_calls=False)
    answer = client.responses.parse(temperature=0, max_output_tokens=100, **call)
    (item,) = [item for item in answer.output if item.type == "function_call"]
    assert item.name == "Define" and json.loads(item.arguments) == {"noun": "lantern"}
    with client.responses.stream(temperature=0, max_output_tokens=100, **call) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        again = stream.get_final_response()
    assert deltas[-1].snapshot == item.arguments == again.output[-1].arguments
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "a lamp with a handle"}
    answer = client.responses.create(
        model=base, input=[*MESSAGES, *answer.output, result], tools=tools, max_output_tokens=8
    )
    assert answer.output_text


def errors():
    def fails(kind, **body):
        try:
            client.completions.create(**{"model": base, "prompt": "x", "max_tokens": 1, **body})
        except kind as error:
            return error
        raise AssertionError(f"{body} was accepted")

    assert fails(openai.NotFoundError, model="nope").code == "model_not_found"
    assert fails(openai.NotFoundError, extra_body={"adapter": "nope"}).code == "adapter_not_found"
    error = fails(openai.BadRequestError, temperature=9)
    assert error.param == "temperature" and "from 0 to 2" in error.message
    assert "adapter" in fails(openai.BadRequestError, extra_body={"lora": ADAPTER}).message
    try:
        openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0).models.list()
    except openai.AuthenticationError:
        return
    raise AssertionError("a wrong key was accepted")


async def concurrent():
    client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0, timeout=300)

    async def ask(model, stream):
        answer = await client.completions.create(model=model, prompt="One", max_tokens=8, temperature=0, stream=stream)
        if not stream:
            return answer.choices[0].text
        return "".join([chunk.choices[0].text async for chunk in answer])

    texts = await asyncio.gather(*[ask(model, stream) for model in (base, ADAPTER) for stream in (False, True)])
    assert texts[0] == texts[1] and texts[2] == texts[3], texts


for check in (models, completions, chat, adapters, streaming, embeddings, responses, errors):
    check()
    print("ok", check.__name__)
asyncio.run(concurrent())
print("ok concurrent")
