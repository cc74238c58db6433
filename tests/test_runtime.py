"""The process: how one of several ends, and what is set before anything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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
