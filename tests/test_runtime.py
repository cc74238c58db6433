"""The process: how one of several ends, and what is set before anything else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmfoundry import runtime
from llmfoundry.callbacks.memory_monitor import KEYS, report
from llmfoundry.runtime import cache_root
from llmfoundry.train import out_of_memory

PROGRAM = """
import atexit, sys
from llmfoundry import runtime
class Late:
    def __del__(self):
        print("torn down")
kept = Late()
atexit.register(lambda: print("at exit"))
sys.stdout.write("said, ")
runtime.leave(3)
"""


@pytest.mark.parametrize(("rank", "said"), [("0", "said, at exit\n"), (None, "said, at exit\ntorn down\n")])
def test_one_of_several_processes_leaves_without_teardown(rank: str | None, said: str) -> None:
    place = {key: value for key, value in os.environ.items() if key != "RANK"} | ({"RANK": rank} if rank else {})
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=place, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, said), done.stderr


@pytest.mark.gpu
def test_memory_on_a_gpu_is_of_segments_that_grow() -> None:
    program = """
import torch
from llmfoundry import runtime
kept = torch.empty(1, device=runtime.start())
print(torch.cuda.memory_snapshot()[0]["is_expandable"])
"""
    place = {key: value for key, value in os.environ.items() if key not in ("PYTORCH_ALLOC_CONF", "RANK")}
    done = subprocess.run([sys.executable, "-c", program], env=place, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {"HOME": "/home/someone"}, Path("/home/someone/.cache/llmfoundry")),
        (None, {"HOME": "/home/someone", "LLMFOUNDRY_CACHE": "/big/cache"}, Path("/big/cache")),
        ("/mine", {"HOME": "/home/someone", "LLMFOUNDRY_CACHE": "/big/cache"}, Path("/mine")),
        (None, {"HOME": "/home/someone", "LLMFOUNDRY_CACHE": ""}, Path("/home/someone/.cache/llmfoundry")),
    ],
)
def test_one_rule_says_where_caches_are(
    given: str | None, environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLMFOUNDRY_CACHE", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert cache_root(given) == expected


def test_a_user_without_a_home_has_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a user id that the system does not know."""
    for name in ("HOME", "LLMFOUNDRY_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987_654)
    assert cache_root() == Path(tempfile.gettempdir()).absolute() / "llmfoundry-987654"


def test_memory_around_the_allocator_counts_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts' weights are there, where GPUs copy from each other: all but them were too few activations."""
    weights, activations = 30 * 2**30, 40 * 2**30
    stats = {f"{kind}_bytes.all.{when}": activations for kind in ("allocated", "active", "reserved")
             for when in ("current", "peak")}  # fmt: skip
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda place: stats)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(runtime, "_mapped", 0)
    runtime.count_memory(weights)
    place = torch.device("cuda", 0)
    assert runtime.peak_memory_bytes(place) == weights + activations
    assert out_of_memory.allocator(place) == (80 * 2**30, weights + activations, weights + activations)
    assert report(runtime.memory_stats(place), KEYS)["peak_allocated_mem"] == (weights + activations) / 1e9
