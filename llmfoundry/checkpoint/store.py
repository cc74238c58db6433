"""A run's folder in a store (`save_folder: s3://bucket/runs/moe`): what is written here goes there, beside training.

    s3://bucket/runs/moe/
      config.yaml, metrics.jsonl, ...    as in a folder of this machine; uploaded with each checkpoint and at the end
      checkpoints/step-1200/...          every file, then MANIFEST.json: a folder without it is no checkpoint

The store is the truth. A checkpoint is written here first, uploaded by all ranks, each its part, and deleted here when
it is complete there. One that cannot be uploaded stays here until a newer one is written, or until the run goes on.
One run writes to a store at a time.
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
# Of a run's folder, what is not for the store: the lock, files that are being written, what W&B uploads by itself.
_HERE_ALONE = (".lock", "owner.json", ".probe-", "wandb/", f"{CHECKPOINTS}/")
STORE_ERRORS = (ConfigError, ResourceError, OSError)  # what a store may fail with


class RunStore:
    """A run's folder in a store. Rank 0 has it to itself, but for `upload`.

    Args:
        url: the `save_folder`.
        folder: the run's folder on this machine.
        keep: newest checkpoints to keep in the store; -1 keeps all.
    """

    def __init__(self, url: str, folder: Path, keep: int = -1) -> None:
        self.url = url.rstrip("/")
        self.folder = folder
        self.keep = keep
        self._kept: dict[str, Kept] = {}  # of complete checkpoints in the store, as far as it was asked
        self._uploaded: dict[str, tuple[int, int]] = {}  # time and size of files that the store has

    def files(self) -> dict[str, RemoteFile]:
        """All that the store has of the run, by name."""
        return listing(self.url)

    def checkpoints(self) -> list[Candidate]:
        """Its complete checkpoints, newest first."""
        url = f"{self.url}/{CHECKPOINTS}"
        return in_store(url, listing(url))

    def place_of(self, name: str) -> str:
        """The URL of a checkpoint."""
        return f"{self.url}/{CHECKPOINTS}/{name}"

    def free_name(self, step: int) -> str:
        """A name for a checkpoint that no complete one has; half an upload under it is deleted."""
        found = listing(f"{self.url}/{CHECKPOINTS}")
        name, again = f"step-{step}", 0
        while f"{name}/{MANIFEST}" in found:
            again += 1
            name = f"step-{step}-r{again}"
        if any(file.startswith(f"{name}/") for file in found):
            delete(self.place_of(name))
        return name

    def upload(self, folder: Path, name: str, files: Iterable[str]) -> None:
        """Upload some files of a checkpoint; any rank.

        Args:
            folder: the checkpoint here.
            name: its name in the store.
            files: their names; not the manifest.
        """
        for file in files:
            put(folder / file, f"{self.place_of(name)}/{file}")

    def complete(self, folder: Path, name: str) -> None:
        """Upload the files of the run, then the manifest of a checkpoint whose other files are there; then tidy."""
        self.push()
        put(folder / MANIFEST, f"{self.place_of(name)}/{MANIFEST}")
        for duty in (lambda: self._prune(name, folder), self.sweep):
            try:
                duty()
            except STORE_ERRORS as error:
                log.warning("while tidying %s: %s", self.url, error)

    def sweep(self) -> None:
        """Delete what uploads have left that were killed or failed."""
        found = listing(f"{self.url}/{CHECKPOINTS}")
        folders = {name.partition("/")[0] for name in found if "/" in name}
        for name in folders:
            if number_of(name) and f"{name}/{MANIFEST}" not in found:
                delete(self.place_of(name))

    def push(self) -> None:
        """Upload those files of the run that have changed, checkpoints aside."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(_HERE_ALONE) or ".tmp" in path.name or not path.is_file():
                continue
            with tempfile.TemporaryDirectory() as copies:  # the run goes on writing to it, or deletes it
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
        """Make the files of the run here those of the store, checkpoints aside."""
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
        """Delete what is not to be kept: the manifest first, so that no half checkpoint is taken for one."""
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
