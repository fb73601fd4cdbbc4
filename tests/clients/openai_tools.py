"""OpenAI's client: tools in every form."""

import json
import typing

import openai
import pydantic
from openai_answers import NAME, ask, connect
from record import CITIES, FUNCTION, OTHER_TOOL, TOOL, WEATHER, action, check_forecast, contains, raises

NAMED = {"type": "function", "function": {"name": "forecast"}}


def call_tool(server, **fields):
    """A greedy chat with tools."""
    return ask(server, **{"messages": WEATHER, "tools": [TOOL], "max_tokens": 80, **fields})


def check_call(answer):
    """A choice with at least one valid call."""
    choice = answer.choices[0]
    assert choice.message.tool_calls, choice
    for call in choice.message.tool_calls:
        assert call.type == "function" and call.id and call.function.name == "forecast", call
        check_forecast(call.function.arguments)
    return choice.message.tool_calls


@action(NAME, "tools, tool_choice auto")
def auto(server):
    choice = call_tool(server, tool_choice="auto").choices[0]
    assert choice.message.content or choice.message.tool_calls
    if choice.message.tool_calls:
        assert choice.finish_reason == "tool_calls"


@action(NAME, "tools, tool_choice none")
def none(server):
    choice = call_tool(server, tool_choice="none").choices[0]
    assert choice.message.content and not choice.message.tool_calls and choice.finish_reason in ("stop", "length")


@action(NAME, "tools, tool_choice required")
def required(server):
    answer = call_tool(server, tool_choice="required", parallel_tool_calls=False)
    assert len(check_call(answer)) == 1 and answer.choices[0].finish_reason == "tool_calls"


@action(NAME, "tools, tool_choice a function")
def named(server):
    answer = call_tool(server, tools=[TOOL, OTHER_TOOL], tool_choice=NAMED, parallel_tool_calls=False)
    assert len(check_call(answer)) == 1 and answer.choices[0].finish_reason in ("stop", "tool_calls")


@action(NAME, "tools, tool_choice allowed_tools")
def allowed(server):
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
    check_call(call_tool(server, tools=[TOOL, OTHER_TOOL], tool_choice=choice, parallel_tool_calls=False))


@action(NAME, "tools with strict schemas, auto")
def strict(server):
    choice = call_tool(server, tools=[{"type": "function", "function": {**FUNCTION, "strict": True}}]).choices[0]
    if choice.message.tool_calls and choice.finish_reason == "tool_calls":
        check_forecast(choice.message.tool_calls[0].function.arguments)
    else:
        assert choice.message.content or choice.finish_reason == "length", choice


@action(NAME, "tools, stream of a required call")
def stream(server):
    request = dict(tool_choice="required", parallel_tool_calls=False)
    whole = check_call(call_tool(server, **request))[0]
    name, arguments, ids, finish = "", "", set(), None
    for chunk in call_tool(server, stream=True, **request):
        for delta in chunk.choices[0].delta.tool_calls or []:
            assert delta.index == 0
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
            ids |= {delta.id} - {None}
        finish = chunk.choices[0].finish_reason or finish
    assert (name, arguments) == (whole.function.name, whole.function.arguments)
    assert len(ids) == 1 and finish == "tool_calls"


class Forecast(pydantic.BaseModel):
    """Weather forecast for a city."""

    city: typing.Literal[*CITIES]
    days: int = pydantic.Field(ge=1, le=9)


@action(NAME, "tools, pydantic_function_tool with the stream helper")
def stream_helper(server):
    with connect(server).chat.completions.stream(
        model=server.adapter,
        messages=WEATHER,
        tools=[openai.pydantic_function_tool(Forecast, name="forecast")],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=80,
        temperature=0,
    ) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds, kinds
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Forecast)


@action(NAME, "tools, history with calls and results")
def history(server):
    function = {"name": "forecast", "arguments": '{"city": "Oslo", "days": 3}'}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        *WEATHER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny."},
    ]
    answer = call_tool(server, messages=messages, tool_choice="none")
    assert answer.choices[0].message.content
    longer = [*messages[:-1], {**messages[-1], "content": "Sunny, sunny and sunny."}]
    more = call_tool(server, messages=longer, tool_choice="none", max_tokens=1)
    assert more.usage.prompt_tokens > answer.usage.prompt_tokens, "the model sees the result"


@action(NAME, "functions and function_call, the older form")
def functions(server):
    request = dict(model=server.adapter, messages=WEATHER, functions=[FUNCTION], max_tokens=80, temperature=0)
    answer = connect(server).chat.completions.create(function_call={"name": "forecast"}, **request)
    call = answer.choices[0].message.function_call
    assert call.name == "forecast"
    check_forecast(call.arguments)


@action(NAME, "tool_choice with a function that is not a tool", refused=True)
def unknown_tool(server):
    choice = {"type": "function", "function": {"name": "nope"}}
    error = raises(openai.BadRequestError, lambda: call_tool(server, tool_choice=choice))
    assert error.param.startswith("tool_choice"), error
    return contains(error.body["message"], "nope")


@action(NAME, "a custom tool", refused=True)
def custom_tool(server):
    tools = [{"type": "custom", "custom": {"name": "shell"}}]
    error = raises(openai.BadRequestError, lambda: call_tool(server, tools=tools))
    assert error.param.startswith("tools"), error
    return contains(error.body["message"], "custom")


@action(NAME, "tools, parse with pydantic_function_tool")
def parse(server):
    answer = connect(server).chat.completions.parse(
        model=server.adapter,
        messages=WEATHER,
        tools=[openai.pydantic_function_tool(Forecast, name="forecast")],
        tool_choice={"type": "function", "function": {"name": "forecast"}},
        parallel_tool_calls=False,
        max_tokens=80,
        temperature=0,
    )
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(call.function.parsed_arguments, Forecast) and json.loads(call.function.arguments)
