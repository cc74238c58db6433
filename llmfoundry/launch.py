"""This process's place among those that torchrun started, without importing torch, so that `--help` is fast."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from typing import NoReturn

SIGNALLED = 128  # exit codes from here on: a signal's number is added
BEGUN = time.monotonic()  # when this process began, but for Python's own start


def rank() -> int:
    """This process's rank; 0 if it was started without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes, as torchrun reports it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """The number of processes on this node, as torchrun reports it; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Whether this process logs and writes for all ranks."""
    return rank() == 0


def tell_torchrun(why: str) -> None:
    """Write an error where torchrun looks for it: its report names the rank that failed first, and ends with it.

    torchrun compares whole seconds, and ranks that lose this one fail as soon as it is gone, so it waits for one more
    second.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": why, "timestamp": str(int(time.time()))}  # the form that its own handler writes
        with open(file, "w") as report:
            json.dump({"message": {"message": why, "extraInfo": details}}, report)
        time.sleep(1.0)


def leave(code: int) -> NoReturn:
    """End this process; under torchrun or after a signal, without tearing down Python's interpreter.

    DTensor's caches keep meshes alive after `runtime.stop`, and with them gloo's threads. A thread that frees a tensor
    while the interpreter is torn down aborts the process, so one rank in a few thousand would fail after its work.
    After a signal that ends a process at once, the teardown would wait for a checkpoint that a thread is writing.

    Args:
        code: the exit code.
    """
    if code < SIGNALLED:
        if "RANK" not in os.environ:  # a single process
            sys.exit(code)
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
