"""The register of what clients do, and what its functions share."""

import dataclasses
import importlib.metadata
import json
import typing

import pydantic

ACTIONS: list["Action"] = []

WORKS, REFUSED, FAILS = "works", "refused by name", "fails"


@dataclasses.dataclass(frozen=True)
class Action:
    """One thing that people do with a client."""

    client: str
    """Name of the distribution on PyPI."""
    what: str
    run: typing.Callable[["Server"], str | None]
    """Raises if the client does not get what it expects. Returns a note; for a refusal, the server's message."""
    refused: bool
    """Whether the right outcome is a refusal that names the field or the route."""

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.client)


def action(client: str, what: str, refused: bool = False):
    """Registers the function as something that is done with `client`."""

    def register(run):
        ACTIONS.append(Action(client, what, run, refused))
        return run

    return register


@dataclasses.dataclass(frozen=True)
class Server:
    """The server under test."""

    url: str
    """Without `/v1`."""
    base: str
    """Name of the base model."""
    adapter: str
    """Name of an adapter that is loaded."""
    key: str = "unused"

    @property
    def v1(self) -> str:
        return self.url + "/v1"


def contains(message: str, *words: str) -> str:
    """Returns a refusal's message after a check that it names what it should."""
    missing = [word for word in words if word not in message]
    assert not missing, f"the message does not name {missing}: {message}"
    return message


def raises(kind: type[Exception], call: typing.Callable[[], object]):
    """The error that a call ends with."""
    try:
        result = call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}, but {result!r}")


QUESTION = 'Define the noun "lantern".'
MESSAGES = [{"role": "user", "content": QUESTION}]


class Lantern(pydantic.BaseModel):
    """A lantern."""

    # Every value is bounded: a small model finishes it within few tokens.
    colour: typing.Literal["red", "green", "blue"]
    weight: int = pydantic.Field(ge=0, le=99, description="in kilograms")
    lit: bool


CITIES = ["Oslo", "Rome", "Lima"]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": CITIES},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
FUNCTION = {"name": "forecast", "description": "Weather forecast for a city.", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
OTHER_TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "Local time in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": CITIES}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
WEATHER = [{"role": "user", "content": "What is the weather in Oslo for the next 3 days?"}]


def check_forecast(arguments: str | dict) -> None:
    """The arguments of a call of `forecast` match its schema."""
    values = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(values) == {"city", "days"}, values
    assert values["city"] in CITIES and isinstance(values["days"], int) and 1 <= values["days"] <= 9, values
