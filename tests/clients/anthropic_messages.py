"""Anthropic's client: the Messages API."""

import asyncio
import typing

import anthropic
import pydantic
from record import FUNCTION, MESSAGES, PARAMETERS, WEATHER, action, check_forecast, contains, raises

NAME = "anthropic"
TOOL = {"name": FUNCTION["name"], "description": FUNCTION["description"], "input_schema": PARAMETERS}


def connect(server, kind=anthropic.Anthropic):
    return kind(base_url=server.url, api_key=server.key, max_retries=0, timeout=60)


def request(server, **fields):
    # This client has no argument for the temperature any more.
    base = {"model": server.adapter, "messages": MESSAGES, "max_tokens": 12, "extra_body": {"temperature": 0}}
    return {**base, **fields}


def send(server, **fields):
    return connect(server).messages.create(**request(server, **fields))


@action(NAME, "messages, create")
def create(server):
    answer = send(server, system="Be brief.")
    assert answer.type == "message" and answer.role == "assistant" and answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.output_tokens <= 12
    # The template has a system prompt of its own, which is longer.
    assert answer.usage.input_tokens != send(server).usage.input_tokens, "the model sees the system prompt"


@action(NAME, "messages, content blocks and system blocks")
def blocks(server):
    text = [{"type": "text", "text": MESSAGES[0]["content"], "cache_control": {"type": "ephemeral"}}]
    answer = send(server, messages=[{"role": "user", "content": text}], metadata={"user_id": "u"})
    assert answer.content[0].text == send(server).content[0].text


@action(NAME, "messages, stop sequences")
def stop(server):
    text = send(server).content[0].text
    word = text.split()[2]
    answer = send(server, stop_sequences=[word])
    assert answer.stop_reason == "stop_sequence" and answer.stop_sequence == word, answer
    assert text.startswith(answer.content[0].text)


@action(NAME, "messages, async")
def create_async(server):
    async def main():
        async with connect(server, anthropic.AsyncAnthropic) as client:
            return await client.messages.create(**request(server))

    assert asyncio.run(main()).content == send(server).content


@action(NAME, "messages, raw stream of events")
def events(server):
    seen = list(send(server, stream=True))
    kinds = [event.type for event in seen]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1, kinds
    assert seen[0].message.usage.input_tokens > 0 and seen[-2].usage.output_tokens > 0
    text = "".join(e.delta.text for e in seen if e.type == "content_block_delta")
    assert text == send(server).content[0].text


@action(NAME, "messages, stream helper")
def stream_helper(server):
    with connect(server).messages.stream(**request(server)) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    whole = send(server)
    assert text == final.content[0].text == whole.content[0].text and final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens


@action(NAME, "tools, tool_choice auto")
def tools_auto(server):
    answer = send(server, messages=WEATHER, tools=[TOOL], max_tokens=60)
    assert answer.content and all(block.type in ("text", "tool_use") for block in answer.content)


@action(NAME, "tools, tool_choice any and a tool, with the result sent back")
def tools(server):
    for choice in ({"type": "any"}, {"type": "tool", "name": "forecast"}):
        choice["disable_parallel_tool_use"] = True
        answer = send(server, messages=WEATHER, tools=[TOOL], tool_choice=choice, max_tokens=80)
        assert answer.stop_reason == "tool_use", answer
        (call,) = [block for block in answer.content if block.type == "tool_use"]
        assert call.name == "forecast" and call.id
        check_forecast(call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sunny."}]}
    history = [*WEATHER, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    after = send(server, messages=history, tools=[TOOL], tool_choice={"type": "none"})
    assert after.content[0].text and after.usage.input_tokens > answer.usage.input_tokens


@action(NAME, "tools, stream of a call")
def tools_stream(server):
    fields = dict(
        messages=WEATHER,
        tools=[TOOL],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=80,
    )
    with connect(server).messages.stream(**request(server, **fields)) as stream:
        kinds = {event.type for event in stream}
        (call,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert "input_json" in kinds, kinds
    check_forecast(call.input)


class Lamp(pydantic.BaseModel):
    """A lamp. The client leaves bounds of numbers out of the schema that it sends."""

    colour: typing.Literal["red", "green", "blue"]
    lit: bool


@action(NAME, "structured output, parse into a pydantic model")
def parse(server):
    answer = connect(server).messages.parse(**request(server, max_tokens=100), output_format=Lamp)
    assert isinstance(answer.parsed_output, Lamp)


@action(NAME, "messages, count_tokens")
def count(server):
    counted = connect(server).messages.count_tokens(model=server.adapter, messages=MESSAGES).input_tokens
    usage = send(server).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


@action(NAME, "an image in a message", refused=True)
def image(server):
    source = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
    messages = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    error = raises(anthropic.BadRequestError, lambda: send(server, messages=messages))
    return contains(error.body["error"]["message"], "image")


@action(NAME, "a model that does not exist", refused=True)
def unknown_model(server):
    error = raises(anthropic.NotFoundError, lambda: send(server, model="nope"))
    assert error.body["type"] == "error" and error.body["error"]["type"] == "not_found_error", error.body
    return contains(error.body["error"]["message"], "nope")
