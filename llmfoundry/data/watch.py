"""Checksums of files in the cache, compared before a run or beside it: what is found is an error of the next read."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from llmfoundry import runtime
from llmfoundry.config import ConfigError

AT_ONCE_BYTES = 2**28  # of a folder whose checksums are compared when it is opened: a second, if that
_FOUND_DAMAGED = "found-damaged"  # a file in the folder, left by a run that ended for it


class Damaged(ConfigError):
    """Files in the cache that are not what was written: they are made again where the source is there."""


def moved_aside(folder: Path, opened: Callable[[], object]) -> Path | None:
    """Move a damaged folder out of the way, so that it can be made again.

    Of several ranks that found the damage, the first one moves it.

    Args:
        opened: opens the folder, and raises Damaged if it is still damaged.

    Returns:
        Where it is now; None if another rank has moved it, or has made it again.
    """
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            return None
        try:
            opened()
        except Damaged:
            return folder.rename(folder.with_name(f"{folder.name}.damaged-{uuid.uuid4().hex[:12]}"))
    return None


class Watch:
    """Compares the files of a folder with their checksums.

    Up to AT_ONCE_BYTES are compared at once; of more, a thread compares one after another beside the run, each rank its
    share, and `check` says what it has found. The thread ends with the process.
    """

    def __init__(self, folder: Path, n_bytes: int, n_checks: int, check: Callable[[int], None]) -> None:
        """Begin.

        Args:
            n_bytes: of the files.
            n_checks: how many parts of the files have a checksum.
            check: given the number of one, raises Damaged.

        Raises:
            Damaged: found at once.
        """
        self._folder, self._check = folder, check
        self._found: Damaged | None = None
        self._thread: threading.Thread | None = None
        mark = folder / _FOUND_DAMAGED
        if n_bytes <= AT_ONCE_BYTES or mark.exists():
            for number in range(n_checks):
                check(number)
            mark.unlink(missing_ok=True)  # it was the disk or the memory that read it
            return
        own = range(runtime.rank(), n_checks, runtime.world_size())
        self._thread = threading.Thread(target=self._run, args=(own,), name=f"watch {folder.name}", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether something may still be found."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what was found so far."""
        if self._found is not None:
            raise self._found

    def wait(self) -> None:
        """Wait until all is compared."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            try:
                self._check(number)
            except Damaged as error:
                with suppress(OSError):  # so that the next start makes them again
                    (self._folder / _FOUND_DAMAGED).touch()
                self._found = error
                return
