"""Cache folders on disk: each is made once, by the first process that needs it, and is complete once it exists."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmfoundry.config import ConfigError, reason
from llmfoundry.launch import local_rank

log = logging.getLogger(__name__)
_SAID_AFTER = 10.0  # seconds


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return `folder`; make it first if it does not exist.

    Other ranks and runs that ask at the same time wait. The contents are synced to disk before the folder gets its
    name, so a crash never leaves a folder that looks finished. If `make` raises, nothing is left. On a file system
    without locks, the first rename wins.

    Args:
        folder: its name identifies its contents (by a fingerprint), so an existing folder is never changed.
        make: fills the temporary folder that it is given.

    Raises:
        ConfigError: if the cache cannot be written.
    """
    if folder.exists():
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f"{folder.name}.lock")
        with waited_for(lock, f"{folder} to be made"):
            if not folder.exists():
                try:
                    _make(folder, make)
                except BaseException:
                    lock.unlink(missing_ok=True)  # a waiting process sees that the lock is gone and makes another
                    raise
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn errors of a block that writes to the cache into one line.

    Raises:
        ConfigError: if the folder cannot be written, e.g. because the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be created: {reason(error)}; set cache_dir or LLMFOUNDRY_CACHE to a writable folder "
            "with room"
        ) from error


@contextmanager
def waited_for(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock. A process that has to wait logs it, because it cannot see who holds the lock on another machine."""
    held = FileLock(lock)
    try:
        held.acquire(timeout=_SAID_AFTER)
    except Timeout:
        if local_rank() == 0:
            log.warning("waiting for %s by another process, which holds %s", what, lock)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # left by a killed process, as this one holds the lock
        shutil.rmtree(stale, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's mode 0700 would lock other users out of a shared cache
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
