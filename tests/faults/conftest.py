"""One box for all tests of faults, and a small run that they damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from boxed import Box
from small_run import SETTINGS


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the box."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def box(place: Path) -> Iterator[Box]:
    with Box(place) as found:
        yield found


@pytest.fixture(scope="session")
def run(box: Box, place: Path) -> Path:
    """A finished run with checkpoints of steps 2, 4 and 6; copied, never changed."""
    yaml = place / "small.yaml"
    yaml.write_text(SETTINGS)
    ended = box.run("train", yaml, "save_folder=run")
    assert ended.code == 0, ended.err
    return place / "run"
