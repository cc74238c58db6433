"""Handle signals that stop this process, without importing torch: the first stops in order, the second at once.

Python runs a signal handler between two bytecode instructions, so not while the process waits in a collective or writes
a file. Therefore a thread, which the system's handler always wakes, ends a process that does not end by itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from llmfoundry.launch import SIGNALLED

# By Kubernetes and Slurm; Ctrl-C; by `sbatch --signal`; by a terminal that closes.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds; launchers often send a signal twice: to the process group and to each rank
GRACE = 2.0  # seconds for a process to end by itself


class Stop(BaseException):
    """A signal ends the process now. It is not an Exception, so that nothing on the way catches it.

    Attributes:
        code: the exit code, 128 plus the signal's number, as in shells.
    """

    def __init__(self, number: int) -> None:
        super().__init__(name(number))
        self.code = SIGNALLED + number


def name(number: int) -> str:
    """The name of a signal: `SIGTERM`, or `Ctrl-C`."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def on_signal(first: Callable[[int], None] | None = None) -> Iterator[None]:
    """Within the block, a signal raises `Stop`; if `first` is given, the first signal calls it with its number instead.

    Outside the main thread, where Python receives no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    listener = _Listener(first)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=listener.watch, args=(reader,), name="signals", daemon=True)
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, listener.handle) for number in STOPPING}
    thread.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def _forget() -> None:
    """In a forked child: its signals are its own and must not wake the parent's thread."""
    for number in STOPPING:
        if isinstance(getattr(signal.getsignal(number), "__self__", None), _Listener):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


class _Listener:
    def __init__(self, first: Callable[[int], None] | None) -> None:
        self._first = first
        self._begun: float | None = None  # when the first signal was handled

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        now = time.monotonic()
        if self._first is None or (self._begun is not None and now - self._begun >= SAME_REQUEST):
            raise Stop(number)
        if self._begun is None:
            self._begun = now
            self._first(number)

    def watch(self, reader: int) -> None:
        """The thread: read the numbers of signals as they come, until a zero."""
        begun = time.monotonic() if self._first is None else None
        patience = 0.0 if self._first is None else SAME_REQUEST + 0.5  # the handler may judge a little earlier
        while number := os.read(reader, 1)[0]:
            if number not in STOPPING:
                continue
            now = time.monotonic()
            begun = now if begun is None else begun
            if now - begun >= patience:
                self._end(reader, number)
                return

    def _end(self, reader: int, number: int) -> None:
        deadline = time.monotonic() + GRACE
        while (left := deadline - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0] and os.read(reader, 1) == b"\0":
                return
        print(f"{name(number)}: leaving at once", file=sys.stderr, flush=True)
        os._exit(SIGNALLED + number)
