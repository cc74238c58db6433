"""This process among those that torchrun started, without importing torch: `--help` and mistakes answer at once."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
from contextlib import suppress
from typing import NoReturn

SIGNALLED = 128  # exit codes from here on: a signal's number is added
BEGUN = time.monotonic()  # when this process began, but for Python's own start


def rank() -> int:
    """This process's number in the run; 0 if it was started without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in the run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Processes on this node, as torchrun says; 1 if it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Whether this process logs and writes for all."""
    return rank() == 0


def tell_torchrun(why: str) -> None:
    """Leave what went wrong where torchrun looks for it: its report names the rank that failed first, and ends so.

    It compares whole seconds, and ranks that lose this one fail as soon as it is gone: so it stays for one more.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": why, "timestamp": str(int(time.time()))}  # the form that its own handler writes
        with suppress(OSError), open(file, "w") as report:
            json.dump({"message": {"message": why, "extraInfo": details}}, report)
        time.sleep(1.0)


def leave(code: int) -> NoReturn:
    """End this process; under torchrun or after a signal, without Python's teardown of the interpreter.

    DTensor's caches keep meshes alive after `runtime.stop`, and with them gloo's threads. A thread that frees a tensor
    while the interpreter is torn down aborts the process, so that one rank in a few thousand would fail after its work.
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
