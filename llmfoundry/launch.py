"""This process's place among those that torchrun started, without importing torch, so that `--help` is fast."""

from __future__ import annotations

import atexit
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

log = logging.getLogger(__name__)
SIGNALLED = 128  # exit code of a signal: this plus its number
BEGUN = time.monotonic()  # when this process began, not counting the start of Python


def rank() -> int:
    """This process's rank; 0 if it was started without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, as torchrun reports it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's rank on its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Return the number of processes on this node, as torchrun reports it; 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_rank0() -> bool:
    """Return whether this process logs and writes for all ranks."""
    return rank() == 0


def tell_torchrun(why: str) -> None:
    """Write an error where torchrun looks for it: its report names the rank that failed first, and ends with it.

    torchrun compares whole seconds, and ranks that lose this one fail as soon as it is gone, so it waits for one more
    second.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        details = {"py_callstack": why, "timestamp": str(int(time.time()))}  # the format of torchrun's handler
        with suppress(OSError), open(file, "w") as report:
            json.dump({"message": {"message": why, "extraInfo": details}}, report)
        time.sleep(1.0)


def replace_closed() -> None:
    """Discard what is printed to a stream that was closed before Python began (`>&-`), which Python sets to None."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)


def broken_stdout(suspected: bool = False) -> OSError | None:
    """Flush stdout. If that fails, discard this and all later output, because Python flushes once more at exit.

    Args:
        suspected: also write an empty line, because a long text that failed is not written again.

    Returns:
        The error, e.g. because the reader of a pipe is gone or a disk is full; None if stdout works.
    """
    try:
        if suspected:
            sys.stdout.write("\n")
        sys.stdout.flush()
        return None
    except (AttributeError, ValueError):  # stdout is None or closed
        return None
    except OSError as error:
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
            sys.stdout.flush()
        return error


@contextmanager
def printing() -> Iterator[None]:
    """Keep failures to print within the block from ending a run; log them as warnings."""
    try:
        yield
    except SystemExit:  # from rich, which has discarded the rest
        log.warning("stdout cannot be written: the reader of its pipe is gone; training continues without it")
    except OSError as error:
        found = broken_stdout(suspected=True)
        if found is None:
            raise
        log.warning("stdout cannot be written: %s; training continues without it", error.strerror)


def leave(code: int) -> NoReturn:
    """End this process; under torchrun or after a signal, without tearing down Python's interpreter.

    DTensor's caches keep meshes alive after `runtime.stop`, and with them gloo's threads. A thread that frees a tensor
    while the interpreter is torn down aborts the process, so one rank in a few thousand would fail after its work.
    After a signal that ends a process at once, the teardown would wait for a checkpoint that a thread is writing.

    Args:
        code: the exit code.
    """
    broken_stdout()
    if code < SIGNALLED:
        if "RANK" not in os.environ:  # a single process
            sys.exit(code)
        atexit._run_exitfuncs()
    leave_at_once(code)


def leave_at_once(code: int) -> NoReturn:
    """End this process, from any thread, once what it has printed is written."""
    broken_stdout()
    with suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)
