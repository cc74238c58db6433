"""The files of a `save_folder` besides checkpoints: config.yaml, metrics.jsonl, skipped.jsonl, summary.json.

A folder belongs to one run, which holds its lock. Nothing is written before `check_free` has found the folder free, or
has been asked to resume its run. Settings of earlier parts of the run are kept in `config-history/`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
import time
import uuid
from io import FileIO
from itertools import pairwise
from pathlib import Path
from typing import IO

from llmfoundry import runtime
from llmfoundry.atomic import atomic_write
from llmfoundry.checkpoint.identity import Plain
from llmfoundry.checkpoint.manifest import checkpoints
from llmfoundry.config import ConfigError, RunError
from llmfoundry.private import disclosed
from llmfoundry.settings import write_resolved
from llmfoundry.strict_json import parse_json, read_lines, whole_number
from llmfoundry.train.owner import OWNER, Owner
from llmfoundry.train.run import Metrics
from llmfoundry.train.summary import Summary

log = logging.getLogger(__name__)

# What a run that ended before its first step can leave: the folder is still free.
TRACES = {".lock", OWNER, f"{OWNER}.tmp", "config.yaml", "config.yaml.tmp", "metrics.jsonl", "wandb", "wandb-run-id"}

_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what flock says of a lock that another process holds
SKIPPED = "skipped.jsonl"  # the rows of steps that changed nothing
_PROBE, _PROBE_SECONDS = ".probe-", 20.0


class RunFolder:
    """The `save_folder` of a run, held by its owner; only rank 0 has one."""

    def __init__(self, path: Path, lock: IO[str], locked: bool) -> None:
        self.path = path
        self._locked = locked  # some file systems cannot
        self.owner: Owner | None = None
        self._lock = lock  # held until `close`; the kernel releases it however the process ends
        self._metrics: FileIO | None = None
        self._unwritten = bytearray()  # bytes of metrics.jsonl
        self._failing = False

    @classmethod
    def claim(cls, path: Path) -> RunFolder:
        """Lock a folder until `close` or the end of this process; it is made if necessary.

        Raises:
            ConfigError: the folder cannot be written, or a live process holds it.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            # Not to wait, should it be a pipe.
            lock = open(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666), "w")
        except OSError as error:
            raise ConfigError(f"save_folder: {path} cannot be written: {error.strerror}") from None
        locked = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in _HELD:
                raise ConfigError(f"save_folder: {path} is in use by another run, which is still running") from None
            log.warning(
                "save_folder: %s cannot be locked (%s); make sure that no other run uses it", path, error.strerror
            )
        return cls(path, lock, locked)

    def take(self, place: str) -> Owner:
        """Become the owner of a folder among all machines, until `close`.

        Args:
            place: this folder, or the URL of the run's folder in a store.

        Raises:
            ConfigError: another run owns it and is still running.
        """
        owner = Owner(place, self._lock if self._locked else None)
        owner.take()
        self.owner = owner
        return owner

    def begin(self, config: Plain, before: Plain | None, step: int) -> None:
        """Write config.yaml; settings that applied before `step` and differ are kept in config-history.

        Raises:
            ConfigError: they cannot be written.
        """
        try:
            if before is not None and before != config:
                record = self.path / "config-history" / f"until-step-{step}.yaml"
                record.parent.mkdir(exist_ok=True)
                atomic_write(record, [write_resolved(disclosed(before, {})).encode()], sync=True)
            atomic_write(self.path / "config.yaml", [write_resolved(config).encode()], sync=True)
        except OSError as error:
            raise ConfigError(f"save_folder: {self.path} cannot be written: {error.strerror}") from None

    def open_metrics(self, step: int, skips: int | None = None) -> None:
        """Continue metrics.jsonl after `step`: lines that a killed run wrote beyond its checkpoint are dropped.

        Args:
            skips: the step after which skipped.jsonl continues, if it differs.
        """
        if (self.path / SKIPPED).exists():
            self._cut(self.path / SKIPPED, step if skips is None else skips)
        if self._metrics is not None:
            self._metrics.close()
        file = self.path / "metrics.jsonl"
        steps = self._cut(file, step)
        for before, after in pairwise([*steps, step + 1] if steps else []):
            if after > before + 1:
                which = f"step {after - 1}" if after == before + 2 else f"steps {before + 1} to {after - 1}"
                log.warning("%s: has no line of %s; its curves have a gap there", file, which)
                break
        self._metrics = file.open("ab", buffering=0)

    def _cut(self, file: Path, step: int) -> list[int]:
        """Drop the lines of later steps; returns the steps of the others. Only one line is in memory at a time."""
        try:
            if not os.path.lexists(file):
                atomic_write(file, [], sync=True)
            steps: list[int] = []
            bytes_kept = 0
            for number, line in enumerate(read_lines(file), 1):
                if (found := _step_of(file, number, line)) <= step:
                    steps.append(found)
                    bytes_kept += len(line)
            if bytes_kept < file.stat().st_size:
                kept = (line for i, line in enumerate(read_lines(file), 1) if _step_of(file, i, line) <= step)
                atomic_write(file, kept, sync=True)
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read or written: {error.strerror}") from None
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{file}: {error}; move it away") from None
        return steps

    def write_skipped(self, line: dict[str, object]) -> None:
        """Append a line to skipped.jsonl; a failure is a warning."""
        try:
            with (self.path / SKIPPED).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("%s cannot be written: %s; the line was: %s", self.path / SKIPPED, error.strerror, line)

    def sync(self) -> None:
        """Make metrics.jsonl survive a power cut, so that no checkpoint survives without it.

        Raises:
            OSError: it cannot be written.
        """
        if self._metrics is None:
            return
        self._flush()
        os.fsync(self._metrics.fileno())
        here, there = os.fstat(self._metrics.fileno()), os.stat(self.path / "metrics.jsonl")
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise OSError(f"{self.path} is another folder than the run began in; move that one back")

    def write_metrics(self, metrics: Metrics) -> None:
        """Append one line; values that are not finite become null, because JSON cannot represent them.

        If it cannot be written now (the disk is full), it is kept and written with a later line.
        """
        line = json.dumps({key: _finite(value) for key, value in metrics.items()}) + "\n"
        self._unwritten += line.encode()
        try:
            self._flush()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written: %s; trying again", self.path / "metrics.jsonl", error.strerror)
            self._failing = True

    def _flush(self) -> None:
        assert self._metrics is not None
        while self._unwritten:
            del self._unwritten[: self._metrics.write(self._unwritten)]

    def close(self) -> None:
        """Release the folder for other runs."""
        if self._metrics is not None:
            self._metrics.close()
        if self.owner is not None:
            self.owner.close()
        self._lock.close()

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json.

        Raises:
            RunError: it cannot be written.
        """
        text = json.dumps({k: _finite(v) for k, v in summary.items()}, indent=2) + "\n"
        try:
            atomic_write(self.path / "summary.json", [text.encode()], sync=True)
        except OSError as error:
            raise RunError(f"{self.path / 'summary.json'} cannot be written: {error.strerror}") from None


def _step_of(file: Path, number: int, line: bytes) -> int:
    try:
        said = parse_json(line)
        return whole_number(said["step"] if isinstance(said, dict) else None)
    except (ValueError, KeyError):
        raise ConfigError(f"{file}: line {number} is damaged; remove it from there on") from None


def check_free(path: Path, autoresume: bool) -> None:
    """Check whether a run may use a folder, without writing anything.

    Raises:
        ConfigError: it is in use and must not be resumed, does not hold a run, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"save_folder: {path} is a file; name a folder")
    if not is_free(path):
        if not autoresume:
            raise ConfigError(
                f"save_folder: {path} is already used; choose another, or continue that run with autoresume=true"
            )
        if not (path / "config.yaml").is_file() and not checkpoints(path / "checkpoints"):
            raise ConfigError(f"save_folder: {path} holds no run to resume (no config.yaml); choose another")
    standing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not standing.is_dir():
        raise ConfigError(f"save_folder: {path} cannot be made: {standing} is a file; choose another")
    if not os.access(standing, os.W_OK | os.X_OK):
        raise ConfigError(f"save_folder: {path} cannot be written: no permission in {standing}")


def is_free(path: Path) -> bool:
    """Whether a folder is missing or empty, or a run had claimed it and ended before its first step."""
    names = {child.name for child in path.iterdir() if not child.name.startswith(_PROBE)} if path.is_dir() else set()
    if not names:
        return True
    metrics = path / "metrics.jsonl"
    return ".lock" in names and names <= TRACES and not (metrics.exists() and metrics.stat().st_size)


def check_shared(path: Path) -> None:
    """Check that every rank sees the folder that rank 0 has claimed; all ranks together.

    Raises:
        ConfigError: on all ranks; names the first rank that does not see it.
    """
    for rank, host in enumerate(hosts_without(path)):
        if host is not None:
            raise ConfigError(
                f"save_folder: {path.absolute()} on {host} (rank {rank}) is not the folder that rank 0 writes to; "
                "put it on storage that all nodes share, or in a store (s3://...)"
            )


def hosts_without(path: Path) -> list[str | None]:
    """For each rank, its host if it does not see the folder that rank 0 has claimed; all ranks together."""
    if runtime.world_size() == 1:
        return [None]
    probe = path / runtime.on_rank0(lambda: _leave_probe(path))
    deadline = time.monotonic() + _PROBE_SECONDS  # network file systems may take a while to show a new file
    while not (seen := probe.is_file()) and time.monotonic() < deadline:
        time.sleep(0.1)
    hosts = runtime.of_each_rank(None if seen else socket.gethostname())
    if runtime.is_rank0():
        probe.unlink(missing_ok=True)
    return hosts


def _leave_probe(path: Path) -> str:
    probe = path / f"{_PROBE}{uuid.uuid4().hex}"
    try:
        probe.touch()
    except OSError as error:
        raise ConfigError(f"save_folder: {path} cannot be written: {error.strerror}") from None
    return probe.name


def _finite(value: float | int | str | list[float] | None) -> object:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
