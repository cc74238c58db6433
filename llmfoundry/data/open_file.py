"""Files that are read in place while a run goes on, by `pread`.

A mapped file that becomes shorter kills the process by SIGBUS, without a word. Reading it is an error with a name. For
rows of a few KB it takes about as long.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmfoundry.config import ConfigError


class OpenFile:
    """A file at random places.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._number = self._file.fileno()
        self.size = os.fstat(self._number).st_size  # bytes

    def fill(self, memory: memoryview, start: int) -> None:
        """Read into bytes of memory, from a byte of the file on; raises as `read`."""
        try:
            if os.preadv(self._number, (memory,), start) == len(memory):
                return
        except OSError:
            pass
        memory[:] = self.read(start, start + len(memory))  # in several parts, or it says why not

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop).

        Raises:
            ConfigError: the file has become shorter, or cannot be read.
        """
        parts: list[bytes] = []
        while start < stop:
            try:
                part = os.pread(self._number, stop - start, start)
            except OSError as error:
                raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
            if not part:
                raise ConfigError(f"{self.path}: has become shorter than {stop} bytes while it was read; restore it")
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def sample(self, start: int, stop: int) -> bytes:
        """A few bytes; raises as `read`."""
        return self.read(start, stop)
