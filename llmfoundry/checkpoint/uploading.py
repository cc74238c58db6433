"""Uploads checkpoints from the local folder to a store; all ranks take part, each with its share of the files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from llmfoundry import runtime
from llmfoundry.checkpoint.folder import CheckpointFolder
from llmfoundry.checkpoint.manifest import SaveError, number_of, read_manifest
from llmfoundry.checkpoint.store import STORE_ERRORS, RunStore
from llmfoundry.tree import Tree

_OF_RANK = re.compile(r"\w+-(\d{5})\.safetensors")  # storage.py's names for the files of a rank


class Uploader:
    """Uploads checkpoints from a run's folder.

    Args:
        folder: where they are complete; if ranks do not share it, each has what it wrote.
        store: the destination.
        ranks: a group of all ranks, used only here.
        check_owner: called before a checkpoint is completed; raises if another run has taken over the store.
    """

    def __init__(
        self, folder: CheckpointFolder, store: RunStore, ranks: Tree | None, check_owner: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._store = store
        self._ranks = ranks
        self._check_owner = check_owner

    def upload(self, path: Path, step: int) -> str:
        """Upload a checkpoint, and delete it locally; called by all ranks together.

        Returns:
            Its URL.

        Raises:
            SaveError: on all ranks. The store then has no complete checkpoint; the local one remains if ranks share the
                folder.
        """
        store, ranks, shared = self._store, self._ranks, self._folder.shared
        try:
            name, files = runtime.on_rank0(lambda: (store.free_name(step), sorted(read_manifest(path).files)), ranks)
            runtime.agreed(lambda: store.upload(path, name, self._share(files)), ranks)
            runtime.on_rank0(lambda: self._complete(path, name), ranks)
        except STORE_ERRORS as error:
            kept = f"; it is in {path}" if shared else ""
            raise SaveError(f"step {step} could not be uploaded to {store.url}: {error}{kept}") from error
        finally:
            if not shared:
                shutil.rmtree(path, ignore_errors=True)
        if shared:
            runtime.on_rank0(self._folder.clear, ranks)
        return store.place_of(name)

    def _complete(self, path: Path, name: str) -> None:
        self._check_owner()
        self._store.complete(path, name)

    def left(self) -> Path | None:
        """Return the newest local checkpoint if it is newer than the store's; else delete the local ones. On rank 0."""
        newest = self._folder.newest()
        there = max((_number(each.place) for each in self._store.checkpoints()), default=(-1, 0))
        if newest is not None and _number(newest.name) > there:
            return newest
        self._folder.clear()
        return None

    def _share(self, files: list[str]) -> list[str]:
        """Return the files that this rank uploads: if it has a folder of its own, those that it wrote."""
        rank = runtime.rank()
        if self._folder.shared:
            return files[rank :: runtime.world_size()]
        owners = {name: _OF_RANK.fullmatch(name) for name in files}
        return [name for name, owner in owners.items() if (int(owner[1]) if owner else 0) == rank]


def _number(place: str) -> tuple[int, int]:
    return number_of(place.rpartition("/")[2]) or (0, 0)
