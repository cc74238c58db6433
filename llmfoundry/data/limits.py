"""Limits on untrusted code: a chat template is a program, and may loop forever or build endless texts.

The limits hold on every thread. A single Python operation, such as a power of large integers, cannot be interrupted.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TypeVar

try:
    import resource
except ImportError:  # not available on Windows
    resource = None  # type: ignore[assignment]

Made = TypeVar("Made")

SECONDS = 10.0  # CPU time
MEMORY = 2**31  # bytes by which the process may grow
_INTERVAL = 0.1  # seconds between checks of the clock


class Exceeded(ValueError):
    """A limit was reached."""


class _OutOfTime(BaseException):
    """Raised in the thread that is too slow. It is not an Exception, so that nothing on the way catches it."""


class _Call:
    """The call that one thread is running."""

    def __init__(self, seconds: float) -> None:
        self.thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self.thread) if hasattr(time, "pthread_getcpuclockid") else None
        self._end = self._now() + seconds
        self.done = self._stopping = False

    def _now(self) -> float:
        return time.monotonic() if self._clock is None else time.clock_gettime(self._clock)

    def stop_if_late(self) -> None:
        """Stop the call if it is late; called by the watching thread."""
        self._stopping = True  # first, because `forget` waits for it
        if not self.done and self._now() > self._end:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), ctypes.py_object(_OutOfTime))
        self._stopping = False

    def forget(self) -> None:
        """End the watch; called by the thread itself. An exception that was not raised yet is dropped."""
        while self._stopping:
            time.sleep(0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.thread), None)


class _Watch:
    """A thread that watches the clocks of calls. It sleeps while there are none."""

    def __init__(self) -> None:
        self._calls: dict[_Call, None] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, call: _Call) -> None:
        self._calls[call] = None
        if self._thread is None or not self._thread.is_alive():  # also in a forked process
            self._wake = threading.Event()
            self._thread = threading.Thread(target=self._run, name="limits", daemon=True)
            self._thread.start()
        self._wake.set()

    def remove(self, call: _Call) -> None:
        self._calls.pop(call, None)

    def _run(self) -> None:
        while self._wake.wait():
            time.sleep(_INTERVAL)
            self._wake.clear()
            for call in list(self._calls):
                call.stop_if_late()
            if self._calls:
                self._wake.set()


_watch = _Watch()


def bounded(made: Callable[[], Made], seconds: float = SECONDS, memory: int = MEMORY) -> Made:
    """Call a function within limits. The function must not call `bounded` itself.

    Args:
        seconds: the thread's CPU time (wall time on systems that do not count it).
        memory: bytes by which the process may grow, on systems that can limit it.

    Raises:
        Exceeded: if the call exceeded a limit.
    """
    try:
        with _bounded_memory(memory):
            return _in_time(made, seconds)
    except MemoryError:
        raise Exceeded(f"needs more than {memory / 2**30:.3g} GiB of memory") from None


def _in_time(made: Callable[[], Made], seconds: float) -> Made:
    call = _Call(seconds)
    try:
        _watch.add(call)
        return made()
    except _OutOfTime:
        raise Exceeded(f"takes more than {seconds:.0f} seconds") from None
    finally:
        call.done = True  # first: from here on, no exception is raised in this thread
        with suppress(_OutOfTime):
            call.forget()
        _watch.remove(call)


_lock = threading.Lock()
_bounding = 0  # number of active calls, on all threads
_before = (0, 0)  # the process's own limit: soft and hard


@contextmanager
def _bounded_memory(growth: int) -> Iterator[None]:
    """Limit the memory of the process. Of several concurrent calls, the first sets the limit and the last lifts it."""
    global _bounding, _before
    with _lock:
        if not _bounding:
            _before = _bound(growth)
        _bounding += 1
    try:
        yield
    finally:
        with _lock:
            _bounding -= 1
            if not _bounding and resource is not None:
                resource.setrlimit(resource.RLIMIT_DATA, _before)


def _bound(growth: int) -> tuple[int, int]:
    """Limit the process's writable memory, if Linux reports the current amount; return the previous limit."""
    if resource is None:
        return 0, 0
    before = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    now = _memory(int(time.monotonic() / _INTERVAL), os.getpid())
    if now is not None:
        others = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min([now + growth, *others]), hard))
    return before


@lru_cache(maxsize=1)
def _memory(moment: int, process: int) -> int | None:
    """Return the process's writable memory in bytes; None if Linux does not report it. Cached, as reading is slow."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return None
