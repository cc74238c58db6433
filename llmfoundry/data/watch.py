"""Compare checksums of cached files before or during a run; a mismatch is raised at the next read."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from llmfoundry import runtime
from llmfoundry.config import ConfigError

AT_ONCE_BYTES = 2**28  # folders up to this size are verified when they are opened, in at most about a second
_FOUND_DAMAGED = "found-damaged"  # a marker file in the folder, left by a run that ended because of damage


class Damaged(ConfigError):
    """Cached files are not what was written. They are made again if the source exists."""


def moved_aside(folder: Path, opened: Callable[[], object]) -> Path | None:
    """Move a damaged folder out of the way, so that it can be made again.

    If several ranks find the damage, the first one moves it.

    Args:
        opened: opens the folder, and raises Damaged if it is still damaged.

    Returns:
        The folder's new place; None if another rank has moved it or made it again.
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

    Up to AT_ONCE_BYTES are compared at once. If there is more, a thread compares one file after another during the run,
    each rank its share, and `check` raises what it has found. The thread ends with the process.
    """

    def __init__(self, folder: Path, n_bytes: int, n_checks: int, check: Callable[[int], None]) -> None:
        """Start comparing.

        Args:
            n_bytes: total size of the files.
            n_checks: number of checksums.
            check: called with the index of a checksum; raises Damaged if it does not match.

        Raises:
            Damaged: if a mismatch was found at once.
        """
        self._folder, self._check = folder, check
        self._found: Damaged | None = None
        self._thread: threading.Thread | None = None
        mark = folder / _FOUND_DAMAGED
        if n_bytes <= AT_ONCE_BYTES or mark.exists():
            for number in range(n_checks):
                check(number)
            mark.unlink(missing_ok=True)  # the disk or the memory was at fault, not the files
            return
        own = range(runtime.rank(), n_checks, runtime.world_size())
        self._thread = threading.Thread(target=self._run, args=(own,), name=f"watch {folder.name}", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the comparison is still running."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise what was found so far."""
        if self._found is not None:
            raise self._found

    def wait(self) -> None:
        """Wait for the end of the comparison."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            try:
                self._check(number)
            except Damaged as error:
                with suppress(OSError):  # so that the next start verifies all files first
                    (self._folder / _FOUND_DAMAGED).touch()
                self._found = error
                return
