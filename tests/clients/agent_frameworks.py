"""Instructor and pydantic-ai: structured output and agents over OpenAI's client."""

import warnings

import instructor
import openai
import pydantic_ai
import pydantic_ai.models.openai
import pydantic_ai.providers.openai
import pydantic_ai.settings
from record import MESSAGES, QUESTION, WEATHER, Lantern, action

INSTRUCTOR, PYDANTIC_AI = "instructor", "pydantic-ai-slim"


def patched(server, mode: instructor.Mode):
    client = openai.OpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return instructor.from_openai(client, mode=mode)


def extract(server, mode: instructor.Mode, **fields):
    """A lantern out of one chat."""
    return patched(server, mode).chat.completions.create(
        model=server.adapter,
        messages=MESSAGES,
        response_model=Lantern,
        max_retries=0,
        max_tokens=100,
        temperature=0,
        **fields,
    )


for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):

    @action(INSTRUCTOR, f"create with a response model, {mode.name}")
    def create(server, mode=mode):
        assert isinstance(extract(server, mode), Lantern)


@action(INSTRUCTOR, "create with a response model, MD_JSON and a schema for the server")
def markdown(server):
    # This mode only asks for the schema in words.
    schema = {"structured_outputs": {"json": Lantern.model_json_schema()}}
    assert isinstance(extract(server, instructor.Mode.MD_JSON, extra_body=schema), Lantern)


@action(INSTRUCTOR, "create_partial, stream")
def partial(server):
    client = patched(server, instructor.Mode.JSON_SCHEMA)
    parts = list(
        client.chat.completions.create_partial(
            model=server.adapter,
            messages=MESSAGES,
            response_model=Lantern,
            max_retries=0,
            max_tokens=100,
            temperature=0,
        )
    )
    assert parts[-1].colour in ("red", "green", "blue") and parts[-1].lit is not None, parts[-1]


def agent(server, **fields) -> pydantic_ai.Agent:
    provider = pydantic_ai.providers.openai.OpenAIProvider(base_url=server.v1, api_key=server.key)
    model = pydantic_ai.models.openai.OpenAIChatModel(server.adapter, provider=provider)
    settings = pydantic_ai.settings.ModelSettings(max_tokens=100, temperature=0, parallel_tool_calls=False)
    return pydantic_ai.Agent(model, model_settings=settings, retries=0, **fields)


@action(PYDANTIC_AI, "run an agent")
def run(server):
    result = agent(server, instructions="Be brief.").run_sync(QUESTION)
    assert result.output and result.usage.output_tokens > 0


@action(PYDANTIC_AI, "run an agent, stream")
def run_stream(server):
    result = agent(server).run_stream_sync(QUESTION)
    parts = list(result.stream_text(delta=True, debounce_by=None))
    assert len(parts) > 1 and "".join(parts) == agent(server).run_sync(QUESTION).output


@action(PYDANTIC_AI, "structured output by a tool call")
def tool_output(server):
    assert isinstance(agent(server, output_type=pydantic_ai.ToolOutput(Lantern)).run_sync(QUESTION).output, Lantern)


@action(PYDANTIC_AI, "structured output by response_format")
def native_output(server):
    assert isinstance(agent(server, output_type=pydantic_ai.NativeOutput(Lantern)).run_sync(QUESTION).output, Lantern)


@action(PYDANTIC_AI, "an agent with a tool")
def tool(server):
    helper = agent(server, output_type=pydantic_ai.ToolOutput(Lantern))
    seen = []

    @helper.tool_plain
    def forecast(city: str, days: int) -> str:
        """Weather forecast for a city."""
        seen.append((city, days))
        return "Sunny."

    limits = pydantic_ai.UsageLimits(request_limit=3)
    try:
        result = helper.run_sync(WEATHER[0]["content"], usage_limits=limits)
    except pydantic_ai.UsageLimitExceeded:
        # A weak model may ask for the weather for ever: each call came through with valid arguments.
        assert len(seen) >= 3, seen
    else:
        assert isinstance(result.output, Lantern)
