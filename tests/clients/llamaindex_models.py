"""LlamaIndex's client for servers like OpenAI's."""

import asyncio

from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from record import QUESTION, WEATHER, Lantern, action

NAME = "llama-index-llms-openai-like"


def model(server, **fields):
    fields = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 12, "temperature": 0, **fields}
    return OpenAILike(
        model=server.adapter, api_base=server.v1, api_key=server.key, context_window=2048, max_retries=0, **fields
    )


def forecast(city: str, days: int) -> str:
    """Weather forecast for a city."""
    return f"Sunny in {city} for {days} days."


@action(NAME, "complete and stream_complete")
def complete(server):
    llm = model(server, is_chat_model=False, is_function_calling_model=False)
    whole = llm.complete("One, two,").text
    assert whole and list(llm.stream_complete("One, two,"))[-1].text == whole


@action(NAME, "chat, stream_chat and achat")
def chat(server):
    llm, messages = model(server), [ChatMessage(role="user", content=QUESTION)]
    whole = llm.chat(messages).message.content
    assert whole and list(llm.stream_chat(messages))[-1].message.content == whole
    assert asyncio.run(llm.achat(messages)).message.content == whole


@action(NAME, "as_structured_llm by response_format")
def structured(server):
    llm = model(server, max_tokens=100, should_use_structured_outputs=True)
    answer = llm.as_structured_llm(Lantern).complete(QUESTION)
    assert isinstance(answer.raw, Lantern), answer


@action(NAME, "as_structured_llm by a tool call")
def structured_by_tool(server):
    answer = model(server, max_tokens=100).as_structured_llm(Lantern).complete(QUESTION)
    assert isinstance(answer.raw, Lantern), answer


@action(NAME, "chat_with_tools, required, and the result sent back")
def tools(server):
    tool = FunctionTool.from_defaults(fn=forecast)
    llm, question = model(server, max_tokens=80), ChatMessage(role="user", content=WEATHER[0]["content"])
    answer = llm.chat_with_tools([tool], user_msg=question, tool_required=True, allow_parallel_tool_calls=False)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "forecast" and set(call.tool_kwargs) == {"city", "days"}, call
    result = ChatMessage(role="tool", content="Sunny.", additional_kwargs={"tool_call_id": call.tool_id})
    history = [question, answer.message, result]
    assert model(server).chat(history).message.content
