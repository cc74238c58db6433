"""Runs whose `save_folder` is in a store: the local folder, before the run starts and when it ends.

The store's contents count, except for a local checkpoint that could not be uploaded.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from llmfoundry.checkpoint.folder import CheckpointFolder
from llmfoundry.checkpoint.manifest import SaveError, number_of
from llmfoundry.checkpoint.store import STORE_ERRORS, RunStore
from llmfoundry.config import ConfigError
from llmfoundry.train.outputs import TRACES, RunFolder

log = logging.getLogger(__name__)


def begin_from_store(store: RunStore, autoresume: bool) -> None:
    """Make the local folder equal to the store's; on rank 0, before anything looks at the folder.

    Raises:
        ConfigError: the store holds a run that must not be resumed, or may not be read.
    """
    files = store.files()
    names = {name.partition("/")[0] for name in files}
    is_free = names <= TRACES and not ("metrics.jsonl" in files and files["metrics.jsonl"].size)
    if not is_free and not autoresume:
        raise ConfigError(
            f"save_folder: {store.url} is already used; choose another, or continue that run with autoresume=true"
        )
    if not is_free and "config.yaml" not in names and not store.checkpoints():
        raise ConfigError(f"save_folder: {store.url} holds no run to resume (no config.yaml); choose another")
    lock = RunFolder.claim(store.folder)
    try:
        if _is_ahead(store):
            log.warning("%s: holds a checkpoint that could not be uploaded; continuing from it", store.folder)
        elif is_free:
            _empty(store.folder)
        else:
            store.pull()
    finally:
        lock.close()


def upload_outputs(store: RunStore) -> None:
    """Upload the run's files other than checkpoints; on rank 0, when it ends.

    Raises:
        SaveError: the upload failed; the files are only on this machine.
    """
    try:
        store.push()
    except STORE_ERRORS as error:
        raise SaveError(
            f"{error}; the checkpoints are in {store.url}, and the newest metrics and the report in {store.folder}"
        ) from error


def _is_ahead(store: RunStore) -> bool:
    """Whether a local checkpoint is newer than all in the store."""
    newest = CheckpointFolder(store.folder / "checkpoints").newest()
    there = [number_of(Path(each.place).name) or (0, 0) for each in store.checkpoints()]
    return newest is not None and (number_of(newest.name) or (0, 0)) > max(there, default=(-1, 0))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
