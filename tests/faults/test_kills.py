"""Kills at random instants, and inside saves: the curve and the last tensors are the undisturbed ones.

`make soak` kills 200 times (SOAK_CYCLES), `make test` eight times; each time the run goes on from where it was killed.
"""

from __future__ import annotations

import fnmatch
import json
import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from safetensors.torch import load_file

import llmfoundry.callbacks  # noqa: F401  once, before the forks
import llmfoundry.train.build  # noqa: F401
from llmfoundry.checkpoint.manifest import checkpoints, is_whole
from llmfoundry.cli.train import train_main
from tests import forks
from tests.train.test_run import TINY

CYCLES = int(os.environ.get("SOAK_CYCLES", "8")) // 2  # of either kind
STEPS_PER_CYCLE = 4  # so that the run is not over before the last kill
Instant = Literal["start", "run", "save"]  # of a kill: before the first save, some time after it, in a save


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: to a process that is killed it is like a disk, and syncs are free."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def recipe(folder: Path, save_folder: str, steps: int) -> Path:
    """The YAML of a run that saves at each step."""
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(folder / "cache")}
    config = TINY | {
        "train_loader": {"dataset": text | {"split": "train"}},
        "eval_interval": "0ba",
        "save_interval": "1ba",
        "save_num_checkpoints_to_keep": 2,
        "keep_every": "7ba",
        "autoresume": True,
        "max_duration": f"{steps}ba",
        "save_folder": save_folder,
    }
    file = folder / f"{abs(hash(save_folder))}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def run_in_fork(arguments: list[str], when: Instant | None = None, draw: random.Random | None = None) -> int:
    """Do a run in a fork of this process, which has imported everything, and return how it ended, as `os.waitpid`."""
    kill = None if when is None or draw is None else kill_at(when, draw)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if kill is not None:
                arm(*kill)
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = train_main(arguments)
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kill_at(when: Instant, draw: random.Random) -> tuple[int, float]:
    """How many saves have to begin first, and how many seconds later the run is killed."""
    saves = {"start": 0, "run": 1, "save": draw.randint(1, 3)}[when]
    return saves, draw.uniform(0, {"start": 1.5, "run": 0.4, "save": 0.03}[when])


def arm(saves: int, seconds: float) -> None:
    """Let the kernel kill this process so long after the save of that number has begun, whatever it does then.

    SIGALRM, which nobody handles here, ends a process as SIGKILL does. Who watches a run from outside may be late on a
    machine that is busy, and miss all of its saves.
    """

    def begin() -> None:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))

    real, begun = os.mkdir, 0

    def mkdir(path: str | Path, *arguments: Any, **keys: Any) -> None:
        nonlocal begun
        real(path, *arguments, **keys)
        if fnmatch.fnmatch(Path(path).name, "step-*.tmp-*"):  # a save has begun when its folder is there
            begun += 1
            if begun == saves:
                begin()

    os.mkdir = mkdir
    if not saves:
        begin()


def orphans(run: Path) -> list[str]:
    """What no run leaves in its folder."""
    kept = {path.name for path in checkpoints(run / "checkpoints")} | {"latest"}
    return [str(path) for path in run.rglob("*") if ".tmp" in path.name or path.name.startswith(".probe")] + [
        str(path) for path in (run / "checkpoints").iterdir() if path.name not in kept
    ]


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss/train/ce"], line["grad_norm"]) for line in lines]


def assert_same_end(one: Path, other: Path) -> None:
    """The same curve and the same last tensors, bit by bit, and the same checkpoints."""
    assert losses(one) == losses(other)
    folders = [checkpoints(run / "checkpoints") for run in (one, other)]
    assert [path.name for path in folders[0]] == [path.name for path in folders[1]]
    assert all(is_whole(path) for found in folders for path in found)
    for file in folders[0][0].glob("[mo]*.safetensors"):
        left, right = load_file(file), load_file(folders[1][0] / file.name)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def _kill_and_resume(index: int, folder: Path, asynchronous: bool, seed: int) -> None:
    torch.set_num_threads(1)  # a fork has no other thread
    draw, steps = random.Random(seed), CYCLES * STEPS_PER_CYCLE + 4
    options = [f"save_async={str(asynchronous).lower()}"]
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    status = run_in_fork([str(recipe(folder, str(undisturbed), steps)), *options])
    assert status == 0, status
    command = [str(recipe(folder, str(killed), steps)), *options]
    newest, kills = -1, []
    for cycle in range(CYCLES):
        instants: tuple[Instant, ...] = ("save", "run", "start", "save", "run")
        kills.append(os.WIFSIGNALED(run_in_fork(command, instants[cycle % 5], draw)))
        whole = [path for path in checkpoints(killed / "checkpoints") if is_whole(path)]
        step = max((int(path.name.removeprefix("step-")) for path in whole), default=-1)
        assert step >= newest, "no step is lost beyond the last checkpoint"
        newest = step
    print(
        f"{sum(kills)} of {CYCLES} runs were killed, two of five in a save, up to step {newest} of {steps}", flush=True
    )
    assert sum(kills) >= CYCLES // 2
    status = run_in_fork(command)
    assert status == 0, status
    assert not orphans(killed), orphans(killed)
    assert_same_end(killed, undisturbed)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_kills_at_random_instants_and_in_saves_change_nothing(memory: Path, asynchronous: bool) -> None:
    # In a process of its own: this one may have threads, which a fork does not survive.
    forks.in_processes(_kill_and_resume, (memory, asynchronous, 17), 1)
