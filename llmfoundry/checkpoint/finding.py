"""Resolves a path or URL to a checkpoint, and fetches its files to this machine.

A checkpoint in a store (`s3://bucket/runs/moe`) is fetched to the cache, once per machine, before it is used. In a
store, a folder without MANIFEST.json is an incomplete upload, not a checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from llmfoundry import runtime
from llmfoundry.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    CheckpointError,
    DamagedError,
    Need,
    Written,
    checkpoints,
    is_needed,
    measure,
    number_of,
    read_manifest,
)
from llmfoundry.config import is_url, nearest_path
from llmfoundry.data import remote
from llmfoundry.data.remote import LIMIT, RemoteFile, Store, listing

log = logging.getLogger(__name__)
T = TypeVar("T")
_AT_ONCE = 4  # files fetched concurrently


class Candidate(NamedTuple):
    """A checkpoint that may be usable.

    Attributes:
        place: its folder or URL.
        files: if it is in a store, its files by name.
    """

    place: str
    files: Mapping[str, RemoteFile] | None = None


class Found(NamedTuple):
    """A checkpoint whose files are on this machine.

    Attributes:
        path: the folder on this machine.
        place: its name for users: a folder or URL.
    """

    path: Path
    place: str


def candidates(path: str | Path) -> list[Candidate]:
    """Return the checkpoints that a path may mean: itself, or all in a folder of checkpoints or a run, newest first.

    `latest` means the newest one, wherever the link points.

    Raises:
        CheckpointError: if there is none.
    """
    if is_url(str(path)):
        return _candidates_of_store(str(path).rstrip("/"))
    path = Path(path)
    if path.name == LATEST and (found := checkpoints(path.absolute().parent)):
        return [Candidate(str(each)) for each in found]
    if path.is_dir() and ((path / MANIFEST).exists() or number_of(path.resolve().name)):
        return [Candidate(str(path.resolve()))]
    for folder in (path, path / "checkpoints"):
        if found := checkpoints(folder):
            return [Candidate(str(each)) for each in found]
    if path.is_dir():
        raise CheckpointError(f"{path}: no checkpoint in this folder{_other_kind(path)}")
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; name a run's folder or a checkpoint's")
    raise CheckpointError(f"{path}: no such folder{nearest_path(path, '*/')}")


def _other_kind(folder: Path) -> str:
    """What a folder holds instead of a checkpoint, and what to do with it; empty if that is not known."""
    if (folder / "adapter_config.json").exists():
        return (
            ", but adapters in peft's format; name the run that trained them, or merge them into their base model "
            "with peft's merge_and_unload and name that folder"
        )
    if (folder / "config.json").exists():
        return f", but a Hugging Face model; write hf:{folder} for it where a path is read, or convert it with from-hf"
    return ""


def _candidates_of_store(url: str) -> list[Candidate]:
    parent, _, name = url.rpartition("/")
    files = listing(parent if name == LATEST else url)
    if MANIFEST in files:
        return [Candidate(url, files)]
    for below in ("", "checkpoints/"):
        if found := in_store(f"{parent if name == LATEST else url}/{below}".rstrip("/"), _below(files, below)):
            return found
    half = "is half an upload (it has no MANIFEST.json)" if number_of(name) else "no checkpoint in this folder"
    theirs = f"; for a Hugging Face model, write hf:{url.removeprefix('hf://')}" if url.startswith("hf://") else ""
    raise CheckpointError(f"{url}: {half if files else 'no such folder'}{theirs}")


def in_store(url: str, files: Mapping[str, RemoteFile]) -> list[Candidate]:
    """Return the complete checkpoints in a folder of a store, newest first.

    Args:
        url: the folder.
        files: all files under it.
    """
    names = {name.partition("/")[0] for name in files if name.endswith(f"/{MANIFEST}")}
    numbered = sorted(((number, name) for name in names if (number := number_of(name))), reverse=True)
    return [Candidate(f"{url}/{name}", _below(files, f"{name}/")) for _, name in numbered]


def _below(files: Mapping[str, RemoteFile], folder: str) -> dict[str, RemoteFile]:
    return {name.removeprefix(folder): file for name, file in files.items() if name.startswith(folder)}


def newest_usable(find: Callable[[], list[Candidate]], use: Callable[[Found], T], need: Need, where: str) -> T:
    """Use the newest of several checkpoints; if it is damaged, log an error and use the previous one.

    All ranks must call this; they use the same checkpoint, which rank 0 finds.

    Args:
        find: returns the checkpoints, newest first; called again after each damaged one.
        use: raises DamagedError, on all ranks, if the checkpoint is unusable.
        need: the files that `use` reads; from a store, only these are fetched.
        where: the user's name for the location.

    Raises:
        CheckpointError: if there is none, or all are damaged.
        ResourceError: if a store does not answer; an older checkpoint would not be available either.
    """
    damaged: dict[str, DamagedError] = {}
    while untried := [each for each in runtime.on_rank0(find) if each.place not in damaged]:
        newest = untried[0]
        try:
            return use(here(newest, need))
        except DamagedError as error:
            damaged[newest.place] = error
            if len(untried) > 1:
                log.error("SKIPPING A DAMAGED CHECKPOINT: %s; looking for an older one", error)
    first = next(iter(damaged.values()))
    if len(damaged) == 1:
        raise first
    raise DamagedError(f"{where}: none of {len(damaged)} checkpoints can be used; {first}")


def here(candidate: Candidate, need: Need) -> Found:
    """Make a checkpoint available on this machine; one in a store is fetched on every machine.

    Raises:
        DamagedError: on all ranks, if the store's files differ from what was written.
        ResourceError: if the store does not answer.
    """
    if candidate.files is None:
        return Found(Path(candidate.place), candidate.place)
    return Found(runtime.agreed(lambda: fetched(candidate, need)), candidate.place)


def file_here(path: str) -> str:
    """Return a file on this machine, fetched if it is given by a URL; called by all ranks together."""
    if not is_url(path):
        return path
    store = Store(runtime.cache_root())
    return runtime.agreed(lambda: str(store.fetch(next(iter(store.find(path).values())))))


def fetched(candidate: Candidate, need: Need) -> Path:
    """Return the folder of a checkpoint on this machine, fetched if needed; raises as `here`, but only on this rank."""
    if candidate.files is None:
        return Path(candidate.place)
    size = sum(file.size for name, file in candidate.files.items() if is_needed(name, need))
    store = Store(runtime.cache_root(), max(LIMIT, size))
    key = json.dumps([candidate.place, candidate.files[MANIFEST], need])
    name = candidate.place.rpartition("/")[2]
    return store.keep(key, name, size, lambda folder: _fetch_all(candidate, need, folder))


def _fetch_all(candidate: Candidate, need: Need, folder: Path) -> None:
    assert candidate.files is not None
    folder.mkdir()
    remote.fetch(candidate.files[MANIFEST], folder / MANIFEST)
    log.info("fetching %s", candidate.place)
    needed = {name: written for name, written in read_manifest(folder).files.items() if is_needed(name, need)}
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        fetches = [
            threads.submit(_fetch, candidate.place, name, candidate.files.get(name), written, folder / name)
            for name, written in needed.items()
        ]
        try:
            for fetch in fetches:
                fetch.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _fetch(place: str, name: str, file: RemoteFile | None, written: Written, to: Path) -> None:
    if file is None:
        raise DamagedError(f"{place}/{name}: is missing; the checkpoint is damaged")
    if file.size != written.bytes:
        raise DamagedError(f"{place}/{name}: has {file.size} bytes of {written.bytes}; the checkpoint is damaged")
    to.parent.mkdir(exist_ok=True, parents=True)
    for _ in range(2):  # data may be corrupted in transit, too
        remote.fetch(file, to)
        if measure(to).sha256 == written.sha256:
            return
    raise DamagedError(f"{place}/{name}: has changed since it was written (SHA-256); the checkpoint is damaged")
