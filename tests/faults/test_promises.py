"""docs/reliability.md promises only what a test shows."""

from __future__ import annotations

import re

import pytest

from tests.faults.runs import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.partition("## Stopping in time")[0].splitlines() if line.startswith("| ")][1:]
PROMISES = [row for row in ROWS if not re.match(r"\| \*\*[\w ]+\*\* \| \| \|$", row)]


@pytest.mark.parametrize("row", PROMISES)
def test_a_promise_has_a_test_that_exists(row: str) -> None:
    fault, promise, shown = (part.strip() for part in row.strip("|").split(" | "))
    assert fault and promise
    found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown)
    assert found, shown
    assert f"def {found[2]}(" in (ROOT / found[1]).read_text(encoding="utf-8"), shown


def test_the_page_has_promises() -> None:
    assert len(PROMISES) > 30
