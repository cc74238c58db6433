"""The process: how one of several ends."""

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
