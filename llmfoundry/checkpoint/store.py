"""A run's folder in a store (`save_folder: s3://bucket/runs/moe`), to which local files are uploaded during training.

    s3://bucket/runs/moe/
      config.yaml, metrics.jsonl, ...    as in a local folder; uploaded with each checkpoint and at the end
      checkpoints/step-1200/...          every file, then MANIFEST.json: a folder without it is not a checkpoint

The store is the source of truth. A checkpoint is first written locally, then uploaded by all ranks, each its part, and
deleted locally once it is complete in the store. One that cannot be uploaded stays here until a newer one is written,
or until the run continues. Only one run writes to a store at a time.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from llmfoundry.checkpoint.finding import Candidate, in_store
from llmfoundry.checkpoint.folder import Kept, Standing, kept_of, outdated
from llmfoundry.checkpoint.manifest import MANIFEST, TRAINER, number_of
from llmfoundry.config import ConfigError, ResourceError
from llmfoundry.data.remote import RemoteFile, delete, fetch, listing, put

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
# Local files that are not uploaded: the lock, files being written, and what W&B uploads itself.
_HERE_ALONE = (".lock", "owner.json", ".probe-", "wandb/", f"{CHECKPOINTS}/")
STORE_ERRORS = (ConfigError, ResourceError, OSError)  # the exceptions of a failing store


class RunStore:
    """A run's folder in a store. Only rank 0 uses it, except for `upload`.

    Args:
        url: the `save_folder`.
        folder: the run's local folder.
        keep: number of newest checkpoints to keep in the store; -1 keeps all.
    """

    def __init__(self, url: str, folder: Path, keep: int = -1) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self.keep = keep
        self._kept: dict[str, Kept] = {}  # of the store's complete checkpoints, as far as known
        self._uploaded: dict[str, tuple[int, int]] = {}  # mtime and size of files that the store has

    def files(self) -> dict[str, RemoteFile]:
        """Return all files of the run in the store, by name."""
        return listing(self.url)

    def checkpoints(self) -> list[Candidate]:
        """Return its complete checkpoints, newest first."""
        url = f"{self.url}/{CHECKPOINTS}"
        return in_store(url, listing(url))

    def place_of(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return f"{self.url}/{CHECKPOINTS}/{name}"

    def free_name(self, step: int) -> str:
        """Return a name that no complete checkpoint has; an incomplete upload under it is deleted."""
        found = listing(f"{self.url}/{CHECKPOINTS}")
        name, again = f"step-{step}", 0
        while f"{name}/{MANIFEST}" in found:
            again += 1
            name = f"step-{step}-r{again}"
        if any(file.startswith(f"{name}/") for file in found):
            delete(self.place_of(name))
        return name

    def upload(self, folder: Path, name: str, files: Iterable[str]) -> None:
        """Upload some files of a checkpoint; may be called on any rank.

        Args:
            folder: the local checkpoint.
            name: its name in the store.
            files: their names, without the manifest.
        """
        for file in files:
            put(folder / file, f"{self.place_of(name)}/{file}")

    def complete(self, folder: Path, name: str) -> None:
        """Upload the run's files, then the manifest of a checkpoint whose other files are in the store; then tidy."""
        self.push()
        put(folder / MANIFEST, f"{self.place_of(name)}/{MANIFEST}")
        for duty in (lambda: self._prune(name, folder), self.sweep):
            try:
                duty()
            except STORE_ERRORS as error:
                log.warning("while tidying %s: %s", self.url, error)

    def sweep(self) -> None:
        """Delete the remains of killed or failed uploads."""
        found = listing(f"{self.url}/{CHECKPOINTS}")
        folders = {name.partition("/")[0] for name in found if "/" in name}
        for name in folders:
            if number_of(name) and f"{name}/{MANIFEST}" not in found:
                delete(self.place_of(name))

    def push(self) -> None:
        """Upload the run's files that have changed, except checkpoints."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(_HERE_ALONE) or ".tmp" in path.name or not path.is_file():
                continue
            with tempfile.TemporaryDirectory() as copies:  # the run may be writing to it, or may delete it
                try:
                    status = path.stat()
                    stamp = (status.st_mtime_ns, status.st_size)
                    if self._uploaded.get(name) == stamp:
                        continue
                    copy = Path(shutil.copyfile(path, Path(copies) / path.name))
                except FileNotFoundError:
                    continue
                put(copy, f"{self.url}/{name}")
            self._uploaded[name] = stamp

    def pull(self) -> None:
        """Replace the run's local files by those in the store, except checkpoints."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.name not in (".lock", CHECKPOINTS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, file in self.files().items():
            parts = PurePosixPath(name).parts
            if name.startswith(_HERE_ALONE) or ".." in parts or "\\" in name or name.startswith("/"):
                continue
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(file, path)
            status = path.stat()
            self._uploaded[name] = (status.st_mtime_ns, status.st_size)

    def _prune(self, newest: str, folder: Path) -> None:
        """Delete checkpoints that are not kept, the manifest first, so that partly deleted ones are not complete."""
        if self.keep == -1:
            return
        found = {each.place.rpartition("/")[2]: each for each in self.checkpoints()}
        self._kept[newest] = _read_kept(folder / TRAINER)
        for name, each in found.items():
            if name not in self._kept:
                self._kept[name] = _kept(each)
        names = [newest, *(name for name in found if name != newest)]
        for name in outdated([Standing(name, self._kept[name]) for name in names], self.keep):
            delete(f"{self.place_of(name)}/{MANIFEST}")
            delete(self.place_of(name))


def _kept(candidate: Candidate) -> Kept:
    assert candidate.files is not None
    if TRAINER not in candidate.files:
        return "newest"
    with tempfile.TemporaryDirectory() as folder:
        fetch(candidate.files[TRAINER], Path(folder) / TRAINER)
        return _read_kept(Path(folder) / TRAINER)


def _read_kept(file: Path) -> Kept:
    try:
        return kept_of(json.loads(file.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return "newest"
