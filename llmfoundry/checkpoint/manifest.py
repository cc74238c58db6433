"""A checkpoint as a folder of files: which files it has, whether they are complete, and which one is the newest.

`MANIFEST.json` lists every other file with its size and SHA-256. It is written last, so a folder without it is not a
checkpoint, and a folder only gets a checkpoint's name once it is complete. The newest checkpoint is found by scanning a
folder and verifying its contents (finding.py); the link `latest` is for people and is never trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple

from llmfoundry import runtime
from llmfoundry.config import ConfigError, RunError
from llmfoundry.strict_json import Json, read_mapping, whole_number

MANIFEST, LATEST = "MANIFEST.json", "latest"
FORMAT = 1

# Files of every checkpoint, besides tensor files and a tokenizer.
INDEX, TRAINER, CONFIG = "tensors.json", "trainer.json", "config.yaml"
# In a converted checkpoint, config.yaml is a recipe for the reader to edit, so the manifest does not list it, and the
# settings of the weights are kept here.
CONVERTED = "converted.yaml"

Need = Literal["everything", "model", "texts"]  # which files of a checkpoint; texts: all but tensors
_STEP_FOLDER = re.compile(r"step-(\d+)(?:-r(\d+))?")


class CheckpointError(ConfigError):
    """A checkpoint is missing, damaged, or of another model."""


class DamagedError(CheckpointError):
    """The files of a checkpoint are not as they were written; an older checkpoint may be usable."""


class SaveError(RunError):
    """A checkpoint could not be written; earlier ones are intact."""


class TakenOver(RunError):
    """Another run has taken over this run's folder, so nothing more may be written there."""


class NotFiniteError(RunError):
    """A tensor to be saved has non-finite values, which later steps cannot repair."""


class Written(NamedTuple):
    """A file that has been written and synced to disk."""

    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """The contents of a checkpoint's manifest.

    Attributes:
        step: the step of the checkpoint.
        finite: whether all values were checked to be finite when it was written.
        files: every other file, by its name in the folder; all are inside of it.
    """

    step: int
    finite: bool
    files: dict[str, Written]


def write_file(path: Path, content: bytes) -> Written:
    """Write a new file and sync it."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(content), hashlib.sha256(content).hexdigest())


def measure(file: Path, sync: bool = False) -> Written:
    """Return the length and SHA-256 of a file."""
    # hashlib.file_digest reads 2**18 bytes at a time, which took several times as much system time from a cold disk.
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**22))
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(buffer):
            digest.update(buffer[:count])
        if sync:
            os.fsync(handle.fileno())
        return Written(handle.tell(), digest.hexdigest())


def fsync_folder(folder: Path) -> None:
    """Sync a folder, so that its file names survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, step: int, files: dict[str, Written], finite: bool = False) -> None:
    """Write the manifest of a complete folder, and sync it.

    Args:
        folder: the folder.
        step: the step of the checkpoint.
        files: its files, by name.
        finite: whether all values were checked to be finite; otherwise they are checked on reading.
    """
    listed = {name: written._asdict() for name, written in sorted(files.items())}
    manifest = {"format": FORMAT, "step": step, "finite": finite, "files": listed}
    write_file(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    fsync_folder(folder)


def is_needed(name: str, need: Need) -> bool:
    """Return whether a file is among those needed."""
    is_tensors = name.endswith(".safetensors")
    return need == "everything" or not is_tensors or (need == "model" and name.startswith("model-"))


def number_of(name: str) -> tuple[int, int] | None:
    """Return the step and repetition in a folder's name, or None if it is not a checkpoint's name."""
    match = _STEP_FOLDER.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, judging by name, newest first: by step, then by repetition.

    If a copy followed links (`cp -rL`, `aws s3 sync`), `latest` is a folder, which counts as a checkpoint of its step.
    """
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        number = number_of(path.name)
        if number and path.is_dir():
            found.append((*number, path))
        elif is_copied_link(path) and (step := step_in(path)) is not None:
            found.append((step, -1, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def is_copied_link(path: Path) -> bool:
    """Return whether this is a `latest` that is a folder instead of a link."""
    return path.name == LATEST and path.is_dir() and not path.is_symlink()


def step_in(path: Path) -> int | None:
    """Return the step in a checkpoint's manifest, or None if it cannot be read."""
    try:
        return whole_number(read_mapping(path / MANIFEST, follow=False)["step"])
    except (OSError, ValueError, KeyError):
        return None


def verify(path: Path, only: Callable[[str], bool] = lambda name: True) -> Manifest:
    """Check the files of a checkpoint against its manifest; the ranks share the work.

    Args:
        path: the checkpoint.
        only: selects files by name.

    Returns:
        The manifest.

    Raises:
        DamagedError: on all ranks, naming the first file that is missing, truncated or changed.
    """

    def check() -> Manifest:
        found = read_manifest(path)
        files = found.files
        names = sorted(name for name in files if only(name))[runtime.rank() :: runtime.world_size()]
        with ThreadPoolExecutor(4) as threads:  # hashing releases the GIL
            list(threads.map(lambda name: _check_file(path, name, files[name]), names))
        return found

    return runtime.agreed(check)


@contextmanager
def verified_beside(path: Path, files: Mapping[str, Written]) -> Iterator[None]:
    """Check the files of a checkpoint while the block reads them, so that they are read from disk only once.

    Lengths are checked before the block runs, contents by its end. If this raises, the caller must discard the block's
    results.

    Args:
        path: the checkpoint.
        files: which of its files to check, by name.

    Raises:
        DamagedError: as `verify`.
    """
    for name, written in files.items():
        _check_file(path, name, written, bytes_too=False)
    thread = ThreadPoolExecutor(1)  # in the order in which the block reads them
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
            raise DamagedError(f"{file}: is not a plain file")
        if status.st_size != expected.bytes:
            raise DamagedError(f"{file}: has {status.st_size} bytes of {expected.bytes}; the checkpoint is damaged")
        if bytes_too and measure(file).sha256 != expected.sha256:
            raise DamagedError(f"{file}: has changed since it was written (SHA-256); the checkpoint is damaged")
    except FileNotFoundError:
        raise DamagedError(f"{file}: is missing; the checkpoint is damaged") from None
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read: {error.strerror}") from None


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint, without checking its files.

    Raises:
        DamagedError: if the manifest is missing or malformed.
    """
    file = path / MANIFEST
    try:
        manifest = read_mapping(file, follow=False)
        if manifest["format"] != FORMAT:
            raise DamagedError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
        step, listed = whole_number(manifest["step"]), manifest["files"]
        if not isinstance(listed, dict):
            raise ValueError("files must be a mapping")
        files = {name: _written(entry) for name, entry in listed.items()}
    except FileNotFoundError:
        raise DamagedError(f"{file}: is missing; the checkpoint is not complete") from None
    except OSError as error:
        raise DamagedError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedError(f"{file}: is damaged ({type(error).__name__}: {error})") from None
    named = _STEP_FOLDER.fullmatch(path.name)
    if named is not None and int(named[1]) != step:
        raise DamagedError(f"{file}: is of step {step}, and its folder is named {path.name}")
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or not _is_name(name):
            raise DamagedError(f"{file}: names {name!r:.80}, which is outside the checkpoint")
    for name in (INDEX, TRAINER, CONVERTED if CONVERTED in files else CONFIG):
        if name not in files:
            raise DamagedError(f"{file}: does not list {name}; the checkpoint is not complete")
    return Manifest(step, manifest.get("finite") is True, files)


def _is_name(text: str) -> bool:
    """Return whether a file can have this name: JSON may contain an unpaired surrogate."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _written(entry: Json) -> Written:
    if not isinstance(entry, dict) or not isinstance(entry["sha256"], str):
        raise ValueError(f"{entry!r:.80} is not a file's length and SHA-256")
    return Written(whole_number(entry["bytes"]), entry["sha256"])


def is_whole(path: Path) -> bool:
    """Return whether all files exist with their full length, without reading them."""
    try:
        files = read_manifest(path).files
        return all((path / name).stat().st_size == written.bytes for name, written in files.items())
    except (CheckpointError, OSError):
        return False


def remove(path: Path) -> None:
    """Delete a folder or link. Folders are renamed first, so that a kill leaves no partial checkpoint."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    if ".tmp-" not in path.name:
        path = path.rename(path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}"))
    shutil.rmtree(path)
