"""The folder of a run's checkpoints on this machine: naming, retention and cleanup.

One run owns it (`RunFolder` holds its lock), and only rank 0 changes it. After a checkpoint has been renamed, the
folder is tidied: the link `latest` is moved, and old checkpoints and leftovers are deleted. Each of these steps is
tried, whether or not the previous one failed, and the next start of the run finishes what a kill or an error left
undone.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args

from llmfoundry.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    TRAINER,
    checkpoints,
    fsync_folder,
    is_copied_link,
    is_whole,
    remove,
    step_in,
)

log = logging.getLogger(__name__)

# Why a checkpoint is kept: as one of the newest; forever; or until there is a newer one. The last is saved while
# updates are skipped, and does not displace good checkpoints.
Kept = Literal["newest", "for good", "for now"]
KEPT = "kept"  # its key in trainer.json


class Standing(NamedTuple):
    """A complete checkpoint, as needed for retention."""

    name: str
    kept: Kept


def outdated(found: Sequence[Standing], keep: int) -> list[str]:
    """Return the checkpoints to delete.

    Args:
        found: all complete ones, the newest (or just saved) first; the first is always kept.
        keep: number of newest ones to keep; -1 keeps all.
    """
    if keep == -1:
        return []
    counted = [each for each in found if each.kept != "for now"]
    stay = {each.name for each in (*found[:1], *counted[:keep])}
    return [each.name for each in found if each.kept != "for good" and each.name not in stay]


def kept_of(trainer: object) -> Kept:
    """Return how long a checkpoint is kept, by its trainer.json; those of older versions count among the newest."""
    said = trainer.get(KEPT) if isinstance(trainer, dict) else None
    return cast(Kept, said) if said in get_args(Kept) else "newest"


class CheckpointFolder:
    """A folder of checkpoints, from the point of view of the run that saves to it.

    Args:
        path: `save_folder/checkpoints`; created by the first save.
        keep: number of newest checkpoints to keep; -1 keeps all.
    """

    def __init__(self, path: Path, keep: int = -1) -> None:
        if keep == 0 or keep < -1:
            raise ValueError(f"keep={keep}: write -1 to keep all checkpoints, or 1 or more")
        self.path = path
        self.keep = keep
        self.shared = True  # whether all ranks see it; without a store, they must
        self.unusable: set[Path] = set()  # found damaged when read: neither counted nor deleted

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, judging by file sizes only."""
        return next(iter(self._whole()), None)

    def clear(self) -> None:
        """Delete all complete checkpoints, because a store has them or newer ones."""
        self._do(*(partial(remove, path) for path in self._whole()))
        self._do(lambda: (self.path / LATEST).unlink(missing_ok=True))

    def open(self, temporary: str) -> Path:
        """Create a folder to write a checkpoint to."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._do(self.sweep)  # first, to free space
        folder = self.path / temporary
        folder.mkdir()
        return folder

    def adopt(self, temporary: Path, step: int) -> Path:
        """Rename a complete folder to a checkpoint's name, and return it; then tidy."""
        final = self._free_name(step)
        temporary.rename(final)
        fsync_folder(self.path)
        self._do(
            self._adopt_copied_link, partial(self._point_latest, final), partial(self._prune, final), self.sweep
        )  # fmt: skip
        return final

    def tidy(self) -> None:
        """Finish what a killed or failed run left undone."""
        self._do(self._adopt_copied_link, self._point_latest, self._prune, self.sweep)

    def _free_name(self, step: int) -> Path:
        path, again = self.path / f"step-{step}", 0
        while path.exists():
            again += 1
            path = self.path / f"step-{step}-r{again}"
        return path

    def _do(self, *duties: Callable[[], None]) -> None:
        """Run each step, even if the previous one failed: the checkpoints themselves are safe."""
        for duty in duties:
            try:
                duty()
            except OSError as error:
                log.warning("while tidying %s: %s", self.path, error)

    def _whole(self) -> list[Path]:
        """Return the complete checkpoints, newest first, without those found damaged."""
        return [path for path in checkpoints(self.path) if path not in self.unusable and is_whole(path)]

    def _adopt_copied_link(self) -> None:
        """Rename or delete a `latest` that a link-following copy made a folder: a duplicate, or the only checkpoint."""
        latest = self.path / LATEST
        if not is_copied_link(latest):
            return
        step = step_in(latest)
        if step is None:
            raise OSError(f"{latest} is a folder and not a checkpoint; remove it")
        manifest = (latest / MANIFEST).read_bytes()
        if any(path != latest and (path / MANIFEST).read_bytes() == manifest for path in self._whole()):
            remove(latest)
        else:
            latest.rename(self._free_name(step))

    def _point_latest(self, newest: Path | None = None) -> None:
        path = newest or self.newest()
        link = self.path / LATEST
        if path is None or (link.is_symlink() and link.readlink() == Path(path.name)):
            return
        temporary = self.path / f"{LATEST}.tmp-{uuid.uuid4().hex[:12]}"
        temporary.symlink_to(path.name)
        temporary.replace(link)

    def _prune(self, newest: Path | None = None) -> None:
        """Delete checkpoints that are not kept, but never `newest` or damaged ones."""
        if self.keep == -1:
            return
        whole = [path for path in self._whole() if path != newest]
        standing = [Standing(path.name, _kept(path)) for path in ([newest] if newest else []) + whole]
        self._do(*(partial(remove, self.path / name) for name in outdated(standing, self.keep)))

    def sweep(self) -> None:
        """Delete what killed runs left; this run owns the folder."""
        stale = (*self.path.glob("step-*.tmp-*"), *self.path.glob(f"{LATEST}.tmp-*"))
        self._do(*(partial(remove, path) for path in stale))


def _kept(path: Path) -> Kept:
    try:
        return kept_of(json.loads((path / TRAINER).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return "newest"
