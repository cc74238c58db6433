"""Checkpoints: written whole or not at all, and brought back into a model and its optimizer.

    checkpoints/
      latest -> step-1200        for people and scripts; scanning the folder is the truth
      step-1200/
        MANIFEST.json            size and SHA-256 of every other file; written last
        tensors.json             where each tensor lies (storage.py)
        model-00000.safetensors  one file per rank; optimizer-, rng- likewise
        trainer.json             the step, what the trainer put in, who wrote it
        config.yaml, tokenizer/, generation_config.json  all that generation needs
      step-1300.tmp-5e1f.../     being written, or left by a killed run: ignored, and removed by the next run or save

A save writes under a temporary name, syncs every file and folder, and renames: whatever kills it, earlier checkpoints
stay intact. A folder that exists is never written to; a second checkpoint of one step is `step-1200-r1`. Everything but
tensors is JSON or YAML, and nothing is unpickled. One run owns the folder (`RunFolder` holds its lock).

After the rename, the folder is tidied: the link moves, old checkpoints go, leftovers go. Each of these duties is tried,
whatever happened to the one before it, and the next start of the run makes up for what a kill or an error left undone.

Every function here that takes or loads a checkpoint is for all ranks to call together.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import SavePlanner
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    LATEST,
    MANIFEST,
    TRAINER,
    CheckpointError,
    DamagedError,
    checkpoints,
    fsync_folder,
    is_copied_link,
    is_whole,
    measure,
    newest_usable,
    remove,
    step_in,
    write_file,
    write_manifest,
)
from llmfoundry.checkpoint.reading import (
    Base,
    Contents,
    Files,
    find_base,
    first_reason,
    load_base,
    load_model_only,
    read,
    read_one,
    read_tensors,
)
from llmfoundry.checkpoint.storage import StagedPlanner, TensorWriter
from llmfoundry.checkpoint.tensors import (
    check_same_model,
    empty_state,
    model_tensors,
    optimizer_tensors,
    rng_room,
    rng_tensors,
    set_rng,
)
from llmfoundry.dtensor import local_part
from llmfoundry.hf.generation import GENERATION
from llmfoundry.settings import write_resolved
from llmfoundry.strict_json import Json

__all__ = ["Checkpointer", "CheckpointState", "Contents", "SaveError", "load_model_only", "read"]

log = logging.getLogger(__name__)

# One process is a normal way to save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Tokenizer(Protocol):
    """What a checkpoint asks of a tokenizer; those of `transformers` have it."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write what `from_pretrained` needs into a new folder."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; those before it are intact."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint holds.

    Attributes:
        step: completed steps; names the folder.
        model: its parameters and persistent buffers are saved from, or loaded into, where they are.
        optimizer: None to leave its state out.
        trainer: what else is needed to continue, as JSON; handed back by `Checkpointer.load`.
        config: the resolved configuration as plain data.
        tokenizer: saved beside the model.
        generation: a generation_config.json, kept beside the tokenizer.
        base: where the frozen weights came from; given, they are not saved.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer | None = None
    trainer: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    generation: str | None = None
    base: Base | None = None


class Checkpointer:
    """Saves to, finds in and loads from one run's folder.

    Args:
        folder: `save_folder/checkpoints`; made by the first save.
        keep: newest checkpoints to keep; -1 keeps all.
        asynchronous: whether `save` returns when everything is copied to the CPU, and a thread writes it.
    """

    def __init__(self, folder: str | Path, keep: int = -1, asynchronous: bool = False) -> None:
        if keep == 0 or keep < -1:
            raise ValueError(f"keep={keep}: write -1 to keep all checkpoints, or 1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self.asynchronous = asynchronous
        self.newest_saved: Path | None = None  # the last checkpoint that this run has written or found intact
        self._unusable: set[Path] = set()  # found damaged by `newest`: neither counted nor deleted
        self._pending: Future[Path] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._stage: dict[str, Tensor] = {}
        # The writer's own group: its collectives must not meet those of a step that goes on meanwhile.
        self._group: dist.ProcessGroup | None = None
        if runtime.world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1))

    def save(self, state: CheckpointState) -> Path:
        """Write a checkpoint, after the one in flight if there is one.

        Returns:
            Its folder; under `asynchronous`, what it will be unless that name is taken (`wait` returns it).

        Raises:
            SaveError: on all ranks, if this one or the one in flight failed on any. The run can go on.
        """
        self.wait()
        model = model_tensors(state.model, frozen=state.base is None)
        tensors = model | optimizer_tensors(state.model, state.optimizer) | rng_tensors()
        trainer = {"step": state.step} | dict(state.trainer) | {"saved_by": _writer()}
        if state.base is not None:
            trainer["base"] = state.base._asdict()
        texts = {TRAINER: json.dumps(trainer, indent=1), CONFIG: write_resolved(state.config)}
        if state.generation is not None:
            texts[GENERATION] = state.generation
        if self._thread is None:
            live = dcp.DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            return self._write(tensors, live, state.step, texts, state.tokenizer)
        planner = StagedPlanner(self._staged(tensors))
        self._pending = self._thread.submit(self._write, tensors, planner, state.step, texts, state.tokenizer)
        return self.folder / f"step-{state.step}"

    def wait(self) -> Path | None:
        """Wait for the save in flight and return its folder; None if there is none.

        Raises:
            SaveError: it failed.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def newest(self) -> Contents | None:
        """The newest checkpoint whose every file is intact, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints and none can be used.
        """

        def whole(path: Path) -> Contents:
            try:
                return read_one(path, "everything")
            except DamagedError:
                self._unusable.add(path)
                raise

        if not runtime.on_rank0(lambda: bool(checkpoints(self.folder))):
            return None
        found = newest_usable(self.folder, whole)
        self.newest_saved = found.path
        return found

    def load(
        self, source: str | Path | Contents, state: CheckpointState, base_path: str | None = None
    ) -> dict[str, Json]:
        """Load a checkpoint into the model and the optimizer, whatever mesh it was saved on.

        The random state comes back too if the number of ranks is the same; with another, it is left as it is.

        Args:
            source: a checkpoint or a folder with checkpoints (the newest), or what `newest` or `read` returned.
            state: `model` and `optimizer` are loaded into; the rest is not looked at.
            base_path: where the base of an adapter run is now, if it has moved.

        Returns:
            What `state.trainer` was, and `step`.

        Raises:
            CheckpointError: it is damaged, or of another model; neither model nor optimizer has changed.
        """
        contents = source if isinstance(source, Contents) else read(source, "everything")
        assert contents.verified == "everything"
        entries = contents.entries
        model = model_tensors(state.model, frozen=contents.base is None)
        try:
            check_same_model(entries, model, exact_dtype=True)
            memory = empty_state(entries, state.model, state.optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"{contents.path}: {error}") from None
        if contents.base is not None:
            load_base(find_base(contents.base, contents.path, base_path), state.model)
        rng = rng_room(entries)
        read_tensors(contents.path, entries, model | {name: part.room for name, part in memory.items()} | rng)
        if state.optimizer is not None:
            state.optimizer.state.clear()
            for parameter, key, tensor in memory.values():
                state.optimizer.state[parameter][key] = tensor
        set_rng(rng)
        return contents.trainer

    def tidy(self) -> None:
        """Make up for what a killed or failed run left undone in the folder; on rank 0, with the run's lock held."""
        self._do(self._adopt_copied_link, self._point_latest, self._prune, self._sweep)

    def _staged(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of each tensor, copied to the CPU; the same memory each time, pinned if from a GPU."""
        for name, tensor in tensors.items():
            local = local_part(tensor).detach()
            if name not in self._stage:
                self._stage[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self._stage[name].copy_(local, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {name: self._stage[name] for name in tensors}

    def _write(
        self,
        tensors: dict[str, Tensor],
        planner: SavePlanner,
        step: int,
        texts: dict[str, str],
        tokenizer: Tokenizer | None,
    ) -> Path:
        temporary = self.folder / f"step-{step}.tmp-{uuid.uuid4().hex[:12]}"  # rank 0's name counts
        writer = TensorWriter(partial(self._open, temporary), partial(self._commit, step, texts, tokenizer))
        try:
            with torch.no_grad():
                metadata = dcp.save(
                    tensors,
                    storage_writer=writer,
                    planner=planner,
                    process_group=self._group,
                    no_dist=runtime.world_size() == 1,
                )
        except dcp.CheckpointException as error:  # a BaseException, carrying what went wrong on each rank
            shutil.rmtree(temporary, ignore_errors=True)
            failure = SaveError(f"step {step} could not be saved to {self.folder}: {first_reason(error)}")
            if self.asynchronous:  # known to the caller at its next save only
                log.warning("%s", failure)
            raise failure from error
        assert metadata.storage_meta is not None and metadata.storage_meta.checkpoint_id is not None
        self.newest_saved = Path(metadata.storage_meta.checkpoint_id)
        return self.newest_saved

    def _open(self, temporary: Path) -> Path:
        """Make the folder to write to; on rank 0."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._do(self._sweep)  # first, for the space
        temporary.mkdir()
        return temporary

    def _commit(
        self,
        step: int,
        texts: dict[str, str],
        tokenizer: Tokenizer | None,
        temporary: Path,
        files: Files,
    ) -> Path:
        """Complete a folder that every rank has written to, and give it its name; on rank 0."""
        for name, written in files.items():
            file = temporary / name
            if not file.is_file() or file.stat().st_size != written.bytes:
                raise OSError(f"{file} is not as a rank wrote it; all ranks must share one save_folder")
        files |= {name: write_file(temporary / name, text.encode()) for name, text in texts.items()}
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary / "tokenizer")
            for path in (temporary / "tokenizer", *(temporary / "tokenizer").rglob("*")):
                if path.is_dir():
                    fsync_folder(path)
                else:
                    files[path.relative_to(temporary).as_posix()] = measure(path, sync=True)
        write_manifest(temporary, step, files)
        final = self._free_name(step)
        temporary.rename(final)
        fsync_folder(self.folder)
        self._do(
            self._adopt_copied_link, partial(self._point_latest, final), partial(self._prune, final), self._sweep
        )  # fmt: skip
        return final

    def _free_name(self, step: int) -> Path:
        path, again = self.folder / f"step-{step}", 0
        while path.exists():
            again += 1
            path = self.folder / f"step-{step}-r{again}"
        return path

    def _do(self, *duties: Callable[[], None]) -> None:
        """Do each, whatever the one before met with: the checkpoints themselves are safe."""
        for duty in duties:
            try:
                duty()
            except OSError as error:
                log.warning("while tidying %s: %s", self.folder, error)

    def _whole(self) -> list[Path]:
        """Whole checkpoints, newest first; those found damaged left out."""
        return [path for path in checkpoints(self.folder) if path not in self._unusable and is_whole(path)]

    def _adopt_copied_link(self) -> None:
        """Make room for the link where a copy that followed links left a folder: a second copy, or the only one."""
        latest = self.folder / LATEST
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
        path = newest or next(iter(self._whole()), None)
        link = self.folder / LATEST
        if path is None or (link.is_symlink() and link.readlink() == Path(path.name)):
            return
        temporary = self.folder / f"{LATEST}.tmp-{uuid.uuid4().hex[:12]}"
        temporary.symlink_to(path.name)
        temporary.replace(link)

    def _prune(self, newest: Path | None = None) -> None:
        """Delete all but the newest `keep` whole checkpoints; never `newest`, nor damaged ones."""
        if self.keep == -1:
            return
        whole = [path for path in self._whole() if path != newest]
        old = whole[self.keep - 1 :] if newest else whole[self.keep :]
        self._do(*(partial(remove, path) for path in old))

    def _sweep(self) -> None:
        """Delete what dead runs left: this run has the folder to itself."""
        stale = (*self.folder.glob("step-*.tmp-*"), *self.folder.glob(f"{LATEST}.tmp-*"))
        self._do(*(partial(remove, path) for path in stale))


def _writer() -> dict[str, Json]:
    return {
        "torch": torch.__version__,
        "ranks": runtime.world_size(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
