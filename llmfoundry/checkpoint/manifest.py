"""A checkpoint as a folder of files: which there are, whether they are whole, which is the newest.

`MANIFEST.json` lists every other file with its size and SHA-256. It is written last, so a folder without it
is no checkpoint; and a folder only gets the name of a checkpoint when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch.distributed as dist

from llmfoundry import runtime
from llmfoundry.config import ConfigError

MANIFEST = "MANIFEST.json"
FORMAT = 1

# What every checkpoint has; there are tensor files and a tokenizer beside.
INDEX, TRAINER, CONFIG = "tensors.json", "trainer.json", "config.yaml"

_STEP_FOLDER = re.compile(r"step-(\d+)(?:-r(\d+))?")


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged, or not of this model."""


class Written(NamedTuple):
    """A file that is on disk, synced."""

    bytes: int
    sha256: str


def write_file(path: Path, content: bytes) -> Written:
    """Write a new file and sync it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(content), hashlib.sha256(content).hexdigest())


def measure(file: Path, sync: bool = False) -> Written:
    """The length and SHA-256 of a file."""
    # hashlib.file_digest reads 2**18 bytes at a time, which took the system several times as long from a cold disk.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
        if sync:
            os.fsync(handle.fileno())
        return Written(handle.tell(), digest.hexdigest())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, step: int, files: dict[str, Written]) -> None:
    """List the files of a complete folder, and sync it."""
    listed = {name: written._asdict() for name, written in sorted(files.items())}
    manifest = {"format": FORMAT, "step": step, "files": listed}
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    fsync_folder(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first: by step, then by repetition."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def find(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, or the newest in a folder of checkpoints or of a run.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / MANIFEST).exists() or _STEP_FOLDER.fullmatch(path.resolve().name):
        return path.resolve()
    for folder in (path, path / "checkpoints"):
        latest = (folder / "latest").resolve()
        if latest.parent == folder.resolve() and (latest / MANIFEST).exists():
            return latest  # a damaged one may have a higher step
        if found := checkpoints(folder):
            return found[0]
    raise CheckpointError(f"{path}: {'no checkpoint in this folder' if path.is_dir() else 'no such folder'}")


def verify(path: Path, only: Callable[[str], bool] = lambda name: True) -> dict[str, Written]:
    """Check the files of a checkpoint against its manifest; ranks share the work.

    Args:
        path: the checkpoint.
        only: which files, by name.

    Returns:
        The manifest.

    Raises:
        CheckpointError: on all ranks, naming the first file that is missing, cut short or changed.
    """
    error: str | None = None
    files: dict[str, Written] = {}
    try:
        files = read_manifest(path)
        names = sorted(name for name in files if only(name))[runtime.rank() :: runtime.world_size()]
        with ThreadPoolExecutor(4) as threads:  # hashing lets go of the interpreter
            list(threads.map(lambda name: _check_file(path, name, files[name]), names))
    except CheckpointError as failure:
        error = str(failure)
    errors: list[str | None] = [error]
    if runtime.world_size() > 1:
        errors = [None] * runtime.world_size()
        dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise CheckpointError(error)
    return files


@contextmanager
def verified_beside(path: Path, only: Callable[[str], bool]) -> Iterator[None]:
    """Check the files of a checkpoint while the block reads them: from the disk, they are read once.

    Their lengths are checked before the block begins, their bytes by the end of it. What is made of them in the block
    must come to nothing if this raises.

    Raises:
        CheckpointError: as `verify`.
    """
    files = {name: written for name, written in sorted(read_manifest(path).items()) if only(name)}
    for name, written in files.items():
        _check_file(path, name, written, bytes_too=False)
    thread = ThreadPoolExecutor(1)  # in order, as the files are read
    checks = [thread.submit(_check_file, path, name, written) for name, written in files.items()]
    try:
        yield
        for check in checks:
            check.result()
    finally:
        thread.shutdown(cancel_futures=True)


def _check_file(path: Path, name: str, expected: Written, bytes_too: bool = True) -> None:
    file = path / name
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: is not a plain file")
        if status.st_size != expected.bytes:
            raise CheckpointError(f"{file}: has {status.st_size} bytes of {expected.bytes}; the checkpoint is damaged")
        if bytes_too and measure(file).sha256 != expected.sha256:
            raise CheckpointError(f"{file}: has other bytes than were written (SHA-256); the checkpoint is damaged")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing; the checkpoint is damaged") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def read_manifest(path: Path) -> dict[str, Written]:
    """The files of a checkpoint, none of them outside it.

    Raises:
        CheckpointError: there is no manifest, or it is no sound one.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
        files = {name: Written(int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file}: is missing; this is no whole checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: is damaged ({type(error).__name__}: {error})") from None
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
            raise CheckpointError(f"{file}: names {name!r}, which is outside the checkpoint")
    for name in (INDEX, TRAINER, CONFIG):
        if name not in files:
            raise CheckpointError(f"{file}: does not list {name}; this is no whole checkpoint")
    return files


def is_whole(path: Path) -> bool:
    """Whether every file is there in its full length; a cheap look, without reading them."""
    try:
        files = read_manifest(path)
        return all((path / name).stat().st_size == written.bytes for name, written in files.items())
    except (CheckpointError, OSError):
        return False


def remove(path: Path) -> None:
    """Delete a folder or link; first under a temporary name, so that a kill leaves no half checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if _STEP_FOLDER.fullmatch(path.name):
        path = path.rename(path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}"))
    shutil.rmtree(path)
