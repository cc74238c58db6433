"""Cache folders whose files are compared with the checksums that were written with them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import BinaryIO, cast

from llmfoundry.config import ConfigError
from llmfoundry.data.cache import made_once
from llmfoundry.data.watch import Damaged, Watch, moved_aside
from llmfoundry.strict_json import read_mapping

log = logging.getLogger(__name__)

SEAL = "checksums.json"
_BLOCK = 2**28  # bytes per checksum, so that ranks can divide a large file


def sealed_once(folder: Path, make: Callable[[Path], None]) -> Watch:
    """Make a folder if it does not exist (`made_once`), and compare its files. A damaged one is made again.

    Args:
        make: fills the temporary folder that it is given.

    Raises:
        ConfigError: if the folder cannot be made.
        Damaged: if the folder is damaged and cannot be made again.
    """

    def write(temporary: Path) -> None:
        make(temporary)
        sums = {path.name: _checksums(path) for path in sorted(temporary.iterdir())}
        (temporary / SEAL).write_text(json.dumps(sums))

    made_once(folder, write)
    try:
        return _opened(folder)
    except Damaged as error:
        damage = error
    away = moved_aside(folder, lambda: _opened(folder))
    if away is not None:
        log.error("DAMAGED CACHE: %s; making it again from the source", damage)
    try:
        made_once(folder, write)
    except ConfigError as error:
        if away is not None:
            away.rename(folder)
        raise Damaged(f"{damage}; but it cannot be made again: {error}") from None
    if away is not None:
        rmtree(away, ignore_errors=True)
    return _opened(folder)


def _opened(folder: Path) -> Watch:
    try:
        sums = cast(dict[str, list[str]], read_mapping(folder / SEAL))
        sizes = {name: (folder / name).stat().st_size for name in sums}
        blocks = [(folder / name, i, each) for name, found in sums.items() for i, each in enumerate(found)]
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{folder}: is damaged ({error}); delete the folder to make it again") from None
    for name, found in sums.items():
        if -(-sizes[name] // _BLOCK) != len(found):
            raise Damaged(f"{folder / name}: has {sizes[name]} bytes, not as many as were written; delete the folder")
    return Watch(folder, sum(sizes.values()), len(blocks), lambda number: _check(*blocks[number]))


def _checksums(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [_of_block(file) for _ in range(0, path.stat().st_size, _BLOCK)]


def _check(path: Path, block: int, expected: str) -> None:
    try:
        with path.open("rb") as file:
            file.seek(block * _BLOCK)
            found = _of_block(file)
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}; delete the folder to make it again") from None
    if found != expected:
        raise Damaged(f"{path}: checksum {found[:12]}, expected {expected[:12]}; delete the folder to make it again")


def _of_block(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    rest = _BLOCK
    while rest and (data := file.read(min(rest, 2**20))):
        digest.update(data)
        rest -= len(data)
    return digest.hexdigest()
