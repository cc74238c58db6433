"""Saving of checkpoints, atomically, and loading into a model and its optimizer.

    checkpoints/
      latest -> step-1200        for people and scripts; never trusted, the folder is scanned instead
      step-1200/
        MANIFEST.json            size and SHA-256 of every other file; written last
        tensors.json             where each tensor is stored (storage.py)
        model-00000.safetensors  one file per rank; likewise optimizer-, rng-
        trainer.json             the step, the trainer's own state, who wrote it
        config.yaml, tokenizer/, generation_config.json  all that generation needs
      step-1300.tmp-5e1f.../     being written, or left by a killed run: ignored, and removed by the next run or save

If a run saves to a store, this folder is only an intermediate location (store.py).

A save writes under a temporary name, syncs every file and folder, and renames: whatever interrupts it, earlier
checkpoints stay intact. An existing folder is never written to; a second checkpoint of the same step is `step-1200-r1`.
Everything but tensors is JSON or YAML, and nothing is unpickled. Other changes to the folder are in folder.py.

All ranks must call the functions here that save or load a checkpoint.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llmfoundry import runtime
from llmfoundry.checkpoint.finding import Candidate, Found, newest_usable
from llmfoundry.checkpoint.folder import KEPT, CheckpointFolder, Kept
from llmfoundry.checkpoint.index import Entry
from llmfoundry.checkpoint.manifest import (
    CONFIG,
    TRAINER,
    CheckpointError,
    DamagedError,
    NotFiniteError,
    SaveError,
    checkpoints,
    fsync_folder,
    measure,
    number_of,
    write_file,
    write_manifest,
)
from llmfoundry.checkpoint.reading import (
    Base,
    Contents,
    Files,
    find_base,
    load_base,
    load_model_only,
    read,
    read_one,
    read_tensors,
)
from llmfoundry.checkpoint.staging import Stage
from llmfoundry.checkpoint.storage import SavePlan, plan_save, save_parts
from llmfoundry.checkpoint.store import RunStore
from llmfoundry.checkpoint.tensors import (
    check_same_model,
    empty_state,
    join_halves,
    model_tensors,
    optimizer_tensors,
    rng_room,
    rng_tensors,
    rooms_to_split,
    set_rng,
)
from llmfoundry.checkpoint.uploading import Uploader
from llmfoundry.hf.generation import GENERATION
from llmfoundry.kernels.halves import Halves
from llmfoundry.settings import write_resolved
from llmfoundry.strict_json import Json

__all__ = ["Checkpointer", "CheckpointState", "Contents", "SaveError", "load_model_only", "read"]

log = logging.getLogger(__name__)
WRITER = "checkpoint"  # name of the writer thread


class Tokenizer(Protocol):
    """What a checkpoint needs from a tokenizer; those of `transformers` provide it."""

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write what `from_pretrained` needs to a new folder."""


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The contents of a checkpoint.

    Attributes:
        step: number of completed steps; part of the folder's name.
        model: its parameters and persistent buffers are saved, or loaded in place.
        optimizer: None to leave out its state.
        trainer: further state that is needed to continue, as JSON; returned by `Checkpointer.load`.
        config: the resolved configuration as plain data.
        tokenizer: saved beside the model.
        generation: the text of generation_config.json, saved beside the tokenizer.
        base: where the frozen weights came from; if given, they are not saved.
        kept: how long it is kept once there are newer ones.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer | None = None
    trainer: Mapping[str, Json] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    generation: str | None = None
    base: Base | None = None
    kept: Kept = "newest"


class Beside(NamedTuple):
    """The contents of a checkpoint besides tensors, captured when it is saved.

    Attributes:
        trainer: JSON text, because the run continues to change the values.
        config: plain data, which does not change.
    """

    step: int
    trainer: str
    config: Mapping[str, object]
    generation: str | None
    tokenizer: Tokenizer | None


class Checkpointer:
    """Saves to, searches and loads from one run's folder.

    Args:
        folder: `save_folder/checkpoints`; created by the first save.
        keep: number of newest checkpoints to keep; -1 keeps all.
        asynchronous: whether `save` returns immediately, while a thread copies (staging.py) and writes.
        timeout: seconds until a save fails because a rank does not take part.
        store: where checkpoints are uploaded; a save is then complete once it is in the store.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = -1,
        asynchronous: bool = False,
        timeout: float = 1800.0,
        store: RunStore | None = None,
    ) -> None:
        self.folder = CheckpointFolder(Path(folder), keep if store is None else 1)
        self.asynchronous = asynchronous
        self.store = store
        # Called on rank 0 before a checkpoint is completed, here or in the store; raises TakenOver.
        self.check_owner: Callable[[], None] = lambda: None
        self.longest_save = 0.0  # seconds until a save was on disk, or in the store; 0 before the first
        self._begun = 0.0  # when the save in progress started, on the monotonic clock
        self.newest_saved: Path | str | None = None  # written or found intact by this run: a folder, or a URL
        self._pending: Future[Path | str | None] | None = None
        self._config: tuple[Mapping[str, object], str] | None = None  # of the last save, and its YAML
        self._thread = ThreadPoolExecutor(1, WRITER)
        self.stage = Stage()
        # A separate group for the writer: its messages must not mix with those of a concurrent training step.
        self._ranks = runtime.plant(timeout) if runtime.world_size() > 1 else None
        self._uploader = None
        if store is not None:
            self._uploader = Uploader(self.folder, store, self._ranks, lambda: self.check_owner())

    def prepare(self, state: CheckpointState) -> None:
        """Allocate memory for the copies of an asynchronous save, concurrently with the training before the first one.

        Allocating costs several times what copying does: a page fault per 4 KiB, or pinning.
        """
        if self.asynchronous and self._pending is None:
            self._pending = self._thread.submit(self.stage.make_room, plan_save(_tensors(state)).parts)

    def save(self, state: CheckpointState) -> Path | str:
        """Write a checkpoint, after waiting for the save in progress, if any.

        If `asynchronous`, parameters and the optimizer's state are copied while the caller continues, and
        `optimizer.step()` waits until they are. Any other code that changes them must first call `wait`, or
        `stage.wait`.

        Returns:
            Its folder, or its URL. If `asynchronous`, its future folder, unless that name is taken; `wait` returns the
            actual one.

        Raises:
            SaveError: on all ranks, if this save or the one in progress failed on any. The run can continue.
        """
        self.wait()
        self._begun = time.monotonic()
        plan = plan_save(_tensors(state))
        beside = _beside(state)
        if not self.asynchronous:
            return self._write(plan, beside)
        self.stage.begin(plan.parts, state.optimizer, _updated(state))
        self._pending = self._thread.submit(self._write_staged, plan, beside)
        return self.folder.path / f"step-{state.step}"

    def wait(self) -> Path | str | None:
        """Wait for the save in progress and return its folder or URL; None if there is none.

        Raises:
            SaveError: if it failed.
        """
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def newest(self) -> Contents | None:
        """Return the newest checkpoint whose files are all intact, or None if there are no checkpoints.

        Raises:
            CheckpointError: if there are checkpoints but none is usable.
        """

        def whole(found: Found) -> Contents:
            try:
                return read_one(found, "everything")
            except DamagedError:
                self.folder.unusable.add(found.path)
                raise

        if not runtime.on_rank0(lambda: bool(self._candidates())):
            return None
        where = str(self.folder.path) if self.store is None else self.store.url
        contents = newest_usable(self._candidates, whole, "everything", where)
        self.newest_saved = contents.place
        return contents

    def _candidates(self) -> list[Candidate]:
        """Return the checkpoints here and in the store, newest first; called on rank 0."""
        found = [Candidate(str(path)) for path in checkpoints(self.folder.path)]
        if self.store is None:
            return found
        found += self.store.checkpoints()
        return sorted(found, key=lambda each: number_of(Path(each.place).name) or (-1, -1), reverse=True)

    def load(
        self, source: str | Path | Contents, state: CheckpointState, base_path: str | None = None
    ) -> dict[str, Json]:
        """Load a checkpoint into the model and the optimizer, whatever mesh it was saved on.

        The random state is restored too if the number of ranks is the same; otherwise it is left unchanged.

        Args:
            source: a checkpoint, a folder of checkpoints (the newest is used), or the result of `newest` or `read`.
            state: its `model` and `optimizer` are loaded into; the rest is ignored.
            base_path: the current location of an adapter run's base, if it has moved.

        Returns:
            The saved `state.trainer`, and `step`.

        Raises:
            CheckpointError: if it is damaged, or of another model; model and optimizer are then unchanged.
        """
        contents = source if isinstance(source, Contents) else read(source, "everything")
        assert contents.verified == "everything"
        self.stage.wait()
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
        halves = rooms_to_split(entries, state.model, state.optimizer)
        _say_that_weights_are_cast(entries, {name: each for name, each in model.items() if name not in halves})
        rooms = {name: part.room for name, part in (memory | halves).items()}
        read_tensors(contents.path, entries, model | rooms | rng)
        if state.optimizer is not None:
            state.optimizer.state.clear()
            for weight in halves.values():
                weight.keep(state.optimizer)
            for parameter, key, tensor in memory.values():
                state.optimizer.state[parameter][key] = tensor
        set_rng(rng)
        return contents.trainer

    def tidy(self) -> None:
        """Finish what a killed or failed run left undone in the folder; on rank 0, holding the run's lock."""
        self.folder.tidy()
        if self.store is not None:
            self.store.sweep()

    def catch_up(self) -> None:
        """Upload a checkpoint that an earlier run could not upload, like a save; called by all ranks together."""
        path = runtime.on_rank0(self._uploader.left) if self._uploader is not None and self.folder.shared else None
        if path is not None:
            step, _ = number_of(path.name) or (0, 0)
            self._pending = self._thread.submit(self._bring_up, path, step)

    def _write_staged(self, plan: SavePlan, beside: Beside) -> Path | str:
        return self._write(plan._replace(parts=self.stage.finish(plan.parts)), beside)

    def _write(self, plan: SavePlan, beside: Beside) -> Path | str:
        try:
            path = self._write_here(plan, beside)
        except SaveError as error:
            self._say_at_once(error)
            raise
        found = self._bring_up(path, beside.step)
        self.longest_save = max(self.longest_save, time.monotonic() - self._begun)
        return found

    def _bring_up(self, path: Path, step: int) -> Path | str:
        """Upload a checkpoint that is complete here, if there is a store."""
        if self.folder.shared:
            self.newest_saved = path
        if self._uploader is not None:
            try:
                self.newest_saved = self._uploader.upload(path, step)
            except SaveError as error:
                self._say_at_once(error)
                raise
        assert self.newest_saved is not None
        return self.newest_saved

    def _say_at_once(self, error: SaveError) -> None:
        if self.asynchronous:  # the caller only learns of it at its next save
            log.warning("%s", error)

    def _write_here(self, plan: SavePlan, beside: Beside) -> Path:
        """Write a checkpoint to the folder on this machine."""
        if not self.folder.shared:
            # Rank 0 sweeps its own machine. All ranks wait, since others on a machine must not write before its sweep
            # ends.
            sweeps = runtime.local_rank() == 0 and not runtime.is_rank0()
            runtime.agreed(lambda: self.folder.sweep() if sweeps else None, self._ranks)
        temporary = f"step-{beside.step}.tmp-{uuid.uuid4().hex[:12]}"  # rank 0's name is used
        opened, commit = partial(self.folder.open, temporary), partial(self._commit, beside)
        try:
            return save_parts(plan, opened, commit, self.folder.shared, self._ranks)
        except BaseException as error:
            shutil.rmtree(self.folder.path / temporary, ignore_errors=True)
            if isinstance(error, NotFiniteError):
                name = str(error).removeprefix("model/")
                raise NotFiniteError(
                    f"step {beside.step}: {name} has values that are not finite; the weights are damaged, and only an "
                    "older checkpoint helps"
                ) from None
            if not isinstance(error, SaveError):
                raise
            raise SaveError(f"step {beside.step} could not be saved to {self.folder.path}: {error}") from error

    def _commit(self, beside: Beside, temporary: Path, files: Files) -> Path:
        """Complete and rename a folder that every rank has written to; on rank 0."""
        for name, written in files.items() if self.folder.shared else ():
            file = temporary / name
            if not file.is_file() or file.stat().st_size != written.bytes:
                raise OSError(f"{file} is not as a rank wrote it; all ranks must share one save_folder")
        texts = {TRAINER: beside.trainer, CONFIG: self._yaml(beside.config)}
        if beside.generation is not None:
            texts[GENERATION] = beside.generation
        files |= {name: write_file(temporary / name, text.encode()) for name, text in texts.items()}
        if beside.tokenizer is not None:
            beside.tokenizer.save_pretrained(temporary / "tokenizer")
            for path in (temporary / "tokenizer", *(temporary / "tokenizer").rglob("*")):
                if path.is_dir():
                    fsync_folder(path)
                else:
                    files[path.relative_to(temporary).as_posix()] = measure(path, sync=True)
        self.check_owner()
        write_manifest(temporary, beside.step, files, finite=True)  # the writers checked that values are finite
        return self.folder.adopt(temporary, beside.step) if self.folder.shared else temporary

    def _yaml(self, config: Mapping[str, object]) -> str:
        """Convert a config to YAML, cached: 300 settings take 30 ms to write, and do not change between saves."""
        if self._config is None or self._config[0] != config:
            self._config = config, write_resolved(config)
        return self._config[1]


def _say_that_weights_are_cast(entries: Mapping[str, Entry], model: Mapping[str, Tensor]) -> None:
    for name, tensor in model.items() if runtime.is_rank0() else ():
        if entries[name].dtype != tensor.dtype:
            log.info("weights were %s in the checkpoint and are kept in %s (optimizer.master_weights)",
                     entries[name].dtype, tensor.dtype)  # fmt: skip
            return


def _tensors(state: CheckpointState) -> dict[str, Tensor | Halves]:
    model = join_halves(model_tensors(state.model, frozen=state.base is None), state.model, state.optimizer)
    return model | optimizer_tensors(state.model, state.optimizer) | rng_tensors()


def _updated(state: CheckpointState) -> set[str]:
    """Return the names of tensors that only `optimizer.step()` changes: parameters and optimizer state, not buffers."""
    parameters = {f"model/{name}" for name, _ in state.model.named_parameters()}
    return parameters | optimizer_tensors(state.model, state.optimizer).keys()


def _beside(state: CheckpointState) -> Beside:
    trainer = {"step": state.step} | dict(state.trainer) | {KEPT: state.kept, "saved_by": _writer()}
    if state.base is not None:
        trainer["base"] = state.base._asdict()
    return Beside(state.step, json.dumps(trainer, indent=1), state.config, state.generation, state.tokenizer)


def _writer() -> dict[str, Json]:
    return {
        "torch": torch.__version__,
        "ranks": runtime.world_size(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
