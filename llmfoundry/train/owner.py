"""Allow only one run at a time in a `save_folder`, also if runs on two machines share it by a disk or a store.

    owner.json    {"nonce": ..., "host": ..., "lock": ..., "beat": 17}

The owner writes it when it takes the folder, increments `beat` every BEAT seconds, and removes it when it ends. A run
that finds another machine's file watches it for LEASE seconds: if `beat` changes, the owner is alive and the newcomer
ends; otherwise the newcomer takes the folder. No clocks are compared. If both continue (a machine was suspended, or
both started at the same moment), the run whose nonce has been replaced notices it before it completes its next
checkpoint, and ends.

Within one machine the kernel's lock (`RunFolder`) shows at once whether the owner is alive.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from llmfoundry.atomic import atomic_write
from llmfoundry.checkpoint.manifest import TakenOver
from llmfoundry.checkpoint.store import STORE_ERRORS
from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.remote import delete, opened, patiently, put
from llmfoundry.strict_json import Json, parse_json, read_plain

log = logging.getLogger(__name__)

OWNER = "owner.json"
BEAT, LEASE = 10.0, 40.0  # seconds
MOST_BYTES = 2**16  # of owner.json


class Record(NamedTuple):
    """The contents of owner.json."""

    nonce: str
    host: str
    lock: str  # the file that it has locked, and the boot of its machine
    beat: int


class Owner:
    """This run as the owner of a folder, from `take` to `close`; on rank 0.

    Args:
        folder: a path or a URL.
        lock: an open file that this process has locked, if possible; the lock is released when the process ends.
    """

    def __init__(self, folder: str, lock: IO[str] | None) -> None:
        self._folder, self._locked = folder, lock is not None
        self._place = f"{folder.rstrip('/')}/{OWNER}"
        self._own = Record(uuid.uuid4().hex, socket.gethostname(), _lock_of(lock), 0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)

    def take(self) -> None:
        """Take the folder.

        Raises:
            ConfigError: if another run owns it and is still running, or it cannot be written.
        """
        try:
            found = self._read()
            if found is not None and not (self._locked and found.lock == self._own.lock):
                self._watch(found)
            self._write()
        except OSError as error:
            raise ConfigError(f"save_folder: {self._folder} cannot be written: {error.strerror}") from None
        self._thread.start()

    def check(self) -> None:
        """Check that the folder still belongs to this run.

        Raises:
            TakenOver: if it does not.
        """
        found = self._read()
        if found is not None and found.nonce != self._own.nonce:
            raise TakenOver(
                f"save_folder: {self._folder} was taken over by a run on {found.host}, while this one on "
                f"{self._own.host} was still running; this one ends, and saves nothing more there"
            )

    def close(self) -> None:
        """Release the folder for other runs."""
        self._closed.set()
        if self._thread.ident is None:
            return
        self._thread.join()
        with suppress(*STORE_ERRORS):
            found = self._read()
            if found is not None and found.nonce == self._own.nonce:
                delete(self._place) if is_url(self._place) else Path(self._place).unlink()

    def _watch(self, found: Record) -> None:
        log.warning(
            "save_folder: %s belongs to a run on %s; checking for %.0f seconds whether it is still running",
            self._folder, found.host, LEASE,
        )  # fmt: skip
        deadline = time.monotonic() + LEASE
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, BEAT / 4))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise ConfigError(
                    f"save_folder: {self._folder} is in use by another run, on {now.host}, which is still running"
                )
        log.warning("save_folder: %s: the run on %s no longer responds; taking over", self._folder, found.host)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            with suppress(*STORE_ERRORS):  # e.g. a full disk or a store that does not answer: the next may succeed
                found = self._read()
                if found is not None and found.nonce != self._own.nonce:
                    return
                self._own = self._own._replace(beat=self._own.beat + 1)
                self._write()

    def _read(self) -> Record | None:
        """Read owner.json; None if it does not exist or was not written by a run."""
        try:
            if is_url(self._place):
                fs, path = opened(self._place)
                fs.invalidate_cache()
                said = patiently(self._place, lambda: parse_json(fs.cat_file(path) if fs.exists(path) else b"null"))
            else:
                said = parse_json(read_plain(Path(self._place), most=MOST_BYTES))
            return _record(said)
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def _write(self) -> None:
        text = json.dumps(self._own._asdict())
        if not is_url(self._place):
            atomic_write(Path(self._place), [text.encode()])
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / OWNER
            file.write_text(text)
            put(file, self._place)


def _record(said: Json) -> Record | None:
    if not isinstance(said, dict):
        return None
    nonce, host, lock, beat = (said[key] for key in Record._fields)
    if not isinstance(beat, int):
        return None
    return Record(str(nonce), str(host), str(lock), beat)


def _lock_of(lock: IO[str] | None) -> str:
    """Identify a locked file and this boot of the machine: the kernel's locks hold in all its containers."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = socket.gethostname()
    if lock is None:
        return machine
    status = os.fstat(lock.fileno())
    return f"{machine}/{status.st_dev}/{status.st_ino}"
