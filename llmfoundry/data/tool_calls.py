"""Tool calls in the form that a chat template reads.

OpenAI writes the arguments of a call as a JSON string. Most templates expect a mapping and write the JSON themselves;
some expect the string. Rendering a call shows what a template accepts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llmfoundry.data.conversations import Message
from llmfoundry.data.tables import Row

_ARGUMENTS = {"city": "Bern"}
_ID = "abcdefghi"  # nine letters and digits, as Mistral's templates require


class Arguments(NamedTuple):
    """The forms of a call's arguments that a template renders; neither, if it renders no calls."""

    text: bool
    mapping: bool


def understood(render: Callable[[Sequence[Message]], str]) -> Arguments:
    """Find the forms that a template accepts.

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
    # Rejects text that is JSON-encoded twice, and mappings in Python's notation.
    return "city" in text and '\\"city\\"' not in text and "'city'" not in text


def in_form(messages: Sequence[Message], arguments: Arguments) -> list[Message]:
    """Convert the arguments of calls to a form that the template accepts.

    Raises:
        ValueError: if arguments are not a JSON mapping, and the template needs one.
    """
    if arguments.text == arguments.mapping:  # it accepts both, or neither
        return list(messages)
    return [
        message | {"tool_calls": [_changed(call, arguments.text, number) for call in _calls(message)]}
        if _calls(message)
        else message
        for number, message in enumerate(messages)
    ]


def leaves_out_calls(messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str]) -> bool:
    """Return whether a template renders messages with calls exactly as without them.

    Args:
        text: the rendered messages.
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
