"""Files that are read in place by `pread` while a run goes on.

If a memory-mapped file becomes shorter, SIGBUS kills the process without a message. `pread` returns an error that can
be reported, and takes about as long for rows of a few KB.
"""

from __future__ import annotations

import os
from pathlib import Path

from llmfoundry.config import ConfigError


class OpenFile:
    """A file with random access.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._number = self._file.fileno()
        self.size = os.fstat(self._number).st_size  # bytes

    def fill(self, memory: memoryview, start: int) -> None:
        """Read into a buffer, from a byte offset on; the errors are those of `read`."""
        try:
            if os.preadv(self._number, (memory,), start) == len(memory):
                return
        except OSError:
            pass
        memory[:] = self.read(start, start + len(memory))  # in several parts, or raises

    def read(self, start: int, stop: int) -> bytes:
        """Read bytes [start, stop).

        Raises:
            ConfigError: if the file has become shorter, or cannot be read.
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
        """Read a few bytes; the errors are those of `read`."""
        return self.read(start, stop)
