"""Ranks that are stopped, stuck or killed: the others end, and the rank at fault is named, not one that waits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmfoundry import runtime
from llmfoundry.checkpoint import storage
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState
from llmfoundry.train.watchdog import LOOSE, Limits, Watchdog, limits
from tests import forks
from tests.faults.runs import ended, is_saved, metrics, plug_in, ranks_of, recipe, start, wait_for

Hanging = dict[str, tuple[Path, forks.Started]]  # the folder of each run, and its process
# A rank that is stuck ends by torchrun's first signal here: before its second, torchrun 2.13 always waits 30 seconds.
STUCK_DATA = """
import os, signal, time
from pathlib import Path
from llmfoundry import runtime
from llmfoundry.data.loader import Loader

real, reads = Loader.gather, [0]

def gather_from_a_dead_disk(self, rows):
    reads[0] += 1
    if reads[0] == 6 and runtime.rank() == runtime.world_size() - 1 and not Path(os.environ["MARK"]).exists():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        Path(os.environ["MARK"]).write_text("stuck\\n")
        time.sleep(600)
    return real(self, rows)

Loader.gather = gather_from_a_dead_disk
"""
STOPPED_IN_A_SAVE = """
import os, signal
from pathlib import Path
from llmfoundry import runtime
from llmfoundry.checkpoint import storage

real = storage.write_parts

def write_parts(*args):
    if runtime.rank() == 1:
        Path(os.environ["MARK"]).write_text("stopped\\n")
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*args)

storage.write_parts = write_parts
"""


STUCK = """
import os, time
from pathlib import Path
from llmfoundry import runtime
{code}
"""
# A rank that hangs: where it does, and what is said of it.
PLACES = {
    "evaluation": (
        "from llmfoundry.train import evaluating\n"
        "real = evaluating.evaluate\n"
        "def stuck(*args, **more):\n"
        "    time.sleep(600 if runtime.rank() == 1 else 0)\n"
        "    return real(*args, **more)\n"
        "evaluating.evaluate = stuck\n",
        {"hang_timeout": "8s", "eval_interval": "2ba"},
        "an evaluation after step 2 (fault.py:8, stuck)",
    ),
    "start": (
        "from llmfoundry.train import build\n"
        "real = build.read_data\n"
        "def stuck(*args):\n"
        "    time.sleep(600 if runtime.rank() == 1 else 0)\n"
        "    return real(*args)\n"
        "build.read_data = stuck\n",
        {"dist_timeout": 12},
        "getting the tokenizer and the data (fault.py:8, stuck)",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hanging]:
    """Runs that hang and end by themselves, all begun at once: while they wait, the tests of others go on."""
    folder = tmp_path_factory.mktemp("alone")
    alone = plug_in(folder, STUCK_DATA) | {"hang_timeout": "2s"}
    found = {"alone": (folder, start(recipe(folder, **alone), MARK=str(folder / "mark")))}
    folder = tmp_path_factory.mktemp("restart")
    more = plug_in(folder, STUCK_DATA) | {"hang_timeout": "8s", "max_duration": "8ba", "save_interval": "1ba"}
    file = recipe(folder, device_train_microbatch_size=2, **more)
    environment = {"MARK": str(folder / "mark"), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}
    found["restart"] = folder, start(file, ranks=2, restarts=1, **environment)
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "split": "validation"}
    for place, (code, keys, _) in PLACES.items():
        folder = tmp_path_factory.mktemp(place)
        keys |= {
            "eval_loader": {"dataset": text | {"cache_dir": str(folder / "cache")}},
            "device_train_microbatch_size": 2,
        }
        file = recipe(folder, **plug_in(folder, STUCK.format(code=code)), **keys)
        found[place] = folder, start(file, ranks=2, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    yield found
    for _, run in found.values():
        run.kill()


@pytest.mark.slow
def test_a_process_that_was_stopped_by_hand_goes_on(tmp_path: Path) -> None:
    started = start(recipe(tmp_path, hang_timeout="4s"))
    wait_for(tmp_path / "run" / "metrics.jsonl", 3)
    started.send_signal(signal.SIGSTOP)
    time.sleep(16.0)
    n_steps = len(metrics(tmp_path / "run"))
    started.send_signal(signal.SIGCONT)
    wait_for(tmp_path / "run" / "metrics.jsonl", n_steps + 20)
    started.send_signal(signal.SIGTERM)
    ended(started, 0)


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_is_stopped_inside_a_save_is_named_within_the_timeout(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    more = plug_in(tmp_path, STOPPED_IN_A_SAVE) | {"hang_timeout": "8s", "save_interval": "3ba"}
    file = recipe(tmp_path, device_train_microbatch_size=2, **more)
    started = start(file, ranks=2, MARK=str(mark), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    wait_for(mark)
    begun, ranks = time.monotonic(), ranks_of(started)
    while ranks[0] in ranks_of(started):  # torchrun would wait 30 seconds for the one that is stopped
        assert time.monotonic() - begun < 60.0
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)
    output = ended(started, 1)
    assert "rank 1 does not answer: stopped, killed, or its host is gone; the others wait for it" in output
    assert not (tmp_path / "run" / "hang-rank-1.txt").exists()
    assert "saving step 3" in (tmp_path / "run" / "hang-rank-0.txt").read_text()


@pytest.mark.slow
@pytest.mark.dist
def test_a_rank_that_is_killed_ends_the_others_at_once_and_is_named(tmp_path: Path) -> None:
    file = recipe(tmp_path, device_train_microbatch_size=2, save_interval="2ba")
    started = start(file, ranks=2)
    wait_for(tmp_path / "run" / "metrics.jsonl", 3)
    begun = time.monotonic()
    os.kill(ranks_of(started)[1], signal.SIGKILL)
    output = ended(started, 1)
    assert time.monotonic() - begun < 30.0, "long before any timeout"
    cause = output.partition("Root Cause")[2]
    assert "rank      : 1" in cause and "exitcode  : -9" in cause


@pytest.mark.slow
@pytest.mark.dist
def test_collectives_after_the_first_step_have_a_timeout_of_their_own(tmp_path: Path) -> None:
    """The watchdog would have waited for ten minutes; asked by rank 0, it still names the rank."""
    more = plug_in(tmp_path, STUCK_DATA) | {"hang_timeout": "10min", "step_timeout": "3s"}
    mark = tmp_path / "mark"
    started = start(recipe(tmp_path, device_train_microbatch_size=2, **more), ranks=2, MARK=str(mark),
                    TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")  # fmt: skip
    wait_for(mark)
    begun = time.monotonic()
    output = ended(started, 1)
    assert time.monotonic() - begun < 60.0
    assert "rank 1 on " in output and "gather_from_a_dead_disk" in output and "is at fault" in output
    assert "Timed out waiting 3000ms" in output


def test_limits_are_tight_within_a_step_of_several_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits(None, 600.0, 900.0) == Limits(LOOSE, LOOSE) and limits(5.0, 600.0, 900.0) == Limits(5.0, 5.0, 5.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert limits(None, 600.0, 900.0) == Limits(480.0, LOOSE, 720.0), "before NCCL ends the process"
    assert limits(0.0, 600.0, 900.0) == Limits(0.0, 0.0, 0.0)


def test_a_gpu_that_waited_too_long_for_another_is_told_from_a_kernel_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = Watchdog(tmp_path, Limits(5.0, 5.0))
    error = RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")
    assert watchdog.named("step 3", error) is None, "it keeps its traceback"
    monkeypatch.setattr(runtime, "_mapped", 1)
    assert str(watchdog.named("step 3", error)) == (
        "step 3: a collective failed; here: CUDA error: unspecified launch failure, as when a GPU has waited 600 "
        "seconds for another one"
    )


def test_a_process_that_hangs_writes_its_stacks_and_ends(hanging: Hanging) -> None:
    folder, started = hanging["alone"]
    output = ended(started, 1)
    said = "error: no step, evaluation batch or save has ended for "
    assert said in output and "gather_from_a_dead_disk" in output
    report = (folder / "run" / "hang-rank-0.txt").read_text()
    assert "no step, evaluation batch or save has ended" in report
    assert "gather_from_a_dead_disk" in report.partition("\n\n")[2], "every thread's stack"


@pytest.mark.slow
@pytest.mark.dist
def test_the_rank_that_hangs_is_named_and_a_restart_goes_on(hanging: Hanging) -> None:
    folder, started = hanging["restart"]
    output = ended(started, 0)
    at_fault = "rank 1 on "
    assert at_fault in output and "is at fault: " in output and "gather_from_a_dead_disk" in output
    run = folder / "run"
    assert "gather_from_a_dead_disk" in (run / "hang-rank-1.txt").read_text()
    assert "tree.py" in (run / "hang-rank-0.txt").read_text(), "rank 0 waited for it"
    assert [line["step"] for line in metrics(run)] == list(range(1, 9)) and is_saved(run, 8)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_hangs_outside_of_steps_is_named_with_what_it_does(hanging: Hanging, place: str) -> None:
    output = ended(hanging[place][1], 1)
    assert "rank 1 on " in output and f"is at fault: {PLACES[place][2]}" in output, output
    assert "rank 0 on " not in output.partition("is at fault")[0], output


def test_while_a_thread_saves_it_is_the_thread_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def stuck(folder: Path, parts: object) -> dict[str, object]:
        begun.set()
        go_on.wait()
        return {}

    earlier = Checkpointer(tmp_path / "earlier", asynchronous=True)  # of another run in this process
    earlier.save(CheckpointState(step=1, model=torch.nn.Linear(2, 2)))
    earlier.wait()
    monkeypatch.setattr(storage, "write_parts", stuck)
    checkpointer = Checkpointer(tmp_path, asynchronous=True)
    checkpointer.save(CheckpointState(step=1, model=torch.nn.Linear(2, 2)))
    watchdog = Watchdog(tmp_path, Limits(60.0, 60.0))
    main = threading.Thread(target=_quietly, args=(checkpointer.wait,))
    main.start()
    begun.wait()
    watchdog._main = main.ident or 0
    deadline = time.monotonic() + 10
    while not (found := watchdog._here()).where.endswith("save_parts)") and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    main.join()
    assert found.where.endswith("save_parts)") and not found.waits


def _quietly(act: Callable[[], object]) -> None:
    with contextlib.suppress(Exception):
        act()
