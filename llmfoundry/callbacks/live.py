"""The live view of a run on a terminal: progress, time left, loss, speed, memory, load of the experts.

It is drawn between two steps, at most twice a second, and so rarely that drawing takes less than COST of the time.
"""

from __future__ import annotations

import datetime
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

COST = 0.004  # fraction of the run time
INTERVAL = 0.5  # minimum seconds between redraws
LEVELS, ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
FRAMED = (60, 16)  # minimum columns and rows for a frame
ECHO = 3  # columns kept free at the right: a terminal echoes ^C there, which must not wrap
KEPT = 2048  # maximum number of points, each the mean of equally many steps


class Now(NamedTuple):
    """The state of a run after a step, as the view shows it."""

    step: int
    total: int | None  # steps; None: unknown
    seconds_left: float | None
    loss: float | None = None
    validation: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None  # fraction of the peak
    memory: float | None = None  # bytes, at the peak
    memory_total: float | None = None  # bytes of the GPU
    load: Sequence[float] = ()  # (E,) share of each expert, averaged over layers; empty: dense model
    least: float | None = None  # lowest load of any expert of any layer; 1 is the even load
    most: float | None = None


class Losses:
    """The losses of a run, thinned to a bounded number of means over equally many steps."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self._each, self._sum, self._n = 1, 0.0, 0  # steps per mean; sum and count of the current mean

    def add(self, loss: float) -> None:
        """Add one step's loss; a loss that is not finite is left out."""
        if not math.isfinite(loss):
            return
        self._sum, self._n = self._sum + loss, self._n + 1
        if self._n < self._each:
            return
        self.means.append(self._sum / self._n)
        self._sum, self._n = 0.0, 0
        if len(self.means) == KEPT:
            self.means = [(a + b) / 2 for a, b in zip(self.means[::2], self.means[1::2], strict=True)]
            self._each *= 2

    def recent(self) -> list[float]:
        """Return the losses of the last half of the steps."""
        return self.means[len(self.means) // 2 :]


class LiveView:
    """Draws the view. Between `start` and `stop`, log lines are printed above it."""

    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self.losses = Losses()
        # If stderr is the same terminal, other output would overwrite the view.
        on_terminal = sys.stderr.isatty()
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=on_terminal)
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []
        self._busy, self._waiting = False, deque[str]()  # lines that arrived while drawing
        self._due = 0.0

    def start(self) -> None:
        """Start drawing."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr and sys.stderr.isatty():
                self._handlers.append((handler, sys.stderr))
                handler.setStream(cast(TextIO, _Above(self)))
        self._live.start()

    def print(self, text: str) -> None:
        """Print a line above the view.

        Signals are logged by their handler, which may run while a line or the view is half written; then the line is
        printed later.
        """
        self._waiting.append(text)
        if not self._busy:
            with self._writing():
                pass

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._busy = True
        try:
            yield
            while self._waiting:
                self._console.print(self._waiting.popleft(), markup=False)
        finally:
            self._busy = False

    def is_due(self) -> bool:
        """Return whether it is time to draw again."""
        return time.perf_counter() >= self._due

    def draw(self, now: Now) -> None:
        """Draw the current state of a run."""
        start = time.perf_counter()
        width, height = self._console.size
        ascii_only = self._console.options.ascii_only
        drawn = picture(now, self.losses.recent(), self._title, width, height, ascii_only)
        with self._writing():
            self._live.update(drawn, refresh=True)
        end = time.perf_counter()
        self._due = end + pause(end - start)

    def stop(self) -> None:
        """Erase the view and restore the terminal."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        with self._writing():
            self._live.stop()


class _Above:
    """A stream that prints log lines above the view."""

    def __init__(self, view: LiveView) -> None:
        self._view = view

    def write(self, text: str) -> None:
        self._view.print(text.removesuffix("\n"))

    def flush(self) -> None:
        """Do nothing: lines are written at once."""


def pause(cost: float) -> float:
    """Seconds to wait after drawing, which took `cost` seconds."""
    return max(INTERVAL, cost / COST)


def picture(
    now: Now, losses: Sequence[float], title: str, width: int, height: int, ascii_only: bool = False
) -> RenderableType:
    """Return the view for a terminal of `width` columns and `height` rows. Lines are shorter; three rows stay free."""
    framed = width >= FRAMED[0] and height >= FRAMED[1]
    width -= ECHO
    inner = width - 4 if framed else width
    rows = list(_rows(now, losses, inner, LEVELS if not ascii_only else ASCII_LEVELS))[: max(1, height - 3)]
    return Panel(Group(*rows), title=Text(title[: inner - 4]), width=width) if framed else Group(*rows)


def _rows(now: Now, losses: Sequence[float], width: int, levels: str) -> Iterable[RenderableType]:
    left = f"  {datetime.timedelta(seconds=round(now.seconds_left))} left" if now.seconds_left is not None else ""
    total = now.total or max(1, now.step)
    share = f" {now.step / total:.0%}" if now.total else ""
    counted = f" {now.step:,}/{now.total:,} {share}" if now.total else f" {now.step:,}"
    counted = next((text for text in (counted + left, share + left, share) if len(text) + 8 <= width), share)
    bar, done = Table.grid(), now.step if now.total else 0
    bar.add_row(
        ProgressBar(total, done, width=max(4, width - len(counted)), complete_style="green"),
        Text(counted, no_wrap=True),
    )
    yield bar
    if now.loss is not None:
        texts = [f"loss {now.loss:.4f}"] + ([f"validation {now.validation:.4f}"] if now.validation is not None else [])
        yield _with_spark(texts, width, lambda room: Text(spark(losses, room, levels), "cyan"))
    facts = []
    if now.tokens_per_second is not None:
        facts.append(f"{now.tokens_per_second:,.0f} tokens/s")
    if now.mfu is not None:
        facts.append(f"MFU {now.mfu:.1%}")
    if now.memory is not None:
        of = f" of {now.memory_total / 1e9:.0f}" if now.memory_total else ""
        facts.append(f"memory {now.memory / 1e9:.1f}{of} GB")
    while len("  ".join(facts)) > width:
        facts.pop()
    if facts:
        yield Text("  ".join(facts))
    if now.load:
        texts = ["experts"]
        if now.least is not None and now.most is not None:
            texts = [f"experts {now.least:.2f} to {now.most:.2f}", "of an even load"]
        yield _with_spark(texts, width, lambda room: balance(now.load, room, levels))


def _with_spark(texts: Sequence[str], width: int, drawn: Callable[[int], Text]) -> Text:
    """As many of the texts as fit beside a sparkline of at least eight characters, which takes the rest of the line."""
    words = texts[0]
    for text in texts[1:]:
        if len(words) + len(text) + 12 <= width:
            words += f"  {text}"
    room = width - len(words) - 2
    line = Text(words, no_wrap=True, overflow="ellipsis")
    return line.append("  ").append_text(drawn(room)) if room >= 4 else line


def spark(values: Sequence[float], width: int, levels: str = LEVELS) -> str:
    """Return a sparkline of at most `width` characters, each the mean of a few values, and the range at both ends."""
    n = min(width, len(values))
    edges = [round(i * len(values) / n) for i in range(n + 1)] if n else [0]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((mean - low) * scale)] for mean in means)


def balance(load: Sequence[float], width: int, levels: str = LEVELS) -> Text:
    """Return a bar for each expert: half height for an even load, full height for twice that, red for extremes.

    If there are too many experts, neighbours share a bar, which shows the load that is furthest from even.
    """
    relative = [share * len(load) / max(sum(load), 1e-9) for share in load]
    each = -(-len(load) // width)
    bars = Text()
    for start in range(0, len(load), each):
        value = max(relative[start : start + each], key=lambda share: abs(math.log(max(share, 1e-3))))
        style = "green" if 0.5 <= value <= 2 else "yellow" if 0.1 <= value <= 4 else "red"
        bars.append(levels[min(round(value / 2 * (len(levels) - 1)), len(levels) - 1)], style)
    return bars
