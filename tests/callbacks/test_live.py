"""The live view: what it shows at any size, how seldom it is drawn, and how a real terminal looks with and after it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from llmfoundry.callbacks.console import line
from llmfoundry.callbacks.live import COST, INTERVAL, KEPT, LEVELS, Losses, Now, balance, pause, picture, spark
from tests.callbacks.conftest import tiny_run

BUSY = Now(123_456, 9_999_999, 98_765.0, 3.2145, 3.31, 94_954.3, 0.408, 68.3e9, 79.6e9, [1 / 64] * 64, 0.03, 4.5)


def shown(now: Now, width: int, height: int, losses: list[float] | None = None) -> list[str]:
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        console.print(
            picture(now, losses if losses is not None else [3.0, 2.0, 1.0] * 99, "a name " * 9, width, height)
        )
    return capture.get().splitlines()


@pytest.mark.parametrize(("width", "height"), [(200, 50), (80, 24), (60, 16), (59, 16), (40, 10), (20, 6), (12, 4)])
def test_the_picture_fits_any_terminal(width: int, height: int) -> None:
    lines = shown(BUSY, width, height)
    assert len(lines) <= max(1, height - 3) and max(map(len, lines)) <= width - 2, "^C has room"
    assert any("1%" in line for line in lines)


def test_a_wide_terminal_shows_all() -> None:
    text = "\n".join(shown(BUSY, 100, 24))
    for part in ("123,456/9,999,999  1%  1 day, 3:26:05 left", "loss 3.2145  validation 3.3100", "94,954 tokens/s",
                 "MFU 40.8%", "memory 68.3 of 80 GB", "experts 0.03 to 4.50", LEVELS[4]):  # fmt: skip
        assert part in text, part


def test_a_dense_model_on_a_cpu_shows_what_there_is() -> None:
    text = "\n".join(shown(Now(1, 10, None, 5.0, memory=2e9), 80, 24))
    assert "memory 2.0 GB" in text and not re.search("experts|MFU|left|validation", text)


def test_a_run_by_the_clock_shows_its_steps_before_it_can_estimate_them() -> None:
    text = "\n".join(shown(Now(1, None, None, 5.0), 80, 24))
    assert " 1" in text and not re.search("/|%", text)
    assert line({"step": 1, "tokens": 64}, None) == "step 1  64 tokens"
    assert line({"step": 1, "tokens": 64}, 100) == "step   1/100  64 tokens"


def test_the_spark_spans_its_levels() -> None:
    assert spark([float(i) for i in range(8)], 8) == LEVELS
    assert spark([4.0, 4.0, 2.0, 2.0], 2) == LEVELS[7] + LEVELS[0]
    assert spark([1.0] * 5, 40) == LEVELS[0] * 5 and spark([], 40) == ""


def test_extremes_show_where_experts_share_a_bar() -> None:
    even = balance([0.25] * 4, 4)
    assert even.plain == LEVELS[4] * 4 and {str(span.style) for span in even.spans} == {"green"}
    load = [1.0] * 64
    load[10], load[50] = 0.0, 9.0
    shared = balance(load, 16)
    assert [i for i, span in enumerate(shared.spans) if span.style == "red"] == [2, 12]
    assert shared.plain[2] == LEVELS[0] and shared.plain[12] == LEVELS[7] and len(shared.plain) == 16


def test_losses_of_a_long_run_are_thinned_to_means() -> None:
    losses = Losses()
    for i in range(3 * KEPT):
        losses.add(float(i))
        losses.add(float("nan"))
    assert len(losses.means) < KEPT and losses.means[:2] == [1.5, 5.5] and losses.means[-1] > 3 * KEPT - 5
    assert losses.recent()[0] == pytest.approx(1.5 * KEPT, rel=0.01)


@pytest.mark.parametrize("cost", [0.001, 0.005, 0.1])
def test_drawing_takes_less_than_half_a_percent(cost: float) -> None:
    assert cost / pause(cost) <= COST * (1 + 1e-9) < 0.005 and pause(cost) >= INTERVAL


class Screen:
    """As much of a terminal as these runs use: text, returns, and moves of the cursor; anything else is an error."""

    PARTS = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)|(.)", re.DOTALL)

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column, self.cursor_shown = columns, [""], 0, 0, True

    def feed(self, text: str) -> None:
        for number, command, back, newline, plain, other in self.PARTS.findall(text):
            assert not other, repr(other)
            if command:
                self.command(number, command)
            elif back:
                self.column = 0
            elif newline:
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            for letter in plain:
                self.put(letter)

    def command(self, number: str, command: str) -> None:
        if command == "A":
            self.row -= int(number or 1)
            assert self.row >= 0
        elif command == "K":
            assert number == "2"
            self.lines[self.row] = ""
        elif number == "?25":
            self.cursor_shown = command == "h"
        else:
            assert command == "m", (number, command)

    def put(self, letter: str) -> None:
        if self.column == self.columns:
            self.feed("\r\n")
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
        self.column += 1


def train_in(tmp_path: Path, columns: int, rows: int, stop: bool = False, **environment: str) -> tuple[str, int]:
    """Train in a terminal of that size; returns what it was sent, and the exit code."""
    config = tiny_run(tmp_path) | {"log_to_console": True, "console_log_interval": "20ba", "eval_interval": "0ba"}
    config["max_duration"] = "100000ba" if stop else "60ba"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {
        key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")
    }
    started = subprocess.Popen(
        [sys.executable, "scripts/train.py", str(tmp_path / "run.yaml")],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), env=kept | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(theirs)
    data, typed, deadline = b"", False, time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 1.0)[0]:
            try:
                data += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        if stop and not typed and b"step    100" in data:
            os.write(ours, b"\x03")  # Ctrl-C, which the terminal turns into a signal
            typed = True
    os.close(ours)
    return data.decode(), started.wait(10)


def test_a_terminal_has_the_view_below_the_lines_and_is_clean_after_ctrl_c(tmp_path: Path) -> None:
    sent, code = train_in(tmp_path, 80, 24, stop=True)
    assert code == 0, sent
    screen, most = Screen(80), 0
    views = re.split(r"(?=\r\x1b\[2K)", sent)
    for part in views:
        screen.feed(part)
        most = max(most, sum("╭" in line for line in screen.lines))
    assert most == 1, "an older picture was left behind"
    assert all(any(word in part for part in views) for word in ("╭", "tokens/s", "experts", "loss", "memory"))
    assert screen.cursor_shown and not any("╭" in line or "━" in line for line in screen.lines), "the view is wiped"
    text = "\n".join(screen.lines)
    assert "Ctrl-C: finishing this step" in text and re.search(r"^step     20/100000  ", text, re.MULTILINE)
    assert any(line.startswith("stopped at step") for line in screen.lines), "log lines stand above, whole"


def test_a_narrow_terminal_without_colours(tmp_path: Path) -> None:
    sent, code = train_in(tmp_path, 40, 10, NO_COLOR="1")
    assert code == 0, sent
    assert not re.search(r"\x1b\[[\d;]*(3|4|9)\d[\d;]*m", sent), "no colours"
    screen = Screen(40)
    screen.feed(sent)
    assert screen.cursor_shown and not any("━" in line for line in screen.lines)
    assert "100%" in sent and "experts" in sent and "step 60/60" in "".join(screen.lines)
