"""The folder of a run's checkpoints on this machine: where a new one is written, which are kept, what is cleared away.

One run owns it (`RunFolder` holds its lock), and rank 0 alone changes it. After a checkpoint has got its name, the
folder is tidied: the link `latest` moves, old checkpoints go, leftovers go. Each of these duties is tried, whatever
happened to the one before it, and the next start of the run makes up for what a kill or an error left undone.
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

# Why a checkpoint is kept: as one of the newest; for good; or for now, until there is a newer one. The last is saved
# while updates are skipped: it pushes no good checkpoint out.
Kept = Literal["newest", "for good", "for now"]
KEPT = "kept"  # its key in trainer.json


class Standing(NamedTuple):
    """A whole checkpoint, as far as retention asks."""

    name: str
    kept: Kept


def outdated(found: Sequence[Standing], keep: int) -> list[str]:
    """The checkpoints that are not to be kept.

    Args:
        found: all whole ones, the newest (or just saved) first, which always stays.
        keep: the newest to keep; -1 keeps all.
    """
    if keep == -1:
        return []
    counted = [each for each in found if each.kept != "for now"]
    stay = {each.name for each in (*found[:1], *counted[:keep])}
    return [each.name for each in found if each.kept != "for good" and each.name not in stay]


def kept_of(trainer: object) -> Kept:
    """What the contents of a trainer.json say; a checkpoint of an older version counts among the newest."""
    said = trainer.get(KEPT) if isinstance(trainer, dict) else None
    return cast(Kept, said) if said in get_args(Kept) else "newest"


class CheckpointFolder:
    """A folder of checkpoints, as the run that saves to it sees it.

    Args:
        path: `save_folder/checkpoints`; made by the first save.
        keep: newest checkpoints to keep; -1 keeps all.
    """

    def __init__(self, path: Path, keep: int = -1) -> None:
        if keep == 0 or keep < -1:
            raise ValueError(f"keep={keep}: write -1 to keep all checkpoints, or 1 or more")
        self.path = path
        self.keep = keep
        self.shared = True  # whether all ranks see it; without a store, they must
        self.unusable: set[Path] = set()  # found damaged by reading them: neither counted nor deleted

    def newest(self) -> Path | None:
        """The newest whole checkpoint, by a look at the files' sizes."""
        return next(iter(self._whole()), None)

    def clear(self) -> None:
        """Delete all whole checkpoints, which a store has by now, or newer ones."""
        self._do(*(partial(remove, path) for path in self._whole()))
        self._do(lambda: (self.path / LATEST).unlink(missing_ok=True))

    def open(self, temporary: str) -> Path:
        """Make a folder to write a checkpoint to."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._do(self.sweep)  # first, for the space
        folder = self.path / temporary
        folder.mkdir()
        return folder

    def adopt(self, temporary: Path, step: int) -> Path:
        """Give a complete folder the name of a checkpoint, and return it; then tidy."""
        final = self._free_name(step)
        temporary.rename(final)
        fsync_folder(self.path)
        self._do(
            self._adopt_copied_link, partial(self._point_latest, final), partial(self._prune, final), self.sweep
        )  # fmt: skip
        return final

    def tidy(self) -> None:
        """Make up for what a killed or failed run left undone."""
        self._do(self._adopt_copied_link, self._point_latest, self._prune, self.sweep)

    def _free_name(self, step: int) -> Path:
        path, again = self.path / f"step-{step}", 0
        while path.exists():
            again += 1
            path = self.path / f"step-{step}-r{again}"
        return path

    def _do(self, *duties: Callable[[], None]) -> None:
        """Do each, whatever the one before met with: the checkpoints themselves are safe."""
        for duty in duties:
            try:
                duty()
            except OSError as error:
                log.warning("while tidying %s: %s", self.path, error)

    def _whole(self) -> list[Path]:
        """Whole checkpoints, newest first; those found damaged left out."""
        return [path for path in checkpoints(self.path) if path not in self.unusable and is_whole(path)]

    def _adopt_copied_link(self) -> None:
        """Make room for the link where a copy that followed links left a folder: a second copy, or the only one."""
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
        """Delete what is not to be kept; never `newest`, nor damaged ones."""
        if self.keep == -1:
            return
        whole = [path for path in self._whole() if path != newest]
        standing = [Standing(path.name, _kept(path)) for path in ([newest] if newest else []) + whole]
        self._do(*(partial(remove, self.path / name) for name in outdated(standing, self.keep)))

    def sweep(self) -> None:
        """Delete what dead runs left: this run has the folder to itself."""
        stale = (*self.path.glob("step-*.tmp-*"), *self.path.glob(f"{LATEST}.tmp-*"))
        self._do(*(partial(remove, path) for path in stale))


def _kept(path: Path) -> Kept:
    try:
        return kept_of(json.loads((path / TRAINER).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return "newest"
