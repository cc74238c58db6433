"""Calls of tools in the form that a chat template reads.

OpenAI writes the arguments of a call as a text of JSON. Most templates take a mapping and write the JSON themselves;
some take the text alone. What a template takes is seen by rendering a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmfoundry.data.conversations import Message
from llmfoundry.data.tables import Row

_ARGUMENTS = {"city": "Bern"}
_ID = "abcdefghi"  # of nine letters and digits, as Mistral's templates ask


class Arguments(NamedTuple):
    """Which forms of a call's arguments a template writes; neither, if it writes no calls."""

    text: bool
    mapping: bool


def understood(render: Callable[[Sequence[Message]], str]) -> Arguments:
    """The forms that a template takes.

    Args:
        render: raises a ValueError for messages that the template refuses.
    """
    return Arguments(*(_is_written(render, form) for form in (json.dumps(_ARGUMENTS), _ARGUMENTS)))


def _is_written(render: Callable[[Sequence[Message]], str], arguments: object) -> bool:
    call = {"id": _ID, "type": "function", "function": {"name": "weather", "arguments": arguments}}
    try:
        text = render(
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]},
             {"role": "tool", "name": "weather", "tool_call_id": _ID, "content": "x"}]
        )  # fmt: skip
    except ValueError:
        return False
    # A text that is written as JSON once more, and a mapping as Python prints it.
    return "city" in text and '\\"city\\"' not in text and "'city'" not in text


def in_form(messages: Sequence[Message], arguments: Arguments) -> list[Message]:
    """The messages with the arguments of their calls in a form that the template takes.

    Raises:
        ValueError: arguments are no JSON of a mapping, and the template needs one.
    """
    if arguments.text == arguments.mapping:  # it takes both, or neither
        return list(messages)
    return [
        message | {"tool_calls": [_changed(call, arguments.text, number) for call in _calls(message)]}
        if _calls(message)
        else message
        for number, message in enumerate(messages)
    ]


def leaves_out_calls(messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template renders messages with calls as it renders them without.

    Args:
        text: of the messages.
        render: renders other messages.
    """
    for number, message in enumerate(messages):
        if _calls(message):
            without = {key: value for key, value in message.items() if key != "tool_calls"}
            if render([*messages[:number], {"content": ""} | without, *messages[number + 1 :]]) == text:
                return True
    return False


def _calls(message: Message) -> list[object]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _changed(call: object, as_text: bool, number: int) -> object:
    if not isinstance(call, dict):
        return call
    inner = call.get("function")
    if isinstance(inner, dict):
        return call | {"function": _changed(inner, as_text, number)}
    given = call.get("arguments")
    if as_text and isinstance(given, dict):
        return call | {"arguments": json.dumps(given, ensure_ascii=False)}
    if not as_text and isinstance(given, str):
        return call | {"arguments": _mapping(given, number)}
    return call


def _mapping(text: str, number: int) -> Row:
    try:
        found = json.loads(text) if text.strip() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"message {number}: arguments of a tool call must be JSON of a mapping, found {text!r:.60}")
    return found
