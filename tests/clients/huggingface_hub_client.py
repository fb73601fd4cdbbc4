"""Hugging Face's InferenceClient and LoRAX's client."""

import asyncio
import json

import huggingface_hub
import lorax
import lorax.errors
from record import MESSAGES, TOOL, WEATHER, Lantern, action, check_forecast, contains, raises

HUB, LORAX = "huggingface_hub", "lorax-client"
SCHEMA = Lantern.model_json_schema()


def endpoint(server):
    """A client of an endpoint of Text Generation Inference, which has no model's name."""
    return huggingface_hub.InferenceClient(model=server.url, provider="hf-inference", timeout=60)


def named(server, kind=huggingface_hub.InferenceClient):
    """A client whose requests name their model."""
    return kind(base_url=server.v1, api_key=server.key, timeout=60)


@action(HUB, "chat_completion, and its stream")
def chat(server):
    request = dict(model=server.adapter, messages=MESSAGES, max_tokens=12, temperature=0)
    create = named(server).chat.completions.create
    whole = create(**request).choices[0].message.content
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in create(stream=True, **request)) == whole


@action(HUB, "chat_completion of an endpoint's URL, without a model's name")
def endpoint_chat(server):
    request = dict(messages=MESSAGES, max_tokens=12, temperature=0)
    content = endpoint(server).chat_completion(**request).choices[0].message.content
    assert content == named(server).chat_completion(model=server.base, **request).choices[0].message.content


@action(HUB, "chat_completion with a JSON schema")
def schema(server):
    form = {"type": "json_schema", "json_schema": {"name": "lantern", "schema": SCHEMA, "strict": True}}
    for client, model in ((named(server), server.adapter), (endpoint(server), None)):
        answer = client.chat_completion(
            MESSAGES, model=model, response_format=form, max_tokens=100, temperature=0
        )
        Lantern.model_validate_json(answer.choices[0].message.content)


@action(HUB, "chat_completion with tools")
def tools(server):
    answer = named(server).chat_completion(
        WEATHER, model=server.adapter, tools=[TOOL], tool_choice="required", max_tokens=300, temperature=0
    )
    check_forecast(answer.choices[0].message.tool_calls[0].function.arguments)


@action(HUB, "chat_completion, async stream")
def asynchronous(server):
    request = dict(model=server.adapter, messages=MESSAGES, max_tokens=12, temperature=0)

    async def main():
        client = named(server, huggingface_hub.AsyncInferenceClient)
        try:
            chunks = await client.chat.completions.create(stream=True, **request)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        finally:
            await client.close()

    assert asyncio.run(main()) == named(server).chat.completions.create(**request).choices[0].message.content


@action(HUB, "text_generation with adapter_id, and its stream")
def text(server):
    request = dict(prompt="One, two,", adapter_id=server.adapter, max_new_tokens=8)
    whole = endpoint(server).text_generation(**request)
    assert whole and "".join(endpoint(server).text_generation(stream=True, **request)) == whole
    assert endpoint(server).text_generation("One, two,", max_new_tokens=8) != whole


@action(HUB, "text_generation with details")
def details(server):
    request = dict(prompt="One, two,", max_new_tokens=8, details=True)
    answer = endpoint(server).text_generation(decoder_input_details=True, **request)
    assert answer.details.generated_tokens == len(answer.details.tokens) <= 8
    assert answer.details.finish_reason in ("length", "eos_token", "stop_sequence") and answer.details.prefill
    last = list(endpoint(server).text_generation(stream=True, **request))[-1]
    assert last.generated_text == answer.generated_text
    assert last.details.generated_tokens == answer.details.generated_tokens


@action(HUB, "text_generation with a grammar")
def grammar(server):
    form = {"type": "json", "value": SCHEMA}
    Lantern.model_validate_json(endpoint(server).text_generation("A lantern: ", grammar=form, max_new_tokens=100))


@action(HUB, "text_generation with watermark", refused=True)
def watermark(server):
    call = lambda: endpoint(server).text_generation("One", watermark=True, max_new_tokens=2)
    return contains(str(raises(huggingface_hub.errors.ValidationError, call)), "watermark")


@action(HUB, "get_endpoint_info and health_check")
def info(server):
    about = endpoint(server).get_endpoint_info()
    assert about["model_id"] == server.base and about["max_total_tokens"] > 0, about
    assert endpoint(server).health_check()


@action(LORAX, "generate with adapter_id")
def generate(server):
    client = lorax.Client(server.url, timeout=60)
    answer = client.generate("One, two,", adapter_id=server.adapter, max_new_tokens=8)
    assert answer.generated_text and answer.details.generated_tokens == len(answer.details.tokens) <= 8
    assert client.generate("One, two,", max_new_tokens=8).generated_text != answer.generated_text
    long = client.generate("One, two,", adapter_id=server.adapter, max_new_tokens=8, return_full_text=True)
    assert long.generated_text == "One, two," + answer.generated_text


@action(LORAX, "generate_stream with adapter_id")
def generate_stream(server):
    client = lorax.Client(server.url, timeout=60)
    request = dict(prompt="One, two,", adapter_id=server.adapter, max_new_tokens=8)
    parts = list(client.generate_stream(**request))
    whole = client.generate(**request)
    assert "".join(part.token.text for part in parts if not part.token.special) == whole.generated_text
    assert parts[-1].generated_text == whole.generated_text
    assert parts[-1].details.finish_reason == whole.details.finish_reason


@action(LORAX, "generate, async")
def generate_async(server):
    client = lorax.AsyncClient(server.url, timeout=60)
    answer = asyncio.run(client.generate("One, two,", adapter_id=server.adapter, max_new_tokens=8))
    assert answer.generated_text


@action(LORAX, "generate with merged adapters")
def merged(server):
    adapters = lorax.MergedAdapters(
        ids=[server.adapter], weights=[0.5], merge_strategy="linear", density=1.0
    )
    client = lorax.Client(server.url, timeout=60)
    assert client.generate("One, two,", merged_adapters=adapters, max_new_tokens=8).generated_text


@action(LORAX, "generate with a schema")
def generate_schema(server):
    client = lorax.Client(server.url, timeout=60)
    form = {"type": "json_object", "schema": SCHEMA}
    answer = client.generate("A lantern: ", response_format=form, max_new_tokens=100)
    assert set(json.loads(answer.generated_text)) == set(SCHEMA["properties"])


@action(LORAX, "generate with an adapter that does not exist", refused=True)
def unknown_adapter(server):
    client = lorax.Client(server.url, timeout=60)
    error = raises(Exception, lambda: client.generate("One", adapter_id="nope", max_new_tokens=2))
    assert type(error).__module__ == "lorax.errors", error
    return contains(str(error), "nope")
