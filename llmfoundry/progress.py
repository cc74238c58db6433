"""Progress of long jobs on stderr: a bar on a terminal that can move its cursor, otherwise a line every ten seconds.

Off a terminal, jobs that end within ten seconds print nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

Unit = Literal["bytes", "tokens", "samples"]
SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Called with the amount that was done and the number of tokens that were made."""

    def __call__(self, amount: int, tokens: int = 0) -> None: ...


@dataclass
class Meter:
    """The amount done so far, and the speed."""

    title: str
    total: int | None
    unit: Unit
    done: int = 0
    tokens: int = 0  # that were made on the way
    start: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        """E.g. `tokenizing texts: 120 of 800 MB, 10.2 MB/s, 1:06 left`."""
        seconds = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / seconds
        scale, name = (1e6, "MB") if self.unit == "bytes" else (1.0, self.unit)
        of = f" of {self.total / scale:,.0f}" if self.total else ""
        text = f"{self.title}: {self.done / scale:,.0f}{of} {name}, {rate / scale:,.{int(scale > 1)}f} {name}/s"
        if self.tokens:
            text += f", {self.tokens / seconds:,.0f} tokens/s"
        if self.total and rate:
            left = round(max(self.total - self.done, 0) / rate)
            text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text


@contextmanager
def progress(title: str, total: int | None, unit: Unit, *, bar: bool = True) -> Iterator[Advance]:
    """Show the progress of the block, which calls the function it gets with the amount done since the last call.

    Args:
        title: what is being done, e.g. "tokenizing texts".
        total: the amount to do, possibly estimated; None: unknown.
        bar: whether a terminal shows a bar; False if it may already show another one.
    """
    meter = Meter(title, total, unit)
    console = Console(file=sys.stderr)
    if bar and sys.stderr.isatty() and not console.is_dumb_terminal:
        with Progress(TextColumn("{task.description}"), BarColumn(), console=console, transient=True) as shown:
            task = shown.add_task(str(meter), total=total)

            def advance(amount: int, tokens: int = 0) -> None:
                meter.done += amount
                meter.tokens += tokens
                shown.update(task, completed=meter.done, description=str(meter))

            yield advance
        return
    last = meter.start

    def count(amount: int, tokens: int = 0) -> None:
        nonlocal last
        meter.done += amount
        meter.tokens += tokens
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            print(meter, file=sys.stderr, flush=True)
            last = time.monotonic()

    yield count
