"""LangChain's OpenAI package: chats, streams, structured output, tools, embeddings."""

import asyncio

import langchain.agents
import langchain.agents.structured_output
import langchain_core.messages
import langchain_core.tools
import langchain_openai
from record import MESSAGES, QUESTION, WEATHER, Lantern, action

NAME = "langchain-openai"


def model(server, **fields):
    fields = {"max_tokens": 12, "temperature": 0, **fields}
    return langchain_openai.ChatOpenAI(
        base_url=server.v1, api_key=server.key, model=server.adapter, max_retries=0, timeout=60, **fields
    )


@langchain_core.tools.tool
def forecast(city: str, days: int) -> str:
    """Weather forecast for a city."""
    return f"Sunny in {city} for {days} days."


@action(NAME, "invoke")
def invoke(server):
    answer = model(server).invoke(QUESTION)
    assert answer.content and answer.usage_metadata["output_tokens"] <= 12
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


@action(NAME, "stream, and stream with usage")
def stream(server):
    whole = model(server).invoke(MESSAGES)
    chunks = list(model(server, stream_usage=True).stream(MESSAGES))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    assert sum((chunk.usage_metadata or {"output_tokens": 0})["output_tokens"] for chunk in chunks) > 0
    assert "".join(chunk.content for chunk in model(server, stream_usage=False).stream(MESSAGES)) == whole.content


@action(NAME, "ainvoke and astream, in a batch")
def asynchronous(server):
    async def main():
        llm = model(server)
        answers = await llm.abatch([QUESTION, QUESTION])
        return [a.content for a in answers], "".join([chunk.content async for chunk in llm.astream(QUESTION)])

    (one, two), streamed = asyncio.run(main())
    assert one == two == streamed


@action(NAME, "logprobs")
def logprobs(server):
    answer = model(server, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


for method in ("json_schema", "function_calling", "json_mode"):

    @action(NAME, f"with_structured_output, {method}")
    def structured(server, method=method):
        llm = model(server, max_tokens=100)
        runnable = llm.with_structured_output(Lantern, method=method, include_raw=True)
        answer = runnable.invoke("Answer in JSON: describe a lantern.")
        if method == "json_mode":  # It asks for an object, and not for one of the schema.
            assert answer["raw"].content.lstrip().startswith("{"), answer
        else:
            assert isinstance(answer["parsed"], Lantern), answer


@action(NAME, "with_structured_output, stream")
def structured_stream(server):
    runnable = model(server, max_tokens=100).with_structured_output(Lantern, method="json_schema")
    assert isinstance(list(runnable.stream(QUESTION))[-1], Lantern)


@action(NAME, "bind_tools, a loop of call, result and answer")
def tool_loop(server):
    bound = model(server, max_tokens=80).bind_tools([forecast], tool_choice="any", parallel_tool_calls=False)
    messages = [langchain_core.messages.HumanMessage(WEATHER[0]["content"])]
    call = bound.invoke(messages)
    assert [c["name"] for c in call.tool_calls] == ["forecast"] and not call.invalid_tool_calls, call
    messages += [call, forecast.invoke(call.tool_calls[0])]
    answer = model(server).bind_tools([forecast]).invoke(messages)
    assert answer.content or answer.tool_calls


@action(NAME, "bind_tools, stream of a call")
def tool_stream(server):
    bound = model(server, max_tokens=80).bind_tools([forecast], tool_choice="forecast", parallel_tool_calls=False)
    whole = None
    for chunk in bound.stream(WEATHER[0]["content"]):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["forecast"], whole
    assert set(whole.tool_calls[0]["args"]) == {"city", "days"}, whole


@action("langchain", "create_agent with a tool, and its stream")
def agent(server):
    agent = langchain.agents.create_agent(model(server, max_tokens=80), [forecast], system_prompt="Be brief.")
    question = {"messages": WEATHER}
    messages = agent.invoke(question, {"recursion_limit": 6})["messages"]
    assert messages[-1].content or messages[-1].tool_calls
    assert list(agent.stream(question, {"recursion_limit": 6}, stream_mode="messages"))


@action("langchain", "create_agent with structured output")
def structured_agent(server):
    # LangChain does not know that this model can do it, and asks by a tool call unless it is told.
    form = langchain.agents.structured_output.ProviderStrategy(Lantern)
    agent = langchain.agents.create_agent(model(server, max_tokens=100), response_format=form)
    assert isinstance(agent.invoke({"messages": MESSAGES})["structured_response"], Lantern)


@action(NAME, "the Responses API")
def responses(server):
    answer = model(server, use_responses_api=True, max_tokens=16).invoke(QUESTION)
    assert answer.text and answer.response_metadata["status"] in ("completed", "incomplete")


@action(NAME, "completions")
def completions(server):
    llm = langchain_openai.OpenAI(
        base_url=server.v1, api_key=server.key, model=server.adapter, max_tokens=8, temperature=0, max_retries=0
    )
    assert llm.invoke("One, two,") == "".join(llm.stream("One, two,"))


@action(NAME, "embeddings of text")
def embeddings(server):
    embedder = langchain_openai.OpenAIEmbeddings(
        base_url=server.v1, api_key=server.key, model=server.base, check_embedding_ctx_length=False, max_retries=0
    )
    one, two = embedder.embed_documents(["A lantern.", "A lamp."])
    query = embedder.embed_query("A lantern.")
    assert len(one) == len(two) and all(abs(a - b) < 1e-5 for a, b in zip(one, query, strict=True))
