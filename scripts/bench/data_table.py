"""The measured parts of docs/data.md: the loader, and `prepare`."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


def prepare() -> str:
    """`prepare` on one process and on two, beside `datasets.map`."""
    found = json.loads((RESULTS / "prepare.json").read_text(encoding="utf-8"))
    shape, rate, load = found["config"], found["tokens_per_processor_second"], found["load_average"]
    rows = [f"| {way} | {rate[way]:,} | {found['seconds'][way]:.1f} |" for way in rate]
    by_processor, by_clock = found["two_processes_to_one_by_processor_time"], found["two_processes_to_one"]
    return f"""\
{shape["bytes"] / 1e6:.0f} MB of Python source, a byte-level BPE of {shape["vocab_size"]:,}, {shape["cores"]} cores with
a load of {min(load):.1f} to {max(load):.1f}; medians of {shape["repeats"]} turns, by `scripts/bench/prepare.py` at
{found["git_sha"][:8]}. Two processes do {by_processor:.2f} times the work of one by the processor's time, and
{by_clock:.2f} times by the clock of that loaded machine.

| | tokens per second of a core | seconds by the clock |
|---|---|---|
{chr(10).join(rows)}"""


def loader() -> str:
    """Speed of the loader with one source and with fifty."""
    found = json.loads((RESULTS / "loader.json").read_text(encoding="utf-8"))
    rate, more = found["tokens_per_second"], found["cost_of_50_sources"]
    return f"""\
In one thread, the loader reads {rate["1"] / 1e6:.0f} M tokens/s of one source and {rate["50"] / 1e6:.0f} M of fifty,
which cost {more:.1%} more of the processor's time: {found["times_what_is_needed"]:.0f} times what eight GPUs take at
110,000 tokens/s each (load {found["load_average"]:.1f}, `scripts/bench/loader.py` at {found["git_sha"][:8]})."""
