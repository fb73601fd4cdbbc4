"""OpenAI's Agents SDK, over chats and over responses."""

import asyncio

import agents
import openai
from record import QUESTION, WEATHER, Lantern, action

NAME = "openai-agents"
agents.set_tracing_disabled(True)


def openai_agent(server, responses=False, tool_choice=None, **fields) -> agents.Agent:
    client = openai.AsyncOpenAI(base_url=server.v1, api_key=server.key, max_retries=0, timeout=60)
    kind = agents.OpenAIResponsesModel if responses else agents.OpenAIChatCompletionsModel
    settings = agents.ModelSettings(
        max_tokens=100, temperature=0, tool_choice=tool_choice, parallel_tool_calls=False if tool_choice else None
    )
    return agents.Agent(
        name="helper", model=kind(model=server.adapter, openai_client=client), model_settings=settings, **fields
    )


@action(NAME, "run an agent over chats")
def run(server):
    result = agents.Runner.run_sync(openai_agent(server), QUESTION)
    assert result.final_output and result.raw_responses[0].usage.output_tokens > 0


@action(NAME, "run an agent over chats, stream")
def stream(server):
    async def main():
        result = agents.Runner.run_streamed(openai_agent(server), QUESTION)
        return [event.type async for event in result.stream_events()], result.final_output

    kinds, output = asyncio.run(main())
    assert "raw_response_event" in kinds and output


@action(NAME, "structured output")
def structured(server):
    assert isinstance(agents.Runner.run_sync(openai_agent(server, output_type=Lantern), QUESTION).final_output, Lantern)


@action(NAME, "an agent with a tool")
def tool(server):
    seen = []

    @agents.function_tool
    def forecast(city: str, days: int) -> str:
        """Weather forecast for a city."""
        seen.append((city, days))
        return "Sunny."

    helper = openai_agent(server, tools=[forecast], tool_choice="required")
    # The tool's result goes back, and the model may then answer freely.
    result = agents.Runner.run_sync(helper, WEATHER[0]["content"], max_turns=4)
    assert seen and result.final_output is not None


@action(NAME, "run an agent over responses")
def responses(server):
    assert agents.Runner.run_sync(openai_agent(server, responses=True), QUESTION).final_output
