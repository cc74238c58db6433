"""The fenced blocks of README.md and docs/: what a reader copies."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "yaml", "json", "text", "diff"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)$")


class Block(NamedTuple):
    """One fenced block, its indentation taken off."""

    page: Path
    line: int  # of its opening fence, counted from 1
    language: str
    text: str


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Those of a page, in order."""
    return [block for block in _blocks(page) if language in (None, block.language)]


def commands(block: Block) -> list[str]:
    """The command lines of a bash block; lines that end with a backslash go on, comments stay."""
    joined = block.text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _blocks(page: Path) -> Iterator[Block]:
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if (fence := _FENCE.match(line)) is None:
            continue
        inside, end = [], f"{fence['indent']}```"
        for _, line in lines:
            if line == end:
                break
            inside.append(line.removeprefix(fence["indent"]))
        else:
            raise AssertionError(f"{page.name}:{number}: the block is not closed")
        yield Block(page, number, fence["language"], "".join(f"{line}\n" for line in inside))
