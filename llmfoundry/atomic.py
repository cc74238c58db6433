"""Write a file completely or not at all: to a temporary name first, then rename it over the old file."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterable
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a write: the disk is full, or a limit is reached


def atomic_write(path: Path, content: Iterable[bytes], sync: bool = False, shared: bool = False) -> None:
    """Replace a file, or leave it unchanged.

    Args:
        content: the pieces of the file, in order.
        sync: wait until they are on disk, so that a crash of the machine does not lose them.
        shared: several processes may write the file at the same time; the last one wins.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp{f'-{uuid.uuid4().hex[:12]}' if shared else ''}")
    temporary.unlink(missing_ok=True)  # a killed run's, or a pipe, on which opening would wait
    try:
        with temporary.open("xb") as file:
            file.writelines(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
        raise
