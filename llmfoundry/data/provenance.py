"""Records of what a source was when its tokens were made: to detect changes, and to continue when it is gone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llmfoundry.atomic import atomic_write
from llmfoundry.config import ConfigError, ResourceError
from llmfoundry.strict_json import read_mapping

Stamps = tuple[tuple[Path, str], ...]  # files, with values that change with their contents


class Gone(Exception):
    """A source does not exist, or cannot be reached.

    Args:
        error: the error to show the user.
    """

    def __init__(self, error: ConfigError | ResourceError) -> None:
        super().__init__(str(error))
        self.error = error


class Provenance(NamedTuple):
    """What is known of a source without reading it."""

    title: str  # for messages and folder names
    fingerprint: str  # hex; equal for equal documents
    n_bytes: int | None = None  # approximate size of the text; None: unknown
    files: frozenset[Path] = frozenset()  # real paths of the files that are read


def stamp_of(path: Path) -> str:
    """Return values that change when a file is written or replaced, without reading it; raise OSError if it is gone."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"


def stamps_of(paths: Iterable[Path]) -> Stamps:
    """Return the stamps of several files; raise OSError."""
    return tuple((path, stamp_of(path)) for path in paths)


def check_unchanged(title: str, stamps: Stamps) -> None:
    """Check that files have not changed since their fingerprint was taken; call it after reading them.

    Raises:
        ConfigError: if a file has changed; the message names the first one.
    """
    for path, stamp in stamps:
        try:
            now = stamp_of(path)
        except OSError:
            now = ""
        if now != stamp:
            raise ConfigError(
                f"dataset {title}: {path} changed while it was being read, so nothing of it is kept; start "
                "again when it is complete"
            )


def remember(memory: Path, source: Provenance) -> None:
    """Record what a source was, so that a run can continue from cached tokens when the source is gone."""
    said = source._asdict() | {"files": sorted(map(str, source.files))}
    with suppress(OSError):  # only an optimization
        memory.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(memory, [json.dumps(said).encode()], shared=True)


def recalled(memory: Path, gone: Gone) -> Provenance:
    """Return the record of a source that is gone.

    Raises:
        ConfigError, ResourceError: `gone.error`, if the source was never tokenized on this machine.
    """
    try:
        said = read_mapping(memory)
        title, fingerprint, n_bytes, files = (said[key] for key in Provenance._fields)
        if not (isinstance(title, str) and isinstance(fingerprint, str) and isinstance(files, list)):
            raise ValueError("it is not a source")
    except (OSError, ValueError, KeyError):
        raise gone.error from None
    n_bytes = n_bytes if isinstance(n_bytes, int) else None
    return Provenance(title, fingerprint, n_bytes, frozenset(Path(str(file)) for file in files))


def said_of_gone(gone: Gone, title: str) -> str:
    """Return a line for the log."""
    return f"{title}: its files are gone ({gone}); continuing with their cached tokens"
