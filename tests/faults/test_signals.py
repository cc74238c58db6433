"""Each signal, in each part of a run, to one process, to one rank, to all ranks and to torchrun."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import ended, is_saved, plug_in, ranks_of, recipe, start, summary, wait_for

SLEEPS_WHILE_BUILDING = """
import os, time
from pathlib import Path
Path(os.environ["MARK"]).write_text("building\\n")
time.sleep(60)
"""
STUCK_IN_A_STEP = """
import ctypes
import os
from pathlib import Path
from llmfoundry.train.callback import Callback, CallbackConfig

class Stuck(Callback):
    def step_end(self, trainer, metrics):
        if trainer.state.step == 3:
            Path(os.environ["MARK"]).write_text("stuck\\n")
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # never returns, as a collective may, and no handler of Python's runs

class StuckConfig(CallbackConfig, names=("stuck",)):
    def build(self):
        return Stuck()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_with_128_and_its_number(tmp_path: Path, number: signal.Signals) -> None:
    mark = tmp_path / "mark"
    started = start(recipe(tmp_path, **plug_in(tmp_path, SLEEPS_WHILE_BUILDING)), MARK=str(mark))
    wait_for(mark)
    started.send_signal(number)
    output = ended(started, 128 + number)
    assert output.strip().endswith(f"{number.name}: stopped at once; the checkpoints are as they were")
    assert "Traceback" not in output and not (tmp_path / "run").exists()


def test_a_second_signal_ends_a_process_that_is_stuck_at_once(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    more = plug_in(tmp_path, STUCK_IN_A_STEP) | {"callbacks": {"stuck": {}}}
    started = start(recipe(tmp_path, **more), MARK=str(mark))
    wait_for(mark)
    started.send_signal(signal.SIGTERM)
    time.sleep(2.0)
    assert started.poll() is None, "the first one waits for the step"
    begun = time.monotonic()
    started.send_signal(signal.SIGTERM)
    output = ended(started, 128 + signal.SIGTERM)
    assert "SIGTERM: leaving at once" in output and time.monotonic() - begun < 60.0
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_all_ranks_or_to_torchrun_saves_and_stops(tmp_path: Path) -> None:
    file, run = recipe(tmp_path, device_train_microbatch_size=2), tmp_path / "run"
    started = start(file, ranks=2)
    wait_for(run / "metrics.jsonl", 3)
    for pid in ranks_of(started):
        os.kill(pid, signal.SIGHUP)
    output = ended(started, 0)
    step = summary(run)["steps"]
    assert summary(run) | {"ended": "SIGHUP", "stopped": True} == summary(run) and is_saved(run, step), output

    started = start(file, ranks=2)
    assert isinstance(step, int)
    wait_for(run / "metrics.jsonl", step + 3)
    started.send_signal(signal.SIGTERM)
    output = ended(started, 1)  # torchrun's own, after a signal
    assert summary(run)["ended"] == "SIGTERM" and is_saved(run, summary(run)["steps"]), output
    assert f"stopped at step {summary(run)['steps']}; saved to" in output
