"""LiteLLM's SDK, as a client of a server like OpenAI's and of vLLM."""

import asyncio
import os

# Otherwise the import fetches a list of prices.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")

import litellm
from record import MESSAGES, TOOL, WEATHER, Lantern, action, check_forecast, contains, raises

NAME = "litellm"
litellm.suppress_debug_info = True


def fields(server, provider="openai", **more):
    base = {"model": f"{provider}/{server.adapter}", "api_base": server.v1, "api_key": server.key}
    return {**base, "max_retries": 0, "timeout": 60, **more}


def chat(server, provider="openai", **more):
    request = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0, **more}
    return litellm.completion(**fields(server, provider, **request))


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@action(NAME, "completion, and its stream, as openai/ and hosted_vllm/")
def completion(server):
    whole = chat(server).choices[0].message.content
    assert whole and chat(server, "hosted_vllm").choices[0].message.content == whole
    for provider in ("openai", "hosted_vllm"):
        chunks = list(chat(server, provider, stream=True, stream_options={"include_usage": True}))
        assert text_of(chunks) == whole
        assert litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message.content == whole


@action(NAME, "acompletion, many at once")
def asynchronous(server):
    async def main():
        request = fields(server, messages=MESSAGES, max_tokens=8, temperature=0)
        return await asyncio.gather(*(litellm.acompletion(**request) for _ in range(4)))

    assert len({answer.choices[0].message.content for answer in asyncio.run(main())}) == 1


@action(NAME, "tools, required, and a stream of the call")
def tools(server):
    request = dict(messages=WEATHER, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80)
    (call,) = chat(server, **request).choices[0].message.tool_calls
    check_forecast(call.function.arguments)
    chunks = list(chat(server, stream=True, **request))
    built = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls[0].function
    assert (built.name, built.arguments) == (call.function.name, call.function.arguments)


@action(NAME, "response_format with a pydantic model")
def structured(server):
    answer = chat(server, response_format=Lantern, max_tokens=100)
    Lantern.model_validate_json(answer.choices[0].message.content)


@action(NAME, "text_completion")
def text(server):
    answer = litellm.text_completion(
        **fields(server, "text-completion-openai", prompt="One, two,", max_tokens=8, temperature=0)
    )
    assert answer.choices[0].text


@action(NAME, "embedding")
def embedding(server):
    answer = litellm.embedding(**fields(server, input=["A lantern.", "A lamp."], encoding_format="float"))
    assert len(answer.data) == 2 and len(answer.data[0]["embedding"]) > 8


@action(NAME, "responses")
def responses(server):
    answer = litellm.responses(**fields(server, input=MESSAGES[0]["content"], max_output_tokens=16))
    assert answer.output[0].content[0].text


@action(NAME, "anthropic messages, as anthropic/")
def messages(server):
    request = fields(server, "anthropic", messages=MESSAGES, max_tokens=12, temperature=0)
    answer = litellm.completion(**{**request, "api_base": server.url})
    assert answer.choices[0].message.content


@action(NAME, "a fallback from an adapter that does not exist")
def fallback(server):
    router = litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": {**fields(server), "model": f"openai/{target}"}}
            for name, target in (("broken", "nope"), ("good", server.adapter))
        ],
        fallbacks=[{"broken": ["good"]}],
        num_retries=0,
    )
    answer = router.completion(model="broken", messages=MESSAGES, max_tokens=4)
    assert answer.choices[0].message.content


@action(NAME, "a prompt beyond the context length becomes ContextWindowExceededError", refused=True)
def context(server):
    long = [{"role": "user", "content": "x " * 20000}]
    for provider in ("openai", "hosted_vllm"):
        error = raises(litellm.ContextWindowExceededError, lambda: chat(server, provider, messages=long))
    message = contains(str(error), "This model's maximum context length is")
    return message[message.index("This model's") :].partition('"')[0]


@action(NAME, "a field that the server refuses", refused=True)
def refused(server):
    error = raises(litellm.BadRequestError, lambda: chat(server, extra_body={"typical_p": 0.5}))
    return contains(str(error), "typical_p", "top_p").splitlines()[0]
