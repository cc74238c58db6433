"""Read rows of a table as conversations, in the formats in which chats and instructions are published.

A row becomes a list of messages in OpenAI's format, which the tokenizer's chat template renders, or a prompt and a
response, which are concatenated unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np

from llmfoundry.data import functions
from llmfoundry.data.foundry_tasks import TASKS
from llmfoundry.data.tables import Row

Message = dict[str, object]  # role, content, and other fields that the template reads

# ShareGPT's names of the speakers, in lowercase.
_SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "ai": "assistant",
    "bot": "assistant", "function_call": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# Columns that identify a format, in the order in which they are checked. Chats often have a column `turns` that counts.
FORMATS = {
    "messages": ("messages",),
    "ShareGPT": ("conversations",),
    "WildChat": ("conversation",),
    "prompt and response": ("prompt", "response"),
    "prompt and completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "turns of ids": ("turns",),
    "ids": ("input_ids", "labels"),
}
_IDENTIFYING = {column for columns in FORMATS.values() for column in columns}


class Conversation(NamedTuple):
    """One example as messages."""

    messages: list[Message]
    tools: list[Row] | None = None  # JSON schemas
    template: Row = {}  # further arguments of the chat template


class Pair(NamedTuple):
    """A prompt and its response, which are concatenated unchanged."""

    prompt: str
    response: str


class Tokenized(NamedTuple):
    """Turns of a prompt and an answer as token ids."""

    turns: list[tuple[list[int], list[int]]]


Example = Conversation | Pair | Tokenized
Preprocess = Callable[[Row], Row]


def example_of(row: Row) -> Example:
    """Read the example in a row.

    Raises:
        ValueError: if the row is not an example; the message says what is wrong with it.
    """
    present = {key: value for key, value in row.items() if value is not None}
    for columns in FORMATS.values():
        if all(column in present for column in columns):
            return _of_format(columns, present)
    if {"chosen", "rejected"} <= present.keys():
        raise ValueError("has the columns chosen and rejected; for such pairs, set name: preferences in the loader")
    known = "; ".join(f"{name}: {', '.join(columns)}" for name, columns in FORMATS.items())
    raise ValueError(
        f"has the columns {', '.join(row)}, which match no known format ({known}); name them in preprocessing_fn"
    )


def _of_format(columns: tuple[str, ...], row: Row) -> Example:
    first, second = row[columns[0]], row[columns[-1]]
    if columns[-1] in ("turns", "labels"):
        return tokenized(first if columns == ("turns",) else [{"input_ids": first, "labels": second}])
    if columns[0] == "messages":
        return conversation(messages_of(first), row)
    if columns[0] in ("conversations", "conversation"):
        turns = _turns(first)
        if all("role" in turn and "from" not in turn for turn in turns):
            return conversation(messages_of(turns), row)
        return conversation([_of_speaker(turn) for turn in turns], row)
    if columns[0] == "prompt" and not (isinstance(first, str) and isinstance(second, str)):
        return conversation(
            [
                *messages_of(_as_turns(first, "user", columns[0])),
                *messages_of(_as_turns(second, "assistant", columns[1])),
            ],
            row,
        )
    if columns[0] == "prompt":
        return Pair(cast(str, first), cast(str, second))
    task, answer = _text(first, columns[0]), _text(second, columns[1])
    more = next((_text(row[key], key) for key in ("input", "context") if row.get(key)), "")
    user = f"{task}\n\n{more}" if more else task
    last: list[Message] = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return conversation([*_history(row.get("history")), *last], row)


def tokenized(turns: object) -> Tokenized:
    """Read turns that LLM Foundry's convert_finetuning_dataset has tokenized.

    Raises:
        ValueError: if a turn is not lists of token ids.
    """
    found = []
    for number, turn in enumerate(_turns(turns)):
        ids = [_ids(turn.get(key), f"turn {number}: {key}") for key in ("input_ids", "labels")]
        found.append((ids[0], ids[1]))
    return Tokenized(found)


def _ids(value: object, where: str) -> list[int]:
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list) or not all(isinstance(each, int) and each >= 0 for each in value):
        raise ValueError(f"{where}: must be a list of token ids, found {value!r:.60}")
    return value


def _history(pairs: object) -> list[Message]:
    """Return the turns before an instruction, from a list of (user, assistant) pairs."""
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"history: must be a list of pairs of texts, found {pairs!r:.80}")
    return [{"role": role, "content": _text(said, "history")}
            for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip


def _text(value: object, column: str) -> str:
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise ValueError(f"{column}: must be text, found {value!r:.80}")
    return str(value)


def _as_turns(value: object, role: str, column: str) -> object:
    if not isinstance(value, str | list):
        raise ValueError(f"{column}: must be a text or a list of turns, found {value!r:.80}")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def conversation(messages: list[Message], row: Row) -> Conversation:
    """Build a conversation from messages and the row's other keys.

    Raises:
        ValueError: if no turn is the assistant's, or another key of the row has the wrong type.
    """
    system, template = row.get("system"), row.get("chat_template_kwargs") or {}
    if not isinstance(system, str | None):
        raise ValueError(f"system: must be text, found {system!r:.60}")
    if not isinstance(template, dict):
        raise ValueError(f"chat_template_kwargs: must be a mapping, found {template!r:.60}")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    for number, message in enumerate(messages):
        if message.get("weight", 1) not in (0, 1):
            raise ValueError(f"message {number}: weight must be 0 (not learned) or 1, found {message['weight']!r:.60}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("has no turn of the assistant, so there is nothing to learn")
    return Conversation(messages, _tools(row.get("tools")), template)


def _tools(tools: object) -> list[Row] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise ValueError(f"tools: is not JSON: {tools!r:.60}") from None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools: is a {type(tools).__name__}, not a list of JSON schemas")
    return tools or None


def _turns(turns: object) -> list[Row]:
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)  # a cell of a .csv file, or a JSON column
        except ValueError:
            raise ValueError(f"is a text, not a list of turns: {turns!r:.60}") from None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"must be a list of turns, found {turns!r:.80}")
    return turns


def messages_of(turns: object) -> list[Message]:
    messages = [{key: value for key, value in turn.items() if value is not None} for turn in _turns(turns)]
    if any("function_call" in message for message in messages):
        messages = [_of_function(message) for message in messages]
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"message {number}: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
        if not isinstance(calls := message.get("tool_calls", []), list):
            raise ValueError(f"message {number}: tool_calls must be a list, found {calls!r:.60}")
        if "content" not in message and not calls:
            raise ValueError(f"message {number}: has neither content nor tool_calls")
        if isinstance(message.get("content"), list):
            message["content"] = _joined(cast(list[object], message["content"]), number)
        if not isinstance(message.get("content", ""), str):
            raise ValueError(f"message {number}: content must be text, found {message['content']!r:.60}")
    return messages


def _of_function(message: Message) -> Message:
    """Convert a message in OpenAI's format of 2023: `function_call`, answered by the role `function`."""
    call = message.get("function_call")
    if call is not None:
        if not isinstance(call, dict) or "name" not in call:
            raise ValueError(f"function_call: must have name and arguments, found {call!r:.80}")
        kept = {key: value for key, value in message.items() if key != "function_call"}
        return {"content": "", **kept, "tool_calls": [{"type": "function", "function": call}]}
    return message | {"role": "tool"} if message.get("role") == "function" else message


def _joined(parts: list[object], number: int) -> str:
    """Join the parts of a content list into one text; templates for plain text would print the Python list."""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"message {number}: has a part of type {kind}; only text is read")
    return "".join(str(part["text"]) for part in parts if isinstance(part, dict))


def _of_speaker(turn: Row) -> Message:
    speaker = turn.get("from")
    said = next((turn[key] for key in ("value", "text", "content") if turn.get(key) is not None), None)
    role = _SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(said, str):
        known = ", ".join(_SPEAKERS)
        raise ValueError(f"a turn must have from ({known}) and value, found {turn!r:.80}")
    kept = {key: turn[key] for key in ("weight",) if turn.get(key) is not None}
    if str(speaker).lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(said)} | kept
    return {"role": role, "content": said} | kept


def _calls(said: str) -> list[Row]:
    """Parse the tool calls in a `function_call` turn: JSON of one or several calls, each with name and arguments."""
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise ValueError(f"function_call: must be JSON with name and arguments, found {said!r:.80}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls]  # fmt: skip


def preprocess(given: str | Mapping[str, str] | None) -> Preprocess:
    """Return the function that `preprocessing_fn` stands for.

    It may be a mapping from the known column names to the data's, a dataset of `foundry_tasks.TASKS`, or
    `package.module:function`, which is also looked for in the working directory and in the files of `code_paths`.

    Raises:
        ConfigError: if the function does not exist.
    """
    if given is None:
        return lambda row: row
    if isinstance(given, str) and given in TASKS:
        return TASKS[given]
    if isinstance(given, str):
        return functions.imported(given, "preprocessing_fn")
    names = dict(given)
    others = set(names.values())
    if any(names.keys() >= set(columns) for columns in FORMATS.values()):
        others |= _IDENTIFYING  # the mapping says which format the row has

    def rename(row: Row) -> Row:
        missing = next((name for name in names.values() if name not in row), None)
        if missing is not None:
            raise ValueError(f"has no column {missing!r}, which preprocessing_fn names; it has {', '.join(row)}")
        kept = {key: value for key, value in row.items() if key not in others}
        return kept | {key: row[name] for key, name in names.items()}

    return rename


def code_of(given: str | Mapping[str, str] | None) -> str:
    """Return what decides the result of `preprocess`: the mapping itself, or the file that defines the function."""
    if not isinstance(given, str) or given in TASKS:
        return json.dumps(given)
    return functions.code_of(given, "preprocessing_fn")
