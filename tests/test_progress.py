"""Progress of long jobs, on the terminals and pipes that it may meet."""

from __future__ import annotations

import io
import sys

import pytest

from llmfoundry.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "drawn"), [("xterm-256color", True), ("dumb", False)])
def test_a_bar_is_drawn_only_where_the_cursor_can_move(term: str, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress("tokenizing texts", 8, "bytes") as advance:
        advance(8)
    assert ("tokenizing texts" in screen.getvalue()) == drawn
    assert drawn or screen.getvalue() == "", "not even an empty line"
