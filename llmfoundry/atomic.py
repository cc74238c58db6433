"""Write a file completely or not at all: to a temporary name first, then rename it over the old file."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write: the disk is full, or a limit is reached
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def os_error(error: BaseException) -> OSError | None:
    """Return the operating system's error behind an exception, or None. Rust libraries give only its number."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def atomic_write(path: Path, content: Iterable[bytes], sync: bool = False, shared: bool = False) -> None:
    """Replace a file, or leave it unchanged.

    Args:
        content: the pieces of the file, in order.
        sync: wait until they are on disk, so that a crash of the machine does not lose them.
        shared: several processes may write the file at the same time; the last one wins.

    Raises:
        OSError: if the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp{f'-{uuid.uuid4().hex[:12]}' if shared else ''}")
    temporary.unlink(missing_ok=True)  # left by a killed run, or a pipe, which would block when opened
    try:
        with temporary.open("xb") as file:
            file.writelines(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # frees space on a full disk
        raise


def write_output(path: Path, text: str) -> None:
    """Write a file that the user has named, completely or not at all. A path like /dev/stdout is written to directly.

    Raises:
        OSError: if it cannot be written.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
    else:
        atomic_write(Path(os.path.realpath(path)), [text.encode()])


def append_line(path: Path, line: str) -> None:
    """Append a line to a file; on an error, leave the file unchanged.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("ab", buffering=0) as file:
        write_line(file, line)


def write_line(file: FileIO, line: str) -> None:
    """Do the same as `append_line` for an open file."""
    before = file.tell() if file.seekable() else None
    content = memoryview(f"{line}\n".encode())
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        with suppress(OSError):
            if before is not None:
                file.truncate(before)  # half a line would damage the next one
        raise
