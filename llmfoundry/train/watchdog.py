"""A thread on each rank that detects a hang, writes down where the rank is, names the rank at fault, and exits.

    hang-rank-3.txt        when, after which step, and every thread's stack
    hang-rank-3-nccl.json  on GPUs: NCCL's flight recorder, with the collectives that have not ended

When no step, evaluation batch or save has ended for too long on some rank, that rank asks all others: each one's thread
answers where its main thread is. A rank is at fault if it does not answer (it is stopped, or its host is gone) or is
not in a collective; the others wait for it. Then the processes exit with 1, so that torchrun can restart.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from llmfoundry import launch, runtime
from llmfoundry.checkpoint.checkpointer import WRITER, Checkpointer
from llmfoundry.config import RunError

log = logging.getLogger(__name__)

READING = "reading the results of a step"  # the host waits for a GPU whose collectives may not have ended
ROLL, VERDICT, FIRST = "hang/roll", "hang/verdict", "hang/first"
POLL = 5.0  # maximum seconds between two checks
PATIENCE = 3.0  # further seconds for a rank to answer
ANSWER = 20.0  # seconds to wait for the verdict of another rank
STOPPED = 10.0  # if this thread did not run for so many seconds, the process was stopped
GIL = 60.0  # further seconds until a process ends in which no Python thread can run
COLLECTIVE = ("torch.distributed", "torch._C._distributed", "llmfoundry.tree")
# Messages of gloo if another rank is gone or does not respond.
LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe", "gloo/transport")
TRAPPED = "unspecified launch failure"  # what CUDA says when a GPU ends its wait for another one (parallel/peers.py)
INNERMOST = 3  # number of innermost frames in which a collective is looked for


LOOSE = 1800.0  # default seconds for the first step, which compiles, and for saves, evaluations and callbacks
TIGHT = 0.8  # default share of the collectives' timeout, at which NCCL ends a process without naming a rank


class Limits(NamedTuple):
    """Seconds without progress after which a rank counts as hanging."""

    step: float  # within a step but the first
    other: float  # anywhere else; 0 in both: nothing is watched
    first: float = LOOSE  # at the end of the first step, where the host waits for what it has given to the device


def limits(hang_timeout: float | None, collective: float, first: float) -> Limits:
    """The limits of a run.

    Args:
        hang_timeout: for everything, where the YAML gives it.
        collective: the timeout of collectives in steps.
        first: that of collectives in the first step.
    """
    if hang_timeout is not None:
        return Limits(hang_timeout, hang_timeout, hang_timeout)
    if runtime.world_size() == 1:
        return Limits(LOOSE, LOOSE)
    return Limits(min(LOOSE, TIGHT * collective), LOOSE, min(LOOSE, TIGHT * first))


class Answer(NamedTuple):
    """A rank's answer when it is asked where it is."""

    waits: bool  # whether it waits for other ranks
    where: str
    host: str


class Watchdog:
    """Watches the main thread of this process from `start` to `close`.

    Args:
        folder: where to write.
        allowed: seconds without a beat.
    """

    def __init__(self, folder: Path, allowed: Limits) -> None:
        self._folder, self._allowed = folder, allowed
        self._beaten, self._doing, self._seconds = time.monotonic(), "", allowed.other
        self._closed = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._store = runtime.store_for_a_thread()
        if self._store is not None:
            self._store.set_timeout(datetime.timedelta(seconds=ANSWER))
        self._written = False
        self._failed = False  # a collective of the main thread has failed, so it no longer waits
        self._thread: threading.Thread | None = None

    @property
    def poll(self) -> float:
        """Seconds between checks."""
        return min(POLL, min(self._allowed) / 4)

    def start(self) -> None:
        """Start answering other ranks; the calling thread is watched from the first `beat` on.

        The time for tokenizing or loading is not limited: until then, the timeout of a collective ends a hang.
        """
        if min(self._allowed) > 0:
            self._main = threading.get_ident()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._seconds = math.inf
            self._thread.start()

    def beat(self, doing: str, in_step: bool = False) -> None:
        """Record progress; `doing` comes next, and `in_step` says whether it is a step that compiles nothing."""
        self._beaten, self._doing = time.monotonic(), doing
        self._seconds = self._allowed.step if in_step else self._allowed.other

    def phase(self, doing: str) -> None:
        """Record what the main thread does, without counting it as progress."""
        self._doing = doing

    def read(self, warm: bool) -> None:
        """Record that the host has launched a whole step and now waits for the device.

        Args:
            warm: whether this is not the first step, in which ranks may have compiled for long before they got here.
        """
        self._doing = READING
        if not warm:
            self._beaten, self._seconds = time.monotonic(), self._allowed.first

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def named(self, at: str, error: Exception) -> RunError | None:
        """Return the failure of a collective, naming the rank that it waited for; None for any other error."""
        here = str(error).strip()
        if TRAPPED in here and runtime.shares_memory():
            here = f"{here.splitlines()[0]}, as when a GPU has waited {runtime.timeout():.12g} seconds for another one"
        elif not isinstance(error, dist.DistError) and not any(word in here for word in LOST):
            return None
        return RunError(f"{at}: {self.verdict() or 'a collective failed'}; here: {here}")

    def verdict(self) -> str:
        """Ask all ranks, and say which one is at fault; every asker gets the same answer. Empty if unknown."""
        if self._store is None or self._thread is None:
            return ""
        self._failed = threading.get_ident() == self._main
        try:
            self._answer()
            self._store.set(ROLL, "called")
            time.sleep(self.poll + PATIENCE)
            if self._store.add(FIRST, 1) == 1:
                self._store.set(VERDICT, self._judge())
            return self._store.get(VERDICT).decode()
        except (RuntimeError, ValueError) as error:  # the store is gone, and its host with it
            return f"the ranks cannot ask each other ({error})"

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(self.poll):
            if self._store is not None:
                # If a C function holds the interpreter's lock, this thread cannot run, and a C thread ends the process.
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    faulthandler.dump_traceback_later(self._allowed.other + GIL, exit=True, file=runtime.STDERR)
            now = time.monotonic()
            if now - looked > self.poll + STOPPED:  # e.g. by Ctrl-Z: this thread was stopped too
                self._beaten = now
            looked, silent, allowed = now, now - self._beaten, self._seconds
            if silent > allowed:
                self._bark(silent, allowed)
            if self._store is not None and not self._written:
                with contextlib.suppress(RuntimeError):
                    if self._store.check([ROLL]):
                        self._answer()
        faulthandler.cancel_dump_traceback_later()

    def _bark(self, silent: float, allowed: float) -> None:
        said = f"no step, evaluation batch or save has ended for {silent:.0f} seconds (hang_timeout={allowed:.12g}s)"
        self._write(said)
        waits = self._here().waits
        why = self.verdict()
        if why:
            self._append(why)
        message = f"{said}: {why or self._here().where}; stacks are in {self._file()}"
        with contextlib.suppress(OSError, ValueError):  # whatever became of stderr, the process must end
            print(f"[rank {launch.rank()}] error: {message}", file=sys.stderr, flush=True)
        if waits:
            time.sleep(PATIENCE)  # the rank at fault goes first: torchrun's report names the one that failed first
        launch.tell_torchrun(f"error: {message}")
        os._exit(1)

    def _here(self) -> Answer:
        """Return where the main thread is."""
        frames = _frames(self._main)
        if any(each.f_code is Checkpointer.wait.__code__ for each in frames):  # the thread that writes for it counts
            writers = [thread for thread in threading.enumerate() if thread.name.startswith(WRITER)]
            frames = _frames(writers[-1].ident or 0) if writers else frames  # an earlier run may have left others
        inside = any(str(each.f_globals.get("__name__", "")).startswith(COLLECTIVE) for each in frames[:INNERMOST])
        ours = next((each for each in frames if "llmfoundry" in each.f_code.co_filename and not _passes_on(each)), None)
        is_parked = bool(frames) and str(frames[0].f_globals.get("__name__")).startswith(("threading", "concurrent"))
        place = next(iter(frames), None) if not inside and not is_parked else ours
        at = f"{Path(place.f_code.co_filename).name}:{place.f_lineno}, {place.f_code.co_name}" if place else "nowhere"
        return Answer(inside or self._failed or self._doing == READING, f"{self._doing} ({at})", socket.gethostname())

    def _answer(self) -> None:
        assert self._store is not None
        self._write("another rank hangs or has failed")
        self._store.set(f"hang/rank-{launch.rank()}", json.dumps(self._here()))

    def _judge(self) -> str:
        """Which ranks are at fault; called on one rank, which asks all others."""
        assert self._store is not None
        silent, busy = [], []
        for rank in range(launch.world_size()):
            key = f"hang/rank-{rank}"
            if not self._store.check([key]):
                silent.append(rank)
                continue
            answer = Answer(*json.loads(self._store.get(key)))
            if not answer.waits:
                busy.append(f"rank {rank} on {answer.host} is at fault: {answer.where}")
        if silent:
            some = ", ".join(map(str, silent[:8])) + (f" and {len(silent) - 8} more" if len(silent) > 8 else "")
            return f"rank {some} does not answer: stopped, killed, or its host is gone; the others wait for it"
        return "; ".join(busy[:8]) or "all ranks wait for each other in collectives"

    def _file(self) -> Path:
        return self._folder / f"hang-rank-{launch.rank()}.txt"

    def _write(self, why: str) -> None:
        """Write the stacks down, once."""
        if self._written:
            return
        self._written = True
        here = self._here()
        try:
            with self._file().open("w") as file:
                file.write(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {launch.rank()} on {here.host}, process {os.getpid()}: "
                    f"{why}\n{here.where}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if (trace := _flight_recorder()) is not None:
                self._file().with_name(f"hang-rank-{launch.rank()}-nccl.json").write_bytes(trace)
        except OSError as error:
            log.error("%s cannot be written: %s", self._file(), error.strerror)

    def _append(self, text: str) -> None:
        with contextlib.suppress(OSError), self._file().open("a") as file:
            file.write(f"\n{text}\n")


def _frames(thread: int) -> list[FrameType]:
    """Return the frames of a thread, innermost first."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _passes_on(frame: FrameType) -> bool:
    """Return whether a frame is in code that many parts of a run communicate through: it does not show who waits."""
    return frame.f_globals.get("__name__") in ("llmfoundry.tree", "llmfoundry.runtime")


def _flight_recorder() -> bytes | None:
    """NCCL's last collectives as JSON; None without NCCL."""
    if not torch.cuda.is_available() or not dist.is_initialized():
        return None
    # Two different recorders: NCCL's own, and that of other backends, which has no collectives of NCCL.
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        with contextlib.suppress(AttributeError, RuntimeError):  # not in this build, or NCCL does not respond
            trace = getattr(torch._C._distributed_c10d, name)()
            return trace.encode() if isinstance(trace, str) else trace
    return None
