"""The prompts of `generate`, from the command line and from files, and its results as JSON lines."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from llmfoundry.config import ConfigError, reason
from llmfoundry.strict_json import parse_json

if TYPE_CHECKING:
    from llmfoundry.data.conversations import Message
    from llmfoundry.eval.generate_many import Completion

log = logging.getLogger(__name__)

Row = dict[str, object]  # `prompt`, a text, or `messages`, a conversation; and the line's other fields


def read_prompts(path: Path) -> list[Row]:
    """Read the prompts of a file: each line of a .txt, or each line of a .jsonl with `prompt` or `messages`.

    Raises:
        ConfigError: if the file cannot be read, or a line has neither key.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts: {path}: must be a .txt with a prompt per line, or a .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {reason(error)}") from None
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if line.strip():
            rows.append({"prompt": line} if path.suffix == ".txt" else _row(line, f"--prompts: {path}, line {number}"))
    if not rows:
        raise ConfigError(f"--prompts: {path}: holds no prompt")
    if empty := len(lines) - len(rows) - (not lines[-1]):
        log.info("%s: %d empty %s left out", path, empty, "line is" if empty == 1 else "lines are")
    return rows


def prompt_of(row: Row) -> str | list[Message]:
    """Return the text or the conversation in a row."""
    return cast("str | list[Message]", row["prompt"] if row.get("prompt") is not None else row["messages"])


def read_template(path: Path | None) -> str | None:
    """Read a chat template from a file; raise ConfigError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if path is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template: {path} cannot be read: {reason(error)}") from None


def _row(line: str, where: str) -> Row:
    try:
        row = cast(Row, parse_json(line))
    except ValueError as error:
        raise ConfigError(f"{where}: is not valid JSON: {error}") from None
    found = [key for key in ("prompt", "messages") if isinstance(row, dict) and row.get(key) is not None]
    if len(found) != 1:
        raise ConfigError(f"{where}: must be a mapping with either `prompt` or `messages`")
    value = row[found[0]]
    if found == ["prompt"] and not isinstance(value, str):
        raise ConfigError(f"{where}: prompt must be a text")
    if found == ["messages"] and not (isinstance(value, list) and value and all(isinstance(m, dict) for m in value)):
        raise ConfigError(f"{where}: messages must be a list of mappings with role and content")
    return row


def check_output(path: Path) -> None:
    """Refuse a file that cannot be written, before hours of work; raise ConfigError."""
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--output: {path} cannot be written: {path.parent} must be a folder, and {path} a file")


def write_completions(path: Path, rows: Sequence[Row], completions: Iterable[Completion]) -> None:
    """Write each prompt's line with `completion`, `finish_reason` and `tokens` added, as they are completed.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", buffering=1) as file:
            for row, one in zip(rows, completions, strict=True):
                added = {"completion": one.text, "finish_reason": one.finish, "tokens": one.tokens}
                file.write(json.dumps(row | added, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"--output: {path} cannot be written: {error.strerror}") from None
