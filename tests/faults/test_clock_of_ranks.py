"""Two ranks whose clocks disagree by an hour end, evaluate and save at the same steps: rank 0's counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runs import ended, is_saved, metrics, plug_in, recipe, start, summary

pytestmark = [pytest.mark.dist, pytest.mark.slow]
OTHER_CLOCK = """
import time
from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig

real, begun = time.monotonic, time.monotonic()
if runtime.rank() == 1:
    time.monotonic = lambda: real() + 3600.0 * (1.0 + (real() - begun))  # far ahead, and far too fast
    time.time = lambda: real() - 3600.0

most_of_ranks, waits = runtime.most_of_ranks, [0]

def counted(values):
    waits[0] += 1  # what the host waits for at the end of a step
    return most_of_ranks(values)

runtime.most_of_ranks = counted

class Counts(Callback):
    def fit_start(self, trainer):
        waits[0] = 0

    def step_end(self, trainer, metrics):
        metrics["waits"] = waits[0]
        time.sleep(0.05)  # some seconds of steps, not some seconds of both cores

class CountsConfig(CallbackConfig, names=("counts",)):
    def build(self):
        return Counts()
"""


def test_ranks_agree_by_the_clock_of_rank_0_in_one_reduction_per_step(tmp_path: Path) -> None:
    more = plug_in(tmp_path, OTHER_CLOCK) | {"callbacks": {"counts": {}}}
    file = recipe(tmp_path, max_duration="3s", device_train_microbatch_size=2, save_interval="1s", **more)
    output = ended(start(file, ranks=2), 0)
    run = tmp_path / "run"
    steps = summary(run)["steps"]
    assert isinstance(steps, int) and steps > 1 and is_saved(run, steps), output
    assert summary(run)["ended"] == "max_duration=3s has passed"
    saved = [is_saved(run, step) for step in range(1, steps + 1)]
    assert 1 <= sum(saved) <= 4, "at each second, and at the end"
    waits = [line["waits"] for line in metrics(run)]
    assert waits == list(range(steps)), "one at the end of each step, and none for a save"

    output = ended(start(file, "max_duration=1000000ba", "time_limit=6s", ranks=2), 0)
    assert summary(run)["ended"] == "time_limit=6s" and is_saved(run, summary(run)["steps"]), output
