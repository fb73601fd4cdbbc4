"""OpenAI's client: the Responses API."""

import json

import openai
from openai_answers import NAME, connect
from record import FUNCTION, QUESTION, Lantern, action, check_forecast, contains, raises

TOOL = {"type": "function", **FUNCTION, "strict": True}


def respond(server, **fields):
    """A short greedy response."""
    request = {"model": server.adapter, "input": QUESTION, "max_output_tokens": 16, "temperature": 0, **fields}
    return connect(server).responses.create(**request)


@action(NAME, "responses, create")
def create(server):
    answer = respond(server)
    assert answer.output_text and answer.object == "response" and answer.status in ("completed", "incomplete")
    if answer.status == "incomplete":
        assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    chat = connect(server).chat.completions.create(
        model=server.adapter, messages=[{"role": "user", "content": QUESTION}], max_tokens=16, temperature=0
    )
    assert answer.output_text == chat.choices[0].message.content


@action(NAME, "responses, instructions and a list of messages")
def messages(server):
    parts = [{"type": "input_text", "text": QUESTION}]
    answer = respond(server, instructions="Be brief.", input=[{"role": "user", "content": parts}], metadata={"a": "b"})
    assert answer.output_text and answer.instructions == "Be brief." and answer.metadata == {"a": "b"}


@action(NAME, "responses, stream")
def stream(server):
    whole = respond(server)
    events = list(respond(server, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"], kinds
    assert {"response.output_item.added", "response.output_text.done", "response.output_item.done"} <= set(kinds), kinds
    assert kinds[-1] == f"response.{whole.status}", kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(len(events))), numbers


@action(NAME, "responses, stream helper with a pydantic model")
def stream_helper(server):
    with connect(server).responses.stream(
        model=server.adapter, input=QUESTION, max_output_tokens=100, temperature=0, text_format=Lantern
    ) as events:
        assert any(event.type == "response.output_text.delta" for event in events)
        assert isinstance(events.get_final_response().output_parsed, Lantern)


@action(NAME, "responses, parse into a pydantic model")
def parse(server):
    answer = connect(server).responses.parse(
        model=server.adapter, input=QUESTION, max_output_tokens=100, temperature=0, text_format=Lantern
    )
    assert isinstance(answer.output_parsed, Lantern)


@action(NAME, "responses, tools")
def tools(server):
    request = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=80)
    answer = respond(server, **request)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "forecast" and call.call_id
    check_forecast(call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny."}
    after = respond(server, tools=[TOOL], tool_choice="none", previous_response_id=answer.id, input=[result])
    assert after.output_text
    by_hand = [{"role": "user", "content": QUESTION}, call.model_dump(exclude_none=True), result]
    again = respond(server, tools=[TOOL], tool_choice="none", input=by_hand)
    assert again.output_text == after.output_text


@action(NAME, "responses, stream of a tool call")
def tool_stream(server):
    request = dict(tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=80)
    events = list(respond(server, stream=True, **request))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    (done,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments
    check_forecast(json.loads(done.arguments))


@action(NAME, "responses, previous_response_id, retrieve, input items, delete")
def stored(server):
    client = connect(server)
    first = respond(server)
    second = respond(server, previous_response_id=first.id, input="And a lamp?")
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert [item.type for item in client.responses.input_items.list(first.id)] == ["message"]
    client.responses.delete(first.id)
    raises(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


@action(NAME, "responses, hosted tools", refused=True)
def hosted_tools(server):
    error = raises(openai.BadRequestError, lambda: respond(server, tools=[{"type": "web_search"}]))
    return contains(error.body["message"], "web_search")


@action(NAME, "responses, background", refused=True)
def background(server):
    error = raises(openai.BadRequestError, lambda: respond(server, background=True))
    assert error.param == "background", error
    return error.body["message"]
