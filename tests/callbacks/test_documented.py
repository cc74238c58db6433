"""docs/callbacks.md names every callback and logger, and no key that is none."""

from __future__ import annotations

import re
from pathlib import Path

import llmfoundry.callbacks  # noqa: F401  registers them
from llmfoundry.train.config import CallbackConfig, LoggerConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "callbacks.md"
ROW = re.compile(r"^\| `(\w+)`(?: \(`(\w+)`\))? \| ([^|]*) \|", re.MULTILINE)
OTHER_NAMES = {"oom_observer"}  # of memory_snapshot
OURS = {name: cls for root in (CallbackConfig, LoggerConfig) for name, cls in root._members.items()
        if cls.__module__.startswith("llmfoundry.")}  # fmt: skip


def test_the_tables_name_every_one_and_their_keys_exist() -> None:
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert {name for first, second, _ in rows for name in (first, second) if name} == OURS.keys() - OTHER_NAMES
    for name, _, keys in rows:
        named = set(re.findall(r"`(\w+)`", keys))
        assert named <= OURS[name].model_fields.keys(), name
