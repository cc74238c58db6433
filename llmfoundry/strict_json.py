"""Read JSON from untrusted files with one strict reader that raises ValueError for anything malformed.

Python's reader accepts `NaN`, `Infinity` and `1e400`, keeps the last of several equal keys, and fails with
RecursionError on deep nesting. A name may also lead to a pipe, on which reading would wait for ever.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

MOST_BYTES = 2**28  # of a file
MOST_OF_LINE = 2**24  # bytes


def parse_json(text: str | bytes) -> Json:
    """The value of a JSON text.

    Raises:
        ValueError: it is malformed, has a number that is not finite or a repeated key, or is nested too deeply.
    """
    try:
        found: Json = json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_mapping)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return found


def read_json(path: Path, follow: bool = True) -> Json:
    """The value in a file.

    Args:
        follow: whether the file may be a link.

    Raises:
        ValueError: as `parse_json`; or it is not a regular file, or too long.
        OSError: it cannot be read.
    """
    return parse_json(read_plain(path, follow))


def read_mapping(path: Path, follow: bool = True) -> dict[str, Json]:
    """The mapping in a file; raises as `read_json`, and ValueError if it is not a mapping."""
    found = read_json(path, follow)
    if not isinstance(found, dict):
        raise ValueError(f"it must hold a mapping, found {type(found).__name__}")
    return found


def read_plain(path: Path, follow: bool = True, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file; reading never waits for another process.

    Raises:
        ValueError: it is not a regular file, or longer than `most` bytes.
        OSError: it cannot be read.
    """
    if not follow and path.is_symlink():
        raise ValueError("is not a plain file but a link")
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"has {size:,} bytes; {most:,} is the most that is read")
        return file.read()


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file with their line breaks; an incomplete last line is left out.

    Raises:
        ValueError: it is not a regular file, or a line is longer than MOST_OF_LINE.
        OSError: it cannot be read.
    """
    with _opened(path) as file:
        while line := file.readline(MOST_OF_LINE):
            if line.endswith(b"\n"):
                yield line
            elif len(line) == MOST_OF_LINE:
                raise ValueError(f"has a line of more than {MOST_OF_LINE:,} bytes")


def _opened(path: Path) -> BinaryIO:
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115  # the callers close it
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("is not a plain file")
    return file


def whole_number(value: Json) -> int:
    """A number that is whole, not negative, and fits into 63 bits; raises ValueError otherwise."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is not an integer of at least 0")
    return value


def whole_numbers(values: Json) -> tuple[int, ...]:
    """The same of a list."""
    if not isinstance(values, list):
        raise ValueError(f"{values!r:.40} is not a list of integers")
    return tuple(whole_number(value) for value in values)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _mapping(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r:.80} comes twice")
    return found
