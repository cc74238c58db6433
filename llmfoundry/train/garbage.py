"""Python's garbage collection, between steps and on all ranks alike.

By itself Python collects at any moment, on each rank in another step, and all other ranks wait for it.
"""

from __future__ import annotations

import gc

ALL = 50  # collections from one full collection to the next; the others look only at young objects


class Garbage:
    """Takes collection over from Python from the first `collect` to `close`."""

    def __init__(self) -> None:
        self._froze = False
        self._collects: bool | None = None  # None: not decided yet
        self._calls = 0

    def freeze(self) -> None:
        """Exempt the objects that exist by now, unless this process has done so before the run.

        After the first step there are 400,000 that stay: a full collection of them stops a rank for a good part of a
        second.
        """
        if not gc.get_freeze_count():
            gc.collect()
            gc.freeze()
            self._froze = True

    def collect(self) -> None:
        """Collect now, while a GPU is busy with the update; does nothing if the process has turned collection off."""
        if self._collects is None:
            self._collects = gc.isenabled()
            gc.disable()
        if self._collects:
            self._calls += 1
            gc.collect(1 if self._calls % ALL else 2)

    def close(self) -> None:
        """Leave collection to Python again."""
        if self._collects:
            gc.enable()
        if self._froze:
            gc.unfreeze()
